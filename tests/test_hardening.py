"""Properties of the functions and the modules, over whatever they may be given, against loops in plain Python.

A few hundred examples in a normal run; 10,000 of each property with

    pytest -m nightly --hypothesis-profile=nightly
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hosts import ALL
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch._subclasses.fake_tensor import FakeTensorMode

from gaussmask import GaussianPatchDropout, PatchDropout, RandomPatchDropout, attach, functional, keep_probability

pytestmark = pytest.mark.filterwarnings("ignore:sigma=.* is the variance")

# torch's own, where it sets up forward-mode differentiation
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.complex64, torch.int64, torch.uint8, torch.bool]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, 1)[:, 1::2],
    "an offset": lambda x: torch.cat([x[:1], x])[1:],
    "one image": lambda x: x[:1].expand_as(x),
    "one token": lambda x: x[:, :1].expand_as(x),
    "one value": lambda x: x[..., :1].expand_as(x),
}
EXPANDED = {"one image": 0, "one token": 1, "one value": 2}

sizes = st.integers(1, 9)
grids = st.one_of(
    st.tuples(sizes, sizes), sizes.map(lambda side: (side, side)), st.tuples(st.just(1), st.integers(1, 60)),
    st.tuples(st.integers(1, 60), st.just(1)), st.just((1, 1)),
)  # fmt: skip
batches = st.one_of(st.just(0), st.just(1), st.integers(2, 5))
ratios = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
sides = st.floats(-1, 1, width=32)
seeds = st.integers(0, 2**31)
sigmas = st.floats(-6, 3).map(lambda exponent: 10**exponent)
layouts = st.sampled_from(sorted(LAYOUTS))
settings_of_a_draw = st.one_of(
    st.just({"sigma": None}),
    st.fixed_dictionaries(
        {"sigma": sigmas, "center": st.tuples(sides, sides), "sampling": st.sampled_from(["additive", "weighted"])}
    ),
)


def exact_count(num_patches, mask_ratio):
    """K of a ratio in thousandths, in integers."""
    return max(1, num_patches * (1000 - round(1000 * mask_ratio)) // 1000)


def make_drop(mask_ratio, sigma, **options):
    return (
        RandomPatchDropout(mask_ratio, **options)
        if sigma is None
        else GaussianPatchDropout(mask_ratio, sigma, **options)
    )


def loop(x, keep_indices, prefix):
    """The prefix and the kept rows of `x`, one by one."""
    x, kept = x.detach(), keep_indices.tolist()
    tokens = [
        [image[i] for i in range(prefix)] + [image[prefix + i] for i in row] for image, row in zip(x, kept, strict=True)
    ]
    flat = [token for image in tokens for token in image]
    shape = (x.shape[0], prefix + keep_indices.shape[1], x.shape[2])
    return torch.stack(flat).view(shape) if flat else x.new_zeros(shape)


def random_tokens(shape, dtype, layout, seed):
    """Small integers, so that sums of gradients are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randint(-8, 9, shape, generator=generator).to(dtype))


# Taking tokens


def plainly(take, x, keep_indices):
    return take(x, keep_indices)


def without_autograd(take, x, keep_indices):
    with torch.no_grad():
        return take(x, keep_indices)


def in_inference_mode(take, x, keep_indices):
    with torch.inference_mode():
        return take(x.clone(), keep_indices)


def mapped_over_both(take, x, keep_indices):
    return torch.vmap(take)(x.unsqueeze(0), keep_indices.unsqueeze(0)).squeeze(0)


def mapped_over_tokens(take, x, keep_indices):
    return torch.vmap(take, in_dims=(-1, None))(torch.stack([x, x], -1), keep_indices)[1]


def mapped_over_indices(take, x, keep_indices):
    return torch.vmap(take, in_dims=(None, 1))(x, torch.stack([keep_indices, keep_indices], 1))[0]


def functionalized(take, x, keep_indices):
    return torch.func.functionalize(take)(x, keep_indices)


WAYS = [
    plainly, without_autograd, in_inference_mode, mapped_over_both, mapped_over_tokens, mapped_over_indices,
    functionalized,
]  # fmt: skip


@pytest.mark.nightly
@given(
    batch=batches, prefix=st.integers(0, 5), patches=st.integers(1, 12), width=st.integers(1, 4),
    kept=st.integers(0, 14), dtype=st.sampled_from(DTYPES), layout=layouts, way=st.sampled_from(WAYS), seed=seeds,
)  # fmt: skip
def test_take_tokens_is_a_loop_however_it_is_called(batch, prefix, patches, width, kept, dtype, layout, way, seed):
    x = random_tokens((batch, prefix + patches, width), dtype, layout, seed)
    keep_indices = torch.from_numpy(np.random.default_rng(seed).integers(patches, size=(batch, kept)))
    before = x.clone()
    taken = way(lambda x, k: functional.take_tokens(x, k, prefix), x, keep_indices)
    assert (taken.dtype, taken.device) == (x.dtype, x.device)
    assert torch.equal(taken, loop(x, keep_indices, prefix))
    assert torch.equal(x, before)


@pytest.mark.nightly
@given(
    batch=batches, prefix=st.integers(0, 3), grid_size=grids, mask_ratio=ratios, options=settings_of_a_draw,
    dtype=st.sampled_from(FLOATS), layout=layouts, function=st.booleans(), by_func=st.booleans(), seed=seeds,
)  # fmt: skip
def test_kept_rows_get_the_upstream_gradient_and_dropped_ones_zero(
    batch, prefix, grid_size, mask_ratio, options, dtype, layout, function, by_func, seed
):
    """Of the base of an expanded input: the sum over what it was expanded to."""
    assume(mask_ratio > 0 or function)
    num_patches = math.prod(grid_size)
    base = random_tokens((batch, prefix + num_patches, 2), dtype, "contiguous", seed)
    num_tokens = prefix + exact_count(num_patches, mask_ratio)
    upstream = random_tokens((batch, num_tokens, 2), dtype, "contiguous", seed + 1).sign()
    drawn = []

    def loss(base):
        x = LAYOUTS[layout](base)
        torch.manual_seed(seed)
        if function:
            taken, keep_indices = functional.gaussian_patch_dropout(
                x, mask_ratio, **options, grid_size=grid_size, num_prefix_tokens=prefix
            )
        else:
            drop = make_drop(mask_ratio, **options, grid_size=grid_size, num_prefix_tokens=prefix)
            taken, keep_indices = drop(x), drop.keep_indices
        assert not keep_indices.requires_grad
        drawn.append(keep_indices)
        return (taken * upstream).sum()

    leaf = base.clone().requires_grad_()
    gradient = torch.func.grad(loss)(base) if by_func else torch.autograd.grad(loss(leaf), leaf)[0]
    of_tokens = torch.zeros_like(base)
    for image, row in enumerate(drawn[0].tolist()):
        for place, index in enumerate([*range(prefix), *(prefix + index for index in row)]):
            of_tokens[image, index] += upstream[image, place]
    if layout in EXPANDED:
        dim = EXPANDED[layout]
        expected = torch.zeros_like(base)
        expected.narrow(dim, 0, min(1, base.shape[dim])).add_(of_tokens.sum(dim, keepdim=True))
    else:
        expected = of_tokens
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected)


# Drawing


@pytest.mark.nightly
@given(
    batch=batches, grid_size=grids, mask_ratio=ratios, sigma=sigmas, center=st.tuples(sides, sides),
    weighted=st.booleans(), ordered=st.booleans(), seed=seeds,
)  # fmt: skip
def test_draws_are_those_of_numpy_in_double_precision(
    batch, grid_size, mask_ratio, sigma, center, weighted, ordered, seed
):
    """u + density, and the exponential clocks of Efraimidis and Spirakis, from the same u: but for ties in float32."""
    num_patches = math.prod(grid_size)
    num_kept = exact_count(num_patches, mask_ratio)
    kept = functional.sample_keep_indices(
        batch, grid_size, mask_ratio, sigma=sigma, center=center, sampling="weighted" if weighted else "additive",
        ordered=ordered, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    assert kept.dtype == torch.int64
    assert kept.shape == (batch, num_kept)
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in grid_size]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    log_density = np.atleast_1d(multivariate_normal(center, sigma * np.eye(2)).logpdf(points))
    u = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(seed)).double().numpy()
    with np.errstate(divide="ignore"):
        scores = log_density - np.log(-np.log(u)) if weighted else u + np.exp(log_density)
    for row, score in zip(kept.tolist(), scores, strict=True):
        assert len(set(row)) == num_kept
        assert set(row) <= set(range(num_patches))
        assert row == sorted(row) or not ordered
        left = sorted(set(range(num_patches)) - set(row))
        if left:
            size = np.abs(log_density).max() + 20 if weighted else 2 + np.exp(log_density.max())
            assert score[left].max() <= score[row].min() + 1e-6 * size


@pytest.mark.nightly
@given(
    batch=batches, prefix=st.integers(0, 3), grid_size=grids, mask_ratio=ratios, options=settings_of_a_draw,
    ordered=st.booleans(), dtype=st.sampled_from(FLOATS), layout=layouts, inference=st.booleans(), seed=seeds,
)  # fmt: skip
def test_module_and_function_agree(
    batch, prefix, grid_size, mask_ratio, options, ordered, dtype, layout, inference, seed
):
    """For the same state of the generator; in eval mode and at ratio 0 the module does nothing, and draws nothing."""
    options = {**options, "num_prefix_tokens": prefix, "grid_size": grid_size, "ordered": ordered}
    x = random_tokens((batch, prefix + math.prod(grid_size), 2), dtype, layout, seed)
    drop = make_drop(mask_ratio, **options)
    torch.manual_seed(seed)
    with torch.inference_mode(inference):
        taken = drop(x)
    if mask_ratio == 0:
        assert taken is x
        assert drop.keep_indices is drop.keep_mask is None
    else:
        torch.manual_seed(seed)
        expected, keep_indices = functional.gaussian_patch_dropout(x, mask_ratio, **options)
        assert torch.equal(drop.keep_indices, keep_indices)
        assert torch.equal(taken, expected)
        assert torch.equal(taken, loop(x, keep_indices, prefix))
        assert drop.keep_mask.shape == (batch, *grid_size)
        in_mask = [mask.flatten().nonzero().flatten().tolist() for mask in drop.keep_mask]
        assert in_mask == keep_indices.sort().values.tolist()
    state = torch.get_rng_state()
    assert drop.eval()(x) is x
    assert drop.keep_indices is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.nightly
@given(
    batch=batches, frames=st.integers(1, 4), grid_size=grids, mask_ratio=ratios, options=settings_of_a_draw, seed=seeds
)
def test_frames_of_a_video_share_their_coordinates(batch, frames, grid_size, mask_ratio, options, seed):
    """A grid (T, H, W) draws as coordinates do that repeat those of a frame T times."""
    drop, num_patches = make_drop(mask_ratio, **options), frames * math.prod(grid_size)
    torch.manual_seed(seed)
    kept = drop.draw(batch, num_patches, (frames, *grid_size))
    assert kept.shape == (batch, exact_count(num_patches, mask_ratio))
    assert drop.keep_mask.shape == (batch, frames, *grid_size)
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in grid_size]
    frame = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 2)
    seen = []
    drop.scores = lambda coords, scores=drop.scores: seen.append(coords) or scores(coords)
    torch.manual_seed(seed)
    assert torch.equal(drop.draw(batch, num_patches, (frames, *grid_size)), kept)
    np.testing.assert_allclose(seen[0].numpy(), np.tile(frame, (batch, frames, 1)), atol=1e-6)
    torch.manual_seed(seed)
    assert torch.equal(drop.draw(batch, num_patches, None, seen[0].clone(memory_format=torch.contiguous_format)), kept)


@pytest.mark.nightly
@given(lengths=st.lists(st.integers(0, 12), max_size=6), data=st.data(), ordered=st.booleans(), seed=seeds)
def test_packed_images_keep_their_own_best(lengths, data, ordered, seed):
    num_kept = [data.draw(st.integers(0, length)) for length in lengths]
    scores = np.random.default_rng(seed).permutation(sum(lengths)).astype("float32")
    kept = functional.top_packed_patches(torch.from_numpy(scores), lengths, num_kept, ordered=ordered).tolist()
    start, expected = 0, []
    for length, count in zip(lengths, num_kept, strict=True):
        best = sorted(range(start, start + length), key=lambda i: -scores[i])[:count]
        chosen, kept = kept[:count], kept[count:]
        assert sorted(chosen) == sorted(best)
        assert chosen == sorted(chosen) or not ordered
        expected += best
        start += length
    assert not kept


@pytest.mark.nightly
@given(
    batch=batches, grid_size=grids, exponent=st.floats(-300, 308), center=st.tuples(sides, sides),
    weighted=st.booleans(), dtype=st.sampled_from(FLOATS), seed=seeds,
)  # fmt: skip
def test_scores_are_finite_and_know_no_layout(batch, grid_size, exponent, center, weighted, dtype, seed):
    """Whatever sigma; float32 for coordinates of any dtype, and the same for shared ones as for copies of them."""
    shared = functional.patch_coordinates(grid_size).to(dtype).expand(batch, -1, -1)
    copied = torch.zeros(2, *shared.shape, dtype=dtype).copy_(shared).mT.contiguous().mT[1]
    options = {"sigma": 10**exponent, "center": center, "sampling": "weighted" if weighted else "additive"}
    shared, copied = (
        functional.gaussian_scores(coords, **options, generator=torch.Generator().manual_seed(seed))
        for coords in (shared, copied)
    )
    assert shared.dtype == torch.float32
    assert shared.shape == (batch, math.prod(grid_size))
    assert shared.isfinite().all()
    assert torch.equal(shared, copied)


@pytest.mark.parametrize("sampling", ["additive", "weighted"])
@pytest.mark.parametrize("sigma", [1e-300, 1e-9, 1e-6, 1e-4, 1e308])
def test_the_least_and_the_greatest_sigma_draw_by_keep_probability(sigma, sampling):
    """5,000 images, within 5 standard errors: chance still decides among patches at equal distances."""
    chance = keep_probability((6, 8), 0.5, sigma=sigma, sampling=sampling)
    kept = functional.sample_keep_indices(
        5000, (6, 8), 0.5, sigma=sigma, sampling=sampling, generator=torch.Generator().manual_seed(0)
    )
    frequency = (kept.flatten().bincount(minlength=48) / 5000).view(6, 8)
    assert ((frequency - chance).abs() <= 5 * (chance * (1 - chance) / 5000).sqrt() + 1e-3).all()


@pytest.mark.nightly
@given(
    grid_size=grids, mask_ratio=ratios, center=st.tuples(sides, sides), exponent=st.floats(-300, 308),
    weighted=st.booleans(),
)  # fmt: skip
def test_keep_probability_sums_to_the_count_and_follows_the_grid(grid_size, mask_ratio, center, exponent, weighted):
    """When the image is transposed, or turned by 180 degrees."""
    options = {"sigma": 10**exponent, "sampling": "weighted" if weighted else "additive"}
    chance = keep_probability(grid_size, mask_ratio, center=center, **options)
    assert chance.shape == grid_size
    assert ((chance >= 0) & (chance <= 1)).all()
    count = exact_count(math.prod(grid_size), mask_ratio)
    assert chance.double().sum().item() == pytest.approx(count, rel=1e-5)
    transposed = keep_probability(grid_size[::-1], mask_ratio, center=center[::-1], **options)
    torch.testing.assert_close(transposed.T, chance, rtol=0, atol=2e-4)
    turned = keep_probability(grid_size, mask_ratio, center=(-center[0], -center[1]), **options)
    torch.testing.assert_close(turned.flip(0, 1), chance, rtol=0, atol=2e-4)


@pytest.mark.nightly
@given(grid_size=grids, sigma=sigmas, center=st.tuples(sides, sides), dtype=st.sampled_from(FLOATS))
def test_density_is_right_to_the_precision_of_its_dtype(grid_size, sigma, center, dtype):
    density = functional.gaussian_density(grid_size, sigma, center=center, dtype=dtype)
    assert density.dtype == dtype
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in grid_size]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    log_density = multivariate_normal(center, sigma * np.eye(2)).logpdf(points).reshape(grid_size)
    assume(log_density.max() < math.log(torch.finfo(dtype).max))
    # The exponent carries its own rounding, and half of a precision its own on top.
    rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + np.abs(log_density))
    rounding = rounding * (1 + 1 / np.sqrt(sigma)) + 2 * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal
    assert (np.abs(density.double().numpy() - np.exp(log_density)) <= rounding * np.exp(log_density) + smallest).all()


# Cutting patches out of images


@pytest.mark.nightly
@given(data=st.data(), batch=batches, channels=st.integers(0, 4), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_take_patches_is_a_loop_however_it_is_called(data, batch, channels, dtype, seed):
    """Of images and videos; indices mapped over by vmap are refused, for their range cannot be checked there."""
    num_axes = data.draw(st.sampled_from([2, 3]))
    patch, stride = (data.draw(st.tuples(*[st.integers(1, 3)] * num_axes)) for _ in range(2))
    shape = [side + data.draw(st.integers(0, 4)) for side in patch]
    images = random_tokens(
        (batch, channels, *shape),
        dtype,
        data.draw(st.sampled_from(["contiguous", "an offset", "one image", "one token", "one value"])),
        seed,
    )
    grid = [(side - p) // s + 1 for side, p, s in zip(shape, patch, stride, strict=True)]
    rng = np.random.default_rng(seed)
    keep_indices = torch.from_numpy(rng.integers(math.prod(grid), size=(batch, data.draw(st.integers(0, 5)))))
    way = data.draw(st.sampled_from([plainly, without_autograd, in_inference_mode, mapped_over_tokens, functionalized]))
    taken = way(lambda images, k: functional.take_patches(images, k, patch, stride), images, keep_indices)
    assert taken.dtype == dtype
    assert taken.shape == (*keep_indices.shape, channels, *patch)
    for image, row in enumerate(keep_indices.tolist()):
        for place, index in enumerate(row):
            corner = np.unravel_index(index, grid)
            window = tuple(slice(c * s, c * s + p) for c, s, p in zip(corner, stride, patch, strict=True))
            assert torch.equal(taken[image, place], images[(image, slice(None), *window)])
    if batch:
        with pytest.raises(RuntimeError, match="vmap"):
            mapped_over_indices(
                lambda images, k: functional.take_patches(images, k, patch, stride), images, keep_indices
            )


@FORWARD_MODE
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_take_patches_by_every_transform():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    keep_indices = torch.tensor([[3, 0], [2, 2]])

    def take(images):
        return functional.take_patches(images, keep_indices, 4)

    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(take(leaf).square().sum(), leaf)
    assert torch.equal(torch.func.grad(lambda x: take(x).square().sum())(images), expected)
    assert torch.equal(torch.func.jvp(take, (images,), (images.cos(),))[1], take(images.cos()))
    backward = torch.func.jacrev(take)(images)
    assert torch.equal(torch.func.jacfwd(take)(images), backward)
    assert torch.equal(backward.flatten(5) @ images.flatten(), take(images))


# torch.func with randomness


@pytest.mark.nightly
@given(
    prefix=st.integers(0, 2), grid_size=grids, mask_ratio=ratios, options=settings_of_a_draw,
    dim=st.sampled_from([0, 1, -1]), randomness=st.sampled_from(["same", "different"]), seed=seeds,
)  # fmt: skip
def test_vmap_draws_for_each_call_or_once_for_all(prefix, grid_size, mask_ratio, options, dim, randomness, seed):
    assume(mask_ratio > 0)
    num_patches = math.prod(grid_size)
    drop = make_drop(mask_ratio, **options, num_prefix_tokens=prefix, grid_size=grid_size, ordered=True)
    places = torch.arange(prefix + num_patches).view(1, 1, -1, 1).expand(4, 2, -1, 1)
    torch.manual_seed(seed)
    taken = torch.vmap(drop, in_dims=dim, randomness=randomness)(places.movedim(0, dim)).squeeze(-1)
    assert taken.shape == (4, 2, prefix + exact_count(num_patches, mask_ratio))
    assert torch.equal(taken[..., :prefix], places[..., :prefix, 0])
    assert all(prefix <= min(row) and len(set(row)) == len(row) for row in taken[..., prefix:].flatten(0, 1).tolist())
    if randomness == "same":
        torch.manual_seed(seed)
        assert torch.equal(taken, drop(places[0]).squeeze(-1).expand_as(taken))
    elif mask_ratio > 0.4 and num_patches > 40 and options["sigma"] is None:
        assert (taken != taken[0]).any()


@pytest.mark.parametrize("sampling", [None, "additive", "weighted"])
def test_vmap_without_leave_to_draw_refuses(sampling):
    """And no draw that is left of a vmap is taken for one of an ordinary forward."""
    drop = RandomPatchDropout(0.5) if sampling is None else GaussianPatchDropout(0.5, sampling=sampling)
    x = torch.zeros(3, 2, 16, 1)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(drop)(x)
    with pytest.raises(ValueError, match=r"x must have shape .* got \(16, 1\)"):
        torch.vmap(drop, randomness="different")(x[0])
    torch.vmap(drop, randomness="different")(x)
    with pytest.raises(RuntimeError, match="escaped from inside a function being vmapped"):
        drop.keep_mask  # noqa: B018
    drop(x[0])
    assert drop.keep_mask.shape == (2, 4, 4)


@FORWARD_MODE
def test_draws_of_torch_func_stay_readable():
    drop, x = GaussianPatchDropout(0.5), torch.randn(2, 16, 1)
    gradient = torch.func.grad(lambda x: drop(x).sum())(x)
    assert torch.equal(gradient[..., 0], drop.keep_mask.flatten(1).float())
    _, tangent = torch.func.jvp(drop, (x,), (x.cos(),))
    assert torch.equal(tangent, loop(x.cos(), drop.keep_indices, 0))
    assert torch.func.functional_call(drop, {}, (x,)).shape == (2, 8, 1)


# Tensors without values, and many patches


@pytest.mark.nightly
@given(
    batch=batches, prefix=st.integers(0, 3), frames=st.integers(1, 3), grid_size=grids, mask_ratio=ratios,
    options=settings_of_a_draw, dtype=st.sampled_from(FLOATS), fake=st.booleans(), gradient=st.booleans(),
)  # fmt: skip
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(
    batch, prefix, frames, grid_size, mask_ratio, options, dtype, fake, gradient
):
    num_patches = math.prod(grid_size)

    def shapes(device):
        x = torch.zeros(batch, prefix + num_patches, 2, dtype=dtype, device=device, requires_grad=gradient)
        images = torch.zeros(
            batch, 3, *(2 * side for side in grid_size), dtype=dtype, device=device, requires_grad=gradient
        )
        drop = make_drop(mask_ratio, **options, num_prefix_tokens=prefix, grid_size=grid_size)
        keep_indices = functional.sample_keep_indices(batch, grid_size, mask_ratio, **options, device=device)
        density = functional.gaussian_density(grid_size, 0.2, dtype=dtype, device=device)
        results = [
            drop(x), drop.keep_indices, drop.keep_mask, keep_indices, density,
            *functional.gaussian_patch_dropout(
                x, mask_ratio, **options, num_prefix_tokens=prefix, grid_size=grid_size
            ),
            functional.take_tokens(x, keep_indices, prefix), functional.take_patches(images, keep_indices, 2),
            drop.draw(batch, frames * num_patches, (frames, *grid_size), device=device), drop.keep_mask,
            functional.top_packed_patches(density.flatten(), [num_patches], [1]),
        ]  # fmt: skip
        if gradient:
            results += torch.autograd.grad(results[7].sum() + results[8].sum(), [x, images])
        devices = {result.device.type for result in results if result is not None}
        assert devices == {device}
        return [result if result is None else (result.shape, result.dtype, result.requires_grad) for result in results]

    expected = shapes("cpu")
    if fake:
        with FakeTensorMode():
            assert shapes("cpu") == expected
    else:
        assert shapes("meta") == expected


@pytest.mark.parametrize("sampling", ["additive", "weighted"])
def test_keep_probability_among_fake_tensors(sampling):
    with FakeTensorMode():
        assert keep_probability((4, 5), 0.5, sigma=0.2, sampling=sampling).shape == (4, 5)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize("without_values", ["meta", "fake"])
def test_an_attached_model_without_values_has_the_shapes_of_a_real_one(stage, without_values):
    host, drop = ALL["transformers-CLIPVisionModel"], GaussianPatchDropout(0.5)
    if without_values == "meta":
        model = attach(host.build().to("meta"), drop, stage=stage)
        hidden = model(host.inputs(3)["pixel_values"].to("meta"))[0]
        hidden.sum().backward()
    else:
        with FakeTensorMode():
            model = attach(host.build(), drop, stage=stage)
            hidden = model(**host.inputs(3))[0]
            hidden.sum().backward()
    assert hidden.shape == (3, 1 + 18, 32)
    assert drop.keep_mask.shape == (3, 6, 6)
    assert all(p.grad.shape == p.shape for name, p in model.named_parameters() if "embeddings" in name)


def test_a_million_patches():
    """And shapes beyond 2^31 rows."""
    kept = functional.sample_keep_indices(2, (1024, 1024), 0.999, sigma=0.2, ordered=True)
    assert kept.shape == (2, 1048)
    assert (kept.diff() > 0).all()
    assert ((kept >= 0) & (kept < 2**20)).all()
    places = torch.arange(2**20).repeat(2, 1).unsqueeze(-1)
    assert torch.equal(functional.take_tokens(places, kept).squeeze(-1), kept)
    drop = RandomPatchDropout(0.75)
    assert drop(places).shape == (2, 2**18, 1)
    assert (drop.keep_mask.sum((1, 2)) == 2**18).all()
    assert drop(torch.zeros(2**12, 2**20, 1024, device="meta")).shape == (2**12, 2**18, 1024)


@pytest.mark.nightly
@given(num_patches=st.integers(1, 10**9), thousandths=st.integers(0, 999))
def test_kept_count_of_many_patches_is_that_of_fractions(num_patches, thousandths):
    exact = math.floor(num_patches * (1 - Fraction(thousandths, 1000)))
    assert functional.num_kept_patches(num_patches, thousandths / 1000) == max(1, exact)


def test_deterministic_algorithms_are_all_there():
    torch.use_deterministic_algorithms(True)
    try:
        drop, x = GaussianPatchDropout(0.5), torch.randn(2, 16, 3, requires_grad=True)
        drop(x).sum().backward()
        assert torch.equal(x.grad[..., 0], drop.keep_mask.flatten(1).float())
    finally:
        torch.use_deterministic_algorithms(False)


def test_tokens_of_many_lengths_compile_whole():
    """Also where the compiler has made the length a symbol, and the square grid is not known."""
    torch._dynamo.reset()
    drop = GaussianPatchDropout(0.5, num_prefix_tokens=1)
    compiled = torch.compile(drop, fullgraph=True, backend="eager")
    for side in (2, 4, 3):
        x = torch.randn(2, 1 + side * side, 3)
        assert torch.equal(compiled(x), loop(x, drop.keep_indices, 1))


# What is refused

NO_NUMBER = st.sampled_from([None, "0.5", True, False, 1j, [0.5], (), np.array([0.5, 0.5]), torch.tensor(0.5)])
NO_COUNT = st.one_of(NO_NUMBER, st.integers(max_value=-1), st.floats())
NO_PAIR = st.one_of(
    st.none(), st.integers(), st.text(max_size=3), st.just(()), st.just({1, 2}), st.tuples(sizes),
    st.tuples(sizes, sizes, sizes), st.just(np.array([4, 4])),
)  # fmt: skip
NO_TENSOR = st.sampled_from([None, 1, "x", [[1.0]], np.zeros((2, 16, 1))])
INDICES = torch.tensor([[0, 5], [15, 3]])
BAD_INDICES = st.one_of(
    NO_TENSOR,
    st.sampled_from(
        [
            INDICES.int(),
            INDICES.float(),
            INDICES.bool(),
            INDICES[0],
            INDICES[:1],
            INDICES[..., None],
            INDICES.to("meta"),
        ]
    ),
    st.one_of(st.integers(16, 2**63 - 1), st.integers(-(2**63), -1)).map(lambda i: torch.tensor([[0, 5], [i, 3]])),
)
OUT_OF_RANGE = st.one_of(st.floats(max_value=0, exclude_max=True), st.floats(min_value=1), st.just(math.nan))
BAD = {
    "mask_ratio": st.one_of(NO_NUMBER, OUT_OF_RANGE, st.integers(1)),
    "sigma": st.one_of(
        st.sampled_from(["0.2", True, 1j, [0.2], torch.tensor(0.2), math.inf, math.nan, 0]),
        st.floats(max_value=0),
    ),
    "center": st.one_of(
        NO_PAIR.filter(lambda value: not isinstance(value, tuple) or len(value) != 2),
        st.tuples(OUT_OF_RANGE.filter(lambda y: not -1 <= y <= 1), sides), st.tuples(sides, NO_NUMBER),
    ),
    "sampling": st.one_of(st.text(max_size=9).filter(lambda s: s not in ("additive", "weighted")), NO_NUMBER),
    "ordered": st.sampled_from([None, 0, 1, "no", [], np.True_]),
    "batch_size": NO_COUNT,
    "grid_size": st.one_of(
        NO_PAIR, st.tuples(sizes, st.integers(max_value=0)), st.tuples(NO_COUNT, sizes), st.tuples(st.floats(), sizes)
    ),
    "num_patches": st.one_of(NO_COUNT, st.just(0)),
    "num_prefix_tokens": NO_COUNT,
    "num_kept": st.one_of(NO_COUNT, st.integers(5), st.just(0)),
    "dtype": st.sampled_from([torch.int64, torch.bool, torch.complex64, "float32", float, None]),
    "coords": st.one_of(
        NO_TENSOR, st.lists(st.integers(0, 4), max_size=5).filter(lambda s: len(s) != 3 or s[2] != 2).map(torch.zeros)
    ),
    "scores": st.one_of(NO_TENSOR, st.sampled_from([torch.zeros(4), torch.zeros(()), torch.zeros(2, 4, 1)])),
    "x": st.one_of(NO_TENSOR, st.lists(st.integers(0, 3), max_size=5).filter(lambda s: len(s) != 3).map(torch.zeros)),
    "images": st.one_of(NO_TENSOR, st.sampled_from([torch.zeros(2, 8, 8), torch.zeros(2, 1, 1, 8, 8, 8)])),
    "keep_indices": BAD_INDICES,
    "patch_size": st.one_of(NO_COUNT, st.just(0), st.integers(9), st.just((2, 2, 2)), st.just((2, 0))),
    "draws": st.one_of(NO_COUNT, st.just(0)),
    "drop": st.sampled_from([None, 0.5, "random", torch.zeros(2), RandomPatchDropout, torch.nn.Identity()]),
    "stride": st.one_of(NO_COUNT.filter(lambda value: value is not None), st.just(0), st.just((2,))),
}  # fmt: skip
GRID, DRAW = {"grid_size": (4, 4), "mask_ratio": 0.5}, {"sigma": 0.2, "center": (0, 0), "sampling": "additive"}
CALLS = {
    functional.cut_patches: {"images": torch.zeros(2, 3, 8, 8), "patch_size": 2, "stride": 2},
    functional.gaussian_density: {"grid_size": (4, 4), "sigma": 0.2, "center": (0, 0), "dtype": torch.float32},
    functional.gaussian_patch_dropout: {
        "x": torch.zeros(2, 17, 1), "num_prefix_tokens": 1, "ordered": False, **GRID, **DRAW,
    },
    functional.gaussian_scores: {"coords": torch.zeros(2, 4, 2), **DRAW},
    functional.keep_frequency: {"drop": RandomPatchDropout(0.5), "grid_size": (4, 4), "draws": 2},
    keep_probability: {**GRID, **DRAW},
    functional.num_kept_patches: {"num_patches": 16, "mask_ratio": 0.5},
    functional.patch_coordinates: {"grid_size": (4, 4), "dtype": torch.float32},
    functional.sample_keep_indices: {"batch_size": 2, "ordered": True, **GRID, **DRAW},
    functional.take_patches: {
        "images": torch.zeros(2, 3, 8, 8), "keep_indices": INDICES, "patch_size": 2, "stride": 2,
    },
    functional.take_tokens: {"x": torch.zeros(2, 17, 1), "keep_indices": INDICES, "num_prefix_tokens": 1},
    functional.top_patches: {"scores": torch.rand(2, 4), "num_kept": 2},
    functional.uniform_scores: {"coords": torch.zeros(2, 4, 2)},
    GaussianPatchDropout: {"num_prefix_tokens": 1, "ordered": True, **GRID, **DRAW},
}  # fmt: skip
MAY_BE_A_VIDEOS = {functional.keep_frequency, GaussianPatchDropout}  # grids of (T, H, W)
MAY_BE_NONE = {
    (functional.gaussian_patch_dropout, "grid_size"), (GaussianPatchDropout, "grid_size"),
    (GaussianPatchDropout, "num_prefix_tokens"),
}  # fmt: skip


def test_every_function_is_among_the_calls():
    names = {function.__name__ for function in CALLS}
    assert {*functional.__all__} - names == {"top_packed_patches"}, "which the two tests below are for"


@pytest.mark.nightly
@given(data=st.data())
def test_a_bad_argument_is_named_whatever_it_is(data):
    """By a ValueError or a TypeError, never by a result, or by an error of torch's own."""
    function = data.draw(st.sampled_from(sorted(CALLS, key=lambda call: call.__name__)))
    name = data.draw(st.sampled_from(sorted(CALLS[function])))
    value = data.draw(BAD[name])
    assume(value is not None or (function, name) not in MAY_BE_NONE)
    assume(name != "grid_size" or function not in MAY_BE_A_VIDEOS or not isinstance(value, tuple) or len(value) != 3)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        function(**{**CALLS[function], name: value})


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_good_arguments_pass(call):
    """So that it is the bad one that is refused."""
    call(**CALLS[call])


@pytest.mark.nightly
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), more=st.sampled_from([-1, 1]), data=st.data())
def test_packed_counts_that_reach_into_another_image_are_refused(lengths, more, data):
    scores = torch.zeros(sum(lengths))
    num_kept = list(lengths)
    place = data.draw(st.integers(0, len(lengths) - 1))
    num_kept[place] = -1 if more < 0 else lengths[place] + 1
    with pytest.raises(ValueError, match="num_kept"):
        functional.top_packed_patches(scores, lengths, num_kept)
    with pytest.raises(ValueError, match="num_kept"):
        functional.top_packed_patches(scores, lengths, lengths[1:])
    with pytest.raises(ValueError, match="scores"):
        functional.top_packed_patches(torch.zeros(max(0, sum(lengths) + more) or 1), [*lengths, 2], [*lengths, 0])


class Constant(PatchDropout):
    """Scores of one's own without any chance."""

    def scores(self, coords, generator=None):
        return torch.arange(coords.shape[1], device=coords.device).expand(coords.shape[:2])


@pytest.mark.nightly
@given(batch=batches, grid_size=grids, mask_ratio=ratios, data=st.data())
def test_scores_of_ones_own_keep_their_highest_and_padding_last(batch, grid_size, mask_ratio, data):
    """Integers too; of an image with R real patches, min(R, K) of them."""
    num_patches = math.prod(grid_size)
    num_kept = exact_count(num_patches, mask_ratio)
    drop = Constant(mask_ratio, ordered=True)
    kept = drop.draw(batch, num_patches, grid_size)
    assert kept.tolist() == [list(range(num_patches - num_kept, num_patches))] * batch
    num_real = [data.draw(st.integers(0, num_patches)) for _ in range(batch)]
    valid = torch.arange(num_patches).expand(batch, -1) < torch.tensor(num_real, dtype=torch.int64).unsqueeze(1)
    random = RandomPatchDropout(mask_ratio)
    random.draw(batch, num_patches, grid_size, valid=valid)
    assert (random.keep_mask.flatten(1) & valid).sum(1).tolist() == [min(num_kept, real) for real in num_real]
