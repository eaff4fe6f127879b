"""Cluster masking: alike patches go together (Wei, Pan and Owens, *Efficient Vision-Language Pre-training by Cluster
Masking*, CVPR 2024)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available
from torch.nn import functional as F

from ..sampling.checks import check_anchors, check_noise, plain_number
from ..sampling.scores import uniform
from .base import PatchDropout


class ClusterPatchDropout(PatchDropout):
    """Drop clusters of patches that look alike: Cluster masking (Wei et al., CVPR 2024, arXiv 2405.08815).

    **Keeps** what is unlike a few anchor patches, which are drawn at random for every image and dropped together with
    the patches that are most like them. A large even ground, a sky or a white wall, goes as a whole and soon; a subject
    that it surrounds stays more often.

    **Made for** images with much ground that says little (photos of products), **not** for subjects that
    fill the frame.

    **Costs** one copy of the pixels in float32 and, for N patches of F numbers and A anchors, 2 N A F operations per
    image: 1.8 MFLOP for 196 patches of 16 x 16 x 3 and 6 anchors, where a ViT-B/16 takes 35 GFLOP.

    The paper's code drops every patch beyond a similarity, and clips the images of a batch to a common length from the
    top left, so that lower rows are kept less often. Here the similarity is the score, so that exactly K are kept and
    no row or column is preferred. It asks for `pixels`: an attached model gives them, at every stage; in a ViT of your
    own, `drop(x, pixels=functional.cut_patches(images, patch_size))`.

    Arguments, modes and errors are those of `PatchDropout`, and:

    Args:
        anchors: the share of the patches that are anchors, in (0, 1), rounded and at least one patch; or, as an int,
            their number. The paper's is 3 %, which is 6 of 196. Padding is never an anchor. In a video they are drawn
            among the patches of all frames.
        noise: what is added to minus the cosine is uniform in [0, `noise`). It decides between patches that are equally
            alike; with 0 these fall in no order that could be relied on.

    Examples:
        >>> from gaussmask import functional
        >>> images = torch.randn(2, 3, 64, 64)
        >>> drop = ClusterPatchDropout(0.5)
        >>> drop(torch.zeros(2, 64, 384), pixels=functional.cut_patches(images, 8)).shape
        torch.Size([2, 32, 384])
    """

    _checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **PatchDropout._checks,
        "anchors": check_anchors,
        "noise": check_noise,
    }
    needs_grid: ClassVar[bool] = False

    anchors: float | int
    noise: float

    def __init__(
        self,
        mask_ratio: float,
        *,
        num_prefix_tokens: int | None = None,
        grid_size: Sequence[int] | None = None,
        ordered: bool = False,
        tube: bool = False,
        anchors: float = 0.03,
        noise: float = 0.1,
    ) -> None:
        super().__init__(
            mask_ratio, num_prefix_tokens=num_prefix_tokens, grid_size=grid_size, ordered=ordered, tube=tube
        )
        self.anchors = anchors
        self.noise = noise

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, anchors={self.anchors:g}, noise={self.noise:g}"

    def num_anchors(self, num_patches: int) -> int:
        """A, of N patches."""
        if isinstance(self.anchors, int):
            return min(self.anchors, num_patches)
        return max(1, round(self.anchors * plain_number(num_patches)))

    def scores(  # type: ignore[override]  # asks for more, by name
        self,
        coords: Tensor,
        generator: torch.Generator | None = None,
        *,
        pixels: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        batch_size, num_patches = coords.shape[:2]
        order, noise = uniform((2, batch_size, num_patches), coords.device, generator)
        if valid is not None:
            order = order.masked_fill(~valid, -1.0)
        anchors = order.topk(self.num_anchors(num_patches)).indices  # (B, A)
        likeness = cosines(pixels.flatten(2), anchors)  # (B, N, A)
        if valid is None:
            most = likeness.amax(dim=2).scatter(1, anchors, 2.0 + self.noise)  # the anchors themselves go first
        else:  # every image has anchors by its own real patches
            num_real = valid.sum(1, keepdim=True)
            own = num_real if isinstance(self.anchors, int) else (num_real * self.anchors).round().clamp(min=1)
            surplus = (torch.arange(anchors.shape[1], device=coords.device) >= own) | ~valid.gather(1, anchors)
            most = likeness.masked_fill(surplus.unsqueeze(1), -1.0).amax(dim=2)
            first = most.gather(1, anchors).masked_fill(~surplus, 2.0 + self.noise)
            most = most.scatter(1, anchors, first)
        return self.noise * noise - most


def cosines(vectors: Tensor, anchors: Tensor) -> Tensor:
    """The cosines (B, N, A) of `vectors` (B, N, F) to those at `anchors` (B, A), in float32.

    A vector of zeros, a patch of the mean colour, is like those of zeros and unlike all others.
    """
    vectors = vectors.float()
    zero = vectors.abs().amax(dim=2) == 0
    vectors = F.normalize(vectors, dim=2)
    chosen = vectors.take_along_dim(anchors.unsqueeze(2), dim=1)
    both_zero = zero.unsqueeze(2) & zero.gather(1, anchors).unsqueeze(1)
    device_type = vectors.device.type
    # torch 2.6 captures no graph through the question, whose answer is known for these.
    has_autocast = device_type in ("cpu", "cuda") or is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
        return (vectors @ chosen.mT).masked_fill(both_zero, 1.0)
