"""The layer that drops patches, whatever the rule: `PatchDropout`, the base class of every file beside it."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..sampling.checks import (
    check_flag,
    check_grid_holds,
    check_grid_size,
    check_mask_ratio,
    check_prefix_count,
    check_tokens,
    square_grid_size,
)
from ..sampling.grids import patch_coordinates
from ..sampling.tokens import take_drawn_tokens
from ..sampling.top import num_kept_patches, top_packed_patches, top_patches


class PatchDropout(nn.Module):
    """Base class: keeps the patches with the highest `scores`, in training only.

    A subclass defines `scores`. In training mode `drop(x)` takes tokens (B, P + N, D) to (B, P + K, D) with
    K = max(1, floor(N * (1 - mask_ratio) + 1e-6)); in eval mode, and when `mask_ratio` is 0, it returns `x` itself. The
    P prefix tokens (class, registers) are always kept and do not count in the ratio. To mask at inference, put the
    model into eval mode and the drop alone into training mode: `model.eval(); drop.train()`.

    There are no parameters and nothing in the state_dict. Every argument is an attribute that may be set between steps;
    under `torch.compile` each new value compiles once more, so a schedule wants few of them.

    Args:
        mask_ratio: share of the patches that is dropped, in [0, 1).
        num_prefix_tokens: P; None is the host's own count when attached, and 0 otherwise.
        grid_size: (H, W), patches per column and row; None is the host's true grid when attached, and the square root
            of N otherwise.
        ordered: keep the tokens in their order; otherwise their order is unspecified, which a ViT does not see.

    Attributes:
        keep_indices: (B, K) int64, the patches that the latest forward kept, counted without the prefix; None when it
            dropped nothing. It does not travel in a pickle, a deep copy or a state_dict.

    Raises:
        ValueError, TypeError: for an argument out of range, also when it is set later, and for `x` in `forward`.
    """

    _checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "mask_ratio": check_mask_ratio,
        "num_prefix_tokens": check_prefix_count,
        "grid_size": lambda grid_size: None if grid_size is None else check_grid_size(grid_size),
        "ordered": check_flag,
    }

    mask_ratio: float
    num_prefix_tokens: int | None
    grid_size: tuple[int, ...] | None
    ordered: bool
    keep_indices: Tensor | None

    def __init__(
        self,
        mask_ratio: float,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = grid_size  # type: ignore[assignment]  # any sequence goes in, a tuple is kept
        self.ordered = ordered
        self.keep_indices = None
        self._mask_shape: tuple[int, ...] = ()
        self._seam: weakref.ref[nn.Module] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        super().__setattr__(name, value if check is None else check(value))

    def __getstate__(self) -> dict[str, Any]:
        # The latest draw, and the seat in a host, belong to this very object and not to its copies.
        return {**self.__dict__, "keep_indices": None, "_seam": None}

    def extra_repr(self) -> str:
        parts = [f"mask_ratio={self.mask_ratio:g}"]
        if self.num_prefix_tokens is not None:
            parts.append(f"num_prefix_tokens={self.num_prefix_tokens}")
        if self.grid_size is not None:
            parts.append(f"grid_size={self.grid_size}")
        return ", ".join(parts + ["ordered=True"] * self.ordered)

    def scores(self, coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One score per patch; the patches with the highest are kept.

        Args:
            coords: (B, N, 2) float32, the (y, x) centres of the patches in [-1, 1]^2 on each image's own grid, on the
                device of the tokens. Images that share a grid share the memory too: do not write to it.
            generator: source of randomness on that device; None is the global one.

        Returns:
            (B, N) float32. No gradient flows through it. NaN counts as the highest score: nothing checks for it, which
            on a GPU would have to wait for the scores.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(coords, generator=None) -> (B, N)")

    @property
    def active(self) -> bool:
        """Whether a forward would drop patches: in training mode with a mask_ratio above 0."""
        return self.training and self.mask_ratio > 0

    @property
    def keep_mask(self) -> Tensor | None:
        """`keep_indices` as (B, H, W) bool, True where kept, or None.

        (B, T, H, W) for videos, and (B, N) for images with grids of their own.
        """
        if self.keep_indices is None:
            return None
        mask = self.keep_indices.new_zeros(len(self.keep_indices), math.prod(self._mask_shape), dtype=torch.bool)
        return mask.scatter_(1, self.keep_indices, True).view(len(mask), *self._mask_shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            self.keep_indices = None
            return x
        num_prefix_tokens = self.num_prefix_tokens or 0
        check_tokens(x, num_prefix_tokens)
        num_patches = x.shape[1] - num_prefix_tokens
        grid_size = self.grid_size or square_grid_size(num_patches)
        keep_indices = self.draw(x.shape[0], num_patches, grid_size, device=x.device)
        return take_drawn_tokens(x, keep_indices, num_prefix_tokens)

    @torch.no_grad()
    def draw(
        self,
        batch_size: int,
        num_patches: int,
        grid_size: Sequence[int] | None,
        coords: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw the patches of a batch and keep them in `keep_indices`, whatever the mode.

        Args:
            grid_size: (H, W) of all images, (T, H, W) of videos, whose frames share the coordinates of a frame, or
                None for images with grids of their own.
            coords: (B, N, 2), for images with grids of their own.
            valid: (B, N) bool, False for padding, which is kept only where an image has fewer than K real patches.
            lengths: for a batch of 1 that packs images one behind the other: the number of patches of each. Each keeps
                its own share, and `keep_indices` is (1, sum of all K), image by image.

        Returns:
            (B, K) int64.
        """
        if coords is None:
            grid_size = grid_size or ()
            check_grid_holds(grid_size, num_patches)
            frame = patch_coordinates(grid_size[-2:], device=device)
            coords = frame.repeat(num_patches // len(frame), 1).expand(batch_size, -1, -1)
        elif coords.shape != (batch_size, num_patches, 2):
            raise ValueError(f"coords must have shape ({batch_size}, {num_patches}, 2), got {tuple(coords.shape)}")
        scores = self.scores(coords)
        if not isinstance(scores, Tensor) or scores.dtype == torch.bool:
            got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"{type(self).__name__}.scores must return a tensor of numbers, got {got}")
        if scores.shape != coords.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}.scores must return one score per patch, shape {tuple(coords.shape[:2])}, "
                f"got {tuple(scores.shape)}"
            )
        if valid is not None:
            scores = scores.masked_fill(~valid, -math.inf)
        if lengths is None:
            num_kept = num_kept_patches(num_patches, self.mask_ratio)
            self.keep_indices = top_patches(scores, num_kept, ordered=self.ordered)
        else:
            kept = [num_kept_patches(length, self.mask_ratio) for length in lengths]
            self.keep_indices = top_packed_patches(scores[0], lengths, kept, ordered=self.ordered).unsqueeze(0)
        self._mask_shape = (num_patches,) if grid_size is None else tuple(grid_size)
        return self.keep_indices
