"""Taking rows: the prefix and the kept patches of every image, out of all its tokens."""

import torch
from einops import rearrange
from torch import Tensor

from .checks import check_count, check_keep_indices, check_tokens
from .kept import kept


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
    length = num_prefix_tokens + num_patches + num_suffix_tokens
    fixed = kept(fixed_rows, 1, length, num_prefix_tokens, num_suffix_tokens, device=keep_indices.device)
    return with_patches(fixed.expand(len(keep_indices), -1), keep_indices, num_prefix_tokens)


def fixed_rows(
    batch_size: int, length: int, num_prefix_tokens: int, num_suffix_tokens: int, *, device: torch.device
) -> Tensor:
    """The rows (B, P + 1 + S) of the prefix, the first patch and the suffix, where tokens (B, L, D) lie in (B L, D)."""
    first_row = torch.arange(0, batch_size * length, length, device=device).unsqueeze(1)
    row = torch.arange(length, device=device)
    return first_row + torch.cat([row[: num_prefix_tokens + 1], row[length - num_suffix_tokens :]])


def with_patches(fixed: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """`fixed_rows` with the kept patches (B, K) in the place of the first one: (B, P + K + S)."""
    patches = keep_indices + fixed[:, num_prefix_tokens : num_prefix_tokens + 1]
    if fixed.shape[1] == 1:
        return patches
    return torch.cat([fixed[:, :num_prefix_tokens], patches, fixed[:, num_prefix_tokens + 1 :]], dim=1)


def take_drawn_tokens(x: Tensor, keep_indices: Tensor, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> Tensor:
    """`take_tokens` for indices that this library drew, which need no check, and with S tokens behind the patches."""
    # One index_select over the rows of all images, prefix and kept together: several times faster than gather, cat or
    # advanced indexing, which expand the index over the width or walk the tokens twice.
    batch_size, length, width = x.shape
    fixed = kept(fixed_rows, batch_size, length, num_prefix_tokens, num_suffix_tokens, device=x.device)
    rows = with_patches(fixed, keep_indices, num_prefix_tokens)
    return rearrange(x, "b l d -> (b l) d").index_select(0, rows.flatten()).view(*rows.shape, width)


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
    checked = keep_indices.masked_fill(outside, batch_size * length)
    if torch.compiler.is_compiling():
        return take_drawn_tokens(x, checked, num_prefix_tokens)
    try:
        return take_drawn_tokens(x, checked, num_prefix_tokens)
    except IndexError:
        raise ValueError(
            f"keep_indices must lie in [0, {num_patches}), counted over the patches without the "
            f"{num_prefix_tokens} prefix tokens, got values from {keep_indices.min()} to {keep_indices.max()}"
        ) from None
