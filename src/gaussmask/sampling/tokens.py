"""Scores, sampling and token gathering as pure functions.

The way of the data: a grid of patches has coordinates, coordinates and noise give scores, the patches with the highest
scores are kept, and the kept rows are taken from the tokens. Everything here works without the modules.

Sources: FLIP (Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794) and GLIP (Liang and
Larson, *Centered Masking for Language-Image Pre-Training*, arXiv 2403.15837).
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .checks import (
    check_center,
    check_count,
    check_flag,
    check_grid_holds,
    check_grid_size,
    check_keep_indices,
    check_mask_ratio,
    check_sampling,
    check_tokens,
    square_grid_size,
)
from .scores import gaussian_scores, patch_coordinates, uniform_scores
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
    ordered = check_flag(ordered)
    coords = patch_coordinates(grid_size, device=device).expand(batch_size, -1, -1)
    if sigma is None:
        scores = uniform_scores(coords, generator)
    else:
        scores = gaussian_scores(coords, sigma, center=center, sampling=sampling, generator=generator)
    return top_patches(scores, num_kept_patches(math.prod(grid_size), mask_ratio), ordered=ordered)


def token_indices(keep_indices: Tensor, num_patches: int, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> Tensor:
    """`keep_indices` counted over all tokens, with those of the prefix and the suffix, which are always kept.

    Args:
        keep_indices: (B, K), counted over the patches.
        num_patches: N.
        num_prefix_tokens: P.
        num_suffix_tokens: S.

    Returns:
        (B, P + K + S), counted over the P + N + S tokens.
    """
    if num_prefix_tokens == num_suffix_tokens == 0:
        return keep_indices
    num_tokens = num_prefix_tokens + num_patches + num_suffix_tokens
    always = torch.arange(num_tokens, device=keep_indices.device).expand(keep_indices.shape[0], -1)
    suffix = always[:, num_tokens - num_suffix_tokens :]
    return torch.cat([always[:, :num_prefix_tokens], keep_indices + num_prefix_tokens, suffix], dim=1)


def _select_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """The tokens (B, M, D) at `indices` (B, M) of `x` (B, L, D)."""
    # One index_select over the rows of all images, prefix and kept together: several times faster than gather, cat or
    # advanced indexing, which expand the index over the width or walk the tokens twice.
    batch_size, length, width = x.shape
    first_row = torch.arange(0, batch_size * length, length, device=x.device).unsqueeze(1)
    rows = (indices + first_row).flatten()
    return rearrange(x, "b l d -> (b l) d").index_select(0, rows).view(*indices.shape, width)


def take_drawn_tokens(x: Tensor, keep_indices: Tensor, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> Tensor:
    """`take_tokens` for indices that this library drew, which need no check, and with S tokens behind the patches."""
    num_patches = x.shape[1] - num_prefix_tokens - num_suffix_tokens
    return _select_tokens(x, token_indices(keep_indices, num_patches, num_prefix_tokens, num_suffix_tokens))


def take_tokens(x: Tensor, keep_indices: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """The prefix tokens and the kept patches of every image, in this order.

    Args:
        x: (B, P + N, D), any dtype and memory layout.
        keep_indices: (B, K) int64, counted over the N patches only, in any order.
        num_prefix_tokens: P, class and register tokens in front, which are always kept.

    Returns:
        (B, P + K, D).

    Raises:
        ValueError: for `keep_indices` of another dtype, rank, batch or device; for indices outside [0, N) on the CPU
            in eager mode. Elsewhere these are caught by the device's own assertion; another image's token is never
            returned.
    """
    num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens)
    check_tokens(x, num_prefix_tokens)
    batch_size, length, _ = x.shape
    num_patches = length - num_prefix_tokens
    check_keep_indices(keep_indices, batch_size, x.device)
    # In the flattened tokens an index out of range would be a row of another image. Sent behind the last row, it is
    # refused by index_select itself, on every device and without a synchronisation.
    outside = (keep_indices < 0) | (keep_indices >= num_patches)
    indices = token_indices(keep_indices.masked_fill(outside, batch_size * length), num_patches, num_prefix_tokens)
    if torch.compiler.is_compiling():
        return _select_tokens(x, indices)
    try:
        return _select_tokens(x, indices)
    except IndexError:
        raise ValueError(
            f"keep_indices must lie in [0, {num_patches}), counted over the patches without the "
            f"{num_prefix_tokens} prefix tokens, got values from {keep_indices.min()} to {keep_indices.max()}"
        ) from None


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
