"""Claim C0 over time: when a method first stands where CLIP ends, in operations and in seconds, and the curves.

records -> a curve per run -> the point where it reaches CLIP's end -> how much sooner, per seed -> an interval
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from clip_intervals import CONFIDENCE, Difference, difference
from matplotlib.figure import Figure
from plot_style import WIDTH

from claim.compute import long_runs, sets
from claim.costs import BASELINE, CURVE_COSTS
from claim.design import NAMES, RATIO, Results, Run, Setting
from claim.records import Record, costs_of, curves_by_run
from claim.run import length_of

UNMASKED = "CLIP"
UNITS = {"operations": "operations, in steps without a mask", "seconds": "seconds"}


@dataclass(frozen=True)
class Curve:
    """Of one run: what was spent, in both units, and the accuracy there on whole images."""

    operations: Sequence[float]
    seconds: Sequence[float] | None
    top1: Sequence[float]

    def spent_until(self, top1: float, unit: str) -> float | None:
        """On straight lines between the points; None if it never gets there."""
        spent: Sequence[float] = getattr(self, unit)
        if self.top1[0] >= top1:
            return spent[0]
        for before, after in itertools.pairwise(range(len(spent))):
            if self.top1[after] >= top1:
                share = (top1 - self.top1[before]) / (self.top1[after] - self.top1[before])
                return spent[before] + share * (spent[after] - spent[before])
        return None

    def top1_after(self, spent: float, unit: str) -> float:
        """On straight lines between the points; after the last one, what it ends with."""
        return float(np.interp(spent, getattr(self, unit), self.top1))


@dataclass(frozen=True)
class Sooner:
    """How many times as soon a method reaches CLIP's end; None where too few seeds get there for an interval.

    Args:
        reached: seeds that get there, of `n`.
    """

    factor: Difference | None
    reached: int
    n: int

    def __str__(self) -> str:
        if self.factor is None:
            return f"{self.reached} of {self.n} seeds get there"
        low, mean, high = (math.exp(value) for value in (self.factor.low, self.factor.mean, self.factor.high))
        return f"{mean:.2f}× [{low:.2f}, {high:.2f}]"


def curves(records: Sequence[Record], setting: Setting, results: Results) -> dict[str, dict[str, dict[int, Curve]]]:
    """By set, method and seed."""
    by_run = curves_by_run(records, setting)
    seconds = seconds_of_a_step(records, setting)
    found: dict[str, dict[str, dict[int, Curve]]] = {}
    for data in sets(setting):
        for name, run in long_runs(data, setting, results).items():
            of_seeds = {own.seed: curve for own, curve in by_run.items() if replace(own, seed=run.seed) == run}
            if of_seeds:
                own_curves = {seed: _timed(curve, run, setting, seconds) for seed, curve in sorted(of_seeds.items())}
                found.setdefault(data.name, {})[name] = own_curves
    return found


def seconds_of_a_step(records: Sequence[Record], setting: Setting) -> dict[str, float]:
    """By method, medians; empty if they have not been measured."""
    record = costs_of(records, CURVE_COSTS, setting)
    if record is None:
        return {}
    return {name.split()[0]: statistics.median(times) / 1000 for name, times in record["milliseconds"].items()}


def _timed(curve: Mapping[str, Sequence[float]], run: Run, setting: Setting, seconds: Mapping[str, float]) -> Curve:
    """Tuning steps cost what a step of CLIP does."""
    if not {run.method, BASELINE} <= seconds.keys():
        return Curve(curve["operations"], None, curve["top1"])
    steps = np.array(curve["images"]) / setting.recipe.batch_size
    of_training = np.minimum(steps, length_of(run, setting).steps)
    spent = of_training * seconds[run.method] + (steps - of_training) * seconds[BASELINE]
    return Curve(curve["operations"], spent.tolist(), curve["top1"])


def lead_after_as_long(of_methods: Mapping[str, Mapping[int, Curve]], method: str, unit: str) -> Difference | None:
    """Of one set, by seed: the accuracy that a method has when it has spent what CLIP has at its end, less CLIP's; None
    as for `sooner`."""
    if (pairs := _pairs(of_methods, method, unit)) is None:
        return None
    return difference(
        [own.top1_after(getattr(clip, unit)[-1], unit) - clip.top1[-1] for clip, own in pairs], confidence=CONFIDENCE
    )


def sooner(of_methods: Mapping[str, Mapping[int, Curve]], method: str, unit: str) -> Sooner | None:
    """Of one set; None where nothing is known of the unit or of CLIP."""
    if (pairs := _pairs(of_methods, method, unit)) is None:
        return None
    logarithms = []
    for clip, own in pairs:
        spent = own.spent_until(clip.top1[-1], unit)
        if spent is not None:
            logarithms.append(math.log(getattr(clip, unit)[-1] / spent))
    enough = len(logarithms) == len(pairs) > 1
    return Sooner(difference(logarithms) if enough else None, len(logarithms), len(pairs))


def _pairs(of_methods: Mapping[str, Mapping[int, Curve]], method: str, unit: str) -> list[tuple[Curve, Curve]] | None:
    """CLIP's curve and the method's, by seed."""
    clip, own = of_methods.get(UNMASKED, {}), of_methods.get(method, {})
    pairs = [(clip[seed], own[seed]) for seed in sorted(clip.keys() & own.keys())]
    known = all(getattr(curve, unit) is not None for pair in pairs for curve in pair)
    return pairs if pairs and known else None


def plot_curves(found: Mapping[str, Mapping[str, Mapping[int, Curve]]]) -> Figure:
    """Accuracy on whole images over operations and over seconds, a row per set; a thin line per seed, a thick one for
    their mean. There must be a curve."""
    units = [unit for unit in UNITS if any(_known(found, unit))]
    figure = Figure(figsize=(WIDTH, 3.1 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(units), squeeze=False)
    for row, (data, methods) in zip(axes, found.items(), strict=True):
        for axis, unit in zip(row, units, strict=True):
            for number, (name, of_seeds) in enumerate(methods.items()):
                _draw(axis, list(of_seeds.values()), unit, f"C{number}", name)
            axis.set(xlabel=UNITS[unit], title=NAMES.get(data, data))
        row[0].set_ylabel("zero-shot top-1 (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _known(found: Mapping[str, Mapping[str, Mapping[int, Curve]]], unit: str) -> list[bool]:
    every = [curve for methods in found.values() for of_seeds in methods.values() for curve in of_seeds.values()]
    return [getattr(curve, unit) is not None for curve in every]


def _draw(axis: Any, of_seeds: Sequence[Curve], unit: str, color: str, name: str) -> None:
    for curve in of_seeds:
        axis.plot(getattr(curve, unit), curve.top1, color=color, linewidth=0.5, alpha=0.5)
    mean = np.mean([curve.top1 for curve in of_seeds], axis=0)
    label = name if name == UNMASKED else f"{name}, {RATIO:.0%} dropped"
    axis.plot(getattr(of_seeds[0], unit), mean, color=color, linewidth=2, label=label)
