"""Tensors that depend on sizes and settings alone, made once and kept between forwards."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

LIMIT = 128
T = TypeVar("T", Tensor, tuple[Tensor, ...])
_kept: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()


def kept(make: Callable[..., T], *settings: Any, device: torch.device | str | None) -> T:
    """`make(*settings, device=device)`, or what an earlier call with the same settings made.

    Nothing is kept, or taken, where a tensor of another time must not be: in a graph that is being captured or traced,
    where it would be a constant at an address that may be freed; under a dispatch mode, which may hold no real tensors;
    and without a device, which may then be any. On a GPU each stream has its own, for another one may not be done yet.
    What somebody wrote into is made anew.

    Args:
        make: a function of this library's, of nothing but its arguments, that returns a tensor or a tuple of them.
        settings: what it depends on besides, hashable.
    """
    if device is None or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return make(*settings, device=device)
    if torch._C._len_torch_dispatch_stack():
        return make(*settings, device=device)
    device = torch.device(device)
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make(*settings, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (make, settings, device, stream)
    found = _kept.get(key)
    if found is not None and versions(found[0]) == found[1]:
        return found[0]
    with torch.inference_mode(False), torch.no_grad():
        made = make(*settings, device=device)
    if all(type(tensor) is Tensor for tensor in (made if isinstance(made, tuple) else (made,))):
        _kept[key] = (made, versions(made))
        while len(_kept) > LIMIT:
            try:
                _kept.popitem(last=False)
            except KeyError:  # another thread was quicker
                break
    return made


def versions(made: Any) -> int:
    """How often somebody has written into it."""
    return sum([tensor._version for tensor in made]) if type(made) is tuple else made._version
