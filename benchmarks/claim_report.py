"""From claims.jsonl to verdicts, tables and plots.

    python benchmarks/claim_report.py                 # docs/, README.md and the plots, from benchmarks/results
    python benchmarks/claim_report.py --records build/claims/claims.jsonl --output build/claims

The first puts its texts between `<!-- results: NAME -->` and `<!-- end -->` of the pages. The second writes a page of
its own. Nothing is computed but means, Student's t intervals, and the verdicts of docs/claims-rule.md.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from claim.costs_report import COSTS, costs_summary_row, costs_text, judge_costs, plot_costs
from claim.curves import curves, plot_curves
from claim.design import Claim, Setting, full_setting
from claim.judge import Judged, interval, judge, name_of
from claim.plan import claims
from claim.plots import plot, plot_by_rule
from claim.reader import compute_table, first_numbers, which_sentence, which_table
from claim.records import Record, read, results_by_run
from claim.verdicts import NOT_ENOUGH, combined, in_a_sentence
from plot_style import DPI, STYLE
from written.tables import fill, markdown

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "claims.jsonl"
PAGES = (ROOT / "docs" / "claims.md", ROOT / "docs" / "claims-details.md", ROOT / "README.md")
PLOTS = ROOT / "docs" / "claims"
BY_RULE = ("C7", "C7 ratios", "C7 top-5", "C7 by class")  # claims whose rows are every mask on every set
CURVES = "C0 curves"
LARGER = "-gpu"  # behind the names of texts and plots of the larger scale
OF_THE_LARGER = ("claims-compute", "claims-which", "claims-C0", "claims-C0-rates", "claims-C7")  # texts that pages show


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
    """What the repository's pages show: `scale_texts`, and some of them at the larger scale, with `LARGER` behind."""
    small, large = full_setting("cpu"), full_setting("gpu")
    larger = scale_texts(records, large)
    both = [judge_all(records, setting)["C0"] for setting in (small, large)]
    return {
        **scale_texts(records, small),
        **{f"{name}{LARGER}": larger[name] for name in OF_THE_LARGER},
        "first-numbers": first_numbers(*both),
    }


def shown_on_pages() -> set[str]:
    """The plots that the pages of the repository show, by name."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return set(re.findall(r"\]\(claims/([\w-]+)\.png\)", pages))


def save_report(records: Sequence[Record], setting: Setting, folder: Path) -> None:
    """Write claims.md, a page with everything, and the plots."""
    texts = scale_texts(records, setting)
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


def scale_texts(records: Sequence[Record], setting: Setting) -> dict[str, str]:
    """At one scale, by name: a text for every claim; `claims-which`, `claims-compute` and `claims-summary` of the page
    for readers; `which-mask` of the README; and `claims-origin`.
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
    by_top1 = [*judged["C7"], *judged["C7 ratios"]]
    texts["claims-which"] = which_table(by_top1)
    texts["which-mask"] = which_sentence(by_top1)
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
        stages = dict.fromkeys(row.row.labels["stage"] for row in judged)
        return "\n\n".join(f"*{stage}*\n\n{which_table(judged, stage)}" for stage in stages)
    primary = [row for row in judged if row.row.primary]
    is_choice = claim.seeds is not None and not primary
    listed = [row for row in judged if row.found or not is_choice]  # of a choice, what has been tried
    cells = pd.DataFrame([_cells(claim, row) for row in listed])
    table = markdown(cells.drop(columns="verdict") if is_choice else cells)  # it takes the best, and proves nothing
    if not primary:
        return table
    rows = "; ".join(f"{name_of(row.row)}: {interval(row.found)}, {row.verdict}" for row in primary)
    return f"**{claim.name} is {in_a_sentence(_verdict(claim, primary))}.** {rows}.\n\n{table}"


def _verdict(claim: Claim, primary: Sequence[Judged]) -> str:
    return NOT_ENOUGH if claim.waits else combined(row.verdict for row in primary)


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


if __name__ == "__main__":
    tyro.cli(main)
