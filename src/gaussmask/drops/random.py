"""FLIP: patches at random. Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..sampling.probability import probability_on
from ..sampling.scores import uniform
from .base import PatchDropout


class RandomPatchDropout(PatchDropout):
    """Keep patches uniformly at random: FLIP (Li et al., CVPR 2023, arXiv 2212.00794, section 3).

    Arguments, modes and errors are those of `PatchDropout`.

    Examples:
        >>> drop = RandomPatchDropout(0.75, num_prefix_tokens=1)
        >>> drop(torch.zeros(2, 1 + 196, 384)).shape
        torch.Size([2, 50, 384])

        It looks at no coordinates, so that any number of patches will do: sequences, volumes.

        >>> RandomPatchDropout(0.5)(torch.zeros(2, 1001, 16)).shape
        torch.Size([2, 500, 16])
    """

    needs_grid: ClassVar[bool] = False

    def __init__(
        self,
        mask_ratio: float,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
        tube: bool = False,
    ) -> None:
        super().__init__(
            mask_ratio, num_prefix_tokens=num_prefix_tokens, grid_size=grid_size, ordered=ordered, tube=tube
        )

    def _exact_probability(self, grid_size: tuple[int, ...]) -> Tensor:
        return probability_on(grid_size, self.mask_ratio, None, (0.0, 0.0), "additive")

    def _scores_of_noise(self, noise: Tensor, grid_size: tuple[int, ...] | None) -> Tensor:
        return noise

    def scores(self, coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return uniform(coords.shape[:2], coords.device, generator)
