"""The exact chance of each patch to be among the kept ones, by integration over the threshold."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checks import check_center, check_grid_size, check_mask_ratio, check_sampling, check_sigma
from .grids import patch_coordinates
from .scores import log_density_at, rankable
from .top import num_kept_patches


def keep_probability(
    grid_size: Sequence[int],
    mask_ratio: float,
    *,
    sigma: float | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
) -> Tensor:
    """The chance that each patch is kept, computed rather than simulated.

    Args:
        grid_size: (H, W), patches per column and row.
        mask_ratio: share of the patches that is dropped, in [0, 1).
        sigma: variance of the Gaussian on [-1, 1]^2; None is uniform.
        center: (y, x) of the Gaussian's mean in [-1, 1]^2.
        sampling: `"additive"` or `"weighted"`, see `functional.gaussian_scores`.

    Returns:
        (H, W) float32 on the CPU, right to 1e-4 on any grid, with the sum K. Some entries may be exactly or nearly 0:
        at ratio 0.918 and sigma 0.2 the additive rule never keeps 55 % of a 14 x 14 grid.

    Raises:
        ValueError, TypeError: as `sample_keep_indices`.
    """
    grid_size, mask_ratio = check_grid_size(grid_size), check_mask_ratio(mask_ratio)
    center, sampling = check_center(center), check_sampling(sampling)
    return probability_on(grid_size, mask_ratio, None if sigma is None else check_sigma(sigma), center, sampling)


def probability_on(
    grid_size: tuple[int, ...], mask_ratio: float, sigma: float | None, center: Sequence[float], sampling: str
) -> Tensor:
    """`keep_probability` on a grid (H, W), or (T, H, W) of frames that compete for the same K places."""
    num_patches = math.prod(grid_size)
    num_kept = num_kept_patches(num_patches, mask_ratio)
    if sigma is None or num_kept == num_patches:
        return torch.full(grid_size, num_kept / num_patches, dtype=torch.float32, device="cpu")
    frame = patch_coordinates(grid_size[-2:], device="cpu", dtype=torch.float64)
    log_density = log_density_at(frame, rankable(sigma), center).repeat(num_patches // len(frame))
    return inclusion_probability(log_density, num_kept, sampling).to(torch.float32).view(*grid_size)


def inclusion_probability(log_density: Tensor, num_kept: int, sampling: str, num_steps: int = 256) -> Tensor:
    """P(patch i is among the `num_kept` highest scores), for independent scores.

    Let the threshold fall from the highest score to the lowest. Patch i is kept when it is passed while fewer than K of
    the others have been passed, so its chance is the integral, over the moment at which it is passed, of
    P(at most K - 1 of the others passed). That number is a sum of independent Bernoulli variables (Poisson-binomial).

    Args:
        log_density: (N,) float64.
        num_kept: K, with 1 <= K < N.
        sampling: `"additive"` or `"weighted"`.
        num_steps: steps of the integral; the error falls with their square.

    Returns:
        (N,) float64 with the sum K.
    """
    passed, earliest, latest = _passage(log_density, sampling)
    num_patches = log_density.numel()
    nodes = _nodes(num_patches, num_kept, num_steps)  # expected numbers of passed patches
    times = _invert(lambda time: passed(time).sum(1), nodes, earliest, latest)
    chance = passed(times)  # (2 * steps + 1, N), rising
    step_ends, step_middles = chance[0::2], chance[1::2]
    step_ends[0], step_ends[-1] = 0.0, 1.0
    in_time = _others_below(step_middles, nodes[1::2], num_kept)
    kept = (in_time * step_ends.diff(dim=0)).sum(0)
    return (kept * (num_kept / kept.sum())).clamp(max=1.0)


def _passage(log_density: Tensor, sampling: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The chance that each patch has been passed, time (T,) -> (T, N), and the times where it is 0 and 1."""
    if sampling == "additive":  # u + density passes the threshold -time
        density = log_density.exp()
        return (
            lambda time: (1 + density + time[:, None]).clamp(0, 1),
            -1 - density.max(),
            -density.min(),
        )
    # An exponential clock per patch with the density as its rate, in logarithmic time.
    log_rate = log_density - log_density.max()
    return (
        lambda time: -torch.expm1(-torch.exp(time[:, None] + log_rate)),
        torch.full_like(log_rate[0], -40.0),
        4.0 - log_rate.min(),
    )


def _nodes(num_patches: int, num_kept: int, num_steps: int) -> Tensor:
    """Ends and middles of the steps, as expected numbers of passed patches: dense around K, where the outcome falls.

    The first and the last node stand for no patch and for all.
    """
    reach = 3 * math.sqrt(num_patches) + 1
    stretch = torch.linspace(-1, 1, 2 * num_steps + 1, dtype=torch.float64, device="cpu") * math.asinh(8 * reach)
    return (num_kept + stretch.sinh() / 8).clamp(0, num_patches)


def _invert(rising: Callable[[Tensor], Tensor], targets: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where `rising` takes the values `targets`, by bisection."""
    lower, upper = low.expand_as(targets), high.expand_as(targets)
    for _ in range(60):
        middle = (lower + upper) / 2
        above = rising(middle) >= targets
        lower, upper = torch.where(above, lower, middle), torch.where(above, middle, upper)
    return (lower + upper) / 2


def _others_below(chance: Tensor, expected: Tensor, num_kept: int) -> Tensor:
    """P(fewer than K of the patches other than i have been passed), for every row of `chance` (T, N) and every i.

    The characteristic function of the count is a product over the patches; one factor is divided out for each i, and
    the distribution comes back by a Fourier sum. Its period needs to hold only the 6 * sqrt(N) counts around the
    expected one: by Hoeffding's inequality less than 4e-8 lies outside.
    """
    num_patches = chance.shape[1]
    half = math.ceil(3 * math.sqrt(num_patches)) + 1
    period = 2 * half + 1  # odd, so that no factor 1 + p (e^iw - 1) is 0
    lowest = expected.round() - half
    num_counts = (num_kept - lowest).clamp(0, period)  # counts in the window that are below K
    result = (num_counts / period)[:, None].expand_as(chance).clone()
    for frequency in range(1, half + 1):
        angle = 2 * math.pi * frequency / period
        # Sum of e^(-i angle count) over those counts, by the middle of the window and the Dirichlet kernel.
        weight = torch.polar(
            torch.sin(angle * num_counts / 2) / math.sin(angle / 2), -angle * (lowest + (num_counts - 1) / 2)
        )
        factors = 1 + chance * complex(math.cos(angle) - 1, math.sin(angle))
        result += 2 / period * (weight[:, None] * factors.prod(1, keepdim=True) / factors).real
    return result.clamp(0, 1)
