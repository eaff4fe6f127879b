"""Part layer: the drop by itself, against other ways to write it and against the least that it could cost."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from measure.timing import Contender
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import Tensor, nn

import gaussmask
from gaussmask.functional import gaussian_density, num_kept_patches
from part.groups import Group
from part.sizes import Sizes

PREFIX = 1  # a class token
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward+backward")
REFERENCE = "copy limit"
BASELINE = "timm"


class CopyLimit(nn.Module):
    """The least that a drop could do: read as many rows as are kept, one behind the other, and write them.

    Its backward writes the gradient of all tokens, as it must: zeros, and the rows.
    """

    def __init__(self, num_kept: int) -> None:
        super().__init__()
        self.num_tokens = PREFIX + num_kept

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.num_tokens].clone()


class PublishedRule(nn.Module):
    """GLIP's rule as its authors publish it: u - (1 - density), sort, gather every token, class token in front."""

    density: Tensor

    def __init__(self, num_kept: int, side: int, sigma: float = 0.2) -> None:
        super().__init__()
        self.num_kept = num_kept
        self.register_buffer("density", gaussian_density((side, side), sigma).flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        prefix, patches = x[:, :PREFIX], x[:, PREFIX:]
        scores = torch.rand(patches.shape[:2], device=x.device) - (1 - self.density)
        keep = scores.argsort(dim=1, descending=True)[:, : self.num_kept]
        kept = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return torch.cat([prefix, kept], dim=1)


class BooleanMask(nn.Module):
    """The rows that a boolean mask picks out; a GPU has to tell the host how many these are."""

    def __init__(self, num_kept: int) -> None:
        super().__init__()
        self.num_kept = num_kept

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        scores = torch.rand(batch, length - PREFIX, device=x.device)
        keep = scores.topk(self.num_kept, dim=1, sorted=False).indices + PREFIX
        mask = torch.zeros(batch, length, dtype=torch.bool, device=x.device).scatter_(1, keep, True)
        mask[:, :PREFIX] = True
        return x[mask].view(batch, PREFIX + self.num_kept, width)


def layers(mask_ratio: float, num_patches: int) -> dict[str, nn.Module]:
    """Every way to drop patches of a square grid."""
    num_kept = num_kept_patches(num_patches, mask_ratio)
    return {
        "gaussmask random": gaussmask.RandomPatchDropout(mask_ratio, num_prefix_tokens=PREFIX),
        "gaussmask Gaussian": gaussmask.GaussianPatchDropout(mask_ratio, num_prefix_tokens=PREFIX),
        BASELINE: TimmPatchDropout(mask_ratio, num_prefix_tokens=PREFIX),
        "open_clip": open_clip.transformer.PatchDropout(mask_ratio),
        "published GLIP rule": PublishedRule(num_kept, round(num_patches**0.5)),
        "boolean mask": BooleanMask(num_kept),
        REFERENCE: CopyLimit(num_kept),
    }


def calls(layer: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed in each pass. The forward records for a backward, as it does in training."""
    with torch.no_grad():
        gradient = torch.ones_like(layer(x))
    return {
        "forward": lambda: layer(x),
        "forward+backward": lambda: torch.autograd.grad(layer(x), x, gradient),
    }


def contenders(shape: tuple[int, int, int], mask_ratio: float, device: str, keys: dict[str, Any]) -> list[Contender]:
    x = torch.randn(shape, device=device, dtype=getattr(torch, keys["dtype"])).requires_grad_()
    found = []
    for name, layer in layers(mask_ratio, shape[1] - PREFIX).items():
        layer = layer.to(device).train()
        run = torch.compile(layer) if keys["mode"] == "compiled" else layer
        found.append(Contender(name, calls(run, x)[keys["pass"]], batch=shape[0]))
    return found


def groups(sizes: Sizes, *, ratios: Sequence[float], modes: Sequence[str], device: str, rounds: int) -> list[Group]:
    found = []
    count = len(layers(0.5, 4))
    seconds = count * max(0.02, 5e-9 * sizes.layer[0] * sizes.layer[1] * sizes.layer[2])
    for mode, dtype, pass_, mask_ratio in itertools.product(modes, DTYPES, PASSES, ratios):
        keys: dict[str, Any] = {"part": "layer", "model": " x ".join(map(str, sizes.layer)), "dtype": dtype}
        keys |= {"mask_ratio": mask_ratio, "mode": mode, "pass": pass_}
        build = functools.partial(contenders, sizes.layer, mask_ratio, device, keys)
        compiles = count if mode == "compiled" else 0
        found.append(Group(keys, build, REFERENCE, BASELINE, rounds, seconds, compiles))
    return found
