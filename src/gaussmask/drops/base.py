"""The layer that drops patches, whatever the rule: `PatchDropout`, the base class of every file beside it.

forward: tokens --> draw --> take --> kept tokens
draw:    grid --> coordinates --> scores, which the rule is asked for in `asking` --> the K highest
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..sampling.checks import (
    check_drop_grid,
    check_flag,
    check_grid_holds,
    check_mask_ratio,
    check_prefix_count,
    check_tokens,
    is_square,
    plain_number,
    refuse_misspelling,
    square_grid_size,
)
from ..sampling.frequency import keep_frequency
from ..sampling.grids import Packing, coordinates_on
from ..sampling.kept import kept
from ..sampling.scores import uniform
from ..sampling.tokens import take_drawn_tokens
from ..sampling.top import count_kept, highest, num_kept_patches, top_packed_patches
from .asking import Facts, names_asked_for, scores_of

OURS = __name__.partition(".")[0]


class Drawn:
    """The latest draw of a drop: an object of its own, which is faster to write to than a module."""

    def __init__(self) -> None:
        self.indices: Tensor | None = None
        self.shape: tuple[int, ...] = ()

    def nothing(self) -> None:
        self.indices = None

    def these(self, indices: Tensor, num_patches: int, grid_size: tuple[int, ...] | None) -> Tensor:
        self.indices, self.shape = indices, (num_patches,) if grid_size is None else grid_size
        return indices


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
        grid_size: (H, W), patches per column and row, or (T, H, W) of a video or volume; None is the host's true grid
            when attached, and the square root of N otherwise. A rule that uses no coordinates, as
            `RandomPatchDropout`, takes any N without a grid.
        ordered: keep the tokens in their order; otherwise their order is unspecified, which a ViT does not see.
        tube: keep the same places in every frame of a video (VideoMAE, Tong et al., arXiv 2203.12602).
            The scores are asked for one frame, and K = T * num_kept(H * W). Images are not changed by it.

    Attributes:
        keep_indices: (B, K) int64, the patches that the latest forward kept, counted without the prefix; None when it
            dropped nothing. It does not travel in a pickle, a deep copy or a state_dict.
        asks_for: what `scores` asks for by name, see there. Read off the class.
        needs_grid: whether `scores` uses `coords`. Where a subclass sets it False, N need be no square and no grid be
            known, and `coords` is NaN where it is not.

    Raises:
        ValueError, TypeError: for an argument out of range, also when it is set later, and for `x` in `forward`. For a
            class whose `scores` asks for a name that is unknown, when it is made.
    """

    _checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "mask_ratio": check_mask_ratio,
        "num_prefix_tokens": check_prefix_count,
        "grid_size": lambda grid_size: None if grid_size is None else check_drop_grid(grid_size),
        "ordered": lambda value: check_flag("ordered", value),
        "tube": lambda value: check_flag("tube", value),
    }
    asks_for: ClassVar[frozenset[str]] = frozenset()
    needs_grid: ClassVar[bool] = True
    _is_ready_made: ClassVar[bool] = False
    # What a ready-made rule knows besides, and whoever writes other scores does not inherit: from (drop, grid) the
    # chances; from (drop, noise (B, N) of U[0, 1), grid) the very scores of images that share a grid.
    _exact_probability: ClassVar[Callable[[Any, tuple[int, ...]], Tensor] | None] = None
    _scores_of_noise: ClassVar[Callable[[Any, Tensor, tuple[int, ...] | None], Tensor] | None] = None

    mask_ratio: float
    num_prefix_tokens: int | None
    grid_size: tuple[int, ...] | None
    ordered: bool
    tube: bool

    def __init__(
        self,
        mask_ratio: float,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
        tube: bool = False,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = grid_size  # type: ignore[assignment]  # any sequence goes in, a tuple is kept
        self.ordered = ordered
        self.tube = tube
        self._drawn: Drawn = Drawn()
        self._seam: weakref.ref[nn.Module] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.asks_for = names_asked_for(cls)
        cls._is_ready_made = cls.__module__.startswith(f"{OURS}.")
        author = next(base for base in cls.__mro__ if "scores" in vars(base))  # of the scores: a mixin perhaps
        cls.needs_grid = vars(cls).get("needs_grid", vars(author).get("needs_grid", True))
        cls._exact_probability = vars(cls).get("_exact_probability", vars(author).get("_exact_probability"))
        cls._scores_of_noise = vars(cls).get("_scores_of_noise", vars(author).get("_scores_of_noise"))

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        if check is not None:
            value = check(value)
        elif name not in self.__dict__ and self._is_ready_made and not hasattr(type(self), name):
            others = (other for cls in PatchDropout.__subclasses__() if cls._is_ready_made for other in cls._checks)
            refuse_misspelling(type(self).__name__, name, self._checks, others)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # The latest draw, and the seat in a host, belong to this very object and not to its copies.
        return {**self.__dict__, "_drawn": Drawn(), "_seam": None}

    def extra_repr(self) -> str:
        parts = [f"mask_ratio={self.mask_ratio:g}"]
        if self.num_prefix_tokens is not None:
            parts.append(f"num_prefix_tokens={self.num_prefix_tokens}")
        if self.grid_size is not None:
            parts.append(f"grid_size={self.grid_size}")
        return ", ".join(parts + ["ordered=True"] * self.ordered + ["tube=True"] * self.tube)

    def __repr__(self) -> str:
        seam: Any = None if self._seam is None else self._seam()
        if seam is None:
            return super().__repr__()
        stage = seam.stage
        if stage == "auto":
            stage = "pixels" if seam.why_tokens() is None else "tokens"
        idle = "" if self.training else ", idle in eval mode"
        return f"{super().__repr__()} attached to {seam.host_name} at stage {stage!r}{idle}"

    # The rule

    def scores(self, coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One score per patch; the patches with the highest are kept. The one method for a subclass to write.

        A rule that has to see more asks for it by name, as a keyword-only parameter
        (`def scores(self, coords, generator=None, *, pixels)`), and is given it without gradient:

        - `pixels` (B, N, C, h, w), of videos (B, N, C, t, h, w): the patches as they enter the projection, after
          whatever the host does to its images before. `drop(x, pixels=...)` takes them in a ViT of one's own.
        - `tokens` (B, N, D): the embedded patches, without prefix and suffix, as they reach the drop; at stage
          "tokens" only.
        - `grid_size` (H, W) or (T, H, W): the grid; None for images with grids of their own, or where none is known.
        - `valid` (B, N) bool, False for padding; None where every patch is real. Padding is never kept before a real
          patch, whatever its score.
        - `num_kept`: K, which is (B, 1) int64 where each image has its own.

        With `tube=True` a video is one frame here: `pixels` (B, H W, C, T t, h, w), `tokens` their mean over time.

        Args:
            coords: (B, N, 2) float32, the (y, x) centres of the patches in [-1, 1]^2 on each image's own grid, on the
                device of the tokens. Images that share a grid share the memory too: do not write to it.
            generator: source of randomness on that device; None is the global one.

        Returns:
            (B, N) float32. No gradient flows through it. NaN counts as the highest score: nothing checks for it, which
            on a GPU would have to wait for the scores.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(coords, generator=None) -> (B, N)")

    # The layer

    @property
    def active(self) -> bool:
        """Whether a forward would drop patches: in training mode with a mask_ratio above 0."""
        return self.training and self.mask_ratio > 0

    @property
    def keep_indices(self) -> Tensor | None:
        """(B, K) int64, the patches that the latest forward kept, counted without the prefix; None if it kept all."""
        return self._drawn.indices

    @keep_indices.setter
    def keep_indices(self, indices: Tensor | None) -> None:
        self._drawn.indices = indices

    @property
    def keep_mask(self) -> Tensor | None:
        """`keep_indices` as (B, H, W) bool, True where kept, or None.

        (B, T, H, W) for videos, and (B, N) for images with grids of their own, or where no grid is known.
        """
        indices, shape = self._drawn.indices, self._drawn.shape
        if indices is None:
            return None
        mask = indices.new_zeros(len(indices), math.prod(shape), dtype=torch.bool)
        return mask.scatter_(1, indices, True).view(len(mask), *shape)

    def keep_probability(
        self,
        grid_size: Sequence[int],
        *,
        draws: int = 4096,
        images: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The chance that each patch is kept: exact for random, Gaussian and grid masks, by drawing for all others.

        Args:
            grid_size: (H, W), or (T, H, W) of a video.
            draws: number of masks, for a rule whose chances are not known; see `functional.keep_frequency`.
            images: (B, C, height, width), for a rule that asks for `pixels`.
            generator: source of randomness of the draws; None is the global one.

        Returns:
            (H, W) or (T, H, W) float32, with the sum K.
        """
        grid_size = check_drop_grid(grid_size)
        if self._exact_probability is None:
            return keep_frequency(self, grid_size, draws=draws, images=images, generator=generator)
        return self._exact_probability(grid_size[-2:] if self.tube else grid_size).expand(grid_size).clone()

    def forward(self, x: Tensor, *, pixels: Tensor | None = None) -> Tensor:
        """Drop patches of `x`, in a ViT of one's own. A model that the drop is attached to calls `draw`.

        Args:
            x: (B, P + N, D) tokens, prefix first.
            pixels: (B, N, C, h, w), for a rule that asks for them: `functional.cut_patches(images, patch_size)`. Other
                rules do not look at it.

        Returns:
            (B, P + K, D), or `x` itself where nothing is dropped.
        """
        if not self.active:
            self._drawn.nothing()
            return x
        seam: Any = None if self._seam is None else self._seam()
        num_prefix_tokens = self.num_prefix_tokens
        if num_prefix_tokens is None:
            num_prefix_tokens = 0 if seam is None else seam.num_prefix_tokens
        check_tokens(x, num_prefix_tokens)
        num_patches = plain_number(x.shape[1]) - num_prefix_tokens
        grid_size = self.grid_size
        if grid_size is None and (self.needs_grid or is_square(num_patches)):
            grid_size = square_grid_size(num_patches)
        tokens = x[:, num_prefix_tokens:] if "tokens" in self.asks_for else None
        keep_indices = self.draw(x.shape[0], num_patches, grid_size, pixels=pixels, tokens=tokens, device=x.device)
        return take_drawn_tokens(x, keep_indices, num_prefix_tokens)

    def draw(
        self,
        batch_size: int,
        num_patches: int,
        grid_size: Sequence[int] | None,
        coords: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        pixels: Tensor | None = None,
        tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the patches of a batch and keep them in `keep_indices`, whatever the mode.

        Args:
            grid_size: (H, W) of all images, (T, H, W) of videos, whose frames share the coordinates of a frame, or
                None for images with grids of their own, and where none is known.
            coords: (B, N, 2), for images with grids of their own.
            valid: (B, N) bool, False for padding, which is kept only where an image has fewer than K real patches.
            lengths: for a batch of 1 that packs images one behind the other: the number of patches of each. Each keeps
                its own share, and `keep_indices` is (1, sum of all K), image by image. The rule is asked for the images
                side by side, padded to one length.
            pixels: (B, N, C, h, w) or (B, N, C, t, h, w), for a rule that asks for them.
            tokens: (B, N, D), likewise.
            generator: source of randomness on `device`, handed to the rule; None is the global one.
            device: of the indices, where there are no `coords`.

        Returns:
            (B, K) int64.
        """
        grid_size = None if grid_size is None else tuple(grid_size)
        if num_patches < 1:
            raise ValueError(f"num_patches must be at least 1, got {num_patches}")
        if coords is None and valid is None and lengths is None and self._has_short_way(grid_size):
            indices = self._keep_on_grid(batch_size, num_patches, grid_size, generator, device)
            return self._drawn.these(indices, num_patches, grid_size)
        with torch.no_grad():
            if coords is None:
                coords = self._coordinates(batch_size, num_patches, grid_size, device)
            elif coords.shape != (batch_size, num_patches, 2):
                raise ValueError(f"coords must have shape ({batch_size}, {num_patches}, 2), got {tuple(coords.shape)}")
            if lengths is not None and (batch_size != 1 or sum(lengths) != num_patches):
                raise ValueError(
                    f"lengths must count the patches of a batch of 1, got {list(lengths)} for {batch_size} x "
                    f"{num_patches}"
                )
            facts = Facts(coords, count_kept(num_patches, self.mask_ratio), valid, pixels, tokens, grid_size)
            facts.check_for(type(self))
            if lengths is not None:
                indices = self._keep_packed(facts, lengths, generator)
            elif self.tube and grid_size is not None and len(grid_size) == 3:
                indices = self._keep_tubes(facts, grid_size[0], generator)
            else:
                indices = self._keep(facts, generator)
        return self._drawn.these(indices, num_patches, grid_size)

    # The steps of a draw

    def _coordinates(
        self, batch_size: int, num_patches: int, grid_size: tuple[int, ...] | None, device: torch.device | str | None
    ) -> Tensor:
        """(B, N, 2), expanded; frames share those of a frame, and where no grid is known they are NaN."""
        if grid_size is None:
            if self.needs_grid:
                raise ValueError(
                    f"{type(self).__name__} scores patches by where they lie, so it needs grid_size=(height, width) of "
                    f"these {num_patches} patches, or coords"
                )
            return torch.full((1, 1, 1), math.nan, device=device).expand(batch_size, num_patches, 2)
        check_grid_holds(grid_size, num_patches)
        return kept(coordinates_on, grid_size, device=device).expand(batch_size, -1, -1)

    def _has_short_way(self, grid_size: tuple[int, ...] | None) -> bool:
        """Whether the scores are those of a ready-made rule, which needs no coordinates for them."""
        has_grid = grid_size is not None or not self.needs_grid
        return self._scores_of_noise is not None and has_grid and not self.tube and "scores" not in self.__dict__

    def _keep_on_grid(
        self,
        batch_size: int,
        num_patches: int,
        grid_size: tuple[int, ...] | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
    ) -> Tensor:
        """What `_keep` would keep of images that share a grid, without coordinates."""
        if grid_size is not None:
            check_grid_holds(grid_size, num_patches)
        noise = uniform((batch_size, num_patches), device, generator)
        scores = cast("Any", self._scores_of_noise)(noise, grid_size)
        return highest(scores, count_kept(num_patches, self.mask_ratio), self.ordered)

    def _keep(self, facts: Facts, generator: torch.Generator | None) -> Tensor:
        return highest(scores_of(self, facts, generator), cast("int", facts.num_kept), self.ordered)

    def _keep_tubes(self, facts: Facts, num_frames: int, generator: torch.Generator | None) -> Tensor:
        """The same places in every frame, frame by frame."""
        per_frame = facts.coords.shape[1] // num_frames
        num_kept = count_kept(per_frame, self.mask_ratio)
        kept = self._keep(facts.of_one_frame(num_frames, num_kept), generator)
        first = torch.arange(0, num_frames * per_frame, per_frame, device=kept.device)
        return (kept.unsqueeze(1) + first.unsqueeze(1)).flatten(1)

    def _keep_packed(self, facts: Facts, lengths: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """(1, sum of all K): each image's own share."""
        packing = Packing(lengths, device=facts.coords.device)
        kept = [num_kept_patches(length, self.mask_ratio) for length in lengths]
        scores = packing.pack(scores_of(self, facts.unpacked(packing, kept), generator))
        return top_packed_patches(scores, lengths, kept, ordered=self.ordered).unsqueeze(0)
