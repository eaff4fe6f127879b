"""Where the patches lie: coordinates in [-1, 1]^2, of a grid that all images share, or of each image's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_float_dtype, check_grid_size


class Packing:
    """Images packed one behind the other, and where their patches lie when they stand side by side.

    Args:
        lengths: number of patches of each image.
        device: of the indices.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str | None = None) -> None:
        longest, total = max(lengths), sum(lengths)
        counts = torch.tensor(lengths, device=device, dtype=torch.int64)
        starts = counts.cumsum(0) - counts
        place = torch.arange(longest, device=device)
        self.valid: Tensor = place < counts.unsqueeze(1)  # (B, longest)
        self.rows: Tensor = (starts.unsqueeze(1) + place).clamp(max=total - 1)  # (B, longest), of the packed patches
        of_image = torch.repeat_interleave(counts, output_size=total)
        self.places: Tensor = of_image * longest + torch.arange(total, device=device) - starts[of_image]  # (total,)

    def unpack(self, packed: Tensor) -> Tensor:
        """(total, ...) as (B, longest, ...), where what lies behind an image's own patches is arbitrary."""
        return packed[self.rows]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, longest, ...) as (total, ...)."""
        return padded.flatten(0, 1)[self.places]


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


def coordinates_on(grid_size: tuple[int, ...], *, device: torch.device | str | None) -> Tensor:
    """The same of a grid, (N, 2); the frames of a video (T, H, W) have those of a frame."""
    frame = patch_coordinates(grid_size[-2:], device=device)
    return frame if len(grid_size) == 2 else frame.repeat(grid_size[0], 1)


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


class Places(NamedTuple):
    """Where each patch lies, in whole numbers: (G, N) each, with G = 1 where all images share a grid, or G = B.

    `height` and `width` of the grids are (G, 1); `frames` is T, and 1 for images.
    """

    frame: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor
    frames: int

    @classmethod
    def of(cls, coords: Tensor, grid_size: Sequence[int] | None, valid: Tensor | None) -> "Places":
        """From the grid that all images share and fill, or else from the coordinates of each image's own."""
        if grid_size is None or valid is not None:
            return cls.of_own_grids(coords, valid)
        frames, height, width = (1, *grid_size)[-3:]
        index = torch.arange(frames * height * width, device=coords.device).unsqueeze(0)
        whole = index.new_ones(1, 1)
        return cls(
            index // (height * width), index // width % height, index % width, whole * height, whole * width, frames
        )

    @classmethod
    def of_own_grids(cls, coords: Tensor, valid: Tensor | None) -> "Places":
        y, x = coords.unbind(-1)
        if valid is None:
            valid = torch.ones_like(y, dtype=torch.bool)
        outside = torch.full_like(y, 2.0)
        first = [torch.where(valid, axis, outside).amin(1, keepdim=True) for axis in (y, x)]
        # A grid is as high as its first column has patches, and as wide as its first row.
        height, width = (
            ((axis == start) & valid).sum(1, keepdim=True).clamp(min=1)
            for axis, start in zip((x, y), reversed(first), strict=True)
        )
        row, column = (
            ((axis + 1) / 2 * (side - 1)).round().long().clamp(min=0).minimum(side - 1)
            for axis, side in ((y, height), (x, width))
        )
        return cls(torch.zeros_like(row), row, column, height, width, 1)
