"""Part overhead: what a drop adds to a forward that has next to nothing else to do, so that the host is the limit.

A ViT of one narrow block, without gradients. What counts is how much longer a forward takes than without a drop: Python
and, on a GPU, launches. On a large model the same microseconds disappear behind the blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import open_clip
import timm
import torch
from measure.launches import launches
from measure.timing import Contender
from torch import Tensor, nn

import gaussmask
from gaussmask.functional import gaussian_density, num_kept_patches
from part.groups import Group

MODEL = "vit_tiny_patch16_224"
SMALLEST: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 1, "depth": 1, "num_classes": 2,
}  # fmt: skip
BATCH = 2
WITHOUT = "no drop"
BASELINE = "timm patch_drop_rate"


class Operations(nn.Module):
    """The tensor operations of a Gaussian drop and nothing else, with all that they need made beforehand."""

    density: Tensor
    first_row: Tensor
    first_patch: Tensor

    def __init__(self, mask_ratio: float) -> None:
        super().__init__()
        side = SMALLEST["img_size"] // SMALLEST["patch_size"]
        self.num_kept = num_kept_patches(side**2, mask_ratio)
        self.register_buffer("density", gaussian_density((side, side), 0.2).view(1, -1), persistent=False)
        first_row = torch.arange(0, BATCH * (1 + side**2), 1 + side**2).unsqueeze(1)
        self.register_buffer("first_row", first_row, persistent=False)
        self.register_buffer("first_patch", first_row + 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.rand((BATCH, x.shape[1] - 1), device=x.device) + self.density
        keep = scores.topk(self.num_kept, dim=-1, sorted=False).indices
        rows = torch.cat([self.first_row, keep + self.first_patch], dim=1)
        return x.flatten(0, 1).index_select(0, rows.view(-1)).view(*rows.shape, -1)


def with_empty_hooks(model: Any) -> nn.Module:
    """Hooks that do nothing, in the places where an attached drop has some: what torch itself takes for them."""
    model.register_forward_pre_hook(lambda module, args: None)
    model.register_forward_hook(lambda module, args, output: None, always_call=True)
    model.patch_embed.register_forward_hook(lambda module, args, output: None)
    model.blocks[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    return cast("nn.Module", model)


def models(mask_ratio: float, stages: Sequence[str]) -> dict[str, nn.Module]:
    """The ViT without a drop, with timm's, open_clip's, the bare operations, and both of our rules at every stage."""
    found = {WITHOUT: build(), BASELINE: build(patch_drop_rate=mask_ratio)}
    others: dict[str, nn.Module] = {"open_clip PatchDropout": open_clip.transformer.PatchDropout(mask_ratio)}
    others |= {name: Operations(mask_ratio) for name in ("bare operations", "bare operations, empty hooks")}
    for name, other in others.items():
        found[name] = build()
        cast("Any", found[name]).patch_drop = other
    with_empty_hooks(found["bare operations, empty hooks"])
    for stage in stages:
        for rule in (gaussmask.RandomPatchDropout, gaussmask.GaussianPatchDropout):
            name = rule.__name__.removesuffix("PatchDropout")
            found[f"gaussmask {name}, {stage}"] = gaussmask.attach(build(), rule(mask_ratio), stage=stage)
    return found


def build(**more: Any) -> nn.Module:
    model: nn.Module = timm.create_model(MODEL, **SMALLEST, **more)
    return model


def forward(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            model(images)

    return call


def contenders(mask_ratio: float, stages: Sequence[str], device: str) -> list[Contender]:
    images = torch.randn(BATCH, 3, SMALLEST["img_size"], SMALLEST["img_size"], device=device)
    found, without = [], 0
    for name, model in models(mask_ratio, stages).items():
        call = forward(model.to(device).train(), images)
        call()  # what is made once is not counted
        count = len(launches(call, device))
        without = count if name == WITHOUT else without
        found.append(Contender(name, call, batch=BATCH, facts={"launches": count - without}))
    return found


def groups(*, ratios: Sequence[float], stages: Sequence[str], device: str, rounds: int) -> list[Group]:
    found = []
    for mask_ratio in ratios:
        keys = {"part": "overhead", "model": "ViT of one block", "dtype": "float32", "mask_ratio": mask_ratio}
        build = functools.partial(contenders, mask_ratio, stages, device)
        seconds = 0.02 * len(models(mask_ratio, stages))
        keys |= {"mode": "eager", "pass": "forward"}
        found.append(Group(keys, build, BASELINE, WITHOUT, rounds, seconds, without=WITHOUT))
    return found
