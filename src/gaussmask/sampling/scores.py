"""From a grid of patches to one score per patch.

Sources: FLIP (Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794) and GLIP (Liang and
Larson, *Centered Masking for Language-Image Pre-Training*, arXiv 2403.15837).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    check_center,
    check_coords,
    check_float_dtype,
    check_grid_size,
    check_sampling,
    check_sigma,
)
from .grids import patch_coordinates


def rankable(sigma: float) -> float:
    """The sigma to draw with: at least 1e-6.

    There the order by distance is certain already, on grids of up to 200 patches a side. Below, float32 has no digits
    left for the noise that decides between patches at the same distance.
    """
    return max(sigma, 1e-6)


def log_density_at(coords: Tensor, sigma: float, center: Sequence[float]) -> Tensor:
    """Logarithm of the bivariate normal density with covariance `sigma * I` at `coords` (..., 2)."""
    offset_y, offset_x = (coords[..., axis] - center[axis] for axis in (0, 1))
    return (offset_y.square() + offset_x.square()) / (-2 * sigma) - math.log(2 * math.pi) - math.log(sigma)


def gaussian_density(
    grid_size: Sequence[int],
    sigma: float,
    *,
    center: Sequence[float] = (0.0, 0.0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The bivariate normal density at the patches of a grid (GLIP, section 3).

    Args:
        grid_size: (H, W), patches per column and row.
        sigma: **variance** of the Gaussian on the square [-1, 1]^2, as in the paper and in its authors' code: 0.2
            there is a standard deviation of 0.447.
        center: (y, x) of the mean, in [-1, 1]^2.

    Returns:
        (H, W), right to the precision of `dtype`.

    Raises:
        ValueError, TypeError: for a `sigma`, `center` or `grid_size` that is out of range, or a `dtype` that is not
            floating.
    """
    grid_size, sigma, center = check_grid_size(grid_size), check_sigma(sigma), check_center(center)
    precise = torch.promote_types(check_float_dtype(dtype), torch.float32)  # half of a precision squares badly
    coords = patch_coordinates(grid_size, device=device, dtype=precise)
    return log_density_at(coords, sigma, center).exp().to(dtype).view(*grid_size)


def uniform_scores(coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw from U[0, 1) per patch: FLIP's scores.

    Args:
        coords: (B, N, 2); only its shape and device are used.

    Returns:
        (B, N) float32, whatever autocast says: bfloat16 has too few values to rank 196 patches without ties.

    Raises:
        ValueError, TypeError: for `coords` of another shape.
    """
    check_coords(coords)
    return uniform(coords.shape[:2], coords.device, generator)


def uniform(size: Sequence[int], device: torch.device | str | None, generator: torch.Generator | None = None) -> Tensor:
    """U[0, 1) in float32, whatever autocast says."""
    if generator is None:  # torch.rand takes symbolic sizes, and so compiles for any batch, only without the argument
        return torch.rand(size, device=device, dtype=torch.float32)
    return torch.rand(size, generator=generator, device=device, dtype=torch.float32)


def gaussian_scores(
    coords: Tensor,
    sigma: float,
    *,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scores that favour the patches near `center`: GLIP's.

    Args:
        coords: (B, N, 2), the (y, x) of every patch.
        sigma: variance of the Gaussian, as in `gaussian_density`.
        sampling: `"additive"` is u + density, the authors' own rule (theirs is u - (1 - density), which ranks alike).
            `"weighted"` is weighted sampling without replacement with the density as the weights: Gumbel noise on the
            log-density (Efraimidis and Spirakis, 2006), which leaves every patch a chance.

    Returns:
        (B, N) float32. Both rules draw one `torch.rand((B, N))`.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it.
    """
    check_coords(coords)
    sigma, center, sampling = check_sigma(sigma), check_center(center), check_sampling(sampling)
    # Images that share a grid expand one row of coordinates: the preference of that row serves them all.
    shared = coords[:1] if coords.stride(0) == 0 else coords
    preference = preference_at(shared.float(), sigma, center, sampling)
    noise = uniform(coords.shape[:2], coords.device, generator)
    if sampling == "weighted":
        noise = noise.clamp(min=torch.finfo(noise.dtype).tiny)  # a draw of 0 would score -inf, like padding
    return with_noise(preference, noise, sampling)


def preference_at(coords: Tensor, sigma: float, center: Sequence[float], sampling: str) -> Tensor:
    """What the scores at `coords` (..., 2) are made of besides the noise: the density, or its logarithm."""
    log_density = log_density_at(coords, rankable(sigma), center)
    return log_density.exp() if sampling == "additive" else log_density


def preference_on(
    grid_size: tuple[int, ...],
    sigma: float,
    center: tuple[float, float],
    sampling: str,
    *,
    device: torch.device | str | None,
) -> Tensor:
    """The same on a grid, (1, N) float32; the frames of a video (T, H, W) have that of a frame."""
    preference = preference_at(patch_coordinates(grid_size[-2:], device=device), sigma, center, sampling)
    return preference.repeat(math.prod(grid_size[:-2])).unsqueeze(0)


def with_noise(preference: Tensor, noise: Tensor, sampling: str) -> Tensor:
    """The scores (B, N), of noise (B, N) from U[0, 1). One draw in 2^24 is 0, and with "weighted" scores -inf."""
    if sampling == "additive":
        return noise + preference
    return preference - torch.xlogy(-1, noise).log()  # xlogy: -log(noise) at once
