"""Coordinates, scores, top-k and taking in one call each: all that a Gaussian or uniform mask is, without a module."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    check_center,
    check_count,
    check_flag,
    check_grid_holds,
    check_grid_size,
    check_mask_ratio,
    check_sampling,
    check_tokens,
    square_grid_size,
)
from .grids import patch_coordinates
from .scores import gaussian_scores, uniform_scores
from .tokens import take_drawn_tokens
from .top import num_kept_patches, top_patches


def sample_keep_indices(
    batch_size: int,
    grid_size: Sequence[int],
    mask_ratio: float,
    *,
    sigma: float | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    ordered: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the patches that each image keeps.

    Args:
        batch_size: number of images.
        grid_size: (H, W), patches per column and row.
        mask_ratio: share of the patches that is dropped, in [0, 1); see `num_kept_patches`.
        sigma: variance of the Gaussian (GLIP), or None for uniform sampling (FLIP).
        center: (y, x) of the Gaussian's mean, in [-1, 1]^2.
        sampling: `"additive"` or `"weighted"`, see `gaussian_scores`.
        ordered: ascending indices.
        generator: source of randomness on `device`; None is the global one.
        device: of the indices.

    Returns:
        (batch_size, K) int64, without repetition in a row.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it.
    """
    batch_size, grid_size = check_count("batch_size", batch_size), check_grid_size(grid_size)
    mask_ratio, center, sampling = check_mask_ratio(mask_ratio), check_center(center), check_sampling(sampling)
    ordered = check_flag("ordered", ordered)
    coords = patch_coordinates(grid_size, device=device).expand(batch_size, -1, -1)
    if sigma is None:
        scores = uniform_scores(coords, generator)
    else:
        scores = gaussian_scores(coords, sigma, center=center, sampling=sampling, generator=generator)
    return top_patches(scores, num_kept_patches(math.prod(grid_size), mask_ratio), ordered=ordered)


def gaussian_patch_dropout(
    x: Tensor,
    mask_ratio: float,
    sigma: float | None,
    *,
    num_prefix_tokens: int = 0,
    grid_size: Sequence[int] | None = None,
    center: Sequence[float] = (0.0, 0.0),
    sampling: str = "additive",
    ordered: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Drop patches of `x` by a Gaussian (GLIP), or uniformly with `sigma=None` (FLIP).

    A function knows no training mode: it always drops. `GaussianPatchDropout` is the module.

    Args:
        x: (B, P + N, D) tokens, prefix first.
        grid_size: (H, W) with H * W = N; None takes the square root of N.
        mask_ratio: share of the patches that is dropped, in [0, 1).
        sigma: variance of the Gaussian on [-1, 1]^2; None is uniform.
        num_prefix_tokens: P, always kept.
        center: (y, x) of the Gaussian's mean in [-1, 1]^2.
        sampling: `"additive"` or `"weighted"`, see `gaussian_scores`.
        ordered: keep the patches in their order.
        generator: source of randomness on the device of `x`; None is the global one.

    Returns:
        The tokens (B, P + K, D) and the indices (B, K) of the patches that they hold.

    Raises:
        ValueError, TypeError: as `sample_keep_indices`; for N that is no square when no `grid_size` is given.
    """
    num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens)
    check_tokens(x, num_prefix_tokens)
    num_patches = x.shape[1] - num_prefix_tokens
    grid_size = square_grid_size(num_patches) if grid_size is None else check_grid_size(grid_size)
    check_grid_holds(grid_size, num_patches)
    keep_indices = sample_keep_indices(
        x.shape[0], grid_size, mask_ratio,
        sigma=sigma, center=center, sampling=sampling, ordered=ordered, generator=generator, device=x.device,
    )  # fmt: skip
    return take_drawn_tokens(x, keep_indices, num_prefix_tokens), keep_indices
