"""The log of a run: a line on the terminal, JSON lines in a file, and TensorBoard if asked for."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class MetricsLog:
    """Records of one phase, `{"phase", "step", ...}` each.

    A resumed run takes out what the interrupted one logged after its last checkpoint, so every step is there once.

    Args:
        folder: gets `metrics.jsonl` and, with `tensorboard`, event files.
        phase: of all records.
        step: where this run begins.
        silent: write nothing; for all processes but the first.
    """

    def __init__(self, folder: Path, phase: str, step: int, *, tensorboard: bool = False, silent: bool = False) -> None:
        self.path = None if silent else folder / "metrics.jsonl"
        self.phase = phase
        self.board: Any = None
        if self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.path.write_text("".join(f"{line}\n" for line in lines if self._stays(line, step)), encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # which is slow to import

            self.board = SummaryWriter(str(folder / "tensorboard" / phase), purge_step=step + 1)

    def _stays(self, line: str, step: int) -> bool:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off by a crash
            return False
        return bool(record["phase"] != self.phase or record["step"] <= step)

    def write(self, step: int, **record: Any) -> None:
        """Log `record`; numbers go to TensorBoard as well."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **record}) + "\n")
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items()
        ]
        tqdm.write(f"{self.phase} {step}: {', '.join(shown)}")
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)
            self.board.flush()


def peak_memory(device: torch.device) -> float:
    """GiB at most: of tensors on the GPU, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
