"""One block per image: the block-wise masks of MAE's ablation (He et al., CVPR 2022)."""

import math

import torch
from torch import Tensor

from ..sampling.grids import Places
from ..sampling.scores import uniform
from .base import PatchDropout

LOG_ASPECT = math.log(1 / 0.3)  # BEiT's blocks are from 0.3 to 1 / 0.3 times as high as wide


class BlockPatchDropout(PatchDropout):
    """Drop one rectangle at a random place: the block-wise masks of MAE's ablation (He et al., arXiv 2111.06377).

    **Keeps** what surrounds a rectangle of N - K patches, which lies anywhere within the image. Its aspect ratio is
    drawn from 0.3 to 1 / 0.3, evenly in its logarithm (BEiT, arXiv 2106.08254), as far as the image has room. Where a
    whole rectangle would be too large, an end of one of its sides is given back, so that exactly K are kept.

    **Made for** the hard case of a comparison: a whole region has to be inferred. Patches in the middle of the image
    are dropped more often than those at its border, the opposite of GLIP's.

    **Costs** some forty operations on a number per patch.

    In a video every frame has a rectangle of its own; with `tube=True` it is the same one in all frames.

    Arguments, modes and errors are those of `PatchDropout`.

    Examples:
        >>> drop = BlockPatchDropout(0.5)
        >>> drop(torch.zeros(2, 196, 384)).shape
        torch.Size([2, 98, 384])
    """

    def scores(  # type: ignore[override]  # asks for more, by name
        self,
        coords: Tensor,
        generator: torch.Generator | None = None,
        *,
        grid_size: tuple[int, ...] | None,
        valid: Tensor | None,
        num_kept: int | Tensor,
    ) -> Tensor:
        batch_size, num_patches = coords.shape[:2]
        places = Places.of(coords, grid_size, valid)
        draws = uniform((7, batch_size, places.frames), coords.device, generator)  # of every frame
        upright, aspect, y, x, at_end, at_far_side, more = draws
        num_dropped = num_patches - num_kept if valid is None else valid.sum(1, keepdim=True) - num_kept
        area = areas(num_dropped, more)
        # Along p the rectangle is a whole number of patches long, and as wide along q as its area needs: p is y or x.
        upright = upright < 0.5
        long_side = torch.where(upright, places.height, places.width)
        other_side = torch.where(upright, places.width, places.height)
        length = (area * ((2 * aspect - 1) * LOG_ASPECT).exp()).sqrt().round().long()
        length = length.maximum(-(-area // other_side)).minimum(long_side).clamp(min=1)
        width = -(-area // length)
        start_p = (y * (long_side - length + 1)).long().minimum(long_side - length)  # a float may round up to the end
        start_q = (x * (other_side - width + 1)).long().minimum(other_side - width)
        too_many = length * width - area  # fewer than `length`

        of_frame = places.frame.expand(batch_size, -1)
        upright, length, width, start_p, start_q, too_many, at_end, at_far_side = (
            value.gather(1, of_frame)
            for value in (upright, length, width, start_p, start_q, too_many, at_end, at_far_side)
        )
        p = torch.where(upright, places.row, places.column) - start_p
        q = torch.where(upright, places.column, places.row) - start_q
        inside = (p >= 0) & (p < length) & (q >= 0) & (q < width)
        from_end = torch.where(at_end < 0.5, p, length - 1 - p)
        given_back = (q == torch.where(at_far_side < 0.5, 0, width - 1)) & (from_end < too_many)
        return torch.where(inside & ~given_back, -1.0, 0.0)


def areas(num_dropped: int | Tensor, more: Tensor) -> Tensor:
    """How many patches the rectangle of each frame drops, (B, T): evenly, with one more in frames drawn by `more`."""
    num_frames = more.shape[1]
    first = (more[:, :1] * num_frames).long().clamp(max=num_frames - 1)
    bounds = (torch.arange(num_frames + 1, device=more.device) * num_dropped + first) // num_frames
    return bounds.diff(dim=1).clamp(min=0)
