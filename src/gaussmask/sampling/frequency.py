"""How often a rule keeps each patch, by drawing: for rules whose chances nobody has worked out."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_count, check_drop_grid, check_images
from .patches import cut_all_patches

AT_ONCE = 256  # images


class Drop(Protocol):
    """What draws: a `PatchDropout`."""

    @property
    def asks_for(self) -> frozenset[str]:
        """Names, see `PatchDropout.scores`."""

    @property
    def keep_mask(self) -> Tensor | None:
        """(B, *grid), of the latest draw."""

    @property
    def draw(self) -> Callable[..., Tensor]:
        """Draw a batch."""


def keep_frequency(
    drop: Drop,
    grid_size: Sequence[int],
    *,
    draws: int = 4096,
    images: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The share of draws in which a drop keeps each patch.

    It works for any rule; `PatchDropout.keep_probability` is exact for those whose chances are known. The drop itself
    stays as it is, also one that is attached.

    Args:
        drop: a `PatchDropout`.
        grid_size: (H, W), patches per column and row, or (T, H, W).
        draws: number of masks; the standard error of a frequency p is sqrt(p (1 - p) / draws), at most .008 for 4,096.
        images: (B, C, height, width), or one image (C, height, width), for a rule that asks for `pixels`: normalised as
            the model gets them. Each is cut into the patches of the grid and drawn for equally often, at least once.
        generator: source of randomness on the device of `images`, or the CPU; None is the global one.

    Returns:
        (H, W) or (T, H, W) float32, on the device of `images`, with the sum K.

    Raises:
        ValueError: for a rule that asks for `tokens`, which only a model has, or for `pixels` without `images`; for
            images that the grid does not cut evenly.
        TypeError: for an argument of another type.
    """
    if isinstance(drop, type) or not callable(getattr(drop, "draw", None)):
        raise TypeError(f"drop must be a gaussmask.PatchDropout, an instance, got {drop!r}")
    grid_size, draws = check_drop_grid(grid_size), check_count("draws", draws, least=1)
    drop, num_patches = copy.deepcopy(drop), math.prod(grid_size)
    name = type(drop).__name__
    if "tokens" in drop.asks_for:
        raise ValueError(f"{name} asks for tokens, which only a model makes: average drop.keep_mask over its forwards")
    pixels = None
    if "pixels" in drop.asks_for:
        if images is None:
            raise ValueError(f"{name} asks for pixels: pass images, a batch that is normalised as the model gets it")
        pixels = _cut_by_grid(images, grid_size)
    device = None if pixels is None else pixels.device
    kept: Tensor | float = 0.0
    drawn = 0
    while drawn < draws:
        batch_size = min(AT_ONCE, draws - drawn) if pixels is None else len(pixels)
        drop.draw(batch_size, num_patches, grid_size, pixels=pixels, generator=generator, device=device)
        mask = drop.keep_mask
        kept = kept + (0.0 if mask is None else mask.sum(0, dtype=torch.float32))
        drawn += batch_size
    return torch.as_tensor(kept) / drawn


def _cut_by_grid(images: Tensor, grid_size: tuple[int, ...]) -> Tensor:
    if isinstance(images, Tensor) and images.ndim == len(grid_size) + 1:
        images = images.unsqueeze(0)
    check_images(images)
    if len(images) == 0:
        raise ValueError("images must hold one image at least, got none")
    sides = images.shape[2:]
    if len(sides) != len(grid_size) or any(side % count for side, count in zip(sides, grid_size, strict=True)):
        raise ValueError(
            f"images of shape {tuple(images.shape)} are not cut evenly by a grid of {' x '.join(map(str, grid_size))}"
        )
    patch_size = [side // count for side, count in zip(sides, grid_size, strict=True)]
    return cut_all_patches(images, patch_size, patch_size)
