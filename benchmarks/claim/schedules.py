"""Masks of a run: the drop, how it changes while the model trains, and the step that it takes.

Schedules are what claim C7 tries beyond the plain rules: a share of random patches, one rule early and another late, a
Gaussian that grows to uniform, and two masks of every image.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from clip_step import apply_gradients, make_drop, train_step
from torch import Tensor, nn

import gaussmask
from claim.design import SIGMA, Run
from gaussmask.functional import num_kept_patches

LARGEST_SIGMA = 10.0  # where the Gaussian is as good as flat, and beyond which the drop warns


@dataclass(frozen=True)
class Masks:
    """Of one run.

    Args:
        drop: at the start; None for a model that is trained without one.
        change: called after every step with the model's image tower and the share of the training that is over.
        step_on: what makes a step, see `clip_training.train`.
    """

    drop: gaussmask.PatchDropout | None
    change: Callable[[nn.Module, float], None] = lambda visual, progress: None
    step_on: Callable[..., Tensor] = train_step


def masks_of(run: Run) -> Masks:
    """What a run trains with.

    Raises:
        ValueError: for a schedule that is not known.
    """
    if run.method == "reclip":
        return Masks(None)
    drop = make_drop(run.method, run.mask_ratio, sigma=run.sigma or SIGMA, sampling=run.sampling or "additive")
    if isinstance(drop, gaussmask.ClusterPatchDropout):
        drop.anchors = drop.anchors if run.anchors is None else run.anchors
        drop.noise = drop.noise if run.noise is None else run.noise
    if run.schedule is None:
        return Masks(drop)
    if run.schedule == "half random":
        return Masks(HalfRandom(run.mask_ratio))
    if run.schedule == "late random":
        return Masks(drop, _random_after_half)
    if run.schedule == "growing":
        return Masks(drop, _grow)
    if run.schedule == "two views":
        return Masks(drop, step_on=two_views)
    raise ValueError(f"schedule must be half random, late random, growing or two views, got {run.schedule!r}")


class HalfRandom(gaussmask.ClusterPatchDropout):
    """Half of the kept patches by chance, the other half by what cluster says of the rest."""

    def scores(  # type: ignore[override]  # asks for more, by name
        self,
        coords: Tensor,
        generator: torch.Generator | None = None,
        *,
        pixels: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        scores = super().scores(coords, generator, pixels=pixels, valid=valid)
        half = num_kept_patches(coords.shape[1], self.mask_ratio) // 2
        by_chance = torch.rand(coords.shape[:2], generator=generator, device=coords.device).topk(half).indices
        return scores.scatter(1, by_chance, math.inf)


def _random_after_half(visual: nn.Module, progress: float) -> None:
    drop = gaussmask.attached(visual)
    if progress >= 0.5 and not isinstance(drop, gaussmask.RandomPatchDropout) and drop is not None:
        gaussmask.detach(visual)
        gaussmask.attach(visual, gaussmask.RandomPatchDropout(drop.mask_ratio))


def _grow(visual: nn.Module, progress: float) -> None:
    drop = gaussmask.attached(visual)
    if isinstance(drop, gaussmask.GaussianPatchDropout):
        drop.sigma = min(SIGMA / max(1 - progress, SIGMA / LARGEST_SIGMA), LARGEST_SIGMA)


def two_views(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    contrastive_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """A step on half of the batch, every image under two masks: as many image tokens, half of the texts (A-CLIP, Yang
    et al., ICCV 2023, arXiv 2212.08653, whose views share their text)."""
    half = len(images) // 2
    with autocast:
        features = model.encode_image(images[:half].repeat(2, 1, 1, 1), normalize=True)  # type: ignore[operator]
        texts = model.encode_text(tokens[:half], normalize=True)  # type: ignore[operator]
    scale = model.logit_scale.exp()  # type: ignore[operator]
    loss: Tensor = sum(contrastive_loss(view, texts, scale) for view in features.split(half)) / 2
    loss.backward()
    apply_gradients(model, optimizer)
    return loss.detach()
