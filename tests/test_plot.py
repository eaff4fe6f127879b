"""The pictures, read back from the axes."""

import sys

import matplotlib
import numpy as np
import pytest
import torch

from gaussmask import functional, plot

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def shown(axes):
    (image,) = axes.images
    return np.asarray(image.get_array()).squeeze()


@pytest.mark.parametrize("grid_size", [(14, 14), (7, 10)])
@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_probability_is_drawn_from_zero_to_one(grid_size, sampling):
    options = {"sigma": 0.2, "center": (0.3, 0.0), "sampling": sampling}
    axes = plot.keep_probability(grid_size, 0.918, **options)
    chance = functional.keep_probability(grid_size, 0.918, **options)
    np.testing.assert_array_equal(shown(axes), chance)
    assert axes.images[0].get_clim() == (0, 1)
    hatched = sorted((p.get_y() + 0.5, p.get_x() + 0.5) for p in axes.patches if p.get_hatch())
    assert np.array_equal(np.array(hatched).reshape(-1, 2), (chance < 1e-3).nonzero())
    assert sampling in axes.get_title()
    axes.figure.canvas.draw()


def test_probability_draws_where_it_is_told_and_says_how_many_are_never_kept():
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    assert plot.keep_probability((14, 14), 0.918, sigma=0.2, ax=axes) is axes
    assert "55% never kept" in axes.get_title()
    assert "never" not in plot.keep_probability((14, 14), 0.918).get_title()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("visibility", [0.0, 0.2])
def test_exactly_the_dropped_patches_fade_to_grey(channels, dtype, visibility):
    images = torch.randint(256, (5, channels, 24, 28), dtype=torch.uint8)
    values = images.numpy() / 255
    mask = torch.rand(5, 3, 7) < 0.5
    given = images if dtype == torch.uint8 else (images / 255).requires_grad_()
    figure = plot.masked_images(given, mask, columns=2, visibility=visibility, titles=list("abcde"))
    assert len(figure.axes) == 6
    kept = np.kron(mask.numpy(), np.ones((1, 8, 4)))[:, None]
    expected = np.where(kept, values, plot.DROPPED_GREY + visibility * (values - plot.DROPPED_GREY))
    for axes, image, title in zip(figure.axes, expected, "abcde", strict=False):
        np.testing.assert_allclose(shown(axes), image.transpose(1, 2, 0).squeeze(), atol=1e-6)
        assert axes.get_title() == title
    assert not figure.axes[5].images
    figure.canvas.draw()


def test_images_without_a_mask_stay_as_they_are():
    images = torch.rand(2, 3, 8, 8)
    for axes, image in zip(plot.masked_images(images, None).axes, images, strict=True):
        np.testing.assert_array_equal(shown(axes), image.permute(1, 2, 0))


@pytest.mark.parametrize("images", [(3, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8), (2, 8, 8, 3)])
def test_images_of_another_shape_raise(images):
    with pytest.raises(ValueError, match="images must have shape"):
        plot.masked_images(torch.zeros(images), None)


@pytest.mark.parametrize("mask", [(4, 4), (1, 4, 4), (3, 4, 4), (2, 16), (2, 1, 4, 4)])
def test_mask_of_another_shape_raises(mask):
    with pytest.raises(ValueError, match=r"keep_mask must be bool of shape \(2, rows, columns\)"):
        plot.masked_images(torch.zeros(2, 3, 8, 8), torch.ones(mask, dtype=torch.bool))


def test_images_are_drawn_where_they_are_told():
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2)
    images = torch.rand(2, 3, 8, 8)
    assert plot.masked_images(images, None, axes=axes) is figure
    for ax, image in zip(axes, images, strict=True):
        np.testing.assert_array_equal(shown(ax), image.permute(1, 2, 0))
    for name, values in (("titles", ["a"]), ("axes", axes[:1])):
        with pytest.raises(ValueError, match=f"{name} must be one for each of the 2 images, got 1"):
            plot.masked_images(images, None, **{name: values})


@pytest.mark.parametrize(
    "draw", [lambda: plot.keep_probability((2, 2), 0.5), lambda: plot.masked_images(torch.zeros(1, 3, 4, 4), None)]
)
def test_missing_matplotlib_is_named_with_the_extra(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gaussmask\[plot\]"'):
        draw()
