"""Even coverage: the grid masks of MAE (He et al., CVPR 2022) and CLIPA (Li et al., NeurIPS 2023)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sampling.checks import check_count
from ..sampling.grids import Places
from ..sampling.scores import uniform, uniform_scores
from .base import PatchDropout


class GridPatchDropout(PatchDropout):
    """Keep patches evenly over the image: the grid masks of MAE (arXiv 2111.06377, figure 6) and CLIPA (2305.07017).

    **Keeps** equally many patches of every cell of 2 x 2: at ratio .75 one of each, drawn at random for every image, at
    .5 two. In general the patches of a cell are ranked at random, and all first ones are kept before any second one;
    where K is no multiple of the number of cells, the cells that give one more are drawn at random. (MAE's grid keeps
    the same patch of every cell and image.)

    **Pays** where the subject fills the frame and no part of it may be missed. It knows nothing of what images show.

    **Costs** a draw and a sort within the cells, nothing that a step would feel.

    Cells at the border of a grid with an odd side have fewer patches, whose chances are those of all others. In a video
    every frame has cells of its own.

    Arguments, modes and errors are those of `PatchDropout`, and:

    Args:
        cell_size: side of a cell, in patches. At high ratios larger ones spread the patches further: at .918, where 2
            keeps a patch in 16 of the 49 cells of a 14 x 14 grid, 4 keeps one in each of its 16.

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

    def scores(  # type: ignore[override]  # asks for more, by name
        self,
        coords: Tensor,
        generator: torch.Generator | None = None,
        *,
        grid_size: tuple[int, ...] | None,
        valid: Tensor | None,
    ) -> Tensor:
        places, side = Places.of(coords, grid_size, valid), self.cell_size
        cells_high, cells_wide = ((length + side - 1) // side for length in (places.height, places.width))
        cell = (places.frame * cells_high + places.row // side) * cells_wide + places.column // side
        slot = places.row % side * side + places.column % side  # (G, N)
        # A random order of the slots of every cell. Cells of grids of their own are at most as many as patches.
        num_cells = coords.shape[1]
        if grid_size is not None and valid is None:
            frames, height, width = (1, *grid_size)[-3:]
            num_cells = frames * -(-height // side) * -(-width // side)
        ranks = uniform((len(coords), num_cells, side * side), coords.device, generator).argsort(dim=2)
        rank = ranks.flatten(1).gather(1, (cell * side * side + slot).expand(len(coords), -1))
        return uniform_scores(coords, generator) - rank
