"""Part step: a whole training step of a ViT, against a step that gets the kept tokens for nothing."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure.arithmetic import Tower
from measure.timing import Contender
from torch import Tensor, nn

import gaussmask
from gaussmask.functional import num_kept_patches
from part.groups import Group
from part.sizes import Sizes, VisionModel

REFERENCE = "ideal"
BASELINE = "unmasked"
FLOPS_PER_SECOND = 1e11  # of two CPU cores, for the progress bar


class FromTokens(nn.Module):
    """A timm ViT from its blocks on: what no way of dropping patches can undercut."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))
        features: Tensor = self.vit.forward_head(tokens)
        return features


@dataclass(frozen=True)
class Job:
    """A model to train and the batch to train it on."""

    model: nn.Module
    inputs: Tensor


def jobs(
    size: VisionModel, mask_ratio: float, stages: Sequence[str], device: str, *, unmasked: bool = True
) -> dict[str, Job]:
    """Every way to train a ViT on fewer patches, on one batch of images, and perhaps on all patches."""
    vit: Any = size.build()
    images = torch.randn(size.batch, 3, *vit.patch_embed.img_size, device=device)
    found = {BASELINE: Job(vit, images)} if unmasked else {}
    found["timm patch_drop_rate"] = Job(size.build(patch_drop_rate=mask_ratio), images)
    for stage in stages:
        model = gaussmask.attach(size.build(), gaussmask.GaussianPatchDropout(mask_ratio), stage=stage)
        found[f"gaussmask {stage}"] = Job(model, images)
    num_tokens = vit.num_prefix_tokens + num_kept_patches(vit.patch_embed.num_patches, mask_ratio)
    tokens = torch.randn(size.batch, num_tokens, vit.embed_dim, device=device, requires_grad=True)
    found[REFERENCE] = Job(FromTokens(size.build()), tokens)
    for job in found.values():
        job.model.to(device).train()
    return found


def training_step(job: Job, *, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """Forward, backward and AdamW. Between two steps only the weights and the optimizer's moments are left."""
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(job.model) if compiled else job.model

    def step() -> None:
        with torch.autocast(job.inputs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = forward(job.inputs)
        features.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        job.inputs.grad = None

    return step


def contenders(
    size: VisionModel,
    mask_ratio: float,
    stages: Sequence[str],
    device: str,
    dtype: torch.dtype,
    mode: str,
    unmasked: bool,
) -> list[Contender]:
    return [
        Contender(name, training_step(job, dtype=dtype, compiled=mode == "compiled"), batch=size.batch)
        for name, job in jobs(size, mask_ratio, stages, device, unmasked=unmasked).items()
    ]


def groups(
    sizes: Sizes,
    *,
    ratios: Sequence[float],
    modes: Sequence[str],
    stages: Sequence[str],
    device: str,
    dtype: torch.dtype,
    unmasked: bool,
    rounds: int,
) -> list[Group]:
    found = []
    masked = 2 + len(stages)
    for mode, size, mask_ratio in itertools.product(modes, sizes.step, ratios):
        with torch.device("meta"):
            vit: Any = size.build()
        flops = Tower(vit.num_prefix_tokens + vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)).flops
        seconds = 3 * size.batch * flops * (unmasked + masked * (1 - mask_ratio)) / FLOPS_PER_SECOND
        keys: dict[str, Any] = {"part": "step", "model": size.name, "dtype": str(dtype).removeprefix("torch.")}
        keys |= {"mask_ratio": mask_ratio, "mode": mode, "pass": "training step"}
        build = functools.partial(contenders, size, mask_ratio, stages, device, dtype, mode, unmasked)
        compiles = unmasked + masked if mode == "compiled" else 0
        baseline = BASELINE if unmasked else REFERENCE
        found.append(Group(keys, build, REFERENCE, baseline, rounds, seconds, compiles))
    return found
