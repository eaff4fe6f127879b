"""Where patches lie: cells and blocks by counting and by geometry, and the places themselves, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gaussmask import BlockPatchDropout, GridPatchDropout, functional
from gaussmask.sampling.grids import Packing, Places, own_grids

sizes = st.integers(1, 9)
grids = st.one_of(st.tuples(sizes, sizes), st.tuples(st.just(1), st.integers(1, 40)), st.tuples(sizes, st.just(1)))
videos = st.tuples(st.integers(1, 4), sizes, sizes)
ratios = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
seeds = st.integers(0, 2**31)


def exact_count(num_patches, mask_ratio):
    """K of a ratio in thousandths, in integers."""
    return max(1, num_patches * (1000 - round(1000 * mask_ratio)) // 1000)


def seeded(drop, seed, *args, **options):
    """The mask of a draw from a seed."""
    torch.manual_seed(seed)
    drop.draw(*args, **options)
    return drop.keep_mask


def many(drop, draws, grid_size, seed=0):
    return seeded(drop, seed, draws, math.prod(grid_size), grid_size)


def assert_even(mask, errors=4):
    """No patch, frame, row or column is kept more often than others, within 4 standard errors."""
    mask = mask.double()
    mask = mask if mask.ndim == 4 else mask.unsqueeze(1)
    of = {"patch": mask.flatten(1), "frame": mask.sum((2, 3)), "row": mask.sum((1, 3)), "column": mask.sum((1, 2))}
    for what, kept in of.items():
        error = kept.std(dim=0) / math.sqrt(len(kept))
        off = (kept.mean(0) - kept.mean()).abs()
        assert (off <= errors * error + 1e-9).all(), f"{what}: {(off / error).tolist()} standard errors"


def assert_alike(mask, other, errors=4):
    """Each patch is kept equally often in two independent sets of masks, within 4 standard errors."""
    first, second = mask.double().mean(0), other.double().mean(0)
    error = (first * (1 - first) / len(mask) + second * (1 - second) / len(other)).sqrt()
    assert ((first - second).abs() <= errors * error + 1e-9).all()


def padded(shapes, longest):
    """`coords` and `valid` of images with grids (H, W) of their own; coordinates of padding are nonsense."""
    coords, valid = torch.full((len(shapes), longest, 2), 5.0), torch.zeros(len(shapes), longest, dtype=torch.bool)
    for image, shape in enumerate(shapes):
        coords[image, : math.prod(shape)] = functional.patch_coordinates(shape)
        valid[image, : math.prod(shape)] = True
    return coords, valid


def own_masks(drop, shapes, longest, seed):
    """The masks (H, W) of images with grids of their own, in one padded batch."""
    mask = seeded(drop, seed, len(shapes), longest, None, *padded(shapes, longest))
    return [row[: math.prod(shape)].view(shape) for row, shape in zip(mask, shapes, strict=True)]


def packed_masks(drop, shapes, seed):
    """Likewise, packed one behind the other."""
    lengths = [math.prod(shape) for shape in shapes]
    coords = torch.cat([functional.patch_coordinates(shape) for shape in shapes]).unsqueeze(0)
    mask = seeded(drop, seed, 1, sum(lengths), None, coords, lengths=lengths)[0]
    return [row.view(shape) for row, shape in zip(mask.split(lengths), shapes, strict=True)]


# Cells


def counts_of_cells(mask, side):
    """How many patches each cell of a mask (H, W) keeps, and how many it has: two lists, by a loop."""
    kept, held = {}, {}
    for (row, column), is_kept in np.ndenumerate(np.asarray(mask)):
        cell = row // side, column // side
        kept[cell] = kept.get(cell, 0) + int(is_kept)
        held[cell] = held.get(cell, 0) + 1
    return list(kept.values()), list(held.values())


@pytest.mark.parametrize(("ratio", "of_each"), [(0.75, 1), (0.5, 2), (0.25, 3)])
@pytest.mark.parametrize("grid_size", [(14, 14), (2, 6), (8, 4), (2, 2), (3, 4, 6)])
def test_every_cell_keeps_equally_many(grid_size, ratio, of_each):
    """Also in every frame of a video."""
    mask = many(GridPatchDropout(ratio), 50, grid_size)
    assert {tuple(counts_of_cells(frame, 2)[0]) for frame in mask.view(-1, *grid_size[-2:])} == {
        (of_each,) * (grid_size[-2] * grid_size[-1] // 4)
    }


@pytest.mark.nightly
@given(grid_size=st.one_of(grids, videos), mask_ratio=ratios, side=st.integers(1, 5), seed=seeds)
def test_cells_of_one_size_differ_by_one_at_most(grid_size, mask_ratio, side, seed):
    """Whatever the ratio, and over all frames; K altogether."""
    mask = seeded(GridPatchDropout(mask_ratio, cell_size=side), seed, 3, math.prod(grid_size), grid_size)
    for image in mask.view(3, -1, *grid_size[-2:]):
        cells = [counts_of_cells(frame, side) for frame in image]
        full = [kept for frame in cells for kept, held in zip(*frame, strict=True) if held == side * side]
        assert not full or max(full) - min(full) <= 1
        assert image.sum() == exact_count(math.prod(grid_size), mask_ratio)


@pytest.mark.parametrize(
    ("grid_size", "ratio", "cell_size"),
    [
        ((6, 6), 0.75, 2), ((6, 6), 0.85, 2), ((7, 7), 0.5, 2), ((7, 7), 0.75, 2), ((7, 7), 0.85, 2), ((5, 9), 0.75, 2),
        ((2, 3), 0.5, 2), ((2, 3), 0.75, 2), ((3, 3), 0.25, 2), ((3, 3), 0.75, 2), ((1, 7), 0.75, 2), ((5, 5), 0.85, 3),
        ((3, 2, 3), 0.75, 2),
    ],
)  # fmt: skip
def test_no_patch_is_preferred_whatever_its_cell_has_room_for(grid_size, ratio, cell_size):
    """At the border of a grid with odd sides, where cells have fewer patches, neither: 40,000 masks, 4 errors."""
    mask = many(GridPatchDropout(ratio, cell_size=cell_size), 40_000, grid_size)
    assert_even(mask)
    border = mask[..., -1, :].double().mean() - mask.double().mean()
    error = mask[..., -1, :].double().flatten(1).mean(1).std() / math.sqrt(len(mask))
    assert abs(border) <= 4 * error + 1e-9


def test_which_patch_of_a_cell_is_kept_is_drawn_for_every_cell():
    """All 4 x 4 pairs of two neighbours, and of two far cells, are equally often: 4 standard errors of 16,000 draws."""
    mask = many(GridPatchDropout(0.75), 16_000, (4, 6))
    cells = mask.unflatten(1, (2, 2)).unflatten(3, (3, 2)).transpose(2, 3).flatten(3)  # (draws, 2, 3, 4)
    assert (cells.sum(-1) == 1).all()
    which = cells.int().argmax(-1).flatten(1)
    for first, second in [(0, 1), (0, 3), (0, 5), (2, 4)]:
        pairs = (4 * which[:, first] + which[:, second]).bincount(minlength=16) / 16_000
        assert ((pairs - 1 / 16).abs() <= 4 * math.sqrt(1 / 16 * 15 / 16 / 16_000)).all()


def test_which_cells_give_one_more_is_drawn_too():
    """K = 6 of 16: two of four cells give a second patch, every pair of cells equally often."""
    mask = many(GridPatchDropout(0.625), 12_000, (4, 4))
    counts = mask.unflatten(1, (2, 2)).unflatten(3, (2, 2)).sum((2, 4)).flatten(1)
    assert (counts.sort(1).values == torch.tensor([1, 1, 2, 2])).all()
    pairs = ((counts == 2) * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    share = pairs[[3, 5, 6, 9, 10, 12]] / 12_000
    assert ((share - 1 / 6).abs() <= 4 * math.sqrt(5 / 36 / 12_000)).all()


def test_cells_may_have_any_side():
    """Of one patch it is random; one that holds the whole image too, however large it is said to be."""
    for side in (1, 6, 50):
        assert_even(many(GridPatchDropout(0.5, cell_size=side), 4000, (6, 6)))
    mask = many(GridPatchDropout(0.9375, cell_size=4), 20, (16, 16))
    assert all(counts_of_cells(image, 4)[0] == [1] * 16 for image in mask)


def test_a_cell_beyond_all_images_costs_nothing():
    assert many(GridPatchDropout(0.5, cell_size=10**9), 2, (4, 4)).sum() == 16


@pytest.mark.nightly
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5), extra=st.integers(0, 9), mask_ratio=ratios,
    side=st.integers(1, 3), seed=seeds, packed=st.booleans(),
)  # fmt: skip
def test_images_with_grids_of_their_own_have_cells_of_their_own(shapes, extra, mask_ratio, side, seed, packed):
    """Padded: K of the longest, or all real ones. Packed: its own K."""
    drop, longest = GridPatchDropout(mask_ratio, cell_size=side), max(map(math.prod, shapes)) + extra
    masks = packed_masks(drop, shapes, seed) if packed else own_masks(drop, shapes, longest, seed)
    for mask, shape in zip(masks, shapes, strict=True):
        num_patches = math.prod(shape)
        assert mask.sum() == min(num_patches, exact_count(num_patches if packed else longest, mask_ratio))
        counts, held = counts_of_cells(mask, side)
        full = [kept for kept, room in zip(counts, held, strict=True) if room == side * side]
        assert not full or max(full) - min(full) <= 1


def test_own_grids_keep_by_the_cells_of_a_shared_one():
    """At .75 one patch of every cell of each image, in whatever shape."""
    for mask, shape in zip(packed_masks(GridPatchDropout(0.75), [(4, 4), (2, 8), (6, 4)], 0), "abc", strict=True):
        assert set(counts_of_cells(mask, 2)[0]) == {1}, shape
    (mask,) = own_masks(GridPatchDropout(0.75), [(4, 4)], 36, 0)  # K = 9 of 16: two of each cell, three of one
    assert sorted(counts_of_cells(mask, 2)[0]) == [2, 2, 2, 3]


@pytest.mark.parametrize("way", [own_masks, packed_masks])
def test_no_patch_of_a_grid_of_its_own_is_preferred(way):
    shapes = [(3, 3), (2, 5), (4, 3)] * 4000
    if way is own_masks:
        masks = own_masks(GridPatchDropout(0.75), shapes, 12, 0)
    else:
        masks = packed_masks(GridPatchDropout(0.75), shapes, 0)
    for first in range(3):
        assert_even(torch.stack(masks[first::3]))


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_a_bad_cell_size_is_named(value):
    drop = GridPatchDropout(0.5)
    with pytest.raises((ValueError, TypeError), match=rf"^cell_size must .*got {value!r}"):
        GridPatchDropout(0.5, cell_size=value)
    with pytest.raises((ValueError, TypeError), match=r"^cell_size must"):
        drop.cell_size = value
    assert drop.cell_size == 2
    assert "cell_size=2" in repr(drop)


# Blocks


def box_of(dropped):
    """(top, left, height, width) of the smallest rectangle around the dropped patches of a mask (H, W)."""
    rows, columns = np.nonzero(np.asarray(dropped))
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def is_block(dropped):
    """Whether these are a rectangle, but for a run of patches at a corner of it, shorter than its side."""
    dropped = np.asarray(dropped)
    if not dropped.any():
        return True
    top, left, height, width = box_of(dropped)
    missing = ~dropped[top : top + height, left : left + width]
    count = missing.sum()
    corners = [missing, missing[::-1], missing[:, ::-1], missing[::-1, ::-1]]
    lines = [line for corner in corners for line in (corner[0], corner[:, 0])]
    return count == 0 or any(line[:count].sum() == count < len(line) for line in lines)


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (["....", "....", "...."], True), (["....", ".##.", ".##."], True), (["#...", "##..", "##.."], True),
        ([".##.", ".##.", ".#.."], True), (["####", "..##", "...."], True), ([".###", ".#..", "...."], True),
        (["...#", "....", "...."], True), ([".#..", "..#.", "...."], False), (["###.", "#.#.", "###."], False),
        (["##..", "##..", "..##"], False), (["####", "#..#", "...."], False), ([".##.", "####", "...."], False),
    ],
)  # fmt: skip
def test_the_checker_knows_a_block(dropped, expected):
    assert is_block([[patch == "#" for patch in row] for row in dropped]) == expected


@pytest.mark.nightly
@given(grid_size=st.one_of(grids, videos), mask_ratio=ratios, seed=seeds)
def test_what_is_dropped_is_a_block(grid_size, mask_ratio, seed):
    """In every frame of a video one, by at most one patch larger than in another; N - K altogether."""
    mask = seeded(BlockPatchDropout(mask_ratio), seed, 4, math.prod(grid_size), grid_size)
    for image in ~mask.view(4, -1, *grid_size[-2:]):
        assert all(is_block(frame) for frame in image)
        counts = image.sum((1, 2))
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == math.prod(grid_size) - exact_count(math.prod(grid_size), mask_ratio)


@pytest.mark.nightly
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5), extra=st.integers(0, 9), mask_ratio=ratios,
    seed=seeds,
)  # fmt: skip
def test_padded_images_drop_a_block_of_their_own_grid(shapes, extra, mask_ratio, seed):
    """Of what is real beyond K."""
    longest = max(map(math.prod, shapes)) + extra
    for mask, shape in zip(own_masks(BlockPatchDropout(mask_ratio), shapes, longest, seed), shapes, strict=True):
        assert mask.sum() == min(math.prod(shape), exact_count(longest, mask_ratio))
        assert is_block(~mask)


@pytest.mark.nightly
@given(shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5), mask_ratio=ratios, seed=seeds)
def test_packed_images_drop_a_block_of_their_own_grid(shapes, mask_ratio, seed):
    """Each of its own size, beside larger ones too."""
    for mask, shape in zip(packed_masks(BlockPatchDropout(mask_ratio), shapes, seed), shapes, strict=True):
        assert mask.sum() == exact_count(math.prod(shape), mask_ratio)
        assert is_block(~mask)


def test_blocks_of_own_grids_lie_as_those_of_a_shared_one():
    """In a padded batch and in a packed one, within 4 standard errors."""
    expected = many(BlockPatchDropout(0.4), 5000, (4, 6))
    padded_ones = own_masks(BlockPatchDropout(0.4), [(4, 6)] * 5000, 24, 1)
    assert_alike(torch.stack(padded_ones), expected)
    packed_ones = packed_masks(BlockPatchDropout(0.4), [(4, 6), (2, 3)] * 5000, 2)
    assert_alike(torch.stack(packed_ones[::2]), expected)
    assert_alike(torch.stack(packed_ones[1::2]), many(BlockPatchDropout(0.4), 5000, (2, 3), seed=3))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid_size", [(7, 7), (5, 8)])
def test_blocks_know_no_up_and_down_no_left_and_right(grid_size, ratio):
    """Nor, in a square, rows from columns: 10,000 masks against as many others that are mirrored, 4 errors."""
    mask, other = (many(BlockPatchDropout(ratio), 10_000, grid_size, seed) for seed in (0, 1))
    assert_alike(mask, other.flip(1))
    assert_alike(mask, other.flip(2))
    if grid_size == (7, 7):
        assert_alike(mask, other.mT)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_blocks_lie_in_the_middle_more_often_than_at_the_border(ratio):
    kept = many(BlockPatchDropout(ratio), 4000, (8, 8)).double().mean(0)
    assert kept[3:5, 3:5].max() < kept[[0, 0, -1, -1], [0, -1, 0, -1]].min() - 0.2


def test_a_block_lies_at_all_places_equally_often():
    """Along one axis, and by all 25 places of those of 2 x 2 in 6 x 6: 4 standard errors."""
    starts = many(BlockPatchDropout(0.5), 18_000, (1, 16)).flatten(1).int().argmin(1).bincount(minlength=9) / 18_000
    assert len(starts) == 9
    assert ((starts - 1 / 9).abs() <= 4 * math.sqrt(8 / 81 / 18_000)).all()
    boxes = [box_of(image) for image in ~many(BlockPatchDropout(4 / 36), 6000, (6, 6))]
    corners = [(top, left) for top, left, height, width in boxes if (height, width) == (2, 2)]
    assert len(corners) > 2000
    share = np.bincount([5 * top + left for top, left in corners], minlength=25) / len(corners)
    assert (abs(share - 1 / 25) <= 4 * math.sqrt(24 / 625 / len(corners))).all()


def test_what_is_too_much_is_given_back_at_any_end_of_any_side():
    """K = 1 leaves nothing but a corner, each equally often; three of 5 x 4 leave runs at all eight ends."""
    mask = many(BlockPatchDropout(0.999), 8000, (6, 6))
    corners = mask[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.sum(1) == 1).all()
    assert ((corners.double().mean(0) - 0.25).abs() <= 4 * math.sqrt(3 / 16 / 8000)).all()
    kept = {tuple(map(tuple, image.nonzero().tolist())) for image in many(BlockPatchDropout(0.85), 2000, (5, 4))}
    ends = [[(0, 0), (0, 1), (0, 2)], [(0, 0), (1, 0), (2, 0)]]
    for rows, columns in ((0, 0), (4, 0), (0, 3), (4, 3)):
        for end in ends:
            assert tuple(sorted((abs(rows - row), abs(columns - column)) for row, column in end)) in kept


def test_blocks_are_as_often_tall_as_wide_with_beits_aspect_ratios():
    """From 0.3 to 1 / 0.3 and evenly in the logarithm, but for rounding to whole patches, where there is room."""
    log_aspect = []
    for image in ~many(BlockPatchDropout(0.1), 4000, (40, 40)):
        _, _, height, width = box_of(image)
        assert height * width - 160 < max(height, width)
        log_aspect.append(math.log(height / width))
    log_aspect, limit = np.array(log_aspect), math.log(1 / 0.3)
    assert abs(log_aspect.mean()) <= 4 * log_aspect.std() / math.sqrt(4000)
    assert abs(log_aspect).max() <= limit + 0.15
    assert abs(log_aspect).max() >= limit - 0.1
    assert log_aspect.std() == pytest.approx(limit / math.sqrt(3), rel=0.06)
    quarters = np.histogram(log_aspect, bins=4, range=(-limit - 0.15, limit + 0.15))[0] / 4000
    assert (abs(quarters - 0.25) < 0.06).all()


@pytest.mark.parametrize(("grid_size", "ratio"), [((3, 40), 0.5), ((40, 3), 0.5), ((14, 14), 0.95), ((2, 2), 0.5)])
def test_where_there_is_no_room_for_the_aspect_ratio_the_block_still_fits(grid_size, ratio):
    for image in ~many(BlockPatchDropout(ratio), 200, grid_size):
        assert is_block(image)
        assert image.sum() == math.prod(grid_size) - exact_count(math.prod(grid_size), ratio)


@pytest.mark.parametrize("ratio", [0.3, 0.63, 0.99])
def test_no_frame_is_preferred_by_blocks(ratio):
    """Where N - K is no multiple of T, the frames that drop one more are drawn: 4 standard errors of 8,000 draws."""
    kept = many(BlockPatchDropout(ratio), 8000, (4, 3, 5)).double().sum((2, 3))
    assert ((kept.mean(0) - kept.mean()).abs() <= 4 * kept.std(dim=0) / math.sqrt(8000) + 1e-9).all()


def test_blocks_of_frames_are_drawn_for_each():
    """Not only of another size: where one lies says nothing of the next, within 4 standard errors."""
    dropped = ~many(BlockPatchDropout(0.25), 4000, (2, 6, 6))
    top = torch.tensor([[box_of(frame)[0] for frame in image] for image in dropped]).double()
    correlation = torch.corrcoef(top.T)[0, 1]
    assert abs(correlation) <= 4 / math.sqrt(4000)


# Places and packing, against loops


@pytest.mark.nightly
@given(grid_size=st.one_of(grids, videos), batch=st.integers(1, 3))
def test_places_of_a_shared_grid_are_those_of_a_loop(grid_size, batch):
    num_patches = math.prod(grid_size)
    places = Places.of(torch.zeros(batch, num_patches, 2), grid_size, None)
    frames, height, width = (1, *grid_size)[-3:]
    expected = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    assert torch.stack([places.frame, places.row, places.column], dim=-1).tolist() == [[list(p) for p in expected]]
    assert (places.height.tolist(), places.width.tolist(), places.frames) == ([[height]], [[width]], frames)


@pytest.mark.nightly
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    extra=st.integers(0, 5), seed=seeds, no_padding=st.booleans(),
)  # fmt: skip
def test_places_of_own_grids_are_the_positions_that_they_came_from(shapes, extra, seed, no_padding):
    """By way of the coordinates, in whatever order, with padding anywhere."""
    if no_padding:
        shapes, extra = shapes[:1], 0
    rng, longest = np.random.default_rng(seed), max(height * width for height, width in shapes) + extra
    positions = rng.integers(0, 60, (len(shapes), longest, 2))
    valid = np.zeros((len(shapes), longest), bool)
    for image, (height, width) in enumerate(shapes):
        at = rng.permutation(longest)[: height * width]
        positions[image, at] = list(np.ndindex(height, width))
        valid[image, at] = True
    facts = own_grids(torch.from_numpy(positions), None if no_padding else torch.from_numpy(valid))
    assert (facts["coords"].dtype, facts["valid"].dtype) == (torch.float32, torch.bool)
    assert (facts["valid"].numpy() == valid).all()
    places = Places.of(facts["coords"], None, None if no_padding else facts["valid"])
    assert list(zip(places.height.flatten().tolist(), places.width.flatten().tolist(), strict=True)) == shapes
    assert places.frames == 1
    found = np.stack([places.row.numpy(), places.column.numpy()], axis=-1)
    for image, shape in enumerate(shapes):
        real, last = valid[image], np.array(shape) - 1
        assert (found[image, real] == positions[image, real]).all()
        assert ((found[image] >= 0) & (found[image] <= last)).all()
        coords = 2 * positions[image, real] / np.maximum(last, 1) - (last > 0)
        np.testing.assert_allclose(facts["coords"][image].numpy()[real], coords, atol=1e-6)


def test_a_grid_beside_padding_is_not_that_of_the_images():
    """Where hosts pad at the right and the bottom, `valid` says which patches are an image's own grid."""
    valid = torch.zeros(1, 4, 5, dtype=torch.bool)
    valid[:, :3, :2] = True
    facts = own_grids(torch.cartesian_prod(torch.arange(4), torch.arange(5)).unsqueeze(0), valid.flatten(1))
    places = Places.of(facts["coords"], (4, 5), facts["valid"])
    assert (places.height.item(), places.width.item()) == (3, 2)
    real = valid.flatten()
    assert places.row[0, real].tolist() == [0, 0, 1, 1, 2, 2]
    assert places.column[0, real].tolist() == [0, 1, 0, 1, 0, 1]


def test_an_image_of_padding_alone_has_places_within_its_grid():
    places = Places.of(torch.full((1, 6, 2), 7.0), None, torch.zeros(1, 6, dtype=torch.bool))
    assert (places.height.item(), places.width.item()) == (1, 1)
    assert not places.row.any()
    assert not places.column.any()


@pytest.mark.nightly
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=seeds)
def test_packing_is_a_loop_over_the_images(lengths, seed):
    """What was packed, side by side and back; behind an image's own patches there is padding."""
    packing, packed = Packing(lengths), torch.from_numpy(np.random.default_rng(seed).random((sum(lengths), 2)))
    side_by_side = packing.unpack(packed)
    assert side_by_side.shape == (len(lengths), max(lengths), 2)
    assert packing.valid.tolist() == [[place < length for place in range(max(lengths))] for length in lengths]
    start = 0
    for image, length in enumerate(lengths):
        assert torch.equal(side_by_side[image, :length], packed[start : start + length])
        start += length
    assert torch.equal(packing.pack(side_by_side), packed)
    marked = torch.where(packing.valid, torch.arange(1.0 + len(lengths))[:-1, None], torch.nan)
    assert packing.pack(marked).tolist() == [image for image, length in enumerate(lengths) for _ in range(length)]


# Cutting patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize(
    ("side", "patch_size", "stride"),
    [((8, 12), 4, None), ((8, 12), (2, 3), None), ((9, 13), 4, None), ((9, 13), (3, 4), (2, 3)), ((8, 8), 2, 5),
     ((5, 7), (5, 7), None)],
)  # fmt: skip
def test_patches_are_those_of_unfold(side, patch_size, stride, dtype):
    """Also of images that are channels last; with pixels left over, and patches that overlap."""
    images = torch.randint(0, 255, (2, 3, *side), generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = F.unfold(images.double(), patch_size, stride=patch_size if stride is None else stride)  # (B, C p q, N)
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    expected = columns.mT.unflatten(2, (3, *patch)).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        patches = functional.cut_patches(images.contiguous(memory_format=layout), patch_size, stride)
        assert patches.dtype == dtype
        assert torch.equal(patches, expected)


@pytest.mark.nightly
@given(data=st.data(), batch=st.integers(0, 2), channels=st.integers(1, 3))
def test_patches_of_images_and_videos_are_those_of_a_loop(data, batch, channels):
    """And `take_patches` takes their rows."""
    num_axes = data.draw(st.sampled_from([2, 3]))
    patch, stride = (data.draw(st.tuples(*[st.integers(1, 3)] * num_axes)) for _ in range(2))
    sides = [length + data.draw(st.integers(0, 4)) for length in patch]
    images = torch.arange(float(batch * channels * math.prod(sides))).view(batch, channels, *sides)
    patches = functional.cut_patches(images, patch, stride)
    grid_size = [(side - length) // step + 1 for side, length, step in zip(sides, patch, stride, strict=True)]
    assert patches.shape == (batch, math.prod(grid_size), channels, *patch)
    for index, place in enumerate(np.ndindex(*grid_size)):
        window = [slice(p * s, p * s + length) for p, s, length in zip(place, stride, patch, strict=True)]
        assert torch.equal(patches[:, index], images[(slice(None), slice(None), *window)])
    keep = torch.randint(math.prod(grid_size), (batch, data.draw(st.integers(0, 5))))
    taken = functional.take_patches(images, keep, patch, stride)
    assert torch.equal(taken, patches[torch.arange(batch).unsqueeze(1), keep])


def test_patches_carry_the_gradient_of_their_images():
    images = torch.randn(1, 1, 5, 4, requires_grad=True)
    functional.cut_patches(images, 2).sum().backward()
    assert torch.equal(images.grad[0, 0], torch.tensor([[1.0] * 4] * 4 + [[0.0] * 4]))


IMAGES = torch.zeros(2, 3, 8, 8)
BAD = [
    ("images", np.zeros((2, 3, 8, 8)), TypeError), ("images", None, TypeError), ("images", IMAGES[0], ValueError),
    ("images", torch.zeros(2, 3, 1, 1, 8, 8), ValueError), ("patch_size", 9, ValueError),
    ("patch_size", (2, 9), ValueError), ("patch_size", (2, 2, 2), ValueError), ("patch_size", 0, ValueError),
    ("patch_size", 2.0, TypeError), ("patch_size", "2", TypeError), ("patch_size", True, TypeError),
    ("patch_size", None, TypeError), ("stride", 0, ValueError), ("stride", (2,), ValueError),
    ("stride", 1.5, TypeError), ("stride", (2, -1), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda value: str(value)[:20])
def test_bad_arguments_of_a_cut_are_named(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        functional.cut_patches(**{"images": IMAGES, "patch_size": 2, name: value})
