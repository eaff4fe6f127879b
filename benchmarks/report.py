"""From results.json to tables and plots.

    python benchmarks/report.py build/benchmarks/results.json
    python benchmarks/report.py --pages benchmarks/README.md README.md docs/performance.md

The first writes results.md and the plots next to the file. The second puts every file of benchmarks/results into the
pages, between `<!-- results: NAME -->` and `<!-- end -->`, where NAME.json is the file; NAME-summary is its upshot.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from written.tables import RESULTS, fill, markdown

Results = dict[str, Any]


def main(file: tyro.conf.Positional[Path | None] = None, pages: tuple[Path, ...] = ()) -> None:
    """Render results again.

    Args:
        file: results.json of a run.
        pages: to put the tables of benchmarks/results into.
    """
    if file is not None:
        save_report(json.loads(file.read_text(encoding="utf-8")), file.parent)
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), committed()), encoding="utf-8")


def committed() -> dict[str, str]:
    """The text and the summary of every file of results that lies in the repository, by its name."""
    found: dict[str, str] = {}
    for file in sorted(RESULTS.glob("*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        found |= {file.stem: text(results), f"{file.stem}-summary": summary(results)}
    return found


def save_report(results: Results, folder: Path) -> None:
    """Write results.md, and a plot for every part."""
    (folder / "results.md").write_text(f"# Benchmarks\n\n{text(results)}\n", encoding="utf-8")
    for name, figure in plots(results).items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def text(results: Results) -> str:
    """Everything in words: where it was measured and how, and a table for every part."""
    rows = measured(results)
    found = [machine_line(results)]
    for part, make in (
        ("layer", layer_table),
        ("overhead", overhead_table),
        ("step", step_table),
        ("clip", clip_table),
        ("program", program_table),
    ):
        if len(rows) and (rows["part"] == part).any():
            found.append(make(rows[rows["part"] == part]))
    if len(rows) and (rows["part"] == "loader").any():
        found.append(loader_table(rows[rows["part"] == "loader"]))
        if len(trained := trainers(results)):
            found.append(workers_table(rows[rows["part"] == "loader"], trained))
    if results["cuda"]:
        found.append(cuda_table(pd.DataFrame(results["cuda"])))
    if lines := failures(results):
        found.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(found)


def measured(results: Results) -> pd.DataFrame:
    """The rows with figures."""
    return pd.DataFrame([row for row in results["rows"] if "failed" not in row])


def failures(results: Results) -> list[str]:
    """What failed, and what the time did not suffice for, a line each."""
    failed = [row for row in results["rows"] if "failed" in row]
    keys = ("part", "model", "dtype", "mask_ratio", "mode", "pass", "contender")
    lines = [f"{', '.join(str(row[key]) for key in keys if key in row)}: {row['failed']}" for row in failed]
    return lines + [f"{group}: the time was over" for group in results.get("left_out", ())]


def summary(results: Results) -> str:
    """Of part step: how many times as fast as without a mask, and time in units of the ideal, for the last model."""
    rows = measured(results)
    if not len(rows):
        return ""
    rows = rows[(rows["part"] == "step") & (rows["mode"] == "eager")]
    if not len(rows):
        return ""
    last = rows[rows["model"] == rows["model"].iloc[-1]]
    last = last[last["contender"] != last["reference"].iloc[0]]
    head = f"{last['model'].iloc[0]}, batch {last['batch'].iloc[0]}, {last['dtype'].iloc[0]}"
    table = last.assign(cell=[f"{faster(row)}{spread(row, 'ratio')} the ideal" for row in last.itertuples()])
    return pivot(table.rename(columns={"contender": head}), [head])


def machine_line(results: Results) -> str:
    """Where, when, and with what."""
    machine, dtype = results["machine"], results["dtype"]
    reason = re.sub(r"[\d.]+e\+\d+", lambda number: plain(float(number[0])), dtype["reason"])
    where = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['instructions']}"
    if machine["gpu"]:
        where = f"{machine['gpu']}; {where}"
    libraries = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    git = f", commit {results['git'][:12]}" if results["git"] else ""
    return (
        f"{where}, {machine['os']}. {libraries}{git}. {results['date'][:10]}, seed {results['seed']}. "
        f"Training steps in {dtype['name']} ({reason}). `{results['command']}`"
    )


def layer_table(rows: pd.DataFrame) -> str:
    """Milliseconds, the multiple of the copy limit, and the speed-up over timm's layer, for every mode and dtype."""
    texts = []
    for (mode, dtype), of_mode in rows.groupby(["mode", "dtype"], sort=False):
        cells = [
            f"{plain(row.ms)} ms, {spread(row, 'ratio')}, {row.baseline} / {row.speed_up:.2f}"
            for row in of_mode.itertuples()
        ]
        table = pivot(of_mode.assign(cell=cells), ["pass", "contender"])
        texts.append(f"{of_mode['model'].iloc[0]}, {dtype}, {mode}:\n\n{table}")
    return "\n\n".join(texts)


def overhead_table(rows: pd.DataFrame) -> str:
    """Microseconds that a drop adds to a forward, that in units of what timm's adds, and the launches that it adds."""
    added = (1000 * rows["added"]).map("{:.0f} µs, ".format) + [spread(row, "added_ratio") for row in rows.itertuples()]
    added += rows["launches"].map(", {} launches".format)
    cells = added.where(rows["contender"] != rows["baseline"], (1000 * rows["ms"]).map("{:.0f} µs in all".format))
    return f"{rows['model'].iloc[0]}, what is added to a forward:\n\n{pivot(rows.assign(cell=cells), ['contender'])}"


def step_table(rows: pd.DataFrame) -> str:
    """How many times as fast as without a mask, peak memory, time in units of the ideal, and milliseconds."""
    texts = []
    for mode, of_mode in rows.groupby("mode", sort=False):
        cells = [
            f"{faster(row)}{row.peak_mib:,.0f} MiB; {spread(row, 'ratio')} the ideal, {plain(row.ms)} ms"
            for row in of_mode.itertuples()
        ]
        table = pivot(of_mode.assign(cell=cells), ["model", "batch", "contender"])
        texts.append(f"{of_mode['dtype'].iloc[0]}, {mode}:\n\n{table}")
    return "\n\n".join(texts)


def faster(row: Any) -> str:
    """The speed-up over the step without a mask, where that was measured."""
    return f"**{row.speed_up:.2f}× as fast**, " if row.baseline == "unmasked" != row.contender else ""


def clip_table(rows: pd.DataFrame) -> str:
    """Images per second and what becomes of the ceiling; the memory is that above weights and moments."""
    cells = [
        {
            "ratio": row.mask_ratio,
            "method": row.contender,
            "batch": row.batch,
            "images/s": plain(row.images_per_s),
            "speed-up": spread(row, "speed_up"),
            "ceiling": f"{row.ceiling:.2f}",
            "peak memory": f"{row.peak_mib:,.0f} MiB",
        }
        for row in rows.itertuples()
    ]
    return markdown(pd.DataFrame(cells))


def program_table(rows: pd.DataFrame) -> str:
    """Images per second of two programs, and how many times as fast as the other one ours is."""
    cells = [
        {
            "ratio": row.mask_ratio,
            "patches": ", ".join(map(str, dict.fromkeys((row.baseline_patches, row.patches)))),
            f"{row.baseline}, images/s": reach(row, "baseline_images_per_s"),
            f"{row.contender}, images/s": reach(row, "images_per_s"),
            "times as fast": spread(row, "speed_up"),
        }
        for row in rows.itertuples()
    ]
    head = f"{rows['model'].iloc[0]}, batch {rows['batch'].iloc[0]:.0f}, {rows['rounds'].min():.0f} rounds:"
    return f"{head}\n\n{markdown(pd.DataFrame(cells))}"


def loader_table(rows: pd.DataFrame) -> str:
    """Milliseconds per image of every stage, and images per second of the whole, for photos of every size."""
    texts = []
    for photos, of_size in rows.groupby("model", sort=False):
        whole = of_size[of_size["pass"] == "whole"].set_index("contender")
        cells = {name: {"loader": name} for name in whole.index}
        for row in of_size.to_dict("records"):
            for name in [row["contender"]] if row["contender"] in cells else cells:  # where all do the same
                cells[name][row["pass"]] = f"{row['ms'] / row['batch']:.2f}"
        for row in whole.itertuples():
            cells[row.Index] |= {"images/s": plain(row.images_per_s), "times as fast": spread(row, "speed_up")}
        head = f"Photos of {photos}, {of_size['mode'].iloc[0]}, ms per image:".replace("Photos of photos", "Photos")
        texts.append(f"{head}\n\n{markdown(pd.DataFrame(cells.values()).fillna('–'))}")
    return "\n\n".join(texts)


def trainers(results: Results) -> pd.DataFrame:
    """Rows of part clip: those of this run, or of the machine beside it."""
    rows = results["rows"] + ((results.get("beside") or {}).get("rows", []))
    return pd.DataFrame([row for row in rows if row["part"] == "clip" and "failed" not in row])


def workers_table(rows: pd.DataFrame, trained: pd.DataFrame) -> str:
    """How many workers keep the model busy: images per second that it takes over those that a core delivers.

    Only for the two loaders that the others are compared with.
    """
    whole = rows[(rows["pass"] == "whole") & (rows["model"] == rows["model"].iloc[0])]
    whole = whole[(whole["contender"] == whole["baseline"]) | (whole["contender"] == whole["reference"])]
    cells = []
    for row in trained.drop_duplicates(["mask_ratio", "contender"]).itertuples():
        needed = {
            f"workers, {loader.contender}": str(math.ceil(row.images_per_s / loader.images_per_s))
            for loader in whole.itertuples()
        }
        taken = {"ratio": row.mask_ratio, "method": row.contender, "images/s of the model": plain(row.images_per_s)}
        cells.append(taken | needed)
    return f"Workers that it takes, photos of {rows['model'].iloc[0]}:\n\n{markdown(pd.DataFrame(cells))}"


def cuda_table(rows: pd.DataFrame) -> str:
    """What only a GPU shows about the drop."""
    share = rows["share of a training step"].map("{:.1%}".format)
    dtype = rows["dtype"].str.removeprefix("torch.")
    yes = rows.select_dtypes(bool).replace({True: "yes", False: "no"})
    return markdown(rows.assign(**{"share of a training step": share, "dtype": dtype, **yes}))


def spread(row: Any, measure: str) -> str:
    """Median and quartiles as text."""
    middle, low, high = (getattr(row, measure + suffix) for suffix in ("", "_q25", "_q75"))
    return f"{middle:.2f}×" if low == high else f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def reach(row: Any, measure: str) -> str:
    """Median, lowest and highest as text."""
    middle, low, high = (plain(getattr(row, measure + suffix)) for suffix in ("", "_min", "_max"))
    return f"{middle} ({low}–{high})"


def plain(figure: Any) -> str:
    """Three digits, and no powers of ten."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def pivot(rows: pd.DataFrame, index: list[str]) -> str:
    """Each `cell` by `index` and mask ratio, both in the order in which they come."""
    table = rows[index].drop_duplicates()
    for mask_ratio, of_ratio in rows.groupby("mask_ratio", sort=False):
        cells = of_ratio[[*index, "cell"]].rename(columns={"cell": str(mask_ratio)})
        table = table.merge(cells, how="left", on=index)
    return markdown(table)


def plots(results: Results) -> dict[str, Figure]:
    """A figure for every part that was measured."""
    rows = measured(results)
    found = {}
    for part, make in (("layer", plot_layer), ("step", plot_step), ("clip", plot_clip)):
        if len(rows) and (rows["part"] == part).any():
            found[part] = make(rows[rows["part"] == part])
    return found


def plot_layer(rows: pd.DataFrame) -> Figure:
    """Time of forward and backward, by contender."""
    rows = rows[rows["pass"] == "forward+backward"]
    figure, panels = _panels(rows, "dtype")
    for (dtype, mode), axes, of_panel in panels:
        _bars(axes, of_panel, "ms")
        axes.set(title=f"{dtype}, {mode}", ylabel="forward + backward (ms)", yscale="log")
    return _legend(figure)


def plot_step(rows: pd.DataFrame) -> Figure:
    """Time of a training step in units of the ideal, by contender; the unmasked step would be off the chart."""
    rows = rows[rows["contender"] != rows["baseline"]]
    figure, panels = _panels(rows, "model")
    for (model, mode), axes, of_panel in panels:
        _bars(axes, of_panel, "ratio")
        low = min(1.0, of_panel["ratio_q25"].min())
        axes.set(title=f"{model}, batch {of_panel['batch'].iloc[0]}, {mode}", ylabel="time of a step / ideal")
        axes.set_ylim(bottom=low - 0.05)
        axes.axhline(1, color="black", linewidth=0.8)
    return _legend(figure)


def plot_clip(rows: pd.DataFrame) -> Figure:
    """Speed-up over training without a mask, and the ceiling that the arithmetic sets."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    masked = rows[rows["contender"] != rows["baseline"]]
    _bars(axes, masked, "speed_up", limit="ceiling")
    axes.set(title=f"{rows['model'].iloc[0]}, {rows['dtype'].iloc[0]} (lines: ceiling)", ylabel="images/s / no mask")
    return _legend(figure)


def _legend(figure: Figure) -> Figure:
    """One for all panels, below them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _panels(rows: pd.DataFrame, across: str) -> tuple[Figure, list[tuple[tuple[str, str], Axes, pd.DataFrame]]]:
    """A grid of axes: a column for every value of `across`, a row for every mode."""
    columns, modes = list(rows[across].unique()), list(rows["mode"].unique())
    figure = Figure(figsize=(1 + 4 * len(columns), 3.3 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), len(columns), squeeze=False)
    panels = []
    for down, mode in enumerate(modes):
        for right, column in enumerate(columns):
            part = rows[(rows[across] == column) & (rows["mode"] == mode)]
            if len(part):
                panels.append(((column, mode), axes[down, right], part))
    return figure, panels


def _bars(axes: Axes, rows: pd.DataFrame, measure: str, limit: str | None = None) -> None:
    """Bars of medians with the quartiles, side by side at each ratio; a line at each one's `limit`."""
    names = list(rows["contender"].unique())
    width = 0.9 / len(names)
    for place, name in enumerate(names):
        own = rows[rows["contender"] == name]
        middle = own[measure]
        spread = [middle - own[f"{measure}_q25"], own[f"{measure}_q75"] - middle]
        x = [ratio + (place + 0.5) * width - 0.45 for ratio in range(len(own))]
        axes.bar(x, middle, width, yerr=spread, label=name, error_kw={"linewidth": 0.8})
        if limit is not None:
            left, right = ([centre + side * width / 2 for centre in x] for side in (-1, 1))
            axes.hlines(own[limit], left, right, color="black")
    ratios = list(rows["mask_ratio"].unique())
    axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("share of patches dropped")


if __name__ == "__main__":
    tyro.cli(main)
