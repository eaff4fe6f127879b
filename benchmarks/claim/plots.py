"""Plots of a claim: a mark with its interval for every row, or a panel for every set and ratio."""

import itertools
import re
from collections.abc import Sequence

from matplotlib.figure import Figure
from plot_style import GREY, WIDTH

from claim.design import NAMES, Claim, Row
from claim.judge import Judged
from claim.verdicts import NOT_ENOUGH

WORDS = {  # for those of the labels
    "val-centred": "centred",
    "val-offcentre": "off centre",
    "centering 0.5": "half way",
    "centering 0": "anywhere",
    "centering 1": "in the middle",
}


def plot(claim: Claim, judged: Sequence[Judged]) -> Figure:
    """The difference of every row that was run, with its interval; primary rows filled, grey without enough runs."""
    rows = [row for row in judged if row.found is not None]
    figure = Figure(figsize=(WIDTH, 1.0 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        if row.found is None:
            continue
        enough = row.verdict != NOT_ENOUGH
        spread = [[row.found.mean - row.found.low], [row.found.high - row.found.mean]] if enough else None
        color = "C0" if enough else GREY
        face = color if row.row.primary else "none"
        axes.errorbar(row.found.mean, place, xerr=spread, fmt="o", color=color, markerfacecolor=face, capsize=2)
    for margin in {0.0, *(row.row.margin for row in rows)}:
        axes.axvline(margin, color=GREY, linewidth=0.8, linestyle="-" if margin == 0 else ":")
    axes.set_yticks(range(len(rows)), [in_words(row.row) for row in rows])
    axes.invert_yaxis()
    figure.supxlabel(f"{claim.sides[0]} − {claim.sides[1]}, points (95 % interval over seeds)", fontsize="medium")
    return figure


def in_words(row: Row) -> str:
    """The name of a row as a plot has it."""
    labels = {name: label for name, label in row.labels.items() if name != "varied"}
    if "ratio" in labels:
        labels["ratio"] = "mean of the ratios" if labels["ratio"] == "mean" else f"{float(labels['ratio']):.1%} dropped"
    if "sigma" in labels:
        labels["sigma"] = f"σ = {labels['sigma']}"
    said = ", ".join(labels.values())
    for code, word in {**NAMES, **WORDS}.items():
        said = said.replace(code, word)
    said = re.sub(r"_to_(\w+)_r(\d+)", r" to \1, recall@\2", said)
    said = re.sub(r"0?\.\d+(?= of the side)", lambda size: f"{float(size[0]):.0%}", said)
    return said.replace(".0%", "%").replace("%", " %")


def plot_by_rule(claim: Claim, judged: Sequence[Judged]) -> Figure:
    """After the tuning: a panel for every set and ratio, a line in it for every mask."""
    tuned = [row for row in judged if row.row.labels["stage"] == "tuned"]
    rows = [row for row in tuned if row.found]
    ratios, sets = (list(dict.fromkeys(row.row.labels[name] for row in rows)) for name in ("ratio", "data"))
    masks = list(dict.fromkeys(row.row.labels["mask"] for row in tuned))
    figure = Figure(figsize=(WIDTH, 2.3 * len(ratios)), layout="constrained")
    grid = figure.subplots(len(ratios), len(sets), squeeze=False, sharey=True)
    for axes, (ratio, data) in zip(grid.flat, itertools.product(ratios, sets), strict=True):
        for row in rows:
            if (row.row.labels["ratio"], row.row.labels["data"]) == (ratio, data) and row.found is not None:
                spread = [[row.found.mean - row.found.low], [row.found.high - row.found.mean]]
                shown = spread if row.verdict != NOT_ENOUGH else None
                place = masks.index(row.row.labels["mask"])
                axes.errorbar(row.found.mean, place, xerr=shown, fmt="o", color="C0" if shown else GREY, capsize=2)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(f"{NAMES.get(data, data)}\n{ratio} dropped", fontsize="small")
        axes.tick_params(axis="y", labelsize="small")
    grid[0, 0].set_yticks(range(len(masks)), masks)  # of all panels, which share them
    grid[0, 0].invert_yaxis()
    figure.supxlabel(f"{claim.sides[0]} − {claim.sides[1]}, points after the tuning", fontsize="small")
    return figure
