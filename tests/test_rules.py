"""What every rule keeps: exactly K, whatever the rule, and clusters against a reference in NumPy.

Cells and blocks, which are matters of geometry, are in test_grids.py.
"""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gaussmask import (
    BlockPatchDropout,
    ClusterPatchDropout,
    GaussianPatchDropout,
    GridPatchDropout,
    PatchDropout,
    RandomPatchDropout,
    attach,
    attached,
    functional,
    keep_probability,
)

RULES = {
    "random": RandomPatchDropout,
    "gaussian": GaussianPatchDropout,
    "weighted": lambda ratio, **options: GaussianPatchDropout(ratio, sampling="weighted", **options),
    "cluster": ClusterPatchDropout,
    "grid": GridPatchDropout,
    "block": BlockPatchDropout,
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
new_rules = pytest.mark.parametrize("make", [ClusterPatchDropout, GridPatchDropout, BlockPatchDropout])

sizes = st.integers(1, 7)
grids = st.one_of(st.tuples(sizes, sizes), st.tuples(st.just(1), st.integers(1, 40)), st.tuples(sizes, sizes, sizes))
ratios = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
seeds = st.integers(0, 2**31)


def exact_count(num_patches, mask_ratio):
    """K of a ratio in thousandths, in integers."""
    return max(1, num_patches * (1000 - round(1000 * mask_ratio)) // 1000)


def noise_patches(*shape, seed=0):
    """(B, N, C, h, w), or whatever else."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(drop, seed, *args, **options):
    """The mask of a draw from a seed."""
    torch.manual_seed(seed)
    drop.draw(*args, **options)
    return drop.keep_mask


def assert_even(mask, errors=4):
    """No patch, row or column of masks (draws, H, W) is kept more often than others, within 4 standard errors."""
    mask = mask.double()
    for what, kept in {"patch": mask.flatten(1), "row": mask.sum(2), "column": mask.sum(1)}.items():
        error = kept.std(dim=0) / math.sqrt(len(kept))
        off = (kept.mean(0) - kept.mean()).abs()
        assert (off <= errors * error + 1e-9).all(), f"{what}: {(off / error).tolist()} standard errors"


# Every rule


@pytest.mark.nightly
@given(
    name=st.sampled_from(sorted(RULES)), batch=st.integers(0, 4), grid_size=grids, mask_ratio=ratios,
    ordered=st.booleans(), tube=st.booleans(), seed=seeds,
)  # fmt: skip
def test_exactly_k_are_kept_of_every_grid(name, batch, grid_size, mask_ratio, ordered, tube, seed):
    """In ascending order where that is asked for; the same from the same seed."""
    drop, num_patches = RULES[name](mask_ratio, ordered=ordered, tube=tube), math.prod(grid_size)
    pixels = noise_patches(batch, num_patches, 1, 2, 2, seed=seed)
    mask = seeded(drop, seed, batch, num_patches, grid_size, pixels=pixels)
    frames = grid_size[0] if tube and len(grid_size) == 3 else 1
    num_kept = frames * exact_count(num_patches // frames, mask_ratio)
    kept = drop.keep_indices
    assert (kept.dtype, kept.shape, mask.shape) == (torch.int64, (batch, num_kept), (batch, *grid_size))
    assert all(len(set(row)) == num_kept and set(row) <= set(range(num_patches)) for row in kept.tolist())
    assert (kept.diff(dim=1) > 0).all() or not ordered
    assert torch.equal(seeded(drop, seed, batch, num_patches, grid_size, pixels=pixels), mask)


@every_rule
def test_a_generator_is_the_only_source_of_chance_that_is_used(make):
    drop, pixels = make(0.5), noise_patches(3, 64, 3, 2, 2)
    state = torch.get_rng_state()
    masks = []
    for seed in (7, 7, 8):
        drop.draw(3, 64, (8, 8), pixels=pixels, generator=torch.Generator().manual_seed(seed))
        masks.append(drop.keep_mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@every_rule
def test_images_of_a_batch_draw_their_own(make):
    """Also where they show the same: more than half of a hundred are alone with their mask."""
    drop = make(0.3)
    mask = seeded(drop, 0, 100, 64, (8, 8), pixels=noise_patches(1, 64, 3, 2, 2).expand(100, -1, -1, -1, -1))
    assert len({tuple(row) for row in mask.flatten(1).tolist()}) > 50


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def own_grids_of(shapes, longest):
    """`coords` and `valid` of images with grids (H, W) of their own, padded to one length."""
    coords, valid = torch.full((len(shapes), longest, 2), 5.0), torch.zeros(len(shapes), longest, dtype=torch.bool)
    for image, shape in enumerate(shapes):
        coords[image, : math.prod(shape)] = functional.patch_coordinates(shape)
        valid[image, : math.prod(shape)] = True
    return {"coords": coords, "valid": valid}


@every_rule
@pytest.mark.parametrize("way", ["image", "video", "tube", "own grids"])
def test_a_draw_waits_for_nothing_and_knows_no_loop_over_the_batch(make, way):
    """The operations are as many for 9 images as for 3, and none looks at a value, for which a GPU would wait."""
    drop = make(0.5, tube=way == "tube")
    names = []
    for batch in (3, 9):
        pixels = noise_patches(batch, 24, 3, 2, 2)
        options = own_grids_of([(4, 6), (3, 4), (2, 7)] * (batch // 3), 24) if way == "own grids" else {}
        grid_size = {"image": (4, 6), "own grids": None}.get(way, (2, 3, 4))
        with Operations() as operations:
            drop.draw(batch, 24, grid_size, **options, pixels=pixels)
        names.append(operations.names)
    assert names[0] == names[1]
    assert not set(names[0]) & {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique"}


@every_rule
def test_copies_and_pickles_are_the_same_rule_without_its_draw(make):
    drop = make(0.75, num_prefix_tokens=1, grid_size=(2, 8), ordered=True, tube=True)
    pixels = noise_patches(2, 16, 3, 2, 2)
    drop(torch.zeros(2, 17, 1), pixels=pixels)
    assert dict(drop.state_dict()) == {}
    assert not [*drop.parameters(), *drop.buffers()]
    for twin in (copy.deepcopy(drop), pickle.loads(pickle.dumps(drop))):
        assert twin.keep_indices is twin.keep_mask is None
        assert repr(twin) == repr(drop)
        assert torch.equal(*(seeded(rule, 0, 2, 16, (2, 8), pixels=pixels) for rule in (twin, drop)))


def shapes_of_draws(make, device):
    """A forward, a video, tubes, grids of their own and packed images."""
    drop, pixels = make(0.5, num_prefix_tokens=1), torch.zeros(3, 16, 3, 2, 2, device=device)
    x = torch.zeros(3, 17, 4, device=device, requires_grad=True)
    results = [drop(x, pixels=pixels), drop.keep_indices, drop.keep_mask]
    for tube in (False, True):
        drop.tube = tube
        results += [drop.draw(3, 16, (4, 2, 2), pixels=pixels, device=device), drop.keep_mask]
    own = {name: value.to(device) for name, value in own_grids_of([(4, 4), (2, 3), (1, 9)], 16).items()}
    results += [drop.draw(3, 16, None, **own, pixels=pixels), drop.keep_mask]
    coords = torch.cat([functional.patch_coordinates(shape) for shape in [(2, 2), (3, 4)]]).unsqueeze(0).to(device)
    results += [drop.draw(1, 16, None, coords, lengths=[4, 12], pixels=pixels[:1]), drop.keep_mask]
    assert {result.device.type for result in results} == {torch.device(device).type}
    return [(result.shape, result.dtype, result.requires_grad) for result in results]


@every_rule
def test_tensors_on_meta_have_the_shapes_of_real_ones(make):
    assert shapes_of_draws(make, "meta") == shapes_of_draws(make, "cpu")


@every_rule
def test_fake_tensors_have_the_shapes_of_real_ones(make):
    expected = shapes_of_draws(make, "cpu")
    with FakeTensorMode():
        assert shapes_of_draws(make, "cpu") == expected


@every_rule
def test_deterministic_algorithms_are_all_there(make):
    torch.use_deterministic_algorithms(True)
    try:
        shapes_of_draws(make, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@new_rules
@pytest.mark.parametrize("tube", [False, True])
def test_a_compiled_rule_keeps_the_sets_of_the_eager_one(make, tube):
    """For the same seed, whole in one graph; another ratio takes effect."""
    torch._dynamo.reset()
    drop = make(0.5, num_prefix_tokens=1, grid_size=(2, 5, 6), tube=tube)
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    x, pixels = torch.randn(4, 1 + 60, 2), noise_patches(4, 60, 3, 2, 2)
    for ratio in (0.5,) if tube else (0.5, 0.8):
        drop.mask_ratio = ratio
        masks = []
        for call in (compiled, drop):
            torch.manual_seed(0)
            assert call(x, pixels=pixels).shape[0] == 4
            masks.append(drop.keep_mask)
        assert torch.equal(*masks)
        assert (masks[0].sum((1, 2, 3)) == (2 * exact_count(30, ratio) if tube else exact_count(60, ratio))).all()


@new_rules
def test_rules_compile_for_images_with_grids_of_their_own(make):
    torch._dynamo.reset()
    drop, pixels, own = make(0.5), noise_patches(3, 24, 3, 2, 2), own_grids_of([(4, 6), (3, 5), (4, 4)], 24)

    def keep(pixels, coords, valid):
        return drop.draw(3, 24, None, coords, valid, pixels=pixels)

    kept = []
    for call in (torch.compile(keep, fullgraph=True, backend="aot_eager"), keep):
        torch.manual_seed(0)
        kept.append(call(pixels, **own).sort(dim=1).values)
    assert torch.equal(*kept)


# Clusters, against NumPy


def cosines_to(patches, anchors):
    """(N, A) of patches (N, ...), in double precision; of a patch of zeros 1 to such patches, and 0 to others."""
    flat = patches.reshape(len(patches), -1).double().numpy()
    norm = np.linalg.norm(flat, axis=1)
    unit = np.divide(flat, norm[:, None], out=np.zeros_like(flat), where=norm[:, None] > 0)
    return unit @ unit[anchors].T + np.outer(norm == 0, norm[anchors] == 0)


def explains(anchors, kept, patches, noise=0.0, num_real=None):
    """Whether these anchors may lead to these patches: they go first, then what is most like any of them."""
    anchors, kept = set(anchors), set(kept)
    dropped = set(range(len(patches) if num_real is None else num_real)) - kept
    if not anchors <= dropped:
        return False
    likeness = cosines_to(patches, sorted(anchors)).max(axis=1)
    least = min((likeness[patch] for patch in dropped - anchors), default=math.inf)
    return max(likeness[patch] for patch in kept) <= least + noise + 1e-6


def kept_by_each_anchor(patches, num_kept):
    """(B, N, N) bool: what is kept with each patch as the only anchor, without noise."""
    flat = patches.flatten(2).double().numpy()
    unit = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    likeness = unit @ unit.transpose(0, 2, 1) + 9 * np.eye(flat.shape[1])
    return likeness.argsort(axis=2).argsort(axis=2) < num_kept


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_a_cluster_is_an_anchor_and_what_is_most_like_it(ratio):
    """A patch explains each mask as its anchor, nearly always one alone, and all are it equally often (4 errors)."""
    pixels = noise_patches(2000, 36, 3, 2, 2)
    mask = seeded(ClusterPatchDropout(ratio, anchors=1, noise=0), 0, 2000, 36, (6, 6), pixels=pixels).flatten(1)
    explained = (kept_by_each_anchor(pixels, exact_count(36, ratio)) == mask[:, None].numpy()).all(axis=2)
    assert explained.any(axis=1).all()
    assert (explained.sum(axis=1) == 1).mean() > 0.95
    frequency = (explained / explained.sum(axis=1, keepdims=True)).mean(axis=0)
    assert (abs(frequency - 1 / 36) <= 4 * math.sqrt(1 / 36 * 35 / 36 / 2000)).all()


@pytest.mark.parametrize("num_anchors", [2, 3])
def test_several_anchors_are_as_many_as_was_said(num_anchors):
    """Some set of so many patches explains each mask, and no set of one more or less explains all."""
    pixels = noise_patches(40, 12, 3, 2, 2)
    drop = ClusterPatchDropout(0.5, anchors=num_anchors, noise=0)
    kept = drop.draw(40, 12, (3, 4), pixels=pixels, generator=torch.Generator().manual_seed(0)).tolist()

    def explained(count):
        return [
            any(explains(anchors, row, image) for anchors in itertools.combinations(range(12), count))
            for row, image in zip(kept, pixels, strict=True)
        ]

    assert all(explained(num_anchors))
    assert not all(explained(num_anchors - 1))
    assert not all(explained(num_anchors + 1))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(("options", "num_anchors"), [({}, 6), ({"anchors": 0.1, "noise": 0.5}, 20), ({"noise": 0}, 6)])
def test_scores_are_noise_less_the_highest_cosine(options, num_anchors, frames):
    """In double precision, from the same two draws; N - K are the lowest scores, the anchors among them."""
    pixels = noise_patches(8, 196, 3, *([frames] if frames > 1 else []), 4, 4)
    drop, noise = ClusterPatchDropout(0.5, **options), options.get("noise", 0.1)
    torch.manual_seed(3)
    order, u = torch.rand(2, 8, 196).double().numpy()
    mask = seeded(drop, 3, 8, 196, (14, 14), pixels=pixels).flatten(1).numpy()
    for image in range(8):
        anchors = order[image].argsort()[-num_anchors:]
        score = noise * u[image] - cosines_to(pixels[image], anchors).max(axis=1)
        score[anchors] = -np.inf
        assert not mask[image, anchors].any()
        assert score[~mask[image]].max() <= score[mask[image]].min() + 1e-6
        assert mask[image].sum() == 98


def test_noise_reorders_no_further_than_it_reaches():
    pixels, drop = noise_patches(200, 16, 3, 2, 2), ClusterPatchDropout(0.5, anchors=1, noise=0.2)
    kept = drop.draw(200, 16, (4, 4), pixels=pixels, generator=torch.Generator().manual_seed(0)).tolist()

    def explained(noise):
        return [
            any(explains([anchor], row, image, noise) for anchor in range(16))
            for row, image in zip(kept, pixels, strict=True)
        ]

    assert all(explained(0.2))
    assert not all(explained(0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_cosines_are_in_float32_whatever_the_pixels(dtype):
    pixels = (100 * noise_patches(50, 64, 3, 2, 2).sigmoid()).to(dtype)
    drop = ClusterPatchDropout(0.5)
    masks = [seeded(drop, 0, 50, 64, (8, 8), pixels=values) for values in (pixels, pixels.float())]
    assert torch.equal(*masks)
    scores = drop.scores(torch.zeros(50, 64, 2), pixels=pixels, valid=None)
    assert scores.dtype == torch.float32


def test_autocast_changes_no_cluster():
    pixels, drop = noise_patches(200, 64, 3, 4, 4), ClusterPatchDropout(0.5, noise=0)
    expected = seeded(drop, 0, 200, 64, (8, 8), pixels=pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(drop, 0, 200, 64, (8, 8), pixels=pixels), expected)
        assert drop.scores(torch.zeros(200, 64, 2), pixels=pixels, valid=None).dtype == torch.float32


def test_what_other_images_show_changes_no_cluster():
    pixels, drop = noise_patches(6, 64, 3, 2, 2), ClusterPatchDropout(0.5)
    expected = seeded(drop, 0, 6, 64, (8, 8), pixels=pixels)
    others = torch.cat([pixels[:1], pixels[1:].flip(0)])
    assert torch.equal(seeded(drop, 0, 6, 64, (8, 8), pixels=others)[0], expected[0])
    others[1:] = torch.tensor([1e6, 0.0, torch.nan, torch.inf, -1.0]).view(5, 1, 1, 1, 1)
    assert torch.equal(seeded(drop, 0, 6, 64, (8, 8), pixels=others)[0], expected[0])


def test_brightness_and_scale_are_those_of_the_pixels_given():
    """A cosine knows no factor, also not one that differs from patch to patch."""
    pixels, drop = noise_patches(50, 64, 3, 2, 2), ClusterPatchDropout(0.5)
    factors = 10 ** (4 * torch.rand(50, 64, 1, 1, 1, generator=torch.Generator().manual_seed(1)) - 2)
    masks = [seeded(drop, 0, 50, 64, (8, 8), pixels=values) for values in (pixels, pixels * factors)]
    assert torch.equal(*masks)


def two_tones(count, num_dark, dark, bright):
    """(count, 64, 3, 2, 2) of which `num_dark` patches anywhere are dark, with slight noise; and which ones."""
    generator = torch.Generator().manual_seed(0)
    is_dark = torch.rand(count, 64, generator=generator).argsort(1) < num_dark
    tone = torch.where(is_dark, dark, bright).view(count, 64, 1, 1, 1)
    return tone + 0.01 * tone.abs() * torch.randn(count, 64, 3, 2, 2, generator=generator), is_dark


@pytest.mark.parametrize(("dark", "bright"), [(-1.0, 1.0), (0.0, 1.0)], ids=["black", "a zero"])
def test_a_tone_goes_as_a_whole(dark, bright):
    """Of black on white, and of zeros: all of the anchor's tone where there is room, and nothing but it where not."""
    pixels, is_dark = two_tones(500, 32, dark, bright)
    gone = ~seeded(ClusterPatchDropout(0.5, anchors=1), 0, 500, 64, (8, 8), pixels=pixels).flatten(1)
    dark_went, bright_went = (gone == is_dark).all(1), (gone == ~is_dark).all(1)
    assert (dark_went ^ bright_went).all()
    assert abs(dark_went.float().mean() - 0.5) <= 4 * 0.5 / math.sqrt(500)
    gone = ~seeded(ClusterPatchDropout(0.25, anchors=1), 0, 500, 64, (8, 8), pixels=pixels).flatten(1)
    assert (gone.sum(1) == 16).all()
    assert ((gone & is_dark).sum(1) % 16 == 0).all()
    gone = ~seeded(ClusterPatchDropout(0.75, anchors=1), 0, 500, 64, (8, 8), pixels=pixels).flatten(1)
    assert (torch.minimum((gone & is_dark).sum(1), (gone & ~is_dark).sum(1)) == 16).all()


def test_a_large_ground_goes_more_often_than_what_it_surrounds():
    pixels, is_dark = two_tones(2000, 16, -1.0, 1.0)
    mask = seeded(ClusterPatchDropout(0.5), 0, 2000, 64, (8, 8), pixels=pixels).flatten(1)
    assert mask[is_dark].float().mean() > 0.55
    assert mask[~is_dark].float().mean() < 0.5


@pytest.mark.parametrize("value", [0.0, 0.7, 1e-20, 1e20])
def test_an_even_image_keeps_its_patches_at_random(value):
    """Exactly K, by finite scores; no row, column or patch more often than others."""
    pixels, drop = torch.full((1, 48, 3, 2, 2), value).expand(4000, -1, -1, -1, -1), ClusterPatchDropout(0.75)
    mask = seeded(drop, 0, 4000, 48, (6, 8), pixels=pixels)
    assert (mask.sum((1, 2)) == 12).all()
    assert_even(mask)
    assert drop.scores(torch.zeros(4000, 48, 2), pixels=pixels, valid=None).isfinite().all()


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.918])
def test_clusters_prefer_no_row_and_no_column(ratio):
    """Images of noise: what a patch shows has nothing to do with where it lies."""
    assert_even(seeded(ClusterPatchDropout(ratio), 0, 8000, 48, (6, 8), pixels=noise_patches(8000, 48, 1, 2, 2)))


@pytest.mark.parametrize(
    ("anchors", "num_patches", "expected"),
    [
        (0.03, 196, 6), (0.03, 64, 2), (0.03, 16, 1), (0.03, 1, 1), (1e-9, 196, 1), (0.999, 10, 10), (0.26, 10, 3),
        (0.24, 10, 2), (1, 196, 1), (5, 196, 5), (5, 3, 3), (np.int64(4), 196, 4), (np.float64(0.5), 10, 5),
    ],
)  # fmt: skip
def test_anchors_are_a_rounded_share_or_a_number_and_at_least_one(anchors, num_patches, expected):
    """And so many patches are gone whatever the image shows, where the ratio asks for no more."""
    drop = ClusterPatchDropout(0.5, anchors=anchors)
    assert drop.num_anchors(num_patches) == expected
    assert drop(torch.zeros(2, num_patches, 1), pixels=noise_patches(2, num_patches, 1, 2, 2)).shape[0] == 2


def test_all_patches_may_be_anchors():
    """Then noise alone decides."""
    drop = ClusterPatchDropout(0.5, anchors=999)
    assert_even(seeded(drop, 0, 4000, 16, (4, 4), pixels=noise_patches(4000, 16, 1, 2, 2)))


BAD = {
    "anchors": {ValueError: [0, -1, 0.0, 1.0, -0.5, 1.5, math.nan, math.inf], TypeError: [True, "x", None, (1,)]},
    "noise": {ValueError: [-1, -1e-9, math.nan, math.inf, -math.inf], TypeError: [True, "x", None]},
    "tube": {TypeError: [1, "yes", None]},
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, rows in BAD.items() for error, values in rows.items() for value in values],
    ids=str,
)
def test_bad_arguments_of_clusters_are_named_when_given_and_when_set(name, value, error):
    """The old value stays."""
    with pytest.raises(error, match=rf"^{name} must .*got") as caught:
        ClusterPatchDropout(**{"mask_ratio": 0.5, name: value})
    assert repr(value) in str(caught.value)
    drop = ClusterPatchDropout(0.5)
    before = getattr(drop, name)
    with pytest.raises(error, match=f"^{name} must"):
        setattr(drop, name, value)
    assert getattr(drop, name) == before


def test_repr_tells_what_clusters_are_made_of():
    text = repr(ClusterPatchDropout(0.5, anchors=0.05, noise=0.2, tube=True))
    assert all(part in text for part in ("mask_ratio=0.5", "anchors=0.05", "noise=0.2", "tube=True"))


@pytest.mark.parametrize("way", ["image", "tube", "packed"])
def test_clusters_without_pixels_say_how_to_get_them(way):
    drop, options = ClusterPatchDropout(0.5, tube=way == "tube"), {"lengths": [4, 12]} if way == "packed" else {}
    with pytest.raises(ValueError, match=r"ClusterPatchDropout asks for pixels.*cut_patches\(images, patch_size\)"):
        drop.draw(1, 16, {"image": (4, 4), "tube": (4, 2, 2), "packed": None}[way], **options)


SHAPES = [(2, 12, 3, 2, 2), (2, 32, 3, 2, 2), (1, 16, 3, 2, 2), (3, 16, 3, 2, 2), (2, 16, 12), (2, 3, 8, 8), (16,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_of_other_patches_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixels must have shape .*\(2, 16, \.\.\.\), got "):
        ClusterPatchDropout(0.5)(torch.zeros(2, 16, 4), pixels=torch.zeros(shape))


@pytest.mark.parametrize("pixels", ["pixels", [[0.0]], np.zeros((2, 16, 3, 2, 2))], ids=["str", "list", "ndarray"])
@pytest.mark.parametrize("tube", [False, True])
def test_pixels_that_are_no_tensor_are_named(pixels, tube):
    with pytest.raises(TypeError, match=f"pixels must be a tensor, got {type(pixels).__name__}"):
        ClusterPatchDropout(0.5, grid_size=(4, 2, 2), tube=tube)(torch.zeros(2, 16, 4), pixels=pixels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_of_other_patches_are_refused_for_tubes_too(shape):
    drop = ClusterPatchDropout(0.5, grid_size=(4, 2, 2), tube=True)
    with pytest.raises(ValueError, match=r"pixels must have shape .*\(2, 16, \.\.\.\), got "):
        drop(torch.zeros(2, 16, 4), pixels=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 12, 3, 2, 2), (1, 32, 3, 2, 2), (2, 16, 3, 2, 2), (1, 16, 12), (16,)], ids=str)
def test_pixels_of_other_patches_are_refused_for_packed_images_too(shape):
    with pytest.raises(ValueError, match=r"pixels must have shape .*\(1, 16, \.\.\.\), got "):
        ClusterPatchDropout(0.5).draw(1, 16, None, lengths=[4, 12], pixels=torch.zeros(shape))


# Clusters among padding and packed images


@pytest.mark.parametrize("num_anchors", [1, 2])
def test_padding_is_never_an_anchor(num_anchors):
    """Some real patches explain what is gone of the real ones, whatever the padding shows."""
    num_real = torch.tensor([12, 9, 6] * 20)
    valid, pixels = torch.arange(12) < num_real[:, None], noise_patches(60, 12, 3, 2, 2)
    drop = ClusterPatchDropout(0.75, anchors=num_anchors, noise=0)
    masks = []
    for padding in (0.0, 1.0, -1e4, math.nan, math.inf):
        pixels = torch.where(valid[:, :, None, None, None], pixels, padding)
        masks.append(seeded(drop, 0, 60, 12, None, torch.zeros(60, 12, 2), valid, pixels=pixels))
        assert torch.equal(masks[-1], masks[0])
    assert not (masks[0] & ~valid).any()
    for row, image, count in zip(masks[0], pixels.nan_to_num(0), num_real.tolist(), strict=True):
        kept = row.nonzero().flatten().tolist()
        sets = itertools.combinations(range(count), num_anchors)
        assert any(explains(anchors, kept, image, num_real=count) for anchors in sets)


def test_an_image_with_fewer_real_patches_than_anchors_keeps_real_ones():
    valid = torch.arange(16) < torch.tensor([3, 2, 1, 0])[:, None]
    pixels, drop = noise_patches(4, 16, 3, 2, 2), ClusterPatchDropout(0.9, anchors=5)
    expected = seeded(drop, 0, 4, 16, None, torch.zeros(4, 16, 2), valid, pixels=pixels)
    assert expected.sum(1).tolist() == [1] * 4
    assert (expected & valid).sum(1).tolist() == [1, 1, 1, 0]
    pixels[~valid] = torch.nan
    assert torch.equal(seeded(drop, 0, 4, 16, None, torch.zeros(4, 16, 2), valid, pixels=pixels)[:3], expected[:3])


def packed_masks(drop, lengths, pixels, seed, **options):
    """One mask per image."""
    return seeded(drop, seed, 1, sum(lengths), None, lengths=lengths, pixels=pixels, **options)[0].split(lengths)


def test_packed_images_have_clusters_of_their_own():
    """Each keeps its own share, explained by one of its own patches, whatever the others show."""
    lengths, pixels = [12, 9, 16, 1], noise_patches(1, 38, 3, 2, 2)
    drop = ClusterPatchDropout(0.5, anchors=1, noise=0)
    for seed in range(20):
        masks = packed_masks(drop, lengths, pixels, seed)
        assert [mask.sum().item() for mask in masks] == [6, 4, 8, 1]
        for mask, image in zip(masks[:3], pixels[0].split(lengths), strict=False):
            kept = mask.nonzero().flatten().tolist()
            assert any(explains([anchor], kept, image) for anchor in range(len(mask)))
        others = pixels.clone()
        others[:, :12] = 7.0
        others[:, 21:] = torch.nan
        assert torch.equal(packed_masks(drop, lengths, others, seed)[1], masks[1])


def test_a_small_image_beside_a_large_one_has_a_share_of_anchors_of_its_own():
    """Of 16 patches one, and not the 12 of its neighbour's 400: packed, and likewise padded."""
    small, drop = noise_patches(1, 16, 3, 2, 2), ClusterPatchDropout(0.5, noise=0)
    pixels = torch.cat([small, noise_patches(1, 400, 3, 2, 2, seed=1)], dim=1)
    for seed in range(10):
        kept = packed_masks(drop, [16, 400], pixels, seed)[0].nonzero().flatten().tolist()
        assert any(explains([anchor], kept, small[0]) for anchor in range(16))
    drop.mask_ratio, valid = 0.98, torch.arange(400) < 16
    for seed in range(10):
        mask = seeded(drop, seed, 1, 400, None, torch.zeros(1, 400, 2), valid[None], pixels=pixels[:, :400])
        kept = mask[0].nonzero().flatten().tolist()
        assert any(explains([anchor], kept, small[0]) for anchor in range(16))


@pytest.mark.parametrize(("lengths", "batch"), [([3, 4], 1), ([3, 4, 5], 1), ([9, 7], 2)])
def test_lengths_of_other_patches_are_refused(lengths, batch):
    with pytest.raises(ValueError, match="lengths"):
        RandomPatchDropout(0.5).draw(batch, 9 if batch == 1 else 16, None, lengths=lengths)


# Tubes


@every_rule
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.99])
def test_a_tube_keeps_the_same_places_in_every_frame(make, ratio):
    """K is T times that of a frame; a forward takes the rows of all frames, in their order."""
    drop = make(ratio, grid_size=(3, 4, 5), tube=True, num_prefix_tokens=2, ordered=True)
    x = torch.arange(4 * 62).view(4, 62, 1).float()
    kept = drop(x, pixels=noise_patches(4, 60, 3, 2, 2))
    num_kept = 3 * exact_count(20, ratio)
    assert drop.keep_indices.shape == (4, num_kept)
    assert drop.keep_mask.shape == (4, 3, 4, 5)
    assert torch.equal(drop.keep_mask, drop.keep_mask[:, :1].expand(-1, 3, -1, -1))
    assert (drop.keep_indices.diff(dim=1) > 0).all()
    expected = torch.cat([x[:, :2], x[:, 2:].take_along_dim(drop.keep_indices.unsqueeze(-1), 1)], dim=1)
    assert torch.equal(kept, expected)
    drop.tube = False
    drop(x, pixels=noise_patches(4, 60, 3, 2, 2))
    assert drop.keep_indices.shape == (4, exact_count(60, ratio))


@every_rule
def test_a_video_without_tubes_keeps_other_places_in_other_frames(make):
    mask = seeded(make(0.5), 0, 20, 128, (2, 8, 8), pixels=noise_patches(20, 128, 3, 2, 2))
    assert (mask[:, 0] != mask[:, 1]).flatten(1).any(1).all()


@every_rule
def test_tubes_change_no_image(make):
    pixels = noise_patches(4, 36, 3, 2, 2)
    masks = [seeded(make(0.5, tube=tube), 0, 4, 36, (6, 6), pixels=pixels) for tube in (False, True)]
    assert torch.equal(*masks)
    own = own_grids_of([(6, 6), (4, 4), (5, 7), (1, 9)], 36)
    masks = [seeded(make(0.5, tube=tube), 0, 4, 36, None, **own, pixels=pixels) for tube in (False, True)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("make", [RandomPatchDropout, GaussianPatchDropout, GridPatchDropout, BlockPatchDropout])
def test_a_tube_draws_for_one_frame_as_for_an_image(make):
    tubes = seeded(make(0.5, tube=True), 0, 4, 90, (3, 5, 6))
    assert torch.equal(tubes[:, 0], seeded(make(0.5), 0, 4, 30, (5, 6)))


class Recorder(PatchDropout):
    """Asks for everything, and remembers what it was given."""

    def scores(self, coords, generator=None, *, pixels, tokens, grid_size, valid):
        self.given = {"coords": coords, "pixels": pixels, "tokens": tokens, "grid_size": grid_size, "valid": valid}
        return torch.rand(coords.shape[:2])


@pytest.mark.parametrize("time", [(), (1,), (2,)], ids=["images", "one frame", "tubelets"])
def test_a_tube_rule_is_given_patches_through_time_and_the_mean_of_the_tokens(time):
    """One patch per place: its pixels of all frames, one behind the other, as a loop puts them."""
    drop, pixels, tokens = Recorder(0.5, tube=True), noise_patches(2, 24, 3, *time, 4, 5), noise_patches(2, 24, 7)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, [5, 13]] = False  # places 5 and 1 of some frame
    drop.draw(2, 24, (4, 2, 3), valid=valid, pixels=pixels, tokens=tokens)
    given = drop.given
    assert given["grid_size"] == (2, 3)
    assert torch.equal(given["coords"], functional.patch_coordinates((2, 3)).expand(2, -1, -1))
    assert given["pixels"].shape == (2, 6, 3, 4 * math.prod(time), 4, 5)
    assert given["tokens"].shape == (2, 6, 7)
    for place in range(6):
        of_place = [frame * 6 + place for frame in range(4)]
        frames = [pixels[:, patch].view(2, 3, -1, 4, 5) for patch in of_place]
        assert torch.equal(given["pixels"][:, place], torch.cat(frames, dim=2))
        mean = sum(tokens[:, patch] for patch in of_place) / 4
        torch.testing.assert_close(given["tokens"][:, place], mean)
        assert given["valid"][:, place].tolist() == [True, place not in (5, 1)]


def test_clusters_of_tubes_are_those_of_whole_tubes():
    """An anchor's tube goes with the tubes most like it, over all frames."""
    pixels, drop = noise_patches(100, 36, 3, 2, 2), ClusterPatchDropout(0.5, anchors=1, noise=0, tube=True)
    mask = seeded(drop, 0, 100, 36, (3, 3, 4), pixels=pixels)[:, 0].flatten(1)
    tubes = pixels.unflatten(1, (3, 12)).transpose(1, 2)
    assert (kept_by_each_anchor(tubes, 6) == mask[:, None].numpy()).all(axis=2).any(axis=1).all()


# Grids that are none, and grids of one's own


@pytest.mark.parametrize("make", [RandomPatchDropout, ClusterPatchDropout])
@pytest.mark.parametrize("num_patches", [17, 1001])
def test_rules_without_coordinates_take_any_number_of_patches(make, num_patches):
    drop, x = make(0.5, num_prefix_tokens=1), torch.arange(1.0 + num_patches).view(1, -1, 1).expand(3, -1, 2)
    kept = drop(x, pixels=noise_patches(3, num_patches, 1, 2, 2))
    assert kept.shape == (3, 1 + num_patches // 2, 2)
    assert torch.equal(kept[:, 1:, 0], 1.0 + drop.keep_indices)
    assert drop.keep_mask.shape == (3, num_patches)
    assert torch.equal(drop.keep_mask.nonzero()[:, 1].view(3, -1), drop.keep_indices.sort(1).values)
    drop(torch.zeros(3, 1 + 16, 1), pixels=noise_patches(3, 16, 1, 2, 2))
    assert drop.keep_mask.shape == (3, 4, 4)


@pytest.mark.parametrize("make", [GaussianPatchDropout, GridPatchDropout, BlockPatchDropout])
@pytest.mark.parametrize("num_patches", [17, 1001])
def test_rules_on_coordinates_want_a_grid_for_them(make, num_patches):
    with pytest.raises(ValueError, match="grid_size"):
        make(0.5)(torch.zeros(2, num_patches, 4))
    with pytest.raises(ValueError, match=f"{make.__name__} .*grid_size=.*{num_patches} patches, or coords"):
        make(0.5).draw(2, num_patches, None)


@every_rule
def test_a_vit_of_ones_own_may_say_that_it_sees_videos(make):
    drop = make(0.5, num_prefix_tokens=1, grid_size=[2, 4, 3])
    assert drop.grid_size == (2, 4, 3)
    assert drop(torch.zeros(3, 1 + 24, 5), pixels=noise_patches(3, 24, 3, 2, 2)).shape == (3, 1 + 12, 5)
    assert drop.keep_mask.shape == (3, 2, 4, 3)
    with pytest.raises(ValueError, match="2 x 4 x 3 does not hold 16 patches"):
        drop(torch.zeros(3, 1 + 16, 5), pixels=noise_patches(3, 16, 3, 2, 2))


# Asking by name


def test_a_name_that_nobody_knows_is_refused_with_the_class():
    with pytest.raises(TypeError, match=r"Wrong\.scores asks for 'colours', but a rule can ask for pixels, tokens"):

        class Wrong(PatchDropout):
            def scores(self, coords, generator=None, *, colours):
                return coords[..., 0]


BY_POSITION = {
    "pixels": lambda self, coords, generator=None, pixels=None: coords[..., 0],
    "tokens": lambda self, coords, tokens, generator=None: coords[..., 0],
    "grid_size": lambda self, coords, generator, grid_size: coords[..., 0],
    "valid": lambda self, coords, generator=None, *valid: coords[..., 0],
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_a_known_name_by_position_is_refused_with_the_class(name):
    with pytest.raises(TypeError, match=rf"Wrong\.scores asks for {name} by position.*\*, {name}\)"):
        type("Wrong", (PatchDropout,), {"scores": BY_POSITION[name]})


def test_a_name_with_a_default_that_nobody_knows_stays_at_it():
    class Mild(PatchDropout):
        def scores(self, coords, generator=None, *, grid_size, strength=3.0):
            self.seen = strength, grid_size
            return coords[..., 0]

    assert Mild.asks_for == {"grid_size"}
    drop = Mild(0.5)
    drop(torch.zeros(2, 16, 1))
    assert drop.seen == (3.0, (4, 4))


def test_rules_are_given_what_they_ask_for_and_nothing_else():
    assert PatchDropout.asks_for == RandomPatchDropout.asks_for == GaussianPatchDropout.asks_for == frozenset()
    assert ClusterPatchDropout.asks_for >= {"pixels", "valid"}
    assert "pixels" not in GridPatchDropout.asks_for | BlockPatchDropout.asks_for

    class Small(PatchDropout):
        def scores(self, coords, generator=None, **given):
            assert not given
            return coords[..., 0]

    assert Small.asks_for == frozenset()
    assert Small(0.5)(torch.zeros(2, 16, 1), pixels="not looked at").shape == (2, 8, 1)


def test_a_rule_sees_the_patches_that_were_cut_and_its_tokens_without_the_prefix():
    """Without gradient, and the same memory; also where images and tokens want one."""
    images = torch.randn(2, 3, 12, 8, requires_grad=True)
    x = torch.randn(2, 2 + 24, 5, requires_grad=True)
    drop, patches = Recorder(0.5, num_prefix_tokens=2, grid_size=(6, 4)), functional.cut_patches(images, 2)
    assert patches.requires_grad
    kept = drop(x, pixels=patches)
    given = drop.given
    assert given["pixels"].data_ptr() == patches.data_ptr()
    assert torch.equal(given["pixels"], patches)
    assert torch.equal(given["tokens"], x[:, 2:])
    assert not given["pixels"].requires_grad
    assert not given["tokens"].requires_grad
    assert (given["grid_size"], given["valid"]) == ((6, 4), None)
    kept.sum().backward()
    assert images.grad is None
    assert torch.equal(x.grad[:, 2:, 0].bool(), drop.keep_mask.flatten(1))


def test_tokens_that_are_not_there_are_asked_for():
    with pytest.raises(ValueError, match="Recorder asks for tokens, and there are none"):
        Recorder(0.5).draw(2, 16, (4, 4), pixels=torch.zeros(2, 16, 3, 2, 2))
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, patches, width\), here \(2, 16"):
        Recorder(0.5).draw(2, 16, (4, 4), pixels=torch.zeros(2, 16, 3, 2, 2), tokens=torch.zeros(2, 15, 3))


def test_images_with_grids_of_their_own_are_told_by_valid():
    drop, own = Recorder(0.5), own_grids_of([(2, 4), (2, 3)], 8)
    drop.draw(2, 8, None, **own, pixels=torch.zeros(2, 8, 3, 2, 2), tokens=torch.zeros(2, 8, 3))
    assert drop.given["grid_size"] is None
    assert torch.equal(drop.given["valid"], own["valid"])


def test_packed_images_are_given_side_by_side():
    drop, pixels, tokens = Recorder(0.5), noise_patches(1, 9, 3, 2, 2), noise_patches(1, 9, 7)
    drop.draw(1, 9, None, torch.rand(1, 9, 2), lengths=[4, 5], pixels=pixels, tokens=tokens)
    for name, packed in (("pixels", pixels), ("tokens", tokens)):
        assert torch.equal(drop.given[name][0, :4], packed[0, :4])
        assert torch.equal(drop.given[name][1], packed[0, 4:])
    assert drop.given["valid"].tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.parametrize("base", [RandomPatchDropout, GaussianPatchDropout, ClusterPatchDropout, GridPatchDropout])
def test_other_scores_inherit_nothing_that_was_known_of_the_old_ones(base):
    """Neither what they asked for, nor that they need no grid, nor their exact chances."""

    class Other(base):
        def scores(self, coords, generator=None):
            self.seen = coords
            return coords[..., 0]

    drop = Other(0.5)
    assert drop.asks_for == frozenset()
    assert drop.needs_grid
    drop(torch.zeros(2, 16, 1))
    assert drop.seen.isfinite().all()
    lower_half = torch.tensor([[0.0], [0], [1], [1]]).expand(4, 3)
    assert torch.equal(drop.keep_probability((4, 3), draws=2), lower_half)
    with pytest.raises(ValueError, match="grid_size"):
        drop(torch.zeros(2, 17, 1))


def test_the_same_scores_inherit_all_that_is_known_of_them():
    class Named(RandomPatchDropout):
        pass

    class Narrow(GaussianPatchDropout):
        def extra_repr(self):
            return "narrow"

    assert Named(0.5)(torch.zeros(2, 17, 1)).shape == (2, 8, 1)
    assert torch.equal(Named(0.5).keep_probability((4, 4), draws=1), torch.full((4, 4), 0.5))
    expected = keep_probability((4, 4), 0.5, sigma=0.2)
    assert torch.equal(Narrow(0.5).keep_probability((4, 4), draws=1), expected)


def test_scores_of_a_mixin_are_other_scores_too():
    class Lower:
        def scores(self, coords, generator=None):
            return coords[..., 0]

    class Mixed(Lower, RandomPatchDropout):
        pass

    assert Mixed.needs_grid
    lower_half = torch.tensor([[0.0], [0], [1], [1]]).expand(4, 4)
    assert torch.equal(Mixed(0.5).keep_probability((4, 4), draws=2), lower_half)


def test_a_subclass_may_say_that_it_needs_no_grid():
    class Every(PatchDropout):
        needs_grid = False

        def scores(self, coords, generator=None):
            self.seen = coords
            return torch.arange(coords.shape[1]).expand(coords.shape[:2])

    drop = Every(0.5)
    drop(torch.zeros(2, 17, 1))
    assert drop.keep_indices.sort(1).values.tolist() == [list(range(9, 17))] * 2
    assert drop.seen.shape == (2, 17, 2)
    assert drop.seen.isnan().all()
    drop(torch.zeros(2, 16, 1))
    assert not drop.seen.isnan().any()


# How often


@pytest.mark.parametrize("sampling", ["additive", "weighted"])
@pytest.mark.parametrize("grid_size", [(5, 7), (3, 4, 5)])
@pytest.mark.parametrize("tube", [False, True])
def test_frequencies_of_gaussian_draws_are_their_exact_chances(sampling, grid_size, tube):
    """20,000 masks within 4 standard errors, and 2e-4 that the integral may be off; both have the sum K."""
    drop = GaussianPatchDropout(0.7, center=(0.4, -0.2), sampling=sampling, tube=tube)
    chance = drop.keep_probability(grid_size, draws=1)
    frames = grid_size[0] if tube and len(grid_size) == 3 else 1
    num_kept = frames * exact_count(math.prod(grid_size) // frames, 0.7)
    generator = torch.Generator().manual_seed(0)
    frequency = functional.keep_frequency(drop, grid_size, draws=20_000, generator=generator)
    assert chance.shape == frequency.shape == grid_size
    assert chance.sum().item() == pytest.approx(num_kept, abs=1e-3)
    assert frequency.sum().item() == pytest.approx(num_kept, abs=1e-3)
    assert ((frequency - chance).abs() <= 4 * (chance * (1 - chance) / 20_000).sqrt() + 2e-4).all()
    if len(grid_size) == 2:
        expected = keep_probability(grid_size, 0.7, sigma=0.2, center=(0.4, -0.2), sampling=sampling)
        assert torch.equal(chance, expected)


@every_rule
@pytest.mark.parametrize("grid_size", [(4, 5), (3, 2, 5)])
@pytest.mark.parametrize("tube", [False, True])
def test_chances_have_the_shape_of_the_grid_and_the_sum_k(make, grid_size, tube):
    drop, sides = make(0.6, tube=tube), [2 * side for side in grid_size]
    images = noise_patches(2, 3, *sides) if make is ClusterPatchDropout else None
    chance = drop.keep_probability(grid_size, draws=50, images=images)
    frames = grid_size[0] if tube and len(grid_size) == 3 else 1
    assert (chance.dtype, chance.shape) == (torch.float32, grid_size)
    assert chance.sum().item() == pytest.approx(frames * exact_count(math.prod(grid_size) // frames, 0.6), abs=1e-4)
    assert ((chance >= 0) & (chance <= 1)).all()
    drop.mask_ratio = 0
    assert torch.equal(drop.keep_probability(grid_size, draws=3, images=images), torch.ones(grid_size))


@pytest.mark.parametrize("draws", [1, 255, 256, 257, 600])
def test_so_many_masks_are_drawn_as_was_said(draws):
    """The frequencies are whole numbers of that many."""
    generator = torch.Generator().manual_seed(0)
    frequency = functional.keep_frequency(RandomPatchDropout(0.5), (3, 5), draws=draws, generator=generator)
    counts = frequency.double() * draws
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    assert counts.sum().round() == 7 * draws
    assert 0 < frequency.max() <= 1


@pytest.mark.parametrize("grid_size", [(4, 4), (2, 2, 2)])
def test_images_are_cut_into_the_patches_of_the_grid(grid_size):
    """Each is drawn for equally often and at least once; one image needs no batch; they may want a gradient."""
    sides = [3 * side for side in grid_size]
    images = noise_patches(5, 2, *sides).requires_grad_()

    class First(PatchDropout):
        seen = ()

        def scores(self, coords, generator=None, *, pixels):
            First.seen = (*First.seen, pixels)
            return pixels.flatten(2)[..., 0]

    frequency = functional.keep_frequency(First(0.5), grid_size, draws=12, images=images)
    assert len(First.seen) == 3
    patches = functional.cut_patches(images, 3)
    assert all(torch.equal(seen, patches) for seen in First.seen)
    assert not frequency.requires_grad
    value = patches.flatten(2)[..., 0]
    expected = (value >= value.median(dim=1, keepdim=True).values).float()
    expected[value == value.median(dim=1, keepdim=True).values] = 0
    torch.testing.assert_close(frequency.flatten(), expected.mean(0))
    of_one = functional.keep_frequency(First(0.5), grid_size, draws=1, images=images[0])
    torch.testing.assert_close(of_one.flatten(), expected[0])


def test_drawing_for_frequencies_leaves_the_drop_as_it_is():
    drop = RandomPatchDropout(0.5).eval()
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=2).eval()
    attach(model, drop)
    drop.train()
    model(torch.randn(2, 3, 64, 64))
    kept = drop.keep_indices
    before = dict(vars(drop))
    functional.keep_frequency(drop, (3, 5), draws=10)
    drop.keep_probability((2, 3, 5))
    assert drop.keep_indices is kept
    assert vars(drop) == before
    assert attached(model) is drop
    assert drop.keep_mask.shape == (2, 4, 4)
    model(torch.randn(2, 3, 64, 64))
    assert drop.keep_indices is not kept


def test_frequencies_say_what_they_need():
    drop = ClusterPatchDropout(0.5)
    for call in (drop.keep_probability, lambda *args, **options: functional.keep_frequency(drop, *args, **options)):
        with pytest.raises(ValueError, match="ClusterPatchDropout asks for pixels: pass images"):
            call((4, 4))
        with pytest.raises(ValueError, match=r"images of shape \(2, 3, 9, 8\) are not cut evenly by a grid of 4 x 4"):
            call((4, 4), images=torch.zeros(2, 3, 9, 8))
        with pytest.raises(ValueError, match="are not cut evenly by a grid of 2 x 4 x 4"):
            call((2, 4, 4), images=torch.zeros(2, 3, 3, 8, 8))
        with pytest.raises(ValueError, match="are not cut evenly"):
            call((4, 4), images=torch.zeros(2, 3, 4, 8, 8))
        with pytest.raises(ValueError, match="images must have shape"):
            call((4, 4), images=torch.zeros(8, 8))
        with pytest.raises(TypeError, match="images must be a tensor"):
            call((4, 4), images=np.zeros((2, 3, 8, 8)))
        with pytest.raises(ValueError, match="grid_size must be"):
            call((4,), images=torch.zeros(2, 3, 8, 8))
        with pytest.raises(ValueError, match="draws must be at least 1"):
            call((4, 4), draws=0, images=torch.zeros(2, 3, 8, 8))
        with pytest.raises(TypeError, match="draws must be an integer"):
            call((4, 4), draws=2.0, images=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"Recorder asks for tokens, which only a model makes.*keep_mask"):
        functional.keep_frequency(Recorder(0.5), (4, 4), images=torch.zeros(2, 3, 8, 8))


def test_no_images_are_none_to_draw_for():
    """In a thread that is given up, for a loop would have no end."""
    with pytest.raises(ValueError, match="images"), Watched():
        functional.keep_frequency(ClusterPatchDropout(0.5), (4, 4), draws=1, images=torch.zeros(0, 3, 8, 8))


class Watched(TorchDispatchMode):
    """Stops what goes on for ever."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        assert self.operations < 1000, "goes on for ever"
        return func(*args, **(kwargs or {}))
