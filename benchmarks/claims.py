"""Test the papers' claims: train the grid of runs, keep every result, and write the report.

    python benchmarks/claims.py --data FOLDER --plan                 # what would be run, and what it costs
    python benchmarks/claims.py --data FOLDER --hours 2              # go on where the last call stopped
    python benchmarks/claims.py --data FOLDER --only C1 --seeds 10 11 12 13 14
    python benchmarks/claims.py --data FOLDER --only C1 --class-sets "stl10:64:test" --output build/stl10
    python benchmarks/claims.py --smoke                              # all of it, tiny: shows that it runs

FOLDER holds `cifar10/`, `tiny-imagenet/` and `flickr8k/`, each with `train.tar` (or `.tar.gz`) and the splits that
are evaluated, as WebDataset shards (`KEY.jpg`, `KEY.txt`, `KEY.cls`; with several captions, `KEY.json`), and a
`meta.json` or `classnames.txt` that names the classes. Any other labelled set takes the same form.

A run's result is in `claims.jsonl` as soon as it has ended, and the file is whole at any time; a run that is in it is
not repeated. docs/claims-rule.md has the rule, docs/claims.md what came out.
"""

import datetime
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from claim_costs import measure_costs
from claim_plan import SCENES, Claim, DataSet, Run, Setting, claims, full_setting, plan, smoke_setting, work
from claim_records import (
    DEFAULT_SPEED,
    Record,
    costs_keys,
    costs_of,
    pending,
    read,
    training_keys,
    write,
)
from claim_report import save_report
from claim_run import shard, train_and_evaluate, write_stand_ins
from machine import describe_machine, git_commit, versions
from tqdm import tqdm
from user_errors import UserError, one_line

COSTS = "C2"


@dataclass(frozen=True)
class Config:
    """What to run.

    Args:
        data: folder with the data sets.
        only: names of claims: C1, C2, C3, C4, C5, C6a, C6b, C6, border; all if none is named.
        seeds: of the runs. The rule asks for five.
        class_sets: labelled data in place of CIFAR-10 and Tiny-ImageNet: `NAME:SIZE:SPLIT[,SPLIT...]`, the side of its
            images in pixels, and the splits to evaluate.
        hours: start no run after so many.
        workers: runs at a time; by default one per core on a CPU, with one thread each, and one on a GPU.
        plan: print the runs and what they cost, and stop.
        smoke: everything in tiny, on generated data and two seeds.
        output: folder for claims.jsonl and the report.
    """

    data: Path | None = None
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    class_sets: tuple[str, ...] = ()
    hours: float | None = None
    workers: int | None = None
    plan: bool = False
    smoke: bool = False
    output: Path = Path("build/claims")
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


def main(config: Config) -> None:
    """Run what is missing, and write the report."""
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            write_stand_ins(Path(folder) / "data", smoke_setting())
            _run(config, smoke_setting(), Path(folder) / "data", seeds=(0, 1))
        return
    if config.data is None:
        raise UserError("--data is missing: the folder with the data sets (or --smoke, which needs none)")
    class_sets = tuple(_parse(text) for text in config.class_sets)
    setting = full_setting(config.device, *([class_sets] if class_sets else []))
    _run(config, setting, config.data, config.seeds)


def _parse(text: str) -> DataSet:
    try:
        name, size, splits = text.split(":")
        return DataSet(name, int(size), tuple(splits.split(",")))
    except ValueError:
        raise UserError(f"class_sets must look like NAME:SIZE:SPLIT[,SPLIT...], got {text!r}") from None


def _run(config: Config, setting: Setting, folder: Path, seeds: Sequence[int]) -> None:
    wanted = claims(setting)
    known = [*(claim.name for claim in wanted), COSTS]
    for name in config.only:
        if name not in known:
            raise UserError(f"only must be of {', '.join(known)}, got {name!r}")
    if config.only:
        wanted = [claim for claim in wanted if claim.name in config.only]
    file = config.output / "claims.jsonl"
    records = read(file)
    if config.plan:
        print(describe(wanted, setting, seeds, records))
        return
    needed = pending(plan(wanted, seeds), setting, records)
    for name in {run.data for run in needed} - {SCENES}:
        for split in ("train", *setting.data_set(name).splits):
            try:
                shard(folder, name, split)
            except FileNotFoundError as error:
                raise UserError(f"data: {error}") from error
    config.output.mkdir(parents=True, exist_ok=True)
    commit = git_commit()  # before this program changes a file
    if not config.only or COSTS in config.only:
        for name, recipe in setting.cost_models.items():
            if costs_of(records, name, setting) is None:
                print(f"measuring the costs of {name}", flush=True)
                started = time.monotonic()
                costs = measure_costs(recipe, setting.cost_rounds)
                records.append(costs_keys(name, setting) | costs | circumstances(commit, recipe.device, started))
                write(file, records)
    train_all(config, setting, folder, needed, records, file, commit)
    save_report(records, setting, config.output)
    print(f"left in {config.output}: {', '.join(sorted(path.name for path in config.output.iterdir()))}")


def train_all(
    config: Config,
    setting: Setting,
    folder: Path,
    needed: dict[Run, set[str]],
    records: list[Record],
    file: Path,
    commit: str | None,
) -> None:
    """Train what is needed, several runs at a time, and write every result when it is there."""
    until = time.monotonic() + 3600 * config.hours if config.hours is not None else float("inf")
    on_cpu = setting.recipe.device == "cpu"
    workers = config.workers or (os.cpu_count() or 1 if on_cpu else 1)
    os.environ["TQDM_DISABLE"] = "1"  # of the workers: there is one bar for all runs
    waiting, running = iter(needed.items()), dict[Future[Record], Run]()
    layout = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
    total = sum(work(run, setting) for run in needed)
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), functools.partial(torch.set_num_threads, 1) if on_cpu else None
    )
    with pool, tqdm(total=total, bar_format=layout, smoothing=0, file=sys.stdout, disable=False) as bar:
        ended = 0
        while True:
            while len(running) < workers and time.monotonic() < until and (next_run := next(waiting, None)):
                run, figures = next_run
                running[pool.submit(record_of, run, figures, setting, folder, commit)] = run
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                records.append(future.result())
                write(file, records)
                ended += 1
                bar.update(min(work(run, setting), total - bar.n))
                bar.set_postfix_str(f"{ended} of {len(needed)} runs, the last one {run}")


def record_of(run: Run, figures: set[str], setting: Setting, folder: Path, commit: str | None) -> Record:
    """Train, in a worker."""
    started = time.monotonic()
    results = train_and_evaluate(run, figures, setting, folder)
    return training_keys(run, setting) | {"results": results} | circumstances(commit, setting.recipe.device, started)


def circumstances(commit: str | None, device: str, started: float) -> Record:
    return {
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": versions(),
        "commit": commit,
    }


def describe(wanted: Sequence[Claim], setting: Setting, seeds: Sequence[int], records: Sequence[Record]) -> str:
    """The plan: how many runs each claim adds to those before it, how many of them are left, and for how long."""
    planned: dict[Run, set[str]] = {}
    rows = []
    for claim in wanted:
        added = {run: figures for run, figures in plan([claim], seeds).items() if run not in planned}
        planned |= added
        left = pending(added, setting, records)
        hours = sum(work(run, setting) for run in left) / speed(records, setting) / 3600
        rows.append([claim.name, claim.title, len(added), len(left), hours])
    table = pd.DataFrame(rows, columns=["claim", "about", "runs", "left", "hours left"])
    table.loc[len(table)] = ["all", "with one core per run", *table[["runs", "left", "hours left"]].sum()]
    text: str = table.astype({"runs": int, "left": int}).to_markdown(index=False, floatfmt=".1f")
    return text


def speed(records: Sequence[Record], setting: Setting) -> float:
    """Operations per second of a run, from the runs that there are."""
    trainings = [(Run(**record["run"]), record["seconds"]) for record in records if record["kind"] == "training"]
    done = [(work(run, setting), seconds) for run, seconds in trainings if run.data in setting.data_names]
    return sum(operations for operations, _ in done) / sum(seconds for _, seconds in done) if done else DEFAULT_SPEED


if __name__ == "__main__":
    with one_line("claims.py"):
        main(tyro.cli(Config))
