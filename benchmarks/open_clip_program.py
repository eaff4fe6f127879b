"""Two whole programs side by side: open_clip's own with its patch dropout, and examples/train_clip.py.

    python benchmarks/open_clip_program.py
    python benchmarks/open_clip_program.py --train-data "shards/{0000..0015}.tar" --model ViT-B-16 --batch-size 512
    python benchmarks/open_clip_program.py --quick

Both train the same model from the same shards, with the same batch, precision, workers and share of patches, in turns:
in a round each trains once at every ratio, one right after the other, and the next round begins with the other one.
Images per second are what each program logs, without the first steps. It leaves in `--output`: `results.json` (written
after every run, so that an interrupted command loses nothing) and `results.md` (the table).
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
import webdataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from clip_shards import expand
from clip_towers import model_config
from measure.machine import head_of_results
from measure.precision import choose_dtype
from part.loader import CAPTION, photo
from part.open_clip_launcher import PATCHES
from report import failures, save_report, text
from user_errors import UserError, one_line, setting_up
from written.files import save

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCHER = Path(__file__).parent / "part" / "open_clip_launcher.py"
OURS, THEIRS = "train_clip.py", "open_clip_train"
PRECISIONS = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
THEIR_LINE = re.compile(r"Train Epoch: \d+ \[ *(?P<samples>\d+)/.* Batch \(t\): (?P<seconds>[\d.]+),")
SHARDS = 16
Run = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What both programs train, and how often.

    Args:
        train_data: WebDataset shards (path, braces, several joined by `::`); stand-ins for photos if not given.
        model: a name of open_clip, or a .json file in its format, with a ViT of open_clip's own: ViT-B-16 on a GPU,
            examples/small_clip.json on a CPU if not given.
        ratios: shares of the patches that are dropped.
        rounds: each program trains so many times at each ratio.
        steps: that count, a multiple of log_every. Those before and behind them are trained too.
        log_every: steps between lines of both logs.
        batch_size: 512 on a GPU and 64 on a CPU if not given.
        workers: readers of each program: on a GPU one for each core, but at most 16, and one on a CPU if not given.
        threads: of each program's training, besides the workers; on a CPU those of the cores that the workers leave if
            not given: threads that wait for each other on a core that a worker holds make a step many times slower.
        precision: fp32, bf16 (autocast), or auto for the faster of the two on this device.
        photos: so many stand-ins are made.
        photo_size: side of the stand-ins, in pixels.
        seed: of weights, order and masks.
        quick: one round, tiny: shows that it runs, measures nothing.
        output: folder for the results.
    """

    train_data: str | None = None
    model: str | None = None
    ratios: tuple[float, ...] = (0.0, 0.5, 0.75, 0.918)
    rounds: int = 4
    steps: int = 20
    log_every: int = 5
    batch_size: int | None = None
    workers: int | None = None
    threads: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    photos: int = 1024
    photo_size: int = 256
    seed: int = 0
    quick: bool = False
    output: Path = Path("build/open_clip_program")
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """What a run trains, whichever program it is of; see `Config`."""

    model: str
    batch_size: int
    steps: int
    log_every: int
    workers: int
    threads: int
    precision: str
    seed: int
    device: str
    shards: str = ""
    mask_ratio: float = 0.0

    @property
    def in_queue(self) -> int:
        """Batches that wait in the queues of a DataLoader's workers."""
        return 2 * self.workers

    @property
    def warm_up(self) -> int:
        """The first steps, which do not count: at least those whose batches may have been ready beforehand."""
        return self.log_every * math.ceil(max(self.log_every, self.in_queue) / self.log_every)

    @property
    def all_steps(self) -> int:
        """Those that count, those before, and those behind, when workers have nothing more to do.

        open_clip_train logs one step later than train_clip.py, and rounds up to a multiple of its workers.
        """
        readers = max(1, self.workers)
        return readers * math.ceil((self.warm_up + self.steps + 1 + self.in_queue) / readers)


class Window(NamedTuple):
    """The steps from one line of a log to the next one, and how long they took together."""

    first: int
    last: int
    seconds: float


def main(config: Config) -> None:
    """Run both programs in turns, and write the table."""
    if config.quick:
        config = replace(config, ratios=(0.75,), rounds=1, steps=2, log_every=1, batch_size=4, photos=32, photo_size=64)
    with setting_up():
        check(config)
        job = plan(config)
    torch.set_num_threads(job.threads)
    config.output.mkdir(parents=True, exist_ok=True)
    dtype, reason = choose_dtype(PRECISIONS[config.precision], config.device)
    job = replace(job, precision="bf16" if dtype == torch.bfloat16 else "fp32")
    runs: list[Run] = []
    results: dict[str, Any] = {
        **head_of_results(config.device, dtype, reason, config.seed),
        "config": asdict(config) | asdict(job) | {"model": Path(job.model).stem, "output": config.output.name},
        "rows": [],
        "cuda": [],
        "runs": runs,
    }
    with tempfile.TemporaryDirectory() as scratch:
        job = replace(job, shards=config.train_data or write_photos(Path(scratch), config))
        layout = "{l_bar}{bar}| {n_fmt} of {total_fmt} runs, {elapsed}, {remaining} left"
        bar = tqdm(list(turns(config.rounds, config.ratios)), file=sys.stdout, bar_format=layout)
        for number, mask_ratio, program in bar:
            bar.set_description(f"round {number}, {mask_ratio}, {program}")
            turn = {"round": number, "mask_ratio": mask_ratio, "program": program}
            runs.append(turn | measure(program, replace(job, mask_ratio=mask_ratio)))
            results["rows"] = summarize(runs, job)
            save(results, config.output / "results.json")
    save_report(results, config.output)
    print(text(results))
    for line in failures(results):
        print(f"not measured: {line}")
    print(f"left in {config.output}: {', '.join(sorted(path.name for path in config.output.iterdir()))}")


def check(config: Config) -> None:
    """Raise for what can't be meant, before anything is run."""
    for name in ("rounds", "steps", "log_every", "batch_size", "threads", "photos", "photo_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if config.workers is not None and config.workers < 0:
        raise UserError(f"workers must be 0 or more, got {config.workers}")
    if config.steps % config.log_every:
        raise UserError(f"steps must be a multiple of log_every={config.log_every}, got {config.steps}")
    if not config.ratios or not all(0 <= ratio < 1 for ratio in config.ratios):
        raise UserError(f"ratios must lie in [0, 1), got {' '.join(map(str, config.ratios)) or 'none'}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda needs a GPU, and torch sees none here")


def plan(config: Config) -> Job:
    """What the runs have in common, with what depends on the device; the shards and the precision come later."""
    on_gpu = config.device == "cuda"
    model = config.model or ("ViT-B-16" if on_gpu else str(EXAMPLES / "small_clip.json"))
    if Path(model).is_dir():
        raise UserError(f"model must be a name of open_clip or a .json file, got the folder {model}")
    vision = model_config(model)["vision_cfg"]
    if "timm_model_name" in vision or not isinstance(vision["layers"], int):
        raise UserError(f"the image tower of {model} is no ViT of open_clip's own, and has no patch dropout of its own")
    workers = (min(os.cpu_count() or 1, SHARDS) if on_gpu else 1) if config.workers is None else config.workers
    made = math.ceil(config.photos / photos_per_shard(config))
    shards = made if config.train_data is None else len(expand(config.train_data))
    if shards < workers:
        raise UserError(f"open_clip_train needs a shard for each of {workers} workers, and there are {shards}")
    return Job(
        model=model,
        batch_size=config.batch_size or (512 if on_gpu else 64),
        steps=config.steps,
        log_every=config.log_every,
        workers=workers,
        threads=config.threads or max(1, torch.get_num_threads() - (0 if on_gpu else workers)),
        precision=config.precision,
        seed=config.seed,
        device=config.device,
    )


def turns(rounds: int, ratios: Sequence[float]) -> Iterator[tuple[int, float, str]]:
    """Round, ratio and program of every run: the two of a ratio in a row, and every other round the other one first."""
    for number in range(1, rounds + 1):
        for mask_ratio in ratios:
            for program in (THEIRS, OURS) if number % 2 else (OURS, THEIRS):
                yield number, mask_ratio, program


def write_photos(folder: Path, config: Config) -> str:
    """Shards of stand-ins for photos with captions; returns their pattern."""
    generator = np.random.default_rng(config.seed)
    pattern, count = str(folder / "%04d.tar"), photos_per_shard(config)
    with webdataset.ShardWriter(pattern, maxcount=count, verbose=0) as shards:
        for number in tqdm(range(config.photos), desc="making photos", file=sys.stdout):
            image = photo(generator, config.photo_size, config.photo_size)
            shards.write({"__key__": f"{number:06}", "jpg": image, "txt": CAPTION})
    return str(folder / f"{{0000..{len(list(folder.glob('*.tar'))) - 1:04}}}.tar")


def photos_per_shard(config: Config) -> int:
    return math.ceil(config.photos / SHARDS)


def measure(program: str, job: Job) -> Run:
    """One run of a program in a folder of its own: images per second, and the patches of an image in the blocks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = (our_command if program == OURS else their_command)(job, folder)
        settings = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=settings, check=False)
        if done.returncode:
            last = last_words((folder / "output.txt").read_text(encoding="utf-8", errors="replace"))
            return {"failed": f"exit code {done.returncode}: {last}"}
        read = read_our_log if program == OURS else read_their_log
        windows, patches = read(folder, job)
    whole = [window for window in windows if window.last - window.first == job.log_every]
    counted = [window for window in whole if window.first >= job.warm_up][: job.steps // job.log_every]
    seconds = sum(window.seconds for window in counted)
    return {
        "images_per_s": job.steps * job.batch_size / seconds,
        "patches": patches,
        "windows": [[window.first, window.last, round(window.seconds, 4)] for window in counted],
    }


def our_command(job: Job, folder: Path) -> list[str]:
    """FLIP, which drops patches at random as open_clip does."""
    return [
        sys.executable, str(EXAMPLES / "train_clip.py"), "--train-data", job.shards, "--model", job.model,
        "--method", "flip", "--mask-ratio", str(job.mask_ratio), "--stage", "auto", "--device", job.device,
        "--precision", job.precision, "--workers", str(job.workers), "--batch-size", str(job.batch_size),
        "--samples-per-epoch", str(job.all_steps * job.batch_size), "--epochs", "1", "--tuning-epochs", "0",
        "--crop-scale", "0.9", "1.0", "--lr", "1e-4", "--log-every", str(job.log_every), "--seed", str(job.seed),
        "--output", str(folder / OURS),
    ]  # fmt: skip


def their_command(job: Job, folder: Path) -> list[str]:
    """open_clip's program, with the settings that train_clip.py has by default."""
    own = job.model.endswith(".json")
    return [
        sys.executable, str(LAUNCHER), job.model if own else "-",
        "--train-data", job.shards, "--dataset-type", "webdataset",
        "--model", Path(job.model).stem if own else job.model,
        "--force-patch-dropout", str(job.mask_ratio), "--device", job.device,
        "--precision", {"fp32": "fp32", "bf16": "amp_bf16"}[job.precision], "--workers", str(job.workers),
        "--batch-size", str(job.batch_size), "--train-num-samples", str(job.all_steps * job.batch_size),
        "--epochs", "1", "--aug-cfg", "scale=(0.9,1.0)", "--lr", "1e-4", "--warmup", "1", "--wd", "0.2",
        "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6", "--log-every-n-steps", str(job.log_every),
        "--seed", str(job.seed), "--logs", str(folder), "--name", THEIRS,
    ]  # fmt: skip


def read_our_log(folder: Path, job: Job) -> tuple[list[Window], int]:
    """Of train_clip.py: `images_per_second` is that since the line before."""
    lines = (folder / OURS / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "images_per_second" in record]
    windows, before = [], 0
    for record in records:
        seconds = (record["step"] - before) * job.batch_size / record["images_per_second"]
        windows.append(Window(before, record["step"], seconds))
        before = record["step"]
    kept = records[-1]["patches"].partition("/")[0]
    return windows, all_patches(job.model) if kept == "all" else int(kept)


def read_their_log(folder: Path, job: Job) -> tuple[list[Window], int]:
    """Of open_clip_train: `Batch (t)` is the mean since the line before; its `/s` is that of the last step alone."""
    log = (folder / THEIRS / "out.log").read_text(encoding="utf-8")
    windows, before = [], 0
    for line in THEIR_LINE.finditer(log):
        step = int(line["samples"]) // job.batch_size
        windows.append(Window(before, step, (step - before) * float(line["seconds"])))
        before = step
    return windows, int(log.partition(PATCHES)[2].split()[0])


def all_patches(model: str) -> int:
    vision = model_config(model)["vision_cfg"]
    side: int = vision.get("image_size", 224) // vision["patch_size"]
    return side**2


def last_words(output: str) -> str:
    """The error that a program ended with, which other messages may stand behind."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["without a word"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def summarize(runs: Sequence[Run], job: Job) -> list[dict[str, Any]]:
    """A row for each ratio at which both programs ran in a round, and one for each program that failed at a ratio.

    `images_per_s` is the median of the rounds, with the lowest and the highest; `speed_up` is formed within each round,
    and is the median with the quartiles.
    """
    rows: list[dict[str, Any]] = []
    for mask_ratio in dict.fromkeys(run["mask_ratio"] for run in runs):
        common = {"part": "program", "model": Path(job.model).stem, "mask_ratio": mask_ratio, "mode": "eager"}
        here = [run for run in runs if run["mask_ratio"] == mask_ratio]
        rounds = pd.DataFrame(
            {
                program: {run["round"]: run["images_per_s"] for run in done}
                for program in (OURS, THEIRS)
                if (done := [run for run in here if run["program"] == program and "failed" not in run])
            }
        ).dropna()
        if len(rounds) and len(rounds.columns) == 2:
            row: dict[str, Any] = common | {"batch": job.batch_size, "contender": OURS, "baseline": THEIRS}
            for name, program in (("", OURS), ("baseline_", THEIRS)):
                speeds = rounds[program]
                row[f"{name}images_per_s"] = float(speeds.median())
                row |= {f"{name}images_per_s_{end}": float(getattr(speeds, end)()) for end in ("min", "max")}
                row[f"{name}patches"] = next(
                    run["patches"] for run in here if run["program"] == program and "failed" not in run
                )
            speed_up = rounds[OURS] / rounds[THEIRS]
            for suffix, quantile in (("", 0.5), ("_q25", 0.25), ("_q75", 0.75)):
                row[f"speed_up{suffix}"] = float(speed_up.quantile(quantile))
            rows.append(row | {"rounds": len(rounds)})
        failed = {run["program"]: run["failed"] for run in here if "failed" in run}
        rows += [common | {"contender": program, "failed": reason} for program, reason in failed.items()]
    return rows


if __name__ == "__main__":
    with one_line("open_clip_program.py"):
        main(tyro.cli(Config))
