"""One training step of CLIP: forward, contrastive loss, gradients, AdamW. Every loop in examples/ takes this one.

images -> (drop) -> image features --.
                                      > contrastive loss -> gradients -> AdamW
tokens -----------> text features ---'
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import gaussmask

METHODS = ("clip", "flip", "glip")
OTHER_RULES = ("weighted", "grid", "block", "cluster")  # "weighted" is GLIP's Gaussian, drawn without sure winners
RULES: dict[str, Callable[..., gaussmask.PatchDropout]] = {
    "random": gaussmask.RandomPatchDropout,
    "gaussian": gaussmask.GaussianPatchDropout,
    "grid": gaussmask.GridPatchDropout,
    "block": gaussmask.BlockPatchDropout,
    "cluster": gaussmask.ClusterPatchDropout,
}
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP, section 2.5


def train_step(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    contrastive_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """One optimizer step on one batch; the mask is drawn inside the image tower. Returns the loss."""
    with autocast:
        image_features, text_features, *scale_and_bias = model(images, tokens)
    loss: Tensor = contrastive_loss(image_features, text_features, *scale_and_bias)
    loss.backward()
    apply_gradients(model, optimizer)
    return loss.detach()


def train_step_in_parts(
    model: nn.Module,
    images: Sequence[Tensor],
    tokens: Sequence[Tensor],
    contrastive_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: AbstractContextManager[Any],
    *,
    max_norm: float = math.inf,
) -> Tensor:
    """`train_step` on a batch that is too large for one forward, with the gradients of the unsplit batch.

    A contrastive loss compares every image with every caption, so gradients of parts don't add up to those of the
    batch. Hence, as in GradCache (Gao et al. 2021, arXiv 2101.06983): features of all parts without gradients; the loss
    on all of them, and its gradients with respect to the features; then every part once more, with gradients, from
    those of its features. The second forward draws the masks of the first one: the generators are set back.

    Args:
        images, tokens: the parts of the batch, of any sizes. One part takes one forward.
        max_norm: gradients of a larger norm are scaled down to it.
    """
    parts = list(zip(images, tokens, strict=True))
    if len(parts) == 1:
        with autocast:
            outputs = model(*parts[0])
        loss: Tensor = contrastive_loss(*(output.float() for output in outputs))
        loss.backward()
    else:
        device = images[0].device
        generators = _generator_states(device)
        with torch.no_grad(), autocast:
            cached = [model(*part) for part in parts]
        features = [torch.cat([outputs[tower].float() for outputs in cached]).requires_grad_() for tower in (0, 1)]
        scale_and_bias = [output.detach().clone().requires_grad_() for output in cached[0][2:]]
        loss = contrastive_loss(*features, *scale_and_bias)
        loss.backward()
        sizes = [len(part) for part in images]
        image_gradients, text_gradients = (_gradient(feature).split(sizes) for feature in features)
        _set_generator_states(device, generators)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else without_reduction(model):
                with autocast:
                    outputs = [output.float() for output in model(*part)]
                shared = [_gradient(output) * last for output in scale_and_bias]  # the same in every part: counts once
                torch.autograd.backward(outputs, [image_gradients[number], text_gradients[number], *shared])
    apply_gradients(model, optimizer, max_norm=max_norm)
    return loss.detach()


def make_drop(
    method: str, mask_ratio: float, *, sigma: float, sampling: str, options: Mapping[str, Any] | None = None
) -> gaussmask.PatchDropout | None:
    """What a method drops.

    Args:
        method: nothing (`"clip"`), random patches (`"flip"`), those far from the centre (`"glip"`), or what one of
            `OTHER_RULES` or of `RULES` drops.
        sigma, sampling: of the Gaussian.
        options: more of the rule's class.
    """
    rule = {"flip": "random", "glip": "gaussian", "weighted": "gaussian"}.get(method, method)
    if rule == "clip":
        return None
    if rule not in RULES:
        raise ValueError(f"method must be one of {', '.join((*METHODS, *OTHER_RULES))}, got {method!r}")
    gaussian = {"sigma": sigma, "sampling": "weighted" if method == "weighted" else sampling}
    return RULES[rule](mask_ratio, **(gaussian if rule == "gaussian" else {}) | dict(options or {}))


def count_operations(model: nn.Module, images: Tensor, tokens: Tensor) -> int:
    """Of a forward and a backward, counted on the model; it may lie on the meta device."""
    with FlopCounterMode(display=False) as counter:
        image_features, text_features, *_ = model(images, tokens)
        (image_features.sum() + text_features.sum()).backward()
    return counter.get_total_flops()


def apply_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, *, max_norm: float = math.inf) -> None:
    """Step the optimizer, drop the gradients, and keep the logit scale where CLIP keeps it."""
    if max_norm < math.inf:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        unwrap(model).logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def unwrap(model: nn.Module) -> Any:
    """The model under DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def without_reduction(model: nn.Module) -> Iterator[None]:
    """Gradients stay on their process inside this context, to be reduced together with the next ones."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:  # a bias that this loss does not take
        return torch.zeros_like(tensor)
    return tensor.grad


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW without decay on vectors and scalars."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, num_steps: int, num_warmup: int, peak: float) -> float:
    """Of step 0, 1, ...: a linear warm-up to `peak`, then a cosine that would reach 0 at `num_steps`."""
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """`"bf16"` (autocast), `"fp32"`, or `"auto"` for the faster of the two on this device."""
    bf16 = precision == "bf16" or (precision == "auto" and _bf16_is_faster(device))
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


@functools.cache
def _bf16_is_faster(device: str) -> bool:
    """Whether a matrix product is faster in bfloat16: many CPUs only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
        times = []
        for _ in range(5):
            started = now(device)
            matrix @ matrix
            times.append(now(device) - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def now(device: str) -> float:
    """Seconds, when all work on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
