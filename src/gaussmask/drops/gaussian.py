"""GLIP: the centre more often (Liang and Larson, *Centered Masking for Language-Image Pre-Training*, ECML 2024)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sampling.checks import check_center, check_drop_sigma, check_sampling
from ..sampling.kept import kept
from ..sampling.probability import probability_on
from ..sampling.scores import gaussian_scores, preference_on, with_noise
from .base import PatchDropout


class GaussianPatchDropout(PatchDropout):
    """Keep the patches near the centre more often: GLIP (Liang and Larson, ECML 2024, arXiv 2403.15837, section 3).

    Arguments, modes and errors are those of `PatchDropout`, and:

    Args:
        sigma: **variance** of the Gaussian on the square [-1, 1]^2 that the image fills, for the paper and its authors'
            code use it so: their 0.2 is a standard deviation of 0.447, 22 % of the image's side.
        center: (y, x) of its mean in [-1, 1]^2; (0, 0) is the middle of the image.
        sampling: `"additive"` is the authors' own rule, u + density with u from U[0, 1). It keeps some patches always
            and others never when the density is high (see `functional.keep_probability`). `"weighted"` is weighted
            sampling without replacement with the density as the weights; every patch has a chance.

    Examples:
        >>> drop = GaussianPatchDropout(0.5, sigma=0.2, num_prefix_tokens=1)
        >>> drop(torch.zeros(2, 1 + 196, 384)).shape
        torch.Size([2, 99, 384])
        >>> drop.keep_mask.shape
        torch.Size([2, 14, 14])
    """

    _checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **PatchDropout._checks,
        "sigma": check_drop_sigma,
        "center": check_center,
        "sampling": check_sampling,
    }

    sigma: float
    center: tuple[float, float]
    sampling: str

    def __init__(
        self,
        mask_ratio: float,
        sigma: float = 0.2,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
        tube: bool = False,
        center: tuple[float, float] = (0.0, 0.0),
        sampling: str = "additive",
    ) -> None:
        super().__init__(
            mask_ratio, num_prefix_tokens=num_prefix_tokens, grid_size=grid_size, ordered=ordered, tube=tube
        )
        self.sigma = sigma
        self.center = center
        self.sampling = sampling

    def _exact_probability(self, grid_size: tuple[int, ...]) -> Tensor:
        return probability_on(grid_size, self.mask_ratio, self.sigma, self.center, self.sampling)

    def scores(self, coords: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return gaussian_scores(coords, self.sigma, center=self.center, sampling=self.sampling, generator=generator)

    def _scores_of_noise(self, noise: Tensor, grid_size: tuple[int, ...] | None) -> Tensor:
        preference = kept(preference_on, grid_size, self.sigma, self.center, self.sampling, device=noise.device)
        return with_noise(preference, noise, self.sampling)

    def extra_repr(self) -> str:
        own = f"sigma={self.sigma:g} (a variance: std {math.sqrt(self.sigma):.3f}), sampling={self.sampling!r}"
        if self.center != (0, 0):
            own += f", center={self.center}"
        return f"{super().extra_repr()}, {own}"
