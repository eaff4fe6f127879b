"""The most memory that tensors take during a call, above what lay there before it."""

import json
import os
import tempfile
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # see launches.py


def peak_mib(call: Callable[[], object], device: str) -> float:
    """Peak of the allocator's count during `call`, which should have been called before.

    What a library allocates besides tensors (a BLAS work space on the CPU) is not in it.
    """
    return (_cuda_peak(call) if device == "cuda" else _cpu_peak(call)) / MIB


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    # The profiler counts from the process's first profile on, so the total before the call need not be 0.
    changes = sorted(
        ((event["ts"], event["args"]) for event in events if event["name"] == "[memory]"), key=itemgetter(0)
    )
    if not changes:
        return 0
    totals: list[int] = [change["Total Allocated"] for _, change in changes]
    before: int = totals[0] - changes[0][1]["Bytes"]
    return max(totals) - before
