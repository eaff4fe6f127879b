"""Scores, sampling and token gathering as pure functions.

The way of the data: a grid of patches has coordinates, coordinates and noise give scores, the patches with the highest
scores are kept, and the kept rows are taken from the tokens. Everything here works without the modules.

Sources: FLIP (Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794) and GLIP (Liang and
Larson, *Centered Masking for Language-Image Pre-Training*, arXiv 2403.15837).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .probability import keep_probability
from .scores import (
    gaussian_density,
    gaussian_scores,
    num_kept_patches,
    patch_coordinates,
    top_packed_patches,
    top_patches,
    uniform_scores,
)
from .validation import (
    check_axes,
    check_center,
    check_count,
    check_grid_holds,
    check_grid_size,
    check_images,
    check_keep_indices,
    check_mask_ratio,
    check_sampling,
    check_sigma,
    check_tokens,
    square_grid_size,
)

__all__ = [
    "gaussian_density",
    "gaussian_patch_dropout",
    "gaussian_scores",
    "keep_probability",
    "num_kept_patches",
    "patch_coordinates",
    "sample_keep_indices",
    "take_patches",
    "take_tokens",
    "top_packed_patches",
    "top_patches",
    "uniform_scores",
]


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
        grid_size: (H, W), patches per column and row.
        mask_ratio: share of the patches that is dropped, in [0, 1); see `num_kept_patches`.
        sigma: variance of the Gaussian (GLIP), or None for uniform sampling (FLIP).
        center: (y, x) of the Gaussian's mean, in [-1, 1]^2.
        sampling: `"additive"` or `"weighted"`, see `gaussian_scores`.
        ordered: ascending indices.
        generator: source of randomness on `device`; None is the global one.

    Returns:
        (batch_size, K) int64, without repetition in a row.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it.
    """
    batch_size, grid_size = check_count("batch_size", batch_size), check_grid_size(grid_size)
    mask_ratio, center, sampling = check_mask_ratio(mask_ratio), check_center(center), check_sampling(sampling)
    coords = patch_coordinates(grid_size, device=device).expand(batch_size, -1, -1)
    if sigma is None:
        scores = uniform_scores(coords, generator)
    else:
        scores = gaussian_scores(coords, check_sigma(sigma), center=center, sampling=sampling, generator=generator)
    return top_patches(scores, num_kept_patches(math.prod(grid_size), mask_ratio), ordered=ordered)


def token_indices(keep_indices: Tensor, num_patches: int, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> Tensor:
    """`keep_indices` counted over all tokens, with those of the prefix and the suffix, which are always kept.

    Args:
        keep_indices: (B, K), counted over the patches.
        num_patches, num_prefix_tokens, num_suffix_tokens: N, P and S.

    Returns:
        (B, P + K + S), counted over the P + N + S tokens.
    """
    if num_prefix_tokens == num_suffix_tokens == 0:
        return keep_indices
    num_tokens = num_prefix_tokens + num_patches + num_suffix_tokens
    always = torch.arange(num_tokens, device=keep_indices.device).expand(len(keep_indices), -1)
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
        ValueError: for `keep_indices` of another dtype, rank or batch; for indices outside [0, N) on the CPU in eager
            mode. Elsewhere these are caught by the device's own assertion; another image's token is never returned.
    """
    num_prefix_tokens = check_count("num_prefix_tokens", num_prefix_tokens)
    check_tokens(x, num_prefix_tokens)
    batch_size, length, _ = x.shape
    num_patches = length - num_prefix_tokens
    check_keep_indices(keep_indices, batch_size)
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


def take_drawn_patches(
    images: Tensor, keep_indices: Tensor, patch_size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """`take_patches` for indices that this library drew, which need no check."""
    batch_size, channels, *sides = images.shape
    grid_size = [(side - patch) // step + 1 for side, patch, step in zip(sides, patch_size, stride, strict=True)]
    places: list[Tensor] = []  # the (y, x) of every kept patch, each (B, K)
    rest = keep_indices
    for count in reversed(grid_size):
        places.insert(0, rest % count)
        rest = rest // count
    batch = torch.arange(batch_size, device=images.device).unsqueeze(1)
    if torch.compiler.is_compiling() or (images.requires_grad and torch.is_grad_enabled()) or images.numel() == 0:
        windows = images
        for axis, (patch, step) in enumerate(zip(patch_size, stride, strict=True), start=2):
            windows = windows.unfold(axis, patch, step)  # in the end a view (B, C, *grid, *patch)
        chosen: tuple[Any, ...] = (batch, slice(None), *places)
        return windows[chosen]

    # The same, but several times faster: a patch is made of runs of pixels that lie one behind the other in memory. A
    # run is a row of an overlapping view, and the rows of all patches are taken by one index_select.
    channels_last = images.stride(1) == 1 and images.stride(-1) == channels > 1
    if not channels_last and images.stride(-1) != 1:
        images = images.contiguous()
    of_image, of_channel, *of_pixel = images.stride()
    outer, run = list(zip(patch_size[:-1], of_pixel[:-1], strict=True)), [patch_size[-1]]
    if channels_last:
        run.append(channels)
    else:
        outer.insert(0, (channels, of_channel))
    first = batch * of_image
    for place, step, distance in zip(places, stride, of_pixel, strict=True):
        first = first + place * (step * distance)
    for count, distance in outer:
        first = first.unsqueeze(-1) + torch.arange(count, device=images.device) * distance
    length = 1 + sum((side - 1) * distance for side, distance in zip(images.shape, images.stride(), strict=True))
    runs = images.as_strided((length - math.prod(run) + 1, math.prod(run)), (1, 1))
    patches = runs.index_select(0, first.flatten()).view(*first.shape, *run)
    return patches.movedim(-1, 2) if channels_last else patches


def take_patches(
    images: Tensor, keep_indices: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> Tensor:
    """The pixels of the kept patches, to be projected without the others: dropping before the embedding.

    With a convolution of kernel and stride `patch_size` as the embedding, `F.linear(patches.flatten(2),
    conv.weight.flatten(1), conv.bias)` are its outputs (B, K, D) for the kept patches.

    Args:
        images: (B, C, H, W), or videos (B, C, T, H, W); any dtype and memory layout.
        keep_indices: (B, K) int64, counted over the N patches row by row, in any order.
        patch_size: (p, q), or (t, p, q) of a video; an int is the same for all axes.
        stride: distance from patch to patch; None is the `patch_size`. Pixels that fill no patch are left out, as a
            convolution does.

    Returns:
        (B, K, C, p, q), or (B, K, C, t, p, q).

    Raises:
        ValueError, TypeError: for `images` or a patch of another rank, or a patch larger than the image; for
            `keep_indices` as in `take_tokens`.
    """
    check_images(images)
    num_axes = images.ndim - 2
    patch_size = check_axes("patch_size", patch_size, num_axes)
    stride = patch_size if stride is None else check_axes("stride", stride, num_axes)
    if any(side < patch for side, patch in zip(images.shape[2:], patch_size, strict=True)):
        raise ValueError(f"patch_size={tuple(patch_size)} is larger than images of shape {tuple(images.shape)}")
    check_keep_indices(keep_indices, len(images))
    sides = zip(images.shape[2:], patch_size, stride, strict=True)
    num_patches = math.prod([(side - patch) // step + 1 for side, patch, step in sides])
    inside = ((keep_indices >= 0) & (keep_indices < num_patches)).all()
    if keep_indices.is_cpu and not torch.compiler.is_compiling():
        if not inside:
            raise ValueError(
                f"keep_indices must lie in [0, {num_patches}), got values from {keep_indices.min()} to "
                f"{keep_indices.max()}"
            )
    else:
        torch._assert_async(inside, f"keep_indices must lie in [0, {num_patches})")
    return take_drawn_patches(images, keep_indices, patch_size, stride)


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
        num_prefix_tokens, mask_ratio, sigma, center, sampling, ordered, generator: as in `take_tokens` and
            `sample_keep_indices`.

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
