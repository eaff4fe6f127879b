"""The results of claims.py as a file of lines, one record per run, and what of it belongs to a setting."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_training import Config as Recipe
from written.files import write_at_once

from claim.design import Run, Setting

Record = dict[str, Any]
NOT_OF_THE_RECIPE = {"mask_ratio", "sigma", "sampling", "epochs", "tuning_epochs", "device"}
DEFAULT_SPEED = {"cpu": 3e10, "cuda": 1e13}  # operations per second of one run, as long as no run tells


def read(file: Path) -> list[Record]:
    """All records; none if there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, records: Sequence[Record]) -> None:
    """All of them, at once."""
    write_at_once(file, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def results_by_run(records: Sequence[Record], setting: Setting) -> dict[Run, dict[str, float]]:
    """The figures of every training with this setting; records of other recipes and other data are left out.

    Of a training that was repeated, for a figure that it lacked, the others stay what they were.
    """
    found: dict[Run, dict[str, float]] = {}
    for run, record in of_setting(records, setting):
        found[run] = record["results"] | found.get(run, {})
    return found


def curves_by_run(records: Sequence[Record], setting: Setting) -> dict[Run, dict[str, list[float]]]:
    """The curves of those trainings that have one, see `claim.run.Outcome`."""
    found: dict[Run, dict[str, list[float]]] = {}
    for run, record in of_setting(records, setting):
        if "curve" in record:
            found.setdefault(run, record["curve"])
    return found


def of_setting(records: Sequence[Record], setting: Setting) -> Iterator[tuple[Run, Record]]:
    """The trainings with this setting."""
    for record in records:
        if record["kind"] != "training":
            continue
        run = Run(**record["run"])
        if run.data not in setting.data_names:
            continue
        keys = training_keys(run, setting)
        del keys["run"]  # old records have fewer fields
        if _same(record, keys):
            yield run, record


def training_keys(run: Run, setting: Setting) -> Record:
    """What makes a training what it is."""
    sizes = {name: getattr(setting, name) for name in ("steps", "tuning_steps", "test_images", "probe_images")}
    return {"kind": "training", "run": asdict(run), "recipe": _portable(setting.recipe_of(run)), **sizes}


def costs_keys(model: str, setting: Setting) -> Record:
    """What makes a measurement of costs what it is."""
    recipe = _portable(setting.cost_models.get(model, setting.recipe))
    return {"kind": "costs", "model": model, "recipe": recipe, "rounds": setting.cost_rounds}


def costs_of(records: Sequence[Record], model: str, setting: Setting) -> Record | None:
    """The latest measurement."""
    return next((record for record in reversed(records) if _same(record, costs_keys(model, setting))), None)


def pending(needed: Mapping[Run, set[str]], setting: Setting, records: Sequence[Record]) -> dict[Run, set[str]]:
    """The runs of which a figure is missing."""
    known = results_by_run(records, setting)
    return {run: figures for run, figures in needed.items() if not figures <= known.get(run, {}).keys()}


def _portable(recipe: Recipe) -> Record:
    """What is common to all runs; a run on another device is the same run, and its record tells the machine."""
    return {name: value for name, value in asdict(recipe).items() if name not in NOT_OF_THE_RECIPE}


def _same(record: Record, keys: Record) -> bool:
    return all(record.get(name) == value for name, value in keys.items())
