"""From claims.jsonl to verdicts, tables and plots.

    python benchmarks/claim_report.py                 # docs/, README.md and the plots, from benchmarks/results
    python benchmarks/claim_report.py --records build/claims/claims.jsonl --output build/claims

The first puts its texts between `<!-- results: NAME -->` and `<!-- end -->` of the pages. The second writes a page of
its own. Nothing is computed but means, Student's t intervals, and the verdicts of docs/claims-rule.md.
"""

import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from claim.costs import BASELINE
from claim.curves import curves, plot_curves
from claim.design import NAMES, RATIO, RATIOS, Claim, Row, Setting, full_setting
from claim.judge import Judged, interval, judge, name_of
from claim.plan import claims
from claim.reader import compute_table, first_numbers, which_sentence, which_table
from claim.records import Record, costs_of, read, results_by_run
from claim.verdicts import CONTRADICTED, NOT_ENOUGH, SHOWN, combined, verdict
from clip_intervals import Difference, difference
from plot_style import DPI, GREY, STYLE, WIDTH
from written.tables import fill, markdown

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "claims.jsonl"
PAGES = (ROOT / "docs" / "claims.md", ROOT / "docs" / "claims-details.md", ROOT / "README.md")
PLOTS = ROOT / "docs" / "claims"
COSTS = Claim("C2", "It costs no more than FLIP", [], ("GLIP", "FLIP"))
BY_RULE = ("C7", "C7 ratios")  # claims whose rows are every mask on every set
CURVES = "C0 curves"
LARGER = "-gpu"  # behind the names of texts and plots of the larger scale
OF_THE_LARGER = ("claims-compute", "claims-which", "claims-C0", "claims-C0-rates", "claims-C7")  # texts that pages show
WORDS = {  # of the plots, for those of the labels
    "val-centred": "centred",
    "val-offcentre": "off centre",
    "centering 0.5": "half way",
    "centering 0": "anywhere",
    "centering 1": "in the middle",
}
SPEED_MARGIN, MEMORY_LIMIT = math.log(0.97), 1.03


def main(records: Path = RECORDS, output: Path | None = None) -> None:
    """Render results.

    Args:
        records: claims.jsonl of a run.
        output: folder for the page and the plots; by default the pages of the repository are brought up to date.
    """
    found = read(records)
    if output is not None:
        save_report(found, full_setting("cpu"), output)
        return
    texts = page_texts(found)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), texts), encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    save_plots(found, full_setting("cpu"), PLOTS, names=shown_on_pages())
    save_plots(found, full_setting("gpu"), PLOTS, LARGER, names=shown_on_pages())


def page_texts(records: Sequence[Record]) -> dict[str, str]:
    """What the repository's pages show: `all_texts`, and some of them at the larger scale, with `LARGER` behind."""
    small, large = full_setting("cpu"), full_setting("gpu")
    larger = all_texts(records, large)
    both = [judge_all(records, setting)["C0"] for setting in (small, large)]
    return {
        **all_texts(records, small),
        **{f"{name}{LARGER}": larger[name] for name in OF_THE_LARGER},
        "first-numbers": first_numbers(*both),
    }


def shown_on_pages() -> set[str]:
    """The plots that the pages of the repository show, by name."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return set(re.findall(r"\]\(claims/([\w-]+)\.png\)", pages))


def save_report(records: Sequence[Record], setting: Setting, folder: Path) -> None:
    """Write claims.md, a page with everything, and the plots."""
    texts = all_texts(records, setting)
    heads = ("claims-summary", "claims-which", "claims-compute", "claims-origin")
    parts = ["\n\n".join(["# The claims", *(texts[name] for name in heads)])]
    folder.mkdir(parents=True, exist_ok=True)
    save_plots(records, setting, folder)
    for claim in (*claims(setting, results_by_run(records, setting)), COSTS):
        name = claim.name.replace(" ", "-")
        picture = f"![{claim.name}]({name}.png)\n\n" if (folder / f"{name}.png").is_file() else ""
        parts.append(f"## {claim.name}: {claim.title}\n\n{picture}{texts[key(claim)]}")
    (folder / "claims.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def key(claim: Claim) -> str:
    """The name of a claim's text."""
    return f"claims-{claim.name.replace(' ', '-')}"


def all_texts(records: Sequence[Record], setting: Setting) -> dict[str, str]:
    """By name: a text for every claim; `claims-which`, `claims-compute` and `claims-summary` of the page for readers;
    `which-mask` of the README; and `claims-origin`.
    """
    results = results_by_run(records, setting)
    every = claims(setting, results)
    judged = judge_all(records, setting)
    texts = {key(claim): claim_text(claim, judged[claim.name]) for claim in every}
    texts[key(COSTS)] = costs_text(records, setting)
    decided = [claim for claim in every if any(row.primary for row in claim.rows)]
    summary = {claim.name: summary_row(claim, judged[claim.name]) for claim in decided}
    summary[COSTS.name] = costs_summary_row(records, setting)
    texts["claims-summary"] = markdown(pd.DataFrame([summary[name] for name in sorted(summary)]))
    texts["claims-which"] = which_table([*judged["C7"], *judged["C7 ratios"]])
    texts["which-mask"] = which_sentence(judged["C7"])
    texts["claims-compute"] = compute_table(judged["C0"], curves(records, setting, results))
    texts["claims-origin"] = origin(records)
    return texts


def judge_all(records: Sequence[Record], setting: Setting) -> dict[str, list[Judged]]:
    """The rows of every claim, by its name."""
    results = results_by_run(records, setting)
    return {claim.name: judge(claim, results) for claim in claims(setting, results)}


def claim_text(claim: Claim, judged: Sequence[Judged]) -> str:
    """The verdict, if the claim has primary rows, and the table."""
    if not any(row.found for row in judged):
        return "Not run yet."
    if claim.name in BY_RULE:
        return "\n\n".join(f"*{stage}*\n\n{which_table(judged, stage)}" for stage in ("tuned", "unmasked", "masked"))
    primary = [row for row in judged if row.row.primary]
    is_choice = claim.seeds is not None and not primary
    listed = [row for row in judged if row.found or not is_choice]  # of a choice, what has been tried
    cells = pd.DataFrame([_cells(claim, row) for row in listed])
    table = markdown(cells.drop(columns="verdict") if is_choice else cells)  # it takes the best, and proves nothing
    if not primary:
        return table
    rows = "; ".join(f"{name_of(row.row)}: {interval(row.found)}, {row.verdict}" for row in primary)
    return f"**{claim.name} is {_said(_verdict(claim, primary))}.** {rows}.\n\n{table}"


def _verdict(claim: Claim, primary: Sequence[Judged]) -> str:
    return NOT_ENOUGH if claim.waits else combined(row.verdict for row in primary)


def _said(word: str) -> str:
    return "not decided: not enough runs" if word == NOT_ENOUGH else word


def _cells(claim: Claim, judged: Judged) -> dict[str, str]:
    row = judged.row
    sides = [f"{value:.2f}" for value in judged.sides] if judged.sides else ["–", "–"]
    mark = "**" if row.primary else ""
    margin = f" (above {row.margin:g})" if row.margin else ""
    return {
        "verdict": f"{mark}{judged.verdict}{margin}{mark}",
        **row.labels,
        **({"each image seen": "–" if judged.passes is None else f"{judged.passes:.3g}×"} if claim.passes else {}),
        **dict(zip(claim.sides, sides, strict=True)),
        "difference (95 %)": interval(judged.found),
        "n": str(judged.found.n if judged.found else 0),
    }


def summary_row(claim: Claim, judged: Sequence[Judged]) -> dict[str, str]:
    primary = [row for row in judged if row.row.primary]
    said = "; ".join(f"{name_of(row.row)}: {interval(row.found)}" for row in primary)
    return {
        "verdict": f"**{_verdict(claim, primary)}**",
        "claim": f"{claim.name} {claim.title[0].lower()}{claim.title[1:]}",
        "primary rows: difference in points (95 %)": said,
    }


@dataclass(frozen=True)
class Cost:
    """What one model costs at one ratio; logarithms of ratios of images per second.

    Args:
        speed: of GLIP to FLIP.
        memory: peak of GLIP over that of FLIP.
        speed_ups: of FLIP and of GLIP over CLIP.
        ceiling: of the two, by the arithmetic.
    """

    model: str
    batch: int
    mask_ratio: float
    speed: Difference
    memory: float
    speed_ups: tuple[Difference, Difference]
    ceiling: float

    @property
    def verdict(self) -> str:
        by_speed = verdict(self.speed, SPEED_MARGIN)
        if by_speed == NOT_ENOUGH:
            return by_speed
        return combined([by_speed, SHOWN if self.memory < MEMORY_LIMIT else CONTRADICTED])


def judge_costs(records: Sequence[Record], setting: Setting) -> list[Cost]:
    """Every model at every ratio, from its latest measurement."""
    found = []
    for name in setting.cost_models:
        record = costs_of(records, name, setting)
        if record is None:
            continue
        milliseconds, peaks = record["milliseconds"], record["peak_mib"]

        def faster(one: str, other: str, times: dict[str, list[float]] = milliseconds) -> Difference:
            return difference([math.log(b / a) for a, b in zip(times[one], times[other], strict=True)])

        for ratio in RATIOS:
            flip, glip = f"flip {ratio:g}", f"glip {ratio:g}"
            speed_ups = (faster(flip, BASELINE), faster(glip, BASELINE))
            memory = peaks[glip] / peaks[flip]
            ceiling = record["ceiling"][flip]
            found.append(Cost(name, record["batch"], ratio, faster(glip, flip), memory, speed_ups, ceiling))
    return found


def costs_text(records: Sequence[Record], setting: Setting) -> str:
    costs = judge_costs(records, setting)
    if not costs:
        return "Not measured."
    cells = [
        {
            "verdict": f"**{cost.verdict}**" if cost.mask_ratio == RATIO else cost.verdict,
            "model": f"{cost.model}, batch {cost.batch}",
            "ratio": f"{cost.mask_ratio:g}",
            "images/s, GLIP / FLIP (95 %)": times(cost.speed),
            "peak memory, GLIP / FLIP": f"{cost.memory:.3f}",
            "speed-up of FLIP over CLIP": times(cost.speed_ups[0], 2),
            "of GLIP": times(cost.speed_ups[1], 2),
            "ceiling": f"{cost.ceiling:.2f}",
            "n": str(cost.speed.n),
        }
        for cost in costs
    ]
    primary = [cost for cost in costs if cost.mask_ratio == RATIO]
    rows = "; ".join(f"{cost.model}: {times(cost.speed)}, memory {cost.memory:.3f}, {cost.verdict}" for cost in primary)
    said = _said(combined(cost.verdict for cost in primary))
    return f"**{COSTS.name} is {said}.** {rows}.\n\n{markdown(pd.DataFrame(cells))}"


def costs_summary_row(records: Sequence[Record], setting: Setting) -> dict[str, str]:
    primary = [cost for cost in judge_costs(records, setting) if cost.mask_ratio == RATIO]
    said = "; ".join(f"{cost.model}: {times(cost.speed)} of FLIP's images/s" for cost in primary)
    return {
        "verdict": f"**{combined(cost.verdict for cost in primary)}**",
        "claim": f"{COSTS.name} {COSTS.title[0].lower()}{COSTS.title[1:]}",
        "primary rows: difference in points (95 %)": said,
    }


def times(found: Difference, digits: int = 3) -> str:
    """A ratio, from its logarithm."""
    middle, low, high = (f"{math.exp(value):.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{middle}× [{low}, {high}]"


def origin(records: Sequence[Record]) -> str:
    """How many runs come from which machine, versions and commits, and how long they took."""
    places: Counter[str] = Counter()
    for record in records:
        machine = record["machine"]
        where = f"{machine['cpu']}, {machine['instructions']}, {machine['cores']} cores, {machine['os']}"
        libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        commit = record["commit"][:12] if record["commit"] else "unknown"
        kind = "costs" if record["kind"] == "costs" else "trainings"
        where = f"{machine['gpu']}; {where}" if machine["gpu"] else where
        places[f"{kind} on {record['date'][:10]}: {where}; {libraries}; commit {commit}"] += 1
    hours = sum(record["seconds"] for record in records) / 3600
    lines = [f"- {count} {place}" for place, count in places.items()]
    return "\n".join([f"{len(records)} records, {hours:.1f} hours in all, with one thread per training:", "", *lines])


def save_plots(
    records: Sequence[Record], setting: Setting, folder: Path, suffix: str = "", names: Collection[str] | None = None
) -> None:
    """A plot for every claim that has results, or for those of `names`; it carries the digest of what it shows.

    Args:
        suffix: behind the stem of every file.
    """
    with mpl.rc_context(STYLE):
        for stem, figure in draw_plots(records, setting).items():
            name = f"{stem}{suffix}"
            if names is None or name in names:
                figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Records": records_digest(records)})


def draw_plots(records: Sequence[Record], setting: Setting) -> dict[str, Figure]:
    """By the stem of its file."""
    results = results_by_run(records, setting)
    figures = {}
    for claim in claims(setting, results):
        judged = judge(claim, results)
        if any(row.found for row in judged):
            figures[claim.name] = plot_by_rule(claim, judged) if claim.name in BY_RULE else plot(claim, judged)
    if found := curves(records, setting, results):
        figures[CURVES] = plot_curves(found)
    figures[COSTS.name] = plot_costs(judge_costs(records, setting))
    return {name.replace(" ", "-"): figure for name, figure in figures.items()}


def records_digest(records: Sequence[Record]) -> str:
    """Of all records: a plot with another one is out of date."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


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
    grid[0, 0].set_yticks(range(len(masks)), masks, fontsize="small")  # of all panels, which share them
    grid[0, 0].invert_yaxis()
    figure.supxlabel(f"{claim.sides[0]} − {claim.sides[1]}, points after the tuning", fontsize="small")
    return figure


def plot_costs(costs: Sequence[Cost]) -> Figure:
    """Speed-ups over CLIP, with the ceiling."""
    models = list(dict.fromkeys(cost.model for cost in costs)) or [""]
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [cost for cost in costs if cost.model == model]
        for side, (name, shift) in enumerate((("FLIP", -0.2), ("GLIP", 0.2))):
            middle = [math.exp(cost.speed_ups[side].mean) for cost in own]
            low = [value - math.exp(cost.speed_ups[side].low) for value, cost in zip(middle, own, strict=True)]
            high = [math.exp(cost.speed_ups[side].high) - value for value, cost in zip(middle, own, strict=True)]
            axes.bar(
                [place + shift for place in range(len(own))],
                middle,
                0.38,
                yerr=[low, high],
                label=name,
                capsize=2,
                ecolor=GREY,
            )
        for place, cost in enumerate(own):
            axes.hlines(cost.ceiling, place - 0.4, place + 0.4, color=GREY)
        axes.set_xticks(range(len(own)), [f"{cost.mask_ratio:g}" for cost in own])
        axes.set(title=model, xlabel="share of patches dropped")
    figure.axes[0].set_ylabel("times CLIP's images per second")
    figure.axes[0].plot([], color=GREY, label="at best, by the arithmetic")
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    tyro.cli(main)
