"""Cutting patches out of images, the kept ones alone."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .checks import check_axes, check_images, check_keep_indices
from .kept import kept


def cut_all_patches(images: Tensor, patch_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """`cut_patches` for arguments that need no check."""
    windows = images
    for axis, (patch, step) in enumerate(zip(patch_size, stride, strict=True), start=2):
        windows = windows.unfold(axis, patch, step)  # in the end a view (B, C, *grid, *patch)
    num_axes = len(patch_size)
    return windows.movedim(1, 1 + num_axes).flatten(1, num_axes)


def take_drawn_patches(
    images: Tensor, keep_indices: Tensor, patch_size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """`take_patches` for indices that this library drew, which need no check."""
    batch_size, channels, *sides = images.shape
    if torch.compiler.is_compiling() or (images.requires_grad and torch.is_grad_enabled()) or images.numel() == 0:
        windows = images
        for axis, (patch, step) in enumerate(zip(patch_size, stride, strict=True), start=2):
            windows = windows.unfold(axis, patch, step)  # in the end a view (B, C, *grid, *patch)
        places: list[Tensor] = []  # the (y, x) of every kept patch, each (B, K)
        rest = keep_indices
        for side, patch, step in reversed(list(zip(sides, patch_size, stride, strict=True))):
            count = (side - patch) // step + 1
            places.insert(0, rest % count)
            rest = rest // count
        batch = torch.arange(batch_size, device=images.device).unsqueeze(1)
        chosen: tuple[Any, ...] = (batch, slice(None), *places)
        return windows[chosen]

    # The same, but several times faster: a patch is made of runs of pixels that lie one behind the other in memory. A
    # run is a row of an overlapping view, and the rows of all patches are taken by one index_select.
    if images.stride(-1) != 1 and not images.stride(1) == 1 < images.stride(-1) == channels:
        images = images.contiguous()
    runs = Runs.of(images.shape, images.stride(), tuple(patch_size), tuple(stride))
    of_patch = kept(offsets, *runs.of_patch, device=images.device)
    of_run = kept(offsets, (batch_size, images.stride(0)), (1, 0), *runs.in_patch, device=images.device)
    of_kept = of_patch.view(-1).index_select(0, keep_indices.reshape(-1))
    first = of_kept.view(*keep_indices.shape, *(1,) * len(runs.in_patch)) + of_run
    rows = images.as_strided((runs.number, math.prod(runs.shape)), (1, 1)).index_select(0, first.view(-1))
    patches = rows.view(*first.shape, *runs.shape)
    return patches.movedim(-1, 2) if runs.channels_last else patches


class Runs(NamedTuple):
    """Where the runs of pixels lie that patches are made of."""

    of_patch: tuple[tuple[int, int], ...]  # the grid: (number of patches, distance) for each axis
    in_patch: tuple[tuple[int, int], ...]  # within a patch, likewise
    shape: tuple[int, ...]  # of a run
    number: int  # of all runs, at every pixel
    channels_last: bool

    @classmethod
    @lru_cache(maxsize=128)
    def of(
        cls, shape: tuple[int, ...], strides: tuple[int, ...], patch_size: tuple[int, ...], stride: tuple[int, ...]
    ) -> "Runs":
        """For images of this shape, these strides in memory, and patches of this size and stride."""
        channels, of_channel, of_pixel = shape[1], strides[1], strides[2:]
        channels_last = of_channel == 1 and strides[-1] == channels > 1
        axes = zip(shape[2:], patch_size, stride, of_pixel, strict=True)
        of_patch = tuple(((side - patch) // step + 1, step * distance) for side, patch, step, distance in axes)
        in_patch = tuple(zip(patch_size[:-1], of_pixel[:-1], strict=True))
        run = (patch_size[-1], channels) if channels_last else (patch_size[-1],)
        in_patch = in_patch if channels_last else ((channels, of_channel), *in_patch)
        pixels = 1 + sum((side - 1) * distance for side, distance in zip(shape, strides, strict=True))
        return cls(of_patch, in_patch, run, pixels - math.prod(run) + 1, channels_last)


def offsets(*axes: tuple[int, int], device: torch.device) -> Tensor:
    """How far apart in memory the places of a grid lie: axes of (number of places, distance) each."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for count, distance in axes:
        total = total.unsqueeze(-1) + torch.arange(count, device=device) * distance
    return total


def check_cut(
    images: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`patch_size` and `stride` per axis."""
    check_images(images)
    num_axes = images.ndim - 2
    patch_size = check_axes("patch_size", patch_size, num_axes)
    stride = patch_size if stride is None else check_axes("stride", stride, num_axes)
    if any(side < patch for side, patch in zip(images.shape[2:], patch_size, strict=True)):
        raise ValueError(f"patch_size={tuple(patch_size)} is larger than images of shape {tuple(images.shape)}")
    return patch_size, stride


def cut_patches(images: Tensor, patch_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Tensor:
    """All patches of the images, row by row: what a rule that asks for `pixels` is given, in a ViT of your own.

    `drop(x, pixels=cut_patches(images, patch_size))`.

    Args:
        images: (B, C, H, W), or videos (B, C, T, H, W); any dtype and memory layout.
        patch_size: (p, q), or (t, p, q) of a video; an int is the same for all axes.
        stride: distance from patch to patch; None is the `patch_size`. Pixels that fill no patch are left out, as a
            convolution does.

    Returns:
        (B, N, C, p, q), or (B, N, C, t, p, q), of the dtype of `images`.

    Raises:
        ValueError, TypeError: for `images` or a patch of another rank, or a patch larger than the image.
    """
    return cut_all_patches(images, *check_cut(images, patch_size, stride))


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
    patch_size, stride = check_cut(images, patch_size, stride)
    check_keep_indices(keep_indices, images.shape[0], images.device)
    sides = zip(images.shape[2:], patch_size, stride, strict=True)
    num_patches = math.prod([(side - patch) // step + 1 for side, patch, step in sides])
    inside = ((keep_indices >= 0) & (keep_indices < num_patches)).all()
    has_values = not isinstance(keep_indices, FakeTensor)
    if keep_indices.is_cpu and has_values and not torch.compiler.is_compiling():
        if not inside:
            raise ValueError(
                f"keep_indices must lie in [0, {num_patches}), got values from {keep_indices.min()} to "
                f"{keep_indices.max()}"
            )
    else:
        torch._assert_async(inside, f"keep_indices must lie in [0, {num_patches})")
    return take_drawn_patches(images, keep_indices, patch_size, stride)
