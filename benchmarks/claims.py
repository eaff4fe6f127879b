"""Test the papers' claims: train the grid of runs, keep every result, and write the report.

    python benchmarks/claims.py --data FOLDER --plan                 # what would be run, and what it costs
    python benchmarks/claims.py --data FOLDER --minutes 120          # go on where the last call stopped
    python benchmarks/claims.py --data FOLDER --scale gpu --workers 8 --minutes 8 --only C0 C7
    python benchmarks/claims.py --data FOLDER --only C1 --seeds 10 11 12 13 14
    python benchmarks/claims.py --data FOLDER --only "C7 ratios" --sets fashion --masks GLIP weighted
    python benchmarks/claims.py --data FOLDER --only C1 --class-sets "stl10:64:test" --output build/stl10
    python benchmarks/claims.py --smoke                              # all of it, tiny: shows that it runs

FOLDER holds a folder for each set that the chosen claims need (`cifar10/`, `tiny-imagenet/`, `fashion/`, `eurosat/`,
`flickr8k/`, `rsicd/`), each with `train.tar` (or `.tar.gz`) and the splits that are evaluated, as WebDataset shards
(`KEY.jpg`, `KEY.txt`, `KEY.cls`; with several captions, `KEY.json`), and a `meta.json` or `classnames.txt` that names
the classes. Any other labelled set takes the same form.

A run's result is in `claims.jsonl` as soon as it has ended, and the file is whole at any time; a run that is in it is
not repeated, so that another call, on another machine too, goes on from it. docs/claims-rule.md has the rule,
docs/claims.md what came out.
"""

import contextlib
import datetime
import functools
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from claim.compute import methods_on, sets
from claim.costs import BASELINE, CURVE_COSTS, measure_costs, papers_runs
from claim.design import SCENES, Claim, DataSet, Run, Setting, full_setting, smoke_setting
from claim.plan import claims, plan, work
from claim.records import (
    DEFAULT_SPEED,
    Record,
    costs_keys,
    costs_of,
    of_setting,
    pending,
    read,
    results_by_run,
    training_keys,
    write,
)
from claim.run import shard, train_and_evaluate, write_stand_ins
from claim_report import save_report
from measure.machine import describe_machine, git_commit, versions
from tqdm import tqdm
from user_errors import UserError, one_line

COSTS, CURVES = "C2", "C0"  # claims that take measured seconds
NO_BARS = "TQDM_DISABLE"


@dataclass(frozen=True)
class Config:
    """What to run.

    Args:
        data: folder with the data sets.
        only: names of claims as --plan lists them, or what several names begin with: "C7" takes all of its parts; all
            claims if none is named.
        seeds: of the runs. The rule asks for five. What is chosen before a comparison has seeds of its own.
        sets: train on these sets only.
        masks: rows of these masks only, as the tables name them, and what they are compared with. They come row by row
            in any case, so this is for another order.
        class_sets: labelled data in place of the four of the rule: `NAME:SIZE:SPLIT[,SPLIT...]`, the side of its
            images in pixels, and the splits to evaluate.
        scale: "cpu" for the recipe of docs/claims-rule.md, "gpu" for the larger one there, on one GPU.
        minutes: begin no run that would end later, as far as the runs before it tell.
        workers: runs at a time; by default one per core on a CPU, with one thread each, and one on a GPU, which several
            fill better: it waits for its host.
        plan: print the runs and what they cost, and stop.
        smoke: everything in tiny, on generated data and one seed.
        output: folder for claims.jsonl and the report.
    """

    data: Path | None = None
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sets: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    class_sets: tuple[str, ...] = ()
    scale: Literal["cpu", "gpu"] = "cpu"
    minutes: float | None = None
    workers: int | None = None
    plan: bool = False
    smoke: bool = False
    output: Path = Path("build/claims")


def main(config: Config) -> None:
    """Run what is missing, and write the report."""
    if config.smoke:
        with tempfile.TemporaryDirectory() as folder:
            write_stand_ins(Path(folder) / "data", smoke_setting())
            _run(config, smoke_setting(), Path(folder) / "data", seeds=(0,))
        return
    if config.data is None:
        raise UserError("--data is missing: the folder with the data sets (or --smoke, which needs none)")
    class_sets = tuple(_parse(text) for text in config.class_sets)
    if config.scale == "gpu" and not config.plan and not torch.cuda.is_available():
        raise UserError("scale: gpu needs a GPU, and torch sees none here; cpu is the other one")
    setting = full_setting(config.scale, *([class_sets] if class_sets else []))
    _run(config, setting, config.data, config.seeds)


def _parse(text: str) -> DataSet:
    try:
        name, size, splits = text.split(":")
        return DataSet(name, int(size), tuple(splits.split(",")))
    except ValueError:
        raise UserError(f"class_sets must look like NAME:SIZE:SPLIT[,SPLIT...], got {text!r}") from None


def _run(config: Config, setting: Setting, folder: Path, seeds: Sequence[int]) -> None:
    for name in config.sets:
        if name not in setting.data_names:
            raise UserError(f"sets must be of {', '.join(sorted(setting.data_names))}, got {name!r}")
    file = config.output / "claims.jsonl"
    records = read(file)
    if config.plan:
        print(describe(_wanted(config, setting, records), setting, seeds, records, config.sets))
        return
    _check_data(folder, _needed(config, setting, records, seeds), setting)  # before anything is measured
    config.output.mkdir(parents=True, exist_ok=True)
    commit = git_commit()  # before this program changes a file

    def measure(name: str, runs: Sequence[Run], call: Callable[..., Record]) -> None:
        if costs_of(records, name, setting) is None:
            print(f"measuring the costs of {name}", flush=True)
            records.append(call(costs_record, name, setting, runs, commit))
            write(file, records)

    if _asked_for(config, COSTS):
        for name in setting.cost_models:
            measure(name, papers_runs(setting.class_sets[0].name), lambda function, *args: function(*args))
    until = time.monotonic() + 60 * config.minutes if config.minutes is not None else math.inf
    with _pool(config, setting) as pool:
        # A claim whose settings are chosen by runs has its rows only when these have ended.
        while needed := _needed(config, setting, records, seeds):
            _check_data(folder, needed, setting)
            if not train_all(pool, setting, folder, needed, records, file, commit, until):
                print("not all of the runs are done: call the same once more to go on")
                break
        else:
            if _asked_for(config, CURVES):  # with the threads that the runs had, and none of them at the same time
                methods = methods_on(sets(setting)[0], setting, results_by_run(records, setting)).values()
                masked = [run for run in methods if run.method != BASELINE]
                measure(CURVE_COSTS, masked, lambda *call: pool.executor.submit(*call).result())
    save_report(records, setting, config.output)
    print(f"left in {config.output}: {', '.join(sorted(path.name for path in config.output.iterdir()))}")


def _needed(config: Config, setting: Setting, records: Sequence[Record], seeds: Sequence[int]) -> dict[Run, set[str]]:
    return pending(_on(config.sets, plan(_wanted(config, setting, records), seeds)), setting, records)


def _on(sets: Sequence[str], runs: dict[Run, set[str]]) -> dict[Run, set[str]]:
    return {run: figures for run, figures in runs.items() if not sets or run.data in sets}


def _wanted(config: Config, setting: Setting, records: Sequence[Record]) -> list[Claim]:
    known = claims(setting, results_by_run(records, setting))
    names = [*(claim.name for claim in known), COSTS]
    for name in config.only:
        if not any(_belongs(own, name) for own in names):
            raise UserError(f"only must be of {', '.join(names)}, got {name!r}")
    wanted = [claim for claim in known if _asked_for(config, claim.name)]
    if not config.masks:
        return wanted
    masks = sorted({row.mask for claim in wanted for row in claim.rows if row.mask is not None})
    for name in config.masks:
        if name not in masks:
            raise UserError(f"masks must be of {'; '.join(masks) or 'none, for no row here has one'}, got {name!r}")
    return [replace(claim, rows=[row for row in claim.rows if row.mask in config.masks]) for claim in wanted]


def _asked_for(config: Config, claim: str) -> bool:
    return not config.only or any(_belongs(claim, name) for name in config.only)


def _belongs(claim: str, name: str) -> bool:
    """`C7` takes `C7 retrieval` too, and C6 not C6a."""
    return claim == name or claim.startswith(f"{name} ")


def _check_data(folder: Path, needed: Iterable[Run], setting: Setting) -> None:
    for name in {run.data for run in needed} - {SCENES}:
        for split in ("train", *setting.data_set(name).splits):
            try:
                shard(folder, name, split)
            except FileNotFoundError as error:
                raise UserError(f"data: {error}") from error


@dataclass(frozen=True)
class Pool:
    """Processes that train one run at a time each."""

    executor: ProcessPoolExecutor
    size: int


@contextlib.contextmanager
def _pool(config: Config, setting: Setting) -> Iterator[Pool]:
    on_cpu = setting.recipe.device == "cpu"
    size = config.workers or (os.cpu_count() or 1 if on_cpu else 1)
    initializer = functools.partial(_begin_worker, threads=1 if on_cpu else None)
    before = os.environ.get(NO_BARS)
    os.environ[NO_BARS] = "1"  # read by tqdm when a worker imports it: there is one bar for all runs
    try:
        with ProcessPoolExecutor(size, get_context("spawn"), initializer) as executor:
            yield Pool(executor, size)
    finally:
        del os.environ[NO_BARS]
        if before is not None:
            os.environ[NO_BARS] = before


def _begin_worker(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody would read what a worker finds whose parent was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def train_all(
    pool: Pool,
    setting: Setting,
    folder: Path,
    needed: dict[Run, set[str]],
    records: list[Record],
    file: Path,
    commit: str | None,
    until: float,
) -> bool:
    """Train what is needed, several runs at a time, and write every result when it is there.

    Returns:
        Whether there was time for all of it.
    """
    waiting, running = list(needed.items()), dict[Future[Record], Run]()
    layout = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
    total = sum(work(run, setting) for run in needed)
    pace = 0.0  # seconds per operation of the slowest run so far
    with tqdm(total=total, bar_format=layout, smoothing=0, file=sys.stdout, disable=False) as bar:
        ended = 0
        while True:
            while len(running) < pool.size and waiting:
                run, figures = waiting[0]
                if time.monotonic() + pace * work(run, setting) > until:
                    break
                running[pool.executor.submit(record_of, run, figures, setting, folder, commit)] = run
                del waiting[0]
            if not running:
                return not waiting
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                records.append(future.result())
                write(file, records)
                ended += 1
                pace = max(pace, records[-1]["seconds"] / work(run, setting))
                bar.update(min(work(run, setting), total - bar.n))
                bar.set_postfix_str(f"{ended} of {len(needed)} runs, the last one {run}")


def record_of(run: Run, figures: set[str], setting: Setting, folder: Path, commit: str | None) -> Record:
    """Train, in a worker."""
    started = time.monotonic()
    outcome = train_and_evaluate(run, figures, setting, folder)
    found = {"results": outcome.figures} | ({"curve": outcome.curve} if outcome.curve else {})
    return training_keys(run, setting) | found | circumstances(commit, setting.recipe.device, started)


def costs_record(name: str, setting: Setting, runs: Sequence[Run], commit: str | None) -> Record:
    """Measure, here or in a worker."""
    started = time.monotonic()
    recipe = setting.cost_models.get(name, setting.recipe)
    costs = measure_costs(recipe, setting.cost_rounds, runs)
    return costs_keys(name, setting) | costs | circumstances(commit, recipe.device, started)


def circumstances(commit: str | None, device: str, started: float) -> Record:
    return {
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": versions(),
        "commit": commit,
    }


def describe(
    wanted: Sequence[Claim],
    setting: Setting,
    seeds: Sequence[int],
    records: Sequence[Record],
    sets: Sequence[str] = (),
) -> str:
    """The plan: how many runs each claim adds to those before it, how many of them are left, and for how long."""
    planned, all_left = set[Run](), set[Run]()
    rows = []
    for claim in wanted:
        needed = _on(sets, plan([claim], seeds))
        left = pending(needed, setting, records).keys() - all_left  # also runs of before that lack a figure of this one
        hours = sum(work(run, setting) for run in left) / speed(records, setting) / 3600
        rows.append([claim.name, claim.title, len(needed.keys() - planned), len(left), hours])
        planned |= needed.keys()
        all_left |= left
    table = pd.DataFrame(rows, columns=["claim", "about", "runs", "left", "hours left"])
    after = "with one core per run; claims whose settings are chosen first grow when they are"
    table.loc[len(table)] = ["all", after, *table[["runs", "left", "hours left"]].sum()]
    text: str = table.astype({"runs": int, "left": int}).to_markdown(index=False, floatfmt=".1f")
    return text


def speed(records: Sequence[Record], setting: Setting) -> float:
    """Operations per second of a run, from the runs that there are."""
    done = [(work(run, setting), record["seconds"]) for run, record in of_setting(records, setting)]
    if not done:
        return DEFAULT_SPEED[setting.recipe.device]
    return sum(operations for operations, _ in done) / sum(seconds for _, seconds in done)


if __name__ == "__main__":
    with one_line("claims.py"):
        main(tyro.cli(Config))
