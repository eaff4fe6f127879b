"""From scores to the patches that are kept: how many, and which."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_count, check_mask_ratio, check_scores


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """How many of `num_patches` are kept: `max(1, floor(num_patches * (1 - mask_ratio) + 1e-6))`.

    The 1e-6 absorbs the rounding of floats, so that 100 patches at 0.9 keep 10 and not 9.

    Raises:
        ValueError, TypeError: for `num_patches` below 1, or a `mask_ratio` outside [0, 1).
    """
    return count_kept(check_count("num_patches", num_patches, least=1), check_mask_ratio(mask_ratio))


def count_kept(num_patches: int, mask_ratio: float) -> int:
    """`num_kept_patches` for arguments that need no check."""
    return max(1, math.floor(num_patches * (1 - mask_ratio) + 1e-6))


def top_patches(scores: Tensor, num_kept: int, *, ordered: bool = False) -> Tensor:
    """Indices of the `num_kept` highest scores of every row.

    Args:
        scores: (B, N).
        ordered: ascending indices; otherwise their order is unspecified, which a ViT does not see.

    Returns:
        (B, num_kept) int64.

    Raises:
        ValueError, TypeError: for `scores` of another rank, or `num_kept` outside [1, N].
    """
    check_scores(scores)
    num_kept = check_count("num_kept", num_kept, least=1)
    if num_kept > scores.shape[1]:
        raise ValueError(f"num_kept must be at most the number of patches, {scores.shape[1]}, got {num_kept}")
    return highest(scores, num_kept, ordered)


def highest(scores: Tensor, num_kept: int, ordered: bool) -> Tensor:
    """`top_patches` for arguments that need no check."""
    indices = scores.topk(num_kept, dim=-1, sorted=False).indices
    return indices.sort(dim=-1).values if ordered else indices


def top_packed_patches(
    scores: Tensor, lengths: Sequence[int], num_kept: Sequence[int], *, ordered: bool = False
) -> Tensor:
    """`top_patches` of images that are packed one behind the other.

    Args:
        scores: (N,), N the sum of `lengths`.
        lengths: number of patches of each image.
        num_kept: how many of them are kept.
        ordered: ascending indices.

    Returns:
        (sum of num_kept,) int64, counted over all N patches, image by image.

    Raises:
        ValueError: for `scores` of another shape, or a `num_kept` that is not within its image.
    """
    if scores.shape != (sum(lengths),):
        raise ValueError(
            f"scores must have one score for each of the {sum(lengths)} patches that lengths counts, got shape "
            f"{tuple(scores.shape)}"
        )
    if len(num_kept) != len(lengths) or any(not 0 <= k <= n for k, n in zip(num_kept, lengths, strict=True)):
        raise ValueError(f"num_kept must keep 0 to all patches of each image, of lengths {lengths}, got {num_kept}")
    counts = torch.tensor(lengths, device=scores.device, dtype=torch.int64)
    image = torch.repeat_interleave(counts, output_size=len(scores))
    by_score = scores.argsort(descending=True)
    by_image_and_score = by_score[image[by_score].argsort(stable=True)]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    places = [place for start, kept in zip(starts, num_kept, strict=True) for place in range(start, start + kept)]
    indices = by_image_and_score[torch.tensor(places, device=scores.device, dtype=torch.int64)]
    return indices.sort().values if ordered else indices
