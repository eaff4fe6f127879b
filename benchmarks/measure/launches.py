"""What a call launches: kernels on a GPU, and on a CPU the operations that would be kernels."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start and stop between progress bars
COPIES_AND_WAITS = ("cudaStreamSynchronize", "cudaMemcpy")  # a device-wide one is the profiler's own
# Operations of views and of memory, which launch nothing, or which are there for the parts that they are made of.
FREE = {
    "view", "reshape", "expand", "expand_as", "as_strided", "as_strided_", "slice", "alias", "select", "unsqueeze",
    "squeeze", "detach", "t", "transpose", "permute", "flatten", "split", "chunk", "unbind", "unfold", "narrow", "to",
    "_unsafe_view", "meshgrid", "resolve_conj", "resolve_neg", "result_type", "lift_fresh", "dropout",
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "ones_like", "fill_",
}  # fmt: skip


def launches(call: Callable[[], object], device: str) -> list[str]:
    """The names of all, in the order in which they begin; copies and fills of memory are among those of a GPU."""
    if device == "cuda":
        return [event.name for event in events(call) if event.device_type.name == "CUDA"]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    found: Any = profiler.events()
    return [event.name.removeprefix("aten::") for event in found if _is_one(event)]


def copies_and_waits(call: Callable[[], object]) -> list[str]:
    """What a call makes a GPU copy or wait for, at the host's side."""
    return [event.name for event in events(call) if event.name.startswith(COPIES_AND_WAITS)]


def events(call: Callable[[], object]) -> Any:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return profiler.events()


def _is_one(event: Any) -> bool:
    """Whether it is an operation that is not made of others, but for free ones."""
    library, _, name = event.name.partition("::")
    return library == "aten" and name not in FREE and not any(_is_one(child) for child in _below(event))


def _below(event: Any) -> list[Any]:
    return [part for child in event.cpu_children for part in (child, *_below(child))]
