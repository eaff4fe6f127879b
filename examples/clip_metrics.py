"""The log of a run: a line on the terminal, JSON lines in a file, and the boards that are asked for."""

import hashlib
import importlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from user_errors import UserError


class Board(Protocol):
    """Something that draws curves."""

    def log(self, record: Mapping[str, float], step: int) -> None:
        """Numbers of a step, by name."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # which is slow to import

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, record: Mapping[str, float], step: int) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of wandb, or of trackio, which has the same functions.

    Args:
        library: "wandb" or "trackio".
        run_id: what a resumed run finds its curves by.

    Raises:
        UserError: when the library is not installed, or does not begin.
    """

    def __init__(self, library: str, project: str, name: str, run_id: str, options: Mapping[str, Any]) -> None:
        try:
            module: Any = importlib.import_module(library)
        except ImportError as error:
            raise UserError(f"{library} is not installed: pip install {library}, or leave out --{library}") from error
        resumed = {"id": run_id, "resume": "allow"} if library == "wandb" else {"resume": "allow"}
        try:
            self._run = module.init(project=project, name=name, config=dict(options), **resumed)
        except Exception as error:  # of its own kinds: no account, no network
            raise UserError(f"{library} could not begin a run: {error}") from error

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """Records of one phase, `{"phase", "step", ...}` each.

    A resumed run takes out what the interrupted one logged after its last checkpoint, so every step is there once.

    Args:
        folder: gets `metrics.jsonl` and TensorBoard's event files; wandb and trackio name the run after it.
        phase: of all records.
        step: where this run begins.
        boards: of "tensorboard", "wandb" and "trackio".
        project: of wandb and trackio.
        options: of the run, for the same two.
        silent: write nothing; for all processes but the first.
    """

    def __init__(
        self,
        folder: Path,
        phase: str,
        step: int,
        *,
        boards: Sequence[str] = (),
        project: str = "gaussmask",
        options: Mapping[str, Any] | None = None,
        silent: bool = False,
    ) -> None:
        self.path = None if silent else folder / "metrics.jsonl"
        self.phase = phase
        self.boards: list[Board] = []
        if self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.path.write_text("".join(f"{line}\n" for line in lines if self._stays(line, step)), encoding="utf-8")
        name = f"{folder.name}-{phase}"
        run_id = hashlib.sha256(f"{folder.resolve()} {phase}".encode()).hexdigest()[:16]
        for board in boards:
            if board == "tensorboard":
                self.boards.append(TensorBoard(folder / "tensorboard" / phase, step))
            else:
                self.boards.append(Tracker(board, project, name, run_id, options or {}))

    def _stays(self, line: str, step: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off by a crash
            return False
        return bool(record["phase"] != self.phase or record["step"] <= step)

    def write(self, step: int, **record: Any) -> None:
        """Log `record`; its numbers go to the boards as well."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **record}) + "\n")
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items()
        ]
        tqdm.write(f"{self.phase} {step}: {', '.join(shown)}")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for board in self.boards:
            board.log(numbers, step)

    def close(self) -> None:
        """Of a finished phase."""
        for board in self.boards:
            board.close()


def peak_memory(device: torch.device) -> float:
    """GiB at most: of tensors on the GPU, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
