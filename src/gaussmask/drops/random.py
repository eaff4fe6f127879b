"""FLIP: patches at random. Li et al., *Scaling Language-Image Pre-training via Masking*, arXiv 2212.00794."""

import torch
from torch import Tensor

from ..sampling.scores import uniform_scores
from .base import PatchDropout


class RandomPatchDropout(PatchDropout):
    """Keep patches uniformly at random: FLIP (Li et al., CVPR 2023, arXiv 2212.00794, section 3).

    Arguments, modes and errors are those of `PatchDropout`.

    >>> drop = RandomPatchDropout(0.75, num_prefix_tokens=1)
    >>> drop(torch.zeros(2, 1 + 196, 384)).shape
    torch.Size([2, 50, 384])
    """

    def scores(self, coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return uniform_scores(coords, generator)
