"""Taking rows: the prefix and the kept patches of every image, out of all its tokens."""

import torch
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
    sizes = (keep_indices.shape[0], 0, num_prefix_tokens, num_suffix_tokens, length)
    return with_patches(kept(fixed_rows, *sizes, device=keep_indices.device), keep_indices)


def fixed_rows(
    batch_size: int,
    apart: int,
    num_prefix_tokens: int,
    num_suffix_tokens: int,
    length: int,
    *,
    device: torch.device | str | None,
) -> tuple[Tensor, ...]:
    """The rows of the prefix (B, P), the first patch (B, 1) and the suffix (B, S), of L rows for each image.

    Args:
        apart: how many rows lie between the first ones of two images: L, or 0 where they share them.
    """
    first_row = torch.arange(batch_size, device=device).unsqueeze(1) * apart
    row = torch.arange(length, device=device)
    parts = row[:num_prefix_tokens], row[num_prefix_tokens : num_prefix_tokens + 1], row[length - num_suffix_tokens :]
    return tuple(first_row + part for part in parts)


def with_patches(rows: tuple[Tensor, ...], keep_indices: Tensor) -> Tensor:
    """`fixed_rows` with the kept patches (B, K) in the place of the first one: (B, P + K + S)."""
    prefix, first, suffix = rows
    patches = keep_indices + first
    if prefix.shape[1] == suffix.shape[1] == 0:
        return patches
    return torch.cat([prefix, patches] if suffix.shape[1] == 0 else [prefix, patches, suffix], dim=1)


def take_drawn_tokens(x: Tensor, keep_indices: Tensor, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> Tensor:
    """`take_tokens` for indices that this library drew, which need no check, and with S tokens behind the patches."""
    # One index_select over the rows of all images, prefix and kept together: several times faster than gather, cat or
    # advanced indexing, which expand the index over the width or walk the tokens twice.
    batch_size, length, width = x.shape
    sizes = (batch_size, length, num_prefix_tokens, num_suffix_tokens, length)
    rows = with_patches(kept(fixed_rows, *sizes, device=x.device), keep_indices)
    return x.reshape(batch_size * length, width).index_select(0, rows.view(-1)).view(*rows.shape, width)


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
