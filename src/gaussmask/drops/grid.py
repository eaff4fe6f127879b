"""Even coverage: the grid masks of MAE (He et al., CVPR 2022) and CLIPA (Li et al., NeurIPS 2023)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sampling.checks import check_count
from ..sampling.grids import Places
from ..sampling.probability import probability_on
from ..sampling.scores import uniform, uniform_scores
from .base import PatchDropout


class GridPatchDropout(PatchDropout):
    """Keep patches evenly over the image: the grid masks of MAE (arXiv 2111.06377) and CLIPA (2305.07017).

    **Keeps** equally many patches of every cell of 2 x 2: at ratio .75 one of each, drawn at random for every image, at
    .5 two. In general a cell of m patches keeps m K / N of them, rounded up or down at random, so that every patch has
    the chance K / N.

    **Made for** images where the subject fills the frame and no part of it may be missed. It knows nothing of
    what images show.

    **Costs** a few draws and sorts of a number per patch.

    Cells at the border of a grid with an odd side have fewer patches, whose chances are those of all others. In a video
    every frame has cells of its own.

    Arguments, modes and errors are those of `PatchDropout`, and:

    Args:
        cell_size: side of a cell, in patches. At high ratios larger ones spread the patches further: at .9375, where 2
            keeps a patch in 16 of the 64 cells of a 16 x 16 grid, 4 keeps one in each of its 16.

    Examples:
        >>> drop = GridPatchDropout(0.75)
        >>> _ = drop(torch.zeros(1, 36, 384))
        >>> drop.keep_mask.unflatten(1, (3, 2)).unflatten(3, (3, 2)).sum(dim=(2, 4)).tolist()
        [[[1, 1, 1], [1, 1, 1], [1, 1, 1]]]
    """

    _checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **PatchDropout._checks,
        "cell_size": partial(check_count, "cell_size", least=1),
    }

    cell_size: int

    def __init__(
        self,
        mask_ratio: float,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
        tube: bool = False,
        cell_size: int = 2,
    ) -> None:
        super().__init__(
            mask_ratio, num_prefix_tokens=num_prefix_tokens, grid_size=grid_size, ordered=ordered, tube=tube
        )
        self.cell_size = cell_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cell_size={self.cell_size}"

    def _exact_probability(self, grid_size: tuple[int, ...]) -> Tensor:
        return probability_on(grid_size, self.mask_ratio, None, (0.0, 0.0), "additive")  # as of random masks

    def scores(  # type: ignore[override]  # asks for more, by name
        self,
        coords: Tensor,
        generator: torch.Generator | None = None,
        *,
        grid_size: tuple[int, ...] | None,
        valid: Tensor | None,
        num_kept: int | Tensor,
    ) -> Tensor:
        places, side = Places.of(coords, grid_size, valid), self.cell_size
        cells_high, cells_wide = ((length + side - 1) // side for length in (places.height, places.width))
        cell = (places.frame * cells_high + places.row // side) * cells_wide + places.column // side
        batch_size, num_patches = coords.shape[:2]
        # All patches in a row, cell by cell, both in a random order; then evenly K of the row, from a random start.
        turn = uniform((batch_size, num_patches), coords.device, generator).argsort(dim=1)  # cells are no more
        turn = turn.gather(1, cell.clamp(max=num_patches - 1).expand(batch_size, -1))
        num_real: int | Tensor = num_patches
        if valid is not None:
            turn, num_real = turn.masked_fill(~valid, num_patches), valid.sum(1, keepdim=True).clamp(min=1)
        by_chance = uniform_scores(coords, generator).argsort(dim=1)
        in_row = by_chance.gather(1, turn.gather(1, by_chance).argsort(dim=1, stable=True))
        start = (uniform((batch_size, 1), coords.device, generator) * num_real).long().clamp(max=num_patches - 1)
        step = (torch.arange(num_patches, device=coords.device) * num_kept + start) % num_real
        return torch.zeros_like(coords[..., 0]).scatter(1, in_row, (step < num_kept).to(torch.float32))
