"""What the figures were measured on, with which versions, and by which command."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch

import gaussmask


def head_of_results(device: str, dtype: torch.dtype, reason: str, seed: int) -> dict[str, Any]:
    """What results.json begins with; `reason` is that of the dtype."""
    return {
        "machine": describe_machine(device),
        "versions": versions(),
        "dtype": {"name": str(dtype).removeprefix("torch."), "reason": reason},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "seed": seed,
        "git": git_commit(),
    }


def describe_machine(device: str) -> dict[str, str | int | None]:
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "os": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    libraries = {"torch": torch, "timm": timm, "open_clip": open_clip, "gaussmask": gaussmask}
    return {"python": platform.python_version()} | {name: str(lib.__version__) for name, lib in libraries.items()}


def git_commit() -> str | None:
    """The commit that this file lies in, with `-dirty` behind it when files were changed since; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
