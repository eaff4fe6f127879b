"""Where the patches lie: coordinates in [-1, 1]^2, of a grid that all images share, or of each image's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_float_dtype, check_grid_size


def patch_coordinates(
    grid_size: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The (y, x) centres of the patches on `linspace(-1, 1, H)` x `linspace(-1, 1, W)`, row by row.

    Args:
        grid_size: (H, W), patches per column and row. An axis of size 1 has its only patch at 0.

    Returns:
        (H * W, 2).

    Raises:
        ValueError, TypeError: for a `grid_size` that is no pair of positive integers, or a `dtype` that is not
            floating.
    """
    grid_size, dtype = check_grid_size(grid_size), check_float_dtype(dtype)
    axes = [
        torch.linspace(-1, 1, size, device=device, dtype=dtype)
        if size > 1
        else torch.zeros(1, device=device, dtype=dtype)
        for size in grid_size
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def positions_on_grids(shapes: Tensor, num_patches: int) -> Tensor:
    """The (y, x) of patches (B, num_patches, 2), row by row on grids of (H, W) = `shapes` (B, 2)."""
    index = torch.arange(num_patches, device=shapes.device)
    return torch.stack([index // shapes[:, 1:], index % shapes[:, 1:]], dim=-1)


def own_grids(positions: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What `PatchDropout.draw` wants to know of images with grids of their own.

    Args:
        positions: (B, N, 2), the integer (y, x) of every patch on its image's grid, whose first patch is at (0, 0).
        valid: (B, N), False for padding; None if there is none.

    Returns:
        `coords` (B, N, 2) float32 in [-1, 1]^2, and `valid` (B, N) bool.
    """
    if valid is None:
        valid = torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
    valid = valid.bool()
    last = positions.masked_fill(~valid.unsqueeze(-1), 0).amax(dim=1, keepdim=True)
    coords = 2 * positions / last.clamp(min=1) - (last > 0).to(torch.float32)
    return {"coords": coords.to(torch.float32), "valid": valid}
