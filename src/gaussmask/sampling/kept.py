"""Tensors that depend on sizes and settings alone, made once and kept between forwards."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

LIMIT = 128
T = TypeVar("T", Tensor, tuple[Tensor, ...])
_kept: OrderedDict[tuple[Any, ...], tuple[Any, int | None]] = OrderedDict()


def kept(make: Callable[..., T], *settings: Any, device: torch.device | str | None) -> T:
    """`make(*settings, device=device)`, or what an earlier call with the same settings made.

    Nothing is kept, or taken, where a tensor of another time must not be: in a graph that is being captured or traced,
    where it would be a constant at an address that may be freed; under a dispatch mode, which may hold no real tensors;
    in a transform of torch.func, whose tensors are wrappers that end with it; and without a device, which may then be
    any. On a GPU each stream has its own, for another one may not be done yet. A tensor that somebody wrote into is
    made anew.

    Args:
        make: a function of this library's, of nothing but its arguments, that returns a tensor, or a tuple of some that
            nobody outside gets to see.
        settings: what it depends on besides, hashable.
    """
    # Few steps where it is found: in a forward all of this is code that the processor has not run for a while.
    if (
        device is None
        or is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
    ):
        return make(*settings, device=device)
    if type(device) is not torch.device:
        device = torch.device(device)
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make(*settings, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (make, settings, device, stream)
    found = _kept.get(key)
    if found is not None and (found[1] is None or found[0]._version == found[1]):
        return found[0]
    with torch.inference_mode(False), torch.no_grad():
        made = make(*settings, device=device)
    if all(type(tensor) is Tensor for tensor in (made if isinstance(made, tuple) else (made,))):
        _kept[key] = (made, made._version if isinstance(made, Tensor) else None)
        while len(_kept) > LIMIT:
            try:
                _kept.popitem(last=False)
            except KeyError:  # another thread was quicker
                break
    return made
