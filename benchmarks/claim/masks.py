"""Claim C7: which mask for which images. Every rule against random patches at equal tokens, and tries to beat them all.

settings of cluster, chosen on Tiny-ImageNet -> every rule on every set -> tables by set and ratio
masks that change, chosen on Tiny-ImageNet   -> the best one on the other sets, with new seeds
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from claim.design import (
    RATIO,
    RATIOS,
    RECALLS,
    TINY_IMAGENET,
    Choice,
    Claim,
    DataSet,
    Results,
    Row,
    Run,
    Setting,
    flip,
    glip,
    small_images,
    weighted,
)

CHOICE_SEEDS = (20, 21, 22)
CONFIRMING_SEEDS = (30, 31, 32, 33, 34)
RATIOS_IN_TURN = (RATIO, *(ratio for ratio in reversed(RATIOS) if ratio != RATIO))  # the most telling ones first
STAGES = ("masked", "unmasked", "tuned")
SIDES = ("this mask", "FLIP")
NUM_RULES = 6  # that are read together, cluster among them before its settings are chosen


def masks_claims(setting: Setting, results: Results) -> list[Claim]:
    """With the rows of cluster when its settings are chosen, and those of the best schedule likewise."""
    cluster = cluster_choice(setting).taken(results)
    schedule = schedule_choice(setting).taken(results)
    confirmed = list(_confirmed(setting, schedule))
    best = Claim(
        "C7 best",
        "A mask that beats random patches on three other sets",
        confirmed,
        SIDES,
        seeds=CONFIRMING_SEEDS,
        waits=not confirmed,
    )
    first, others = (list(_rules(setting, cluster, ratios)) for ratios in (RATIOS_IN_TURN[:1], RATIOS_IN_TURN[1:]))
    top5 = _tuned_by("top5", [*first, *others])
    uneven = {data.name for data in setting.every_class_set if data.uneven}
    by_class = _tuned_by("mean_per_class_recall", [row for row in (*first, *others) if row.labels["data"] in uneven])
    choices = (
        ("C7 cluster", "Settings of the cluster mask, chosen on one set", cluster_choice(setting)),
        ("C7 schedules", "Masks that change while the model trains", schedule_choice(setting)),
    )
    return [
        *(_choice(name, title, choice) for name, title, choice in choices if len(choice.candidates) > 1),
        Claim("C7", "Which mask, for which images", first, SIDES),
        best,
        Claim("C7 retrieval", "Which mask, where captions are long", list(_retrieval(setting, cluster)), SIDES),
        Claim("C7 ratios", "Which mask, at other ratios", others, SIDES),
        Claim("C7 top-5", "Which mask, by the five likeliest classes", top5, SIDES),
        Claim("C7 by class", "Which mask, where every class counts the same", by_class, SIDES),
    ]


def chosen_on(setting: Setting) -> DataSet:
    """The set that all choices are made on: Tiny-ImageNet, or the last one where it is not there."""
    return next((data for data in setting.class_sets if data.name == TINY_IMAGENET.name), setting.class_sets[-1])


def cluster_choice(setting: Setting) -> Choice:
    name = chosen_on(setting).name
    tried = [Run(name, "cluster", RATIO, anchors=anchors, noise=noise) for anchors, noise in setting.clusters]
    return Choice(tried, _tuned(chosen_on(setting)), CHOICE_SEEDS)


def schedule_choice(setting: Setting) -> Choice:
    name = chosen_on(setting).name
    tried = [Run(name, mask_ratio=RATIO, **fields) for fields in setting.tries]
    return Choice(tried, _tuned(chosen_on(setting)), CHOICE_SEEDS)


def rules_on(data: DataSet, mask_ratio: float, cluster: Run | None) -> dict[str, Run]:
    """Everything that is compared with FLIP, by name; cluster with its chosen settings."""
    rules = {
        "GLIP": glip(data.name, mask_ratio),
        "weighted": weighted(data.name, mask_ratio),
        "grid": Run(data.name, "grid", mask_ratio),
        "block": Run(data.name, "block", mask_ratio),
        "RECLIP": small_images(data.name, mask_ratio),
    }
    if cluster is not None:
        rules["cluster"] = replace(cluster, data=data.name, mask_ratio=mask_ratio)
    return rules


def _choice(name: str, title: str, choice: Choice) -> Claim:
    """Every candidate against FLIP: no verdict rests on it."""
    random = flip(choice.candidates[0].data)
    rows = [Row({"mask": _said(run), "data": run.data}, [(run, random)], [choice.figure]) for run in choice.candidates]
    return Claim(name, title, rows, SIDES, seeds=choice.seeds)


def _said(run: Run) -> str:
    named: Mapping[str, object] = {"anchors": run.anchors, "noise": run.noise, "": run.schedule}
    return ", ".join([run.method, *(f"{name} {value}".strip() for name, value in named.items() if value is not None)])


def _rules(setting: Setting, cluster: Run | None, ratios: tuple[float, ...]) -> Iterator[Row]:
    for ratio, data in itertools.product(ratios, setting.every_class_set):
        rules = rules_on(data, ratio, cluster)
        for stage, (name, run) in itertools.product(reversed(STAGES), rules.items()):
            yield Row(
                {"data": data.name, "ratio": f"{ratio:g}", "stage": stage, "mask": name},
                [(run, flip(data.name, ratio))],
                [f"{stage}.{data.splits[0]}.top1"],
                comparisons=NUM_RULES,
            )


def _tuned_by(measure: str, rows: Sequence[Row]) -> list[Row]:
    """The tuned rows, by another measure than top-1."""
    tuned = [row for row in rows if row.labels["stage"] == "tuned"]
    return [replace(row, figures=[figure.replace(".top1", f".{measure}") for figure in row.figures]) for row in tuned]


def _confirmed(setting: Setting, schedule: Run | None) -> Iterator[Row]:
    if schedule is None:
        return
    for data in setting.every_class_set:
        if data == chosen_on(setting):
            continue
        labels = {"data": data.name, "mask": _said(schedule)}
        yield Row(labels, [(replace(schedule, data=data.name), flip(data.name))], [_tuned(data)], primary=True)


def _retrieval(setting: Setting, cluster: Run | None) -> Iterator[Row]:
    sets = [data for data in (*setting.more_class_sets, *setting.more_retrieval_sets) if data.retrieval]
    for data in sets:
        for name, run in rules_on(data, RATIO, cluster).items():
            yield Row(
                {"data": data.name, "figure": "mean of recalls", "stage": "tuned", "mask": name},
                [(run, flip(data.name))],
                [f"tuned.{data.splits[0]}.{recall}" for recall in RECALLS],
                comparisons=NUM_RULES,
            )


def _tuned(data: DataSet) -> str:
    return f"tuned.{data.splits[0]}.top1"
