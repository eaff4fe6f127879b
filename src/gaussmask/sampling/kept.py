"""Tensors that depend on sizes and settings alone, made once and kept between forwards."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIMIT = 128
_kept: OrderedDict[tuple[Any, ...], tuple[Tensor, int]] = OrderedDict()


def kept(make: Callable[..., Tensor], *settings: Any, device: torch.device | str | None) -> Tensor:
    """`make(*settings, device=device)`, or what an earlier call with the same settings made.

    Nothing is kept, or taken, where a tensor of another time must not be: in a graph that is being captured or traced,
    where it would be a constant at an address that may be freed; under a dispatch mode, which may hold no real tensors;
    and without a device, which may then be any. On a GPU each stream has its own, for another one may not be done yet.
    What somebody wrote into is made anew.

    Args:
        make: a function of this library's, of nothing but its arguments.
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
    if found is not None and found[0]._version == found[1]:
        return found[0]
    with torch.inference_mode(False), torch.no_grad():
        tensor = make(*settings, device=device)
    if type(tensor) is Tensor:
        _kept[key] = (tensor, tensor._version)
        while len(_kept) > LIMIT:
            try:
                _kept.popitem(last=False)
            except KeyError:  # another thread was quicker
                break
    return tensor
