"""bfloat16 or float32: whichever is faster on the device at hand."""

import functools

import torch

from measure.timing import Contender, clock_for, interleave, warm_up

SIDE = 512


def choose_dtype(wanted: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of autocast, and the reason for it.

    Args:
        wanted: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 where a matrix product is at least as fast in it as in
            float32. A CPU without instructions for bfloat16 only emulates it.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as asked for"
    contenders = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
        contenders.append(Contender(str(dtype), functools.partial(torch.matmul, matrix, matrix), batch=1))
    clock = clock_for(device)
    repeats = [warm_up(contender, clock) for contender in contenders]
    milliseconds = interleave(contenders, repeats, 3, clock).median()
    times = milliseconds["torch.bfloat16"] / milliseconds["torch.float32"]
    reason = f"a {SIDE} x {SIDE} matrix product in bfloat16 takes {times:.2g} times as long as in float32"
    return (torch.bfloat16 if times <= 1 else torch.float32), reason
