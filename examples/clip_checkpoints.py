"""Checkpoints of a distributed run that a crash can't spoil.

A checkpoint is a folder: `model.safetensors`, `optimizer.pt` (both whole, whatever the sharding), `rank-N.pt`
(generators and data position of every process) and `checkpoint.json`. It is written under another name, flushed to the
disk and then renamed, so a folder with the right name is complete. Everything is loaded with `weights_only=True`. The
folder must be seen by all nodes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from clip_stream import Progress
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from user_errors import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the CPU, on the first process; all processes must call it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """All of it, where FSDP2 has sharded it; all processes must call it."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    info: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int,
) -> None:
    """Save everything that the run needs to go on as if nothing had happened; all processes must call it.

    Args:
        folder: of the checkpoints; this one becomes `step-00001234` in it.
        progress: of this process in its data.
        info: whatever should be read back with it, as JSON.
        keep: so many of the latest checkpoints are kept.

    Raises:
        UserError: when any process could not write its part. The earlier checkpoints are untouched.
    """
    weights = whole_state_dict(model)
    moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    part, place = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"

    def write() -> None:
        torch.save(_own_state(progress), part / f"rank-{ranks.rank}.pt")
        if ranks.first:
            safetensors.torch.save_file(weights, part / "model.safetensors")
            torch.save(moments, part / "optimizer.pt")
            content = {"step": step, "world_size": ranks.world_size, **info}
            (part / "checkpoint.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    problem = ""
    for job, mine in ((lambda: _start(part), ranks.first), (write, True), (lambda: _finish(part, place), ranks.first)):
        problem = problem or _first_problem(_attempt(job) if mine else "", ranks)
    if problem:
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
        last = latest_checkpoint(folder)
        good = f"the last good one is {last}" if last else "there is no earlier one"
        raise UserError(f"the checkpoint of step {step} could not be written to {folder} ({problem}); {good}")
    if ranks.first:
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def read_info(checkpoint: Path) -> dict[str, Any]:
    """`info` of `save_checkpoint`, with `step` and `world_size`."""
    content: dict[str, Any] = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    return content


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, own_state: bool
) -> Progress | None:
    """Put model and optimizer back, and with `own_state` the generators; all processes must call it.

    Args:
        own_state: whether process and workers are those of the checkpoint, so that generators and positions fit.

    Returns:
        The position in the data, with `own_state`.

    Raises:
        UserError: when the checkpoint is of another model.
    """
    weights: dict[str, Any] = safetensors.torch.load_file(checkpoint / "model.safetensors")
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    try:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        # Not strict, for a parameter that has had no gradient yet has no moments.
        lenient = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, moments, options=lenient)
    except (RuntimeError, KeyError, ValueError) as error:
        detail = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"{checkpoint} is of another model or optimizer than this run's: {detail[:200]}") from error
    if not own_state:
        return None
    own = torch.load(checkpoint / f"rank-{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(own["torch"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    return Progress(**own["progress"])


def _own_state(progress: Progress) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "progress": asdict(progress)}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def _start(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _finish(part: Path, place: Path) -> None:
    for path in [*part.iterdir(), part]:
        _flush(path)
    shutil.rmtree(place, ignore_errors=True)  # of a run that was resumed from an earlier step
    part.rename(place)
    _flush(place.parent)


def _flush(path: Path) -> None:
    """Onto the disk, so that a rename can't be there before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _attempt(job: Callable[[], None]) -> str:
    """What went wrong, in a line, or nothing."""
    try:
        job()
    except Exception as error:  # of the file system, torch or safetensors: one line, and every process is told
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _first_problem(problem: str, ranks: Ranks) -> str:
    """The problem of any process, known to all of them."""
    if ranks.world_size == 1:
        return problem
    problems: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), "")
