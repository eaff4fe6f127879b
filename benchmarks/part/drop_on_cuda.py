"""What only a GPU can show about the drop: kernels, synchronisation, graph capture, share of a step."""

from collections.abc import Callable
from typing import Any

import torch
from measure.launches import copies_and_waits, launches
from measure.timing import Contender, CudaClock, interleave, warm_up
from torch import Tensor, nn

import gaussmask
from part.sizes import Sizes
from part.step import Job, training_step


def check_drop(sizes: Sizes, mask_ratio: float, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row about `GaussianPatchDropout` on the tokens of the largest model of part step."""
    size = sizes.step[-1]
    vit: Any = size.build().cuda().train()
    length = vit.num_prefix_tokens + vit.patch_embed.num_patches
    x = torch.randn(size.batch, length, vit.embed_dim, device="cuda", dtype=dtype, requires_grad=True)
    drop = gaussmask.GaussianPatchDropout(mask_ratio, num_prefix_tokens=vit.num_prefix_tokens)
    gradient = torch.ones_like(drop(x))
    row = {"mask_ratio": mask_ratio, "model": size.name, "batch": size.batch, "dtype": str(dtype)}
    row |= _launches(drop, x, gradient)
    row["waits for the host"] = _waits(drop, x, gradient)
    row["forward captured in a CUDA graph"] = _captures(drop, x)
    gaussmask.attach(vit, gaussmask.GaussianPatchDropout(mask_ratio))
    images = torch.randn(size.batch, 3, *vit.patch_embed.img_size, device="cuda")
    step = training_step(Job(vit, images), dtype=dtype, compiled=False)
    row["share of a training step"] = _share(lambda: torch.autograd.grad(drop(x), x, gradient), step, rounds)
    return row


def _launches(drop: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, int]:
    """Kernels of each pass, and its copies and synchronisations of the stream."""
    out = drop(x)
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: drop(x),
        "backward": lambda: torch.autograd.grad(out, x, gradient, retain_graph=True),
    }
    counts = {}
    for name, call in passes.items():
        counts[f"{name} kernels"] = len(launches(call, "cuda"))
        counts[f"{name} copies and waits"] = len(copies_and_waits(call))
    return counts


def _waits(drop: nn.Module, x: Tensor, gradient: Tensor) -> bool:
    """Whether torch sees a synchronisation in forward or backward."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(drop(x), x, gradient)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captures(drop: nn.Module, x: Tensor) -> bool:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph), torch.no_grad():
            drop(x)
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _share(drop: Any, step: Any, rounds: int) -> float:
    contenders = [Contender("drop", drop, 1), Contender("step", step, 1)]
    clock = CudaClock()
    repeats = [warm_up(contender, clock) for contender in contenders]
    samples = interleave(contenders, repeats, rounds, clock)
    return float((samples["drop"] / samples["step"]).median())
