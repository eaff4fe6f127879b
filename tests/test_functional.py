"""The pure functions, held against SciPy, NumPy, timm and plain gather."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from timm.layers.patch_dropout import patch_dropout_forward

from gaussmask import GaussianPatchDropout, RandomPatchDropout, functional

GRIDS = [(14, 14), (7, 10), (1, 7), (5, 1), (1, 1)]
EXAMPLES = settings(deadline=None, max_examples=60)


def scipy_density(grid_size, sigma, center=(0.0, 0.0)):
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in grid_size]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return multivariate_normal(mean=center, cov=sigma * np.eye(2)).pdf(points).reshape(grid_size)


def by_gather(x, keep_indices, prefix):
    patches = x[:, prefix:].gather(1, keep_indices[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :prefix], patches], dim=1)


def sets_differing(kept, reference):
    """Rows that hold different sets."""
    return (np.sort(kept, axis=1) != np.sort(reference, axis=1)).any(axis=1).nonzero()[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("center", [(0.0, 0.0), (0.3, -0.7)])
@pytest.mark.parametrize("grid_size", GRIDS)
def test_density_is_scipys_with_sigma_as_the_covariance(grid_size, center, dtype, tolerance):
    for sigma in (0.05, 0.2, 0.8, 30.0):
        density = functional.gaussian_density(grid_size, sigma, center=center, dtype=dtype)
        assert density.dtype == dtype
        assert density.shape == grid_size
        np.testing.assert_allclose(density.numpy(), scipy_density(grid_size, sigma, center), rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("call", ["function", "module"])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.918])
@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.8])
@pytest.mark.parametrize(
    ("grid_size", "center"), [((14, 14), (0.0, 0.0)), ((7, 10), (0.0, 0.0)), ((7, 10), (0.5, -0.4))]
)
def test_additive_rule_keeps_the_sets_of_the_published_formula(grid_size, center, sigma, mask_ratio, call):
    batch_size, num_patches = 5000, math.prod(grid_size)
    torch.manual_seed(7)
    scores = torch.rand(batch_size, num_patches).double().numpy() - (
        1 - scipy_density(grid_size, sigma, center).ravel()
    )
    num_kept = {(196, 0.5): 98, (196, 0.75): 49, (196, 0.918): 16, (70, 0.5): 35, (70, 0.75): 17, (70, 0.918): 5}
    reference = np.argsort(-scores, axis=1)[:, : num_kept[num_patches, mask_ratio]]

    torch.manual_seed(7)
    if call == "function":
        kept = functional.sample_keep_indices(batch_size, grid_size, mask_ratio, sigma=sigma, center=center)
    else:
        drop = GaussianPatchDropout(mask_ratio, sigma, center=center, grid_size=grid_size)
        drop(torch.zeros(batch_size, num_patches, 1))
        kept = drop.keep_indices
    kept = kept.numpy()
    assert kept.shape == reference.shape
    # float32 rounding may decide ties at the threshold, about 1 image in 1e5: at most 2 of 5000, and only such ties
    differing = sets_differing(kept, reference)
    assert len(differing) <= 2
    for image in differing:
        disputed = np.setxor1d(kept[image], reference[image])
        assert np.ptp(scores[image, disputed]) < 1e-6


@pytest.mark.parametrize("num_kept", [4, 16, 32, 192])
def test_weighted_sampling_does_not_underflow(num_kept):
    """At variance 0.001 the shells of a 14 x 14 grid differ by e^23.7 in weight, more than float32 noise can span."""
    coords = functional.patch_coordinates((14, 14))
    scores = functional.gaussian_scores(coords.expand(500, -1, -1), 0.001, sampling="weighted")
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    kept = functional.sample_keep_indices(500, (14, 14), 1 - num_kept / 196, sigma=0.001, sampling="weighted")
    steps = np.arange(-13, 14, 2)  # exact integers in place of coordinates
    nearest = np.argsort((steps[:, None] ** 2 + steps**2).ravel(), kind="stable")[:num_kept]
    assert len(sets_differing(kept.numpy(), np.tile(nearest, (500, 1)))) == 0


def test_weighted_sampling_survives_a_draw_of_exactly_zero(monkeypatch):
    """torch.rand draws from [0, 1): a 0 must give a low score but not that of padding."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(2, 4))
    assert functional.gaussian_scores(torch.zeros(2, 4, 2), 0.2, sampling="weighted").isfinite().all()


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@EXAMPLES
@given(
    batch=st.integers(0, 3), prefix=st.integers(0, 3), patches=st.integers(1, 12), width=st.integers(1, 5),
    kept=st.integers(0, 14), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_take_tokens_is_gather_and_cat(batch, prefix, patches, width, kept, dtype, layout, seed):
    """Any dtype and memory layout, any order, repeats, empty batches; gradients too; the arguments stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, prefix + patches, width, generator=generator, dtype=torch.float64).to(dtype)
    x = LAYOUTS[layout](x).requires_grad_()
    keep_indices = torch.randint(patches, (batch, kept), generator=generator)
    given_indices = keep_indices.clone()
    taken, expected = functional.take_tokens(x, keep_indices, prefix), by_gather(x, keep_indices, prefix)
    torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    assert torch.equal(keep_indices, given_indices)
    weights = torch.randn(taken.shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.float64:
        gradients = [torch.autograd.grad(y, x, weights)[0] for y in (taken, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_take_tokens_passes_gradcheck():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    keep_indices = torch.tensor([[3, 0, 3], [1, 2, 0]])
    assert torch.autograd.gradcheck(lambda x: functional.take_tokens(x, keep_indices, 1), x)


def test_take_tokens_takes_what_timm_takes():
    x = torch.randn(3, 2 + 16, 4)
    expected, keep_indices = patch_dropout_forward(x, 0.5, 2, False, True)
    assert torch.equal(functional.take_tokens(x, keep_indices, 2), expected)


@pytest.mark.parametrize(
    "keep_indices",
    [
        torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, 1, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64),
    ],
    ids=["int32", "float", "bool", "rank 1", "rank 3", "batch 1", "batch 3"],
)  # fmt: skip
def test_take_tokens_refuses_indices_of_another_dtype_rank_or_batch(keep_indices):
    with pytest.raises(ValueError, match=r"keep_indices must be int64 of shape \(2, kept\)"):
        functional.take_tokens(torch.zeros(2, 6, 4), keep_indices, 1)


OUTSIDE = [5, 6, -1, -6, 2**62, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_take_tokens_refuses_indices_out_of_range(prefix, compiled):
    """In the first image as in the last, where the row next to it belongs to another image or to none."""
    take, error = functional.take_tokens, (ValueError, r"keep_indices must lie in \[0, 5\)")
    if compiled:
        torch._dynamo.reset()
        take, error = torch.compile(take, fullgraph=True, backend="aot_eager"), (IndexError, "out of range")
    x, inside = torch.randn(2, prefix + 5, 4), torch.tensor([[0, 4], [4, 1]])
    assert torch.equal(take(x, inside, prefix), by_gather(x, inside, prefix))
    for image in (0, 1):
        for value in OUTSIDE:
            keep_indices = inside.clone()
            keep_indices[image, 1] = value
            with pytest.raises(error[0], match=error[1]):
                take(x, keep_indices, prefix)


@EXAMPLES
@given(
    batch=st.integers(0, 4), grid_size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    mask_ratio=st.floats(0, 1, exclude_max=True), sigma=st.none() | st.floats(1e-3, 1e3),
    sampling=st.sampled_from(["additive", "weighted"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_sampled_indices_are_distinct_and_reproducible(batch, grid_size, mask_ratio, sigma, sampling, seed):
    """For a given generator; the global one is neither read nor moved, and `ordered` changes the order alone."""

    def sample(**ordered):
        generator = torch.Generator().manual_seed(seed)
        return functional.sample_keep_indices(
            batch, grid_size, mask_ratio, sigma=sigma, sampling=sampling, generator=generator, **ordered
        )

    state = torch.get_rng_state()
    kept = sample()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)  # now the global state is another
    num_patches = math.prod(grid_size)
    assert kept.dtype == torch.int64
    assert kept.shape == (batch, functional.num_kept_patches(num_patches, mask_ratio))
    assert all(len(set(row)) == len(row) and 0 <= min(row) <= max(row) < num_patches for row in kept.tolist())
    assert torch.equal(sample(), kept)
    assert torch.equal(sample(ordered=True), kept.sort(dim=1).values)


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_kept"),
    [(100, 0.9, 10), (196, 0.5, 98), (196, 0.75, 49), (196, 0.918, 16), (400, 0.8, 80), (4, 0.99, 1), (1, 0.5, 1)],
)
def test_kept_count_of_the_papers(num_patches, mask_ratio, num_kept):
    assert functional.num_kept_patches(num_patches, mask_ratio) == num_kept
    assert functional.sample_keep_indices(1, (1, num_patches), mask_ratio).shape == (1, num_kept)
    drop = RandomPatchDropout(mask_ratio, grid_size=(1, num_patches), num_prefix_tokens=3)
    assert drop(torch.zeros(2, 3 + num_patches, 1)).shape == (2, 3 + num_kept, 1)


def test_kept_count_is_that_of_exact_arithmetic():
    """On every square grid up to 32 x 32, for every ratio in thousandths."""
    for num_patches in (side**2 for side in range(1, 33)):
        for thousandths in range(1000):
            exact = num_patches * (1000 - thousandths) // 1000
            assert functional.num_kept_patches(num_patches, thousandths / 1000) == max(1, exact)


@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_gaussian_patch_dropout_is_the_module_as_a_function(sampling):
    x = torch.randn(3, 2 + 70, 4)
    options = {"num_prefix_tokens": 2, "grid_size": (7, 10), "center": (0.2, 0.1), "sampling": sampling}
    torch.manual_seed(0)
    taken, keep_indices = functional.gaussian_patch_dropout(x, 0.75, 0.2, **options, ordered=True)
    torch.manual_seed(0)
    assert torch.equal(GaussianPatchDropout(0.75, 0.2, **options, ordered=True)(x), taken)
    assert torch.equal(by_gather(x, keep_indices, 2), taken)
    uniform, _ = functional.gaussian_patch_dropout(x, 0.75, None, num_prefix_tokens=2, grid_size=(7, 10))
    assert uniform.shape == taken.shape


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask_ratio": 1.0}, ValueError), ({"mask_ratio": "0.5"}, TypeError), ({"sigma": 0.0}, ValueError),
        ({"sigma": math.nan}, ValueError), ({"center": (0.0, 1.5)}, ValueError), ({"sampling": "gumbel"}, ValueError),
        ({"grid_size": (0, 4)}, ValueError), ({"grid_size": 4}, ValueError),
    ],
    ids=str,
)  # fmt: skip
def test_functions_refuse_what_the_modules_refuse(options, error):
    (name,) = options
    options = {"grid_size": (4, 4), "mask_ratio": 0.5, "sigma": 0.2, **options}
    with pytest.raises(error, match=f"^{name} must"):
        functional.sample_keep_indices(2, **options)
    with pytest.raises(error, match=f"^{name} must"):
        functional.keep_probability(**options)
    with pytest.raises(error, match=f"^{name} must"):
        functional.gaussian_patch_dropout(torch.zeros(2, 16, 1), **options)
    if name not in ("mask_ratio", "sampling"):
        del options["mask_ratio"]
        with pytest.raises(error, match=f"^{name} must"):
            functional.gaussian_density(**options)
