"""keep_probability against closed forms, enumeration, quadrature and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from gaussmask import functional, keep_probability

SAMPLINGS = ["additive", "weighted"]


def density(grid_size, sigma, center):
    return functional.gaussian_density(grid_size, sigma, center=center, dtype=torch.float64).flatten().numpy()


def by_ordered_draws(weights, num_kept):
    """Weighted sampling without replacement: the sum over all orders of drawing K patches (Plackett-Luce)."""
    kept = np.zeros(len(weights))
    for draw in itertools.permutations(range(len(weights)), num_kept):
        chosen = weights[list(draw)]
        left = weights.sum() - np.concatenate([[0], chosen[:-1].cumsum()])
        kept[list(draw)] += np.prod(chosen / left)
    return kept


def by_subsets(densities, num_kept):
    """Additive rule: for every u of a patch, the chance of every set of fewer than K others above it."""

    def kept(i):
        others = np.delete(densities, i)

        def chance(u):
            above = np.clip(1 - (u + densities[i] - others), 0, 1)
            subsets = itertools.product([False, True], repeat=len(others))
            return sum(np.prod(np.where(s, above, 1 - above)) for s in subsets if sum(s) < num_kept)

        kinks = np.concatenate([others - densities[i], others - densities[i] + 1])
        ends = [0, *sorted(kinks[(kinks > 0) & (kinks < 1)]), 1]
        return sum(quad(chance, low, high)[0] for low, high in itertools.pairwise(ends) if high > low)

    return np.array([kept(i) for i in range(len(densities))])


def by_counting(densities, i, num_kept, sampling):
    """Midpoint rule over the patch's own uniform draw, with the number of others ahead of it counted one by one."""
    u = (np.arange(1500) + 0.5) / 1500
    ahead = np.zeros((num_kept, len(u)))  # P(count = 0 .. K - 1)
    ahead[0] = 1
    for other in np.delete(densities, i):
        p = np.clip(1 - (u + densities[i] - other), 0, 1) if sampling == "additive" else 1 - u ** (other / densities[i])
        ahead[1:] = ahead[1:] * (1 - p) + ahead[:-1] * p
        ahead[0] *= 1 - p
    return ahead.sum(axis=0).mean()


@pytest.mark.parametrize("grid_size", [(1, 2), (2, 1)])
@pytest.mark.parametrize("offset", [0.1, 0.5, 0.9])
def test_two_patches_have_a_closed_form(grid_size, offset):
    center = (0.0, offset) if grid_size == (1, 2) else (offset, 0.0)  # nearer to the second patch
    less, more = density(grid_size, 0.5, center)
    assert 0 < more - less < 1
    additive = keep_probability(grid_size, 0.5, sigma=0.5, center=center).flatten()
    assert additive[1].item() == pytest.approx(1 - (1 - (more - less)) ** 2 / 2, abs=1e-4)
    weighted = keep_probability(grid_size, 0.5, sigma=0.5, center=center, sampling="weighted").flatten()
    assert weighted[1].item() == pytest.approx(more / (more + less), abs=1e-4)


@pytest.mark.parametrize("num_kept", [1, 2, 4])
@pytest.mark.parametrize(("grid_size", "center"), [((2, 3), (0.2, -0.6)), ((3, 3), (0.0, 0.0)), ((3, 3), (1.0, 0.4))])
def test_weighted_is_the_enumeration_of_all_ordered_draws(grid_size, center, num_kept):
    ratio = 1 - num_kept / math.prod(grid_size)
    for sigma in (0.2, 1.0):
        expected = by_ordered_draws(density(grid_size, sigma, center), num_kept)
        actual = keep_probability(grid_size, ratio, sigma=sigma, center=center, sampling="weighted")
        np.testing.assert_allclose(actual.flatten(), expected, atol=1e-4)


@pytest.mark.parametrize("num_kept", [1, 3, 5])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_additive_is_the_integral_over_all_subsets(sigma, num_kept):
    expected = by_subsets(density((2, 3), sigma, (0.2, -0.3)), num_kept)
    actual = keep_probability((2, 3), 1 - num_kept / 6, sigma=sigma, center=(0.2, -0.3))
    np.testing.assert_allclose(actual.flatten(), expected, atol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("sigma", "mask_ratio", "num_kept"), [(0.1, 0.918, 16), (0.2, 0.918, 16), (0.8, 0.918, 16), (0.2, 0.5, 98)]
)
def test_papers_grid_agrees_with_counting(sigma, mask_ratio, num_kept, sampling):
    actual = keep_probability((14, 14), mask_ratio, sigma=sigma, sampling=sampling).flatten()
    densities = density((14, 14), sigma, (0.0, 0.0))
    for patch in (6 * 14 + 5, 4 * 14 + 4):
        assert actual[patch].item() == pytest.approx(by_counting(densities, patch, num_kept, sampling), abs=1e-4)


@pytest.mark.parametrize("sampling", [None, *SAMPLINGS])
@pytest.mark.parametrize(
    ("grid_size", "center"),
    [((14, 14), (0.0, 0.0)), ((7, 10), (0.0, 0.0)), ((1, 7), (0.0, 0.0)), ((7, 10), (0.6, -0.4))],
)
def test_simulation_agrees(grid_size, center, sampling):
    """Frequencies of 20,000 draws within 5 standard errors and 1e-3."""
    options = {"sigma": 0.2, "sampling": sampling, "center": center} if sampling else {}
    chance = keep_probability(grid_size, 0.7, **options).double().flatten()
    generator = torch.Generator().manual_seed(0)
    kept = functional.sample_keep_indices(20_000, grid_size, 0.7, **options, generator=generator)
    frequency = kept.flatten().bincount(minlength=len(chance)) / 20_000
    standard_error = (chance * (1 - chance) / 20_000).sqrt()
    assert ((frequency - chance).abs() <= 5 * standard_error + 1e-3).all()


@settings(deadline=None, max_examples=30)
@given(
    grid_size=st.tuples(st.integers(1, 9), st.integers(1, 9)), mask_ratio=st.floats(0, 0.999),
    sigma=st.floats(0.01, 100), center=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    sampling=st.sampled_from(SAMPLINGS),
)  # fmt: skip
def test_chances_sum_to_the_kept_count_and_fall_with_the_distance(grid_size, mask_ratio, sigma, center, sampling):
    chance = keep_probability(grid_size, mask_ratio, sigma=sigma, center=center, sampling=sampling)
    assert chance.shape == grid_size
    assert ((chance >= 0) & (chance <= 1)).all()
    num_kept = functional.num_kept_patches(math.prod(grid_size), mask_ratio)
    assert chance.double().sum().item() == pytest.approx(num_kept, rel=1e-5)
    by_distance = chance.flatten()[np.argsort(-density(grid_size, sigma, center), kind="stable").copy()]
    assert (by_distance.diff() <= 1e-4).all()
    mirrored = keep_probability(grid_size, mask_ratio, sigma=sigma, center=(center[0], -center[1]), sampling=sampling)
    torch.testing.assert_close(mirrored.flip(1), chance, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_centred_is_symmetric(sampling):
    chance = keep_probability((14, 14), 0.75, sigma=0.2, sampling=sampling)
    for mirrored in (chance.flip(0), chance.flip(1), chance.T):
        torch.testing.assert_close(mirrored, chance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_wide_gaussian_is_uniform(sampling):
    chance = keep_probability((7, 10), 0.75, sigma=1e5, sampling=sampling)
    torch.testing.assert_close(chance, torch.full((7, 10), 17 / 70), rtol=0, atol=1e-4)


def test_narrow_gaussian_keeps_the_nearest():
    chance = keep_probability((14, 14), 0.918, sigma=0.001, sampling="weighted")
    middle = torch.zeros(14, 14)
    middle[5:9, 5:9] = 1
    torch.testing.assert_close(chance, middle, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sigma", "share"), [(0.1, 0.78), (0.2, 0.55), (0.8, 0.0)])
def test_share_of_patches_that_the_additive_rule_never_keeps(sigma, share):
    never = keep_probability((14, 14), 0.918, sigma=sigma) < 1e-3
    assert never.float().mean().item() == pytest.approx(share, abs=0.005)
    weighted = keep_probability((14, 14), 0.918, sigma=sigma, sampling="weighted")
    assert (weighted > 0).all()


@pytest.mark.parametrize("options", [{}, {"sigma": 0.2}, {"sigma": 0.2, "sampling": "weighted"}], ids=str)
def test_result_is_float32_on_the_cpu_whatever_the_defaults(options):
    expected = keep_probability((3, 4), 0.8, **options)
    assert (expected.dtype, expected.device.type) == (torch.float32, "cpu")
    torch.set_default_dtype(torch.float64)
    try:
        actual = keep_probability((3, 4), 0.8, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected)
    with torch.device("meta"):
        actual = keep_probability((3, 4), 0.8, **options)
    torch.testing.assert_close(actual, expected)
