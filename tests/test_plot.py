"""The pictures, read back from the axes."""

import copy
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from gaussmask import (
    BlockPatchDropout,
    ClusterPatchDropout,
    GaussianPatchDropout,
    GridPatchDropout,
    PatchDropout,
    RandomPatchDropout,
    functional,
    plot,
)

matplotlib.use("Agg")

MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.3)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def shown(axes):
    (image,) = axes.images
    return np.asarray(image.get_array()).squeeze()


def hatched(axes):
    """(n, 2), the (row, column) of the hatched patches."""
    places = sorted((p.get_y() + 0.5, p.get_x() + 0.5) for p in axes.patches if p.get_hatch())
    return np.array(places).reshape(-1, 2)


def pictures(figure):
    return [shown(axes) for axes in figure.axes if axes.images]


def place(axes):
    spot = axes.get_subplotspec()
    return spot.rowspan.start, spot.colspan.start


def faded(image, mask, visibility=0.2):
    """What is expected of an image (height, width, 3) or (height, width) under a mask (H, W)."""
    scale = [side // count for side, count in zip(image.shape, mask.shape, strict=False)]
    kept = np.kron(np.asarray(mask), np.ones(scale)).astype(bool)
    kept = kept[..., None] if image.ndim == 3 else kept
    return np.where(kept, image, plot.DROPPED_GREY + visibility * (image - plot.DROPPED_GREY))


# keep_probability


@pytest.mark.parametrize("grid_size", [(14, 14), (7, 10)])
@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_probability_is_drawn_from_zero_to_one(grid_size, sampling):
    options = {"sigma": 0.2, "center": (0.3, 0.0), "sampling": sampling}
    axes = plot.keep_probability(grid_size, 0.918, **options)
    chance = functional.keep_probability(grid_size, 0.918, **options)
    np.testing.assert_array_equal(shown(axes), chance)
    assert axes.images[0].get_clim() == (0, 1)
    assert np.array_equal(hatched(axes), (chance < 1e-3).nonzero())
    assert sampling in axes.get_title()
    axes.figure.canvas.draw()


def test_probability_draws_where_it_is_told_and_says_how_many_are_never_kept():
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    assert plot.keep_probability((14, 14), 0.918, sigma=0.2, ax=axes) is axes
    assert "55% kept less than once in 1,000" in axes.get_title()
    assert "kept" not in plot.keep_probability((14, 14), 0.918).get_title()


@pytest.mark.parametrize(
    ("drop", "title"),
    [
        (RandomPatchDropout(0.75), "RandomPatchDropout, ratio 0.75"),
        (GaussianPatchDropout(0.5), "GaussianPatchDropout, ratio 0.5\nσ = 0.2, additive"),
        (
            GaussianPatchDropout(0.918),
            "GaussianPatchDropout, ratio 0.918\nσ = 0.2, additive\n55% kept less than once in 1,000",
        ),
        (
            GaussianPatchDropout(0.75, 0.4, center=(0.5, -0.5), sampling="weighted"),
            "GaussianPatchDropout, ratio 0.75\nσ = 0.4, weighted",
        ),
    ],
)
def test_a_drop_whose_chances_are_known_is_drawn_exactly(drop, title):
    axes = plot.keep_probability(drop, (14, 14))
    chance = drop.keep_probability((14, 14))
    np.testing.assert_array_equal(shown(axes), chance)
    assert np.array_equal(hatched(axes), (chance < 1e-3).nonzero())
    assert axes.get_title() == title
    assert plot.keep_probability(drop=drop, grid_size=(14, 14), ax=axes) is axes


class Drawn(GaussianPatchDropout):
    """A rule of its own to the library, whose chances are not known."""

    def scores(self, coords, generator=None):
        return super().scores(coords, generator)


def test_a_drop_that_draws_says_in_how_many_draws_a_patch_was_never_kept():
    """Patches that were kept in a few draws are not hatched, however rarely."""
    drop = Drawn(0.918, 0.15, sampling="weighted").eval()
    for draws, told in ((4096, "4,096"), (100, "100")):
        torch.manual_seed(0)
        axes = plot.keep_probability(drop, (14, 14), draws=draws)
        torch.manual_seed(0)
        chance = drop.keep_probability((14, 14), draws=draws)
        np.testing.assert_array_equal(shown(axes), chance)
        assert draws == 100 or ((chance > 0) & (chance < 1e-3)).any()
        assert np.array_equal(hatched(axes), (chance == 0).nonzero())
        share = (chance == 0).float().mean().item()
        title = f"Drawn, ratio 0.918\nσ = 0.15, weighted\n{share:.0%} never kept in {told} draws"
        assert axes.get_title() == title
    assert drop.keep_indices is None
    assert not drop.training
    assert "never" not in plot.keep_probability(GridPatchDropout(0.75), (4, 4), draws=100).get_title()


def test_a_drop_that_asks_for_pixels_is_drawn_over_the_images():
    drop, images = ClusterPatchDropout(0.5), torch.randn(2, 3, 24, 16)
    torch.manual_seed(0)
    axes = plot.keep_probability(drop, (6, 4), images=images, draws=50)
    torch.manual_seed(0)
    np.testing.assert_array_equal(shown(axes), functional.keep_frequency(drop, (6, 4), images=images, draws=50))
    with pytest.raises(ValueError, match="ClusterPatchDropout asks for pixels: pass images"):
        plot.keep_probability(drop, (6, 4))


def test_the_chances_of_a_video_are_refused_with_a_way_that_is_true():
    drop = GaussianPatchDropout(0.75, tube=True)
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\): pass grid_size=\(6, 4\), whose chances every frame has"):
        plot.keep_probability(drop, (2, 6, 4))
    for frame in drop.keep_probability((2, 6, 4)):
        torch.testing.assert_close(frame, drop.keep_probability((6, 4)))
    for other in (RandomPatchDropout(0.75), ClusterPatchDropout(0.5, tube=True)):
        with pytest.raises(ValueError, match=r"draw a frame of drop.keep_probability\(\(2, 6, 4\)\)"):
            plot.keep_probability(other, (2, 6, 4))


RANDOM = RandomPatchDropout(0.5)


@pytest.mark.parametrize(
    ("args", "options", "told"),
    [
        ((RANDOM,), {}, "of a drop: missing a required argument: 'grid_size'"),
        ((RANDOM, (4, 4), 0.5), {}, "of a drop: too many positional arguments"),
        ((RANDOM, (4, 4)), {"mask_ratio": 0.5}, "of a drop: got an unexpected keyword argument 'mask_ratio'"),
        ((RANDOM, (4, 4)), {"sigma": 0.2}, "'sigma': call keep_probability.drop, grid_size.* are the drop's own"),
        (
            ((4, 4),),
            {},
            "without a drop: missing a required argument: 'mask_ratio': call keep_probability.grid_size, mask",
        ),
        (((4, 4), 0.5), {"draws": 9}, "without a drop: got an unexpected keyword argument 'draws'"),
        (((4, 4), 0.5), {"drop": RANDOM}, "of a drop: multiple values for argument 'drop'"),
        (((4, 4),), {"images": torch.zeros(1), "mask_ratio": 0.5}, "'images': .* or keep_probability.drop, grid_size"),
        ((), {"drop": "random", "grid_size": (4, 4)}, "drop must be a PatchDropout, got 'random' of type str"),
        ((), {}, "missing a required argument"),
    ],
)
def test_arguments_of_the_other_form_are_told_so(args, options, told):
    with pytest.raises(TypeError, match=told):
        plot.keep_probability(*args, **options)


def test_both_forms_take_their_arguments_by_name():
    np.testing.assert_array_equal(
        shown(plot.keep_probability(grid_size=(4, 4), mask_ratio=0.5)),
        shown(plot.keep_probability(drop=RANDOM, grid_size=(4, 4))),
    )


# masked_images


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


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        ((8, 8), ""),
        ((4, 8, 8), ""),
        ((2, 4, 8, 8), ""),
        ((0, 3, 8, 8), ""),
        ((1, 2, 2, 3, 8, 8), ""),
        ((2, 8, 8, 3), "; a tensor has its channels first: images.movedim(-1, -3)"),
        ((2, 3, 4, 8, 8), "; a video has time before its channels: images.transpose(1, 2)"),
    ],
)
def test_images_of_another_shape_raise(images, hint):
    with pytest.raises(ValueError, match="images must have shape") as error:
        plot.masked_images(torch.zeros(images), None)
    assert str(error.value).endswith(f"for videos, got {images}{hint}")


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        ((8,), ""),
        ((2, 8, 8), ""),
        ((0, 8, 8, 3), ""),
        ((3, 8, 8), "; an array has its channels last: numpy.moveaxis(images, -3, -1)"),
    ],
)
def test_arrays_of_another_shape_raise(images, hint):
    with pytest.raises(ValueError, match=r"images must have shape \(batch, height, width, 3 or 1\)") as error:
        plot.masked_images(np.zeros(images), None)
    assert str(error.value).endswith(f"for videos, got {images}{hint}")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_one_image_needs_no_batch(channels, batched):
    image, mask = torch.rand(channels, 8, 12), torch.rand(4, 3) < 0.5
    (alone,) = pictures(plot.masked_images(image, mask[None] if batched else mask, titles=["a"]))
    np.testing.assert_allclose(alone, faded(image.permute(1, 2, 0).squeeze().numpy(), mask), atol=1e-6)
    (bare,) = pictures(plot.masked_images(image, None))
    np.testing.assert_array_equal(bare, image.permute(1, 2, 0).squeeze())
    with pytest.raises(ValueError, match=r"bool of shape \(rows, columns\) or \(1, rows, columns\) for one image"):
        plot.masked_images(image, mask.expand(2, -1, -1))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 1), (8, 12, 3), (2, 8, 12, 1), (2, 8, 12, 3), (2, 4, 8, 12, 3)])
def test_arrays_have_their_channels_last(shape, dtype):
    values = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    array = values if dtype == np.uint8 else (values / 255).astype(dtype)
    mask = np.random.default_rng(0).random((*shape[: max(len(shape) - 3, 0)], 4, 3)) < 0.5
    before = array.copy()
    drawn = pictures(plot.masked_images(array, mask))
    flat = values.reshape(-1, 8, 12, shape[-1] if len(shape) > 2 else 1) / 255
    assert len(drawn) == len(flat)
    for picture, image, kept in zip(drawn, flat, mask.reshape(-1, 4, 3), strict=True):
        np.testing.assert_allclose(picture, faded(image.squeeze(), kept), atol=1e-6)
    np.testing.assert_array_equal(array, before)


def test_arrays_may_be_views_and_read_only():
    array = np.random.default_rng(0).random((8, 8, 3))
    array.flags.writeable = False
    (drawn,) = pictures(plot.masked_images(array[::-1, :, ::-1], np.ones((8, 8), dtype=bool)[:, ::-1]))
    np.testing.assert_allclose(drawn, array[::-1, :, ::-1], atol=1e-6)


def test_pillow_images_are_drawn_in_the_modes_whose_numbers_are_colours():
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8))
    for mode in ("RGB", "L"):
        (drawn,) = pictures(plot.masked_images(picture.convert(mode), torch.ones(4, 3, dtype=torch.bool)))
        np.testing.assert_allclose(drawn, np.asarray(picture.convert(mode)) / 255, atol=1e-6)
    for mode in ("P", "RGBA"):
        with pytest.raises(ValueError, match=rf'got mode \'{mode}\': pass image.convert\("RGB"\)'):
            plot.masked_images(picture.convert(mode), None)
    with pytest.raises(
        TypeError, match=r"images must be a tensor, a numpy array or a PIL image, got list: .* torch.stack"
    ):
        plot.masked_images([picture, picture], None)


@pytest.mark.parametrize("kind", ["tensor", "array", "image", "video"])
@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), (list(MEAN), torch.tensor(STD)), (np.array(MEAN), STD), (0.5, 0.25), ((0.5,), 0.25)]
)
def test_normalisation_is_undone(kind, mean, std):
    images = torch.rand(2, 8, 8, 3)
    normalised = (images - torch.as_tensor(mean)) / torch.as_tensor(std)
    first, expected = normalised.float().movedim(-1, -3), images
    if kind == "array":
        first = normalised.numpy()
    elif kind == "image":
        first, expected = first[0], images[:1]
    elif kind == "video":
        first, expected = first.unsqueeze(0), images
    drawn = pictures(plot.masked_images(first, None, mean=mean, std=std))
    assert len(drawn) == len(expected)
    for picture, image in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(picture, image, atol=1e-6)


def test_what_a_normalisation_leaves_outside_is_clamped():
    (drawn,) = pictures(plot.masked_images(torch.full((1, 8, 8), 9.0), None, mean=0.5, std=0.5))
    assert (drawn == 1).all()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"mean": MEAN}, ValueError, "mean was given without std: pass both"),
        ({"std": STD}, ValueError, "std was given without mean: pass both"),
        (
            {"mean": MEAN[:2], "std": STD},
            ValueError,
            r"mean must be one number or one for each of the 3 .*\(0.48, 0.45\)",
        ),
        ({"mean": 0.5, "std": (*STD, 1.0)}, ValueError, "std must be one number or one for each of the 3 channels"),
        ({"mean": 0.5, "std": (0.5, 0.5, 0.0)}, ValueError, "std must be positive"),
        ({"mean": "imagenet", "std": STD}, TypeError, "mean must be a number or one per channel, got 'imagenet'"),
    ],
)
def test_a_normalisation_that_cannot_be_raises(options, error, told):
    with pytest.raises(error, match=told):
        plot.masked_images(torch.zeros(1, 3, 8, 8), None, **options)


def test_uint8_is_not_normalised():
    with pytest.raises(ValueError, match="images must be normalised where mean and std are given, got uint8: leave"):
        plot.masked_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, mean=MEAN, std=STD)


@pytest.mark.parametrize("values", [(-0.2, 1.0), (0.0, 1.2), (0, 255)])
def test_images_far_outside_are_told_of_once_and_clamped(values):
    images = torch.tensor(values).repeat(32).view(1, 1, 8, 8)
    with pytest.warns(UserWarning, match=r"images with values from .* to .* mean= and std=") as told:
        figure = plot.masked_images(images, None)
    assert len(told) == 1
    assert told[0].filename == __file__
    np.testing.assert_array_equal(pictures(figure)[0], images.clamp(0, 1).squeeze())


@pytest.mark.parametrize("values", [(-0.05, 1.05), (0.0, 1.0)])
def test_images_a_little_outside_are_clamped_in_silence(values):
    images = torch.tensor(values).repeat(32).view(1, 1, 8, 8)
    np.testing.assert_array_equal(pictures(plot.masked_images(images, None))[0], images.clamp(0, 1).squeeze())


@pytest.mark.parametrize("mask_frames", [1, 2, 4])
def test_a_frame_of_the_mask_stands_for_its_frames_of_the_video(mask_frames):
    videos, mask = torch.rand(2, 4, 3, 8, 8), torch.rand(2, mask_frames, 4, 4) < 0.5
    figure = plot.masked_images(videos, mask, titles=["a", "b"])
    assert [place(axes) for axes in figure.axes] == [(video, frame) for video in range(2) for frame in range(4)]
    for axes in figure.axes:
        video, frame = place(axes)
        image = videos[video, frame].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(shown(axes), faded(image, mask[video, frame * mask_frames // 4].numpy()), atol=1e-6)
        assert axes.get_title(loc="left") == ("" if frame else "ab"[video])
    figure.canvas.draw()


def test_columns_of_a_video_are_frames_per_row_and_each_video_starts_a_row():
    videos = torch.rand(2, 5, 1, 8, 8)
    figure = plot.masked_images(videos, None, columns=2)
    drawn = {place(axes): shown(axes) for axes in figure.axes if axes.images}
    assert len(figure.axes) == 12
    assert len(drawn) == 10
    assert {spot for spot in map(place, figure.axes) if spot not in drawn} == {(2, 1), (5, 1)}
    assert not any(axes.axison for axes in figure.axes)
    for (row, column), picture in drawn.items():
        np.testing.assert_array_equal(picture, videos[row // 3, row % 3 * 2 + column, 0])
    long = torch.rand(10, 1, 8, 8)
    assert {place(axes)[1] for axes in plot.masked_images(long.unsqueeze(0), None).axes} == set(range(10))
    assert {place(axes)[1] for axes in plot.masked_images(long, None).axes} == set(range(8))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        plot.masked_images(videos, None, columns=0)


@pytest.mark.parametrize("mask", [(2, 4, 4), (2, 3, 4, 4), (2, 8, 4, 4), (1, 4, 4, 4), (2, 0, 4, 4)])
def test_mask_that_does_not_fit_a_video_raises(mask):
    told = r"keep_mask must be bool of shape \(2, frames, rows, columns\), with a number of frames that divides 4"
    with pytest.raises(ValueError, match=told):
        plot.masked_images(torch.zeros(2, 4, 3, 8, 8), torch.ones(mask, dtype=torch.bool))


def test_videos_are_drawn_where_they_are_told():
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 6)
    videos = torch.rand(2, 3, 1, 8, 8)
    plot.masked_images(videos, None, axes=axes)
    for ax, image in zip(axes, videos.flatten(0, 1), strict=True):
        np.testing.assert_array_equal(shown(ax), image.squeeze())
    with pytest.raises(ValueError, match="titles must be one for each of the 2 videos, got 6"):
        plot.masked_images(videos, None, titles=list("abcdef"))
    with pytest.raises(ValueError, match="axes must be one for each of the 6 frames, got 2"):
        plot.masked_images(videos, None, axes=axes[:2])


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


# compare_drops


class Bright(PatchDropout):
    """Keeps the bright patches."""

    seen = ()

    def scores(self, coords, generator=None, *, pixels):
        type(self).seen = pixels
        return pixels.flatten(2).mean(2)


class ByTokens(PatchDropout):
    def scores(self, coords, generator=None, *, tokens):
        return tokens.sum(2)


RULES = [
    RandomPatchDropout(0.75),
    GaussianPatchDropout(0.5, sampling="weighted"),
    ClusterPatchDropout(0.75),
    GridPatchDropout(0.75),
    BlockPatchDropout(0.75),
    Bright(0.5),
]


@pytest.mark.parametrize("seed", [0, 3])
def test_every_rule_is_shown_on_the_photo(seed):
    image = torch.rand(3, 32, 48)
    figure = plot.compare_drops(image, RULES, patch_size=8, seed=seed)
    photo = image.permute(1, 2, 0).numpy()
    masks = [torch.ones(4, 6, dtype=torch.bool)]
    for drop in RULES:
        torch.manual_seed(seed)
        pixels = functional.cut_patches(2 * image.unsqueeze(0) - 1, 8)
        copied = copy.deepcopy(drop)
        copied.draw(1, 24, (4, 6), pixels=pixels)
        masks.append(copied.keep_mask[0])
    drawn = pictures(figure)
    assert len(drawn) == 7
    for picture, mask in zip(drawn, masks, strict=True):
        np.testing.assert_allclose(picture, faded(photo, mask), atol=1e-6)
    assert [axes.get_title() for axes in figure.axes[:7]] == [
        "all patches",
        "Random, ratio 0.75",
        "Gaussian, ratio 0.5\nσ = 0.2, weighted",
        "Cluster, ratio 0.75",
        "Grid, ratio 0.75",
        "Block, ratio 0.75",
        "Bright, ratio 0.5",
    ]
    assert [place(axes) for axes in figure.axes] == [(row, column) for row in range(2) for column in range(4)]
    assert not any(axes.axison for axes in figure.axes)
    figure.canvas.draw()


def test_comparing_changes_neither_the_drops_nor_the_random_state():
    drops = [RandomPatchDropout(0.5), GaussianPatchDropout(0.5).eval(), GridPatchDropout(0.5)]
    drops[0](torch.zeros(2, 16, 4))
    before, kept = torch.get_rng_state(), drops[0].keep_indices
    first = pictures(plot.compare_drops(torch.zeros(3, 32, 32), drops, grid_size=(4, 4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert drops[0].keep_indices is kept
    assert drops[0].keep_mask.shape == (2, 4, 4)
    assert drops[1].keep_indices is None
    assert [drop.training for drop in drops] == [True, False, True]
    torch.rand(5)
    np.testing.assert_array_equal(first, pictures(plot.compare_drops(torch.zeros(3, 32, 32), drops, grid_size=(4, 4))))
    other = pictures(plot.compare_drops(torch.zeros(3, 32, 32), drops, grid_size=(4, 4), seed=1))
    assert not np.array_equal(first, other)


def test_titles_and_columns_of_a_comparison_may_be_given():
    drops = {"few": RandomPatchDropout(0.75), "many": RandomPatchDropout(0.25)}
    figure = plot.compare_drops(torch.rand(3, 32, 32), drops, columns=1)
    assert [axes.get_title() for axes in figure.axes] == ["all patches", "few", "many"]
    assert [place(axes) for axes in figure.axes] == [(0, 0), (1, 0), (2, 0)]
    photo, few, many = pictures(figure)
    assert [np.isclose(picture, photo).all(axis=2).mean() for picture in (few, many)] == [0.25, 0.75]


def test_a_photo_may_come_as_anything_that_masked_images_takes():
    array = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    normalised = (tensor / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    drops = [RandomPatchDropout(0.5)]
    expected = pictures(plot.compare_drops(tensor, drops))
    assert expected[0].shape == (32, 48, 3)
    for image, options in (
        (array, {}),
        (Image.fromarray(array), {}),
        (tensor / 255, {}),
        (tensor / 255, {"patch_size": 16}),
        (tensor / 255, {"patch_size": (16, 16)}),
        (tensor / 255, {"grid_size": (2, 3)}),
        (normalised, {"mean": MEAN, "std": STD}),
    ):
        np.testing.assert_allclose(pictures(plot.compare_drops(image, drops, **options)), expected, atol=1e-5)
    (grey, _) = pictures(plot.compare_drops(array[..., 0], drops))
    np.testing.assert_allclose(grey, array[..., 0] / 255, atol=1e-6)


def test_a_rule_is_given_pixels_as_a_model_would_get_them():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    scaled = functional.cut_patches(image.unsqueeze(0) / 127.5 - 1, 16)
    for given in (image, image / 255):
        plot.compare_drops(given, [Bright(0.5)])
        torch.testing.assert_close(Bright.seen, scaled)
    normalised = image / 255 * 4 - 2
    plot.compare_drops(normalised, [Bright(0.5)], mean=0.5, std=0.25)
    torch.testing.assert_close(Bright.seen, functional.cut_patches(normalised.unsqueeze(0), 16))
    plot.compare_drops(image / 255, [Bright(0.5)], mean=MEAN, std=STD)  # normalised, and within [0, 1] all the same
    torch.testing.assert_close(Bright.seen, functional.cut_patches(image.unsqueeze(0) / 255, 16))
    with pytest.warns(UserWarning, match="image with values from .* mean= and std=") as told:
        plot.compare_drops(normalised, [Bright(0.5), RandomPatchDropout(0.5)])
    assert len(told) == 1
    assert told[0].filename == __file__
    torch.testing.assert_close(Bright.seen, functional.cut_patches(normalised.unsqueeze(0), 16))


@pytest.mark.parametrize(
    ("image", "drops", "options", "error", "told"),
    [
        ((2, 3, 32, 32), [RANDOM], {}, ValueError, r"image must be one image, got \(2, 3, 32, 32\).* image\[0\]"),
        ((32, 32), [RANDOM], {}, ValueError, "image must have shape"),
        ((3, 32, 32), [], {}, ValueError, "drops must hold at least one drop"),
        ((3, 32, 32), RANDOM, {}, TypeError, "drops must be a sequence of drops, or a dict of them by title, got Ran"),
        ((3, 32, 32), [RANDOM, 0.5], {}, TypeError, "drops must hold PatchDropouts, got 0.5 of type float"),
        ((3, 32, 32), {"a": ByTokens(0.5)}, {}, ValueError, "ByTokens asks for tokens, which only a model makes"),
        ((3, 32, 32), [RANDOM], {"grid_size": (2, 2), "patch_size": 16}, ValueError, r"not both, got \(2, 2\) and 16"),
        ((3, 32, 40), [RANDOM], {}, ValueError, r"32 x 40 pixels is not cut evenly by patch_size=\(16, 16\), the def"),
        ((3, 32, 40), [RANDOM], {"patch_size": (8, 16)}, ValueError, r"evenly by patch_size=\(8, 16\): resize or crop"),
        ((3, 32, 40), [RANDOM], {"grid_size": (3, 4)}, ValueError, r"is not cut evenly by grid_size=\(3, 4\): resize"),
        ((3, 32, 40), [RANDOM], {"grid_size": (64, 40)}, ValueError, "is not cut evenly by grid_size"),
        ((3, 32, 32), [RANDOM], {"grid_size": (2, 2, 2)}, ValueError, r"grid_size must be a pair \(height, width\)"),
        ((3, 32, 32), [RANDOM], {"columns": 0}, ValueError, "columns must be at least 1"),
        ((3, 32, 32), [RANDOM], {"mean": 0.5}, ValueError, "mean was given without std"),
    ],
)
def test_a_comparison_that_cannot_be_raises(image, drops, options, error, told):
    with pytest.raises(error, match=told):
        plot.compare_drops(torch.zeros(image), drops, **options)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.keep_probability((2, 2), 0.5),
        lambda: plot.keep_probability(RANDOM, (2, 2)),
        lambda: plot.keep_probability(ClusterPatchDropout(0.5), (2, 2)),  # before anything that takes its time
        lambda: plot.masked_images(torch.zeros(1, 3, 4, 4), None),
        lambda: plot.compare_drops(torch.zeros(3, 16, 16), [RANDOM]),
    ],
)
def test_missing_matplotlib_is_named_with_the_extra(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gaussmask\[plot\]"'):
        draw()
