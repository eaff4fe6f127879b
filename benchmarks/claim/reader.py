"""What a reader wants first, from the same records: which mask for which images, whether it pays, and three numbers.

The texts go into the README and the head of docs/claims.md; the rows behind them are in docs/claims-details.md.
"""

import json
from collections.abc import Mapping, Sequence

import pandas as pd
from written.tables import RESULTS, markdown

from claim.curves import Curve, Sooner, lead_after_as_long, sooner
from claim.design import NAMES, RATIO
from claim.judge import UNKNOWN, Judged, interval
from claim.verdicts import CONTRADICTED, NOT_ENOUGH, SHOWN

KINDS = {
    "cifar10": "things that fill the frame",
    "tiny-imagenet": "photos of 200 kinds of things",
    "fashion": "products on white",
    "eurosat": "land from above",
}
FIRST_MODEL, FIRST_RATIO = "vit_base_patch16_224", 0.75


def which_table(judged: Sequence[Judged], stage: str = "tuned") -> str:
    """A row per set and ratio: FLIP's accuracy, and every mask's difference to it, bold where that is shown."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    seeds: dict[tuple[str, str], int] = {}
    for row in judged:
        labels = row.row.labels
        if labels["stage"] != stage or row.found is None or row.sides is None:
            continue
        place = labels["data"], labels["ratio"]
        cells = rows.setdefault(place, {})
        cells |= {"images": _kind(labels["data"]), "dropped": labels["ratio"]}
        if row.found.n > seeds.get(place, 0):  # a mask with few seeds tells little of FLIP
            cells["FLIP"], seeds[place] = f"{row.sides[1]:.1f}", row.found.n
        mark = "**" if row.verdict in (SHOWN, CONTRADICTED) else ""
        few = f" ({row.found.n} seed{'s' * (row.found.n > 1)})"
        spread = few if row.verdict == NOT_ENOUGH else f" ±\N{NO-BREAK SPACE}{row.found.high - row.found.mean:.1f}"
        cells[labels["mask"]] = f"{mark}{row.found.mean:+.1f}{spread}{mark}"
    if not rows:
        return "Not run yet."
    order = list(dict.fromkeys(data for data, _ in rows))
    by_images = sorted(rows, key=lambda place: (order.index(place[0]), float(place[1])))
    return markdown(pd.DataFrame([rows[place] for place in by_images]).fillna(UNKNOWN))


IN_CODE = {
    "GLIP": "`GaussianPatchDropout`",
    "weighted": '`GaussianPatchDropout(sampling="weighted")`',
    "grid": "`GridPatchDropout`",
    "block": "`BlockPatchDropout`",
    "cluster": "`ClusterPatchDropout`",
}  # by the name in the tables; RECLIP is no mask


def which_sentence(judged: Sequence[Judged]) -> str:
    """Which mask to take, as far as the tuned rows show it, of sets where all masks have been run at `RATIO`: on each
    kind of images the one that is furthest ahead there, with every ratio at which it is ahead."""
    rows = [row for row in judged if row.row.labels["stage"] == "tuned"]
    begin = "**Which mask?** Begin with random patches (`RandomPatchDropout`)"
    at_first = [row for row in rows if row.row.labels["ratio"] == f"{RATIO:g}"]
    left = {row.row.labels["data"] for row in at_first if row.verdict == NOT_ENOUGH}
    tested = [data for data in dict.fromkeys(row.row.labels["data"] for row in at_first) if data not in left]
    if not tested:
        return f"{begin}; how the others do depends on the images."
    found = []
    for data in tested:
        ahead = [row for row in rows if row.row.labels["data"] == data and row.verdict == SHOWN and row.found]
        if ahead:
            best = max(ahead, key=lambda row: (row in at_first, row.found.mean if row.found else 0.0))
            mask = best.row.labels["mask"]
            leads = {float(row.row.labels["ratio"]): row.found for row in ahead if row.row.labels["mask"] == mask}
            said = " and ".join(f"{interval(leads[ratio], 1)} points at ratio {ratio:g}" for ratio in sorted(leads))
            found.append(f"on {_kind(data)}, {IN_CODE.get(mask, mask)} was ahead, by {said}")
    others = len(tested) - len(found)
    if not found:
        everywhere = ", ".join(_kind(data) for data in tested)
        return f"{begin}: on {everywhere} no other mask was ahead of them by more than chance explains."
    kinds = "kind" if others == 1 else "kinds"
    level = f"; no mask was ahead of random on the other {others} {kinds} of images" if others else ""
    return f"{begin}; {'; '.join(found)}{level}."


def compute_table(judged: Sequence[Judged], curves: Mapping[str, Mapping[str, Mapping[int, Curve]]]) -> str:
    """At equal operations: CLIP's accuracy and the masked one's, and how much sooner it is there; in seconds too, where
    these have been measured."""
    rows = []
    for row in judged:
        if row.found is None or row.sides is None:
            continue
        data, method = row.row.labels["data"], row.row.labels["method"]
        of_methods = curves.get(data, {})
        rows.append(
            {
                "verdict": row.verdict,
                "images": NAMES.get(data, data),
                "mask": method,
                "without": f"{row.sides[1]:.1f}",
                "with": f"{row.sides[0]:.1f}",
                "difference (95 %)": interval(row.found, 1),
                "at equal seconds": interval(lead_after_as_long(of_methods, method, "seconds"), 1),
                "as soon, by operations": _said(sooner(of_methods, method, "operations")),
                "by seconds": _said(sooner(of_methods, method, "seconds")),
                "seeds": str(row.found.n),
            }
        )
    if not rows:
        return "Not run yet."
    table = pd.DataFrame(rows)
    return markdown(table.loc[:, (table != UNKNOWN).any()])


def _kind(data: str) -> str:
    """Of images, with the name of the set."""
    return f"{KINDS[data]} ({NAMES[data]})" if data in KINDS else data


def _said(found: Sooner | None) -> str:
    return UNKNOWN if found is None else str(found)


def first_numbers(compute: Sequence[Judged], larger: Sequence[Judged] = ()) -> str:
    """Speed and memory of a GPU, and accuracy at equal compute where that has been run, at the larger scale too."""
    steps = _rows("h200-step.json", model=FIRST_MODEL, mask_ratio=FIRST_RATIO, mode="eager")
    clips = _rows("h200-clip.json", mask_ratio=FIRST_RATIO)
    ours, timms = steps["gaussmask pixels"]["speed_up"], steps["timm patch_drop_rate"]["speed_up"]
    whole, unmasked = clips["gaussmask pixels"], clips["no mask"]
    lines = [
        f"- **{ours:.1f} times as fast**: a training step of ViT-B/16 on a quarter of the patches, against all of "
        f"them; timm's own drop: {timms:.1f} times. [H200, bfloat16](docs/performance.md).",
        f"- **{whole['batch'] / unmasked['batch']:.1f} times the batch in the same memory**, and "
        f"{whole['speed_up']:.1f} times the images per second: all of CLIP ViT-B/16 with its texts, likewise.",
    ]
    means, larger_means = _leads_of_flip(compute), _leads_of_flip(larger)
    if means:
        low, high = (f"{limit([*means.values(), *larger_means.values()]):+.0f}" for limit in (min, max))
        span = high if low == high else f"{low} to {high}"
        said = _listed(means)
        if larger_means:
            said += f"; larger ones, on a GPU: {_listed(larger_means)}"
        lines.append(
            f"- **{span} points at equal compute**: zero-shot accuracy of small CLIPs with three quarters of the "
            f"patches dropped at random, against none ({said}). [Five seeds each](docs/claims.md)."
        )
    return "\n".join(lines)


def _leads_of_flip(compute: Sequence[Judged]) -> dict[str, float]:
    """By the name of the set, where enough seeds have been run."""
    flip = [row for row in compute if row.row.labels["method"] == "FLIP" and row.verdict != NOT_ENOUGH]
    return {NAMES.get(row.row.labels["data"], row.row.labels["data"]): row.found.mean for row in flip if row.found}


def _listed(means: Mapping[str, float]) -> str:
    return ", ".join(f"{mean:+.1f} on {name}" for name, mean in means.items())


def _rows(file: str, **of: object) -> dict[str, dict[str, float]]:
    """By contender."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return {row["contender"]: row for row in rows if all(row[name] == value for name, value in of.items())}
