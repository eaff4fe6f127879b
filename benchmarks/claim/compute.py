"""Claim C0: masked training reaches an accuracy sooner. With and without a mask, at equal operations.

learning rates, chosen for each method and set by short runs -> long runs -> differences to CLIP, and curves
"""

from collections.abc import Iterator
from dataclasses import replace

from claim.design import (
    CIFAR10,
    FASHION,
    RATIO,
    SIGMA,
    TINY_IMAGENET,
    Choice,
    Claim,
    DataSet,
    Results,
    Row,
    Run,
    Setting,
)
from claim.masks import cluster_choice

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
CHOICE_SEEDS = (40, 41)
SETS = (CIFAR10.name, TINY_IMAGENET.name, FASHION.name)
METHODS = ("CLIP", "FLIP", "GLIP", "cluster")  # the last one for the rule that looks at the pixels


def compute_claims(setting: Setting, results: Results) -> list[Claim]:
    """The choices of the learning rates, and the comparison on every set where they are made."""
    rows = [row for data in sets(setting) for row in _rows(setting, data, results)]
    waits = sum(row.primary for row in rows) < len(sets(setting))
    return [
        Claim("C0 rates", "Learning rates, chosen for each method with as many tries", list(_tries(setting, results)),
              ("rate", "recipe's"), seeds=CHOICE_SEEDS),
        Claim("C0", "Masked training reaches an accuracy sooner", rows, ("masked", "CLIP"), waits=waits),
    ]  # fmt: skip


def sets(setting: Setting) -> list[DataSet]:
    """The three of the claim, or all that there are where others are named."""
    return [data for data in setting.every_class_set if data.name in SETS] or list(setting.every_class_set)


def methods_on(data: DataSet, setting: Setting, results: Results) -> dict[str, Run]:
    """By name, with the recipe's learning rate and a third of the budget; cluster with its chosen settings."""
    cluster = cluster_choice(setting).taken(results)
    third = max(1, setting.budget // 3)
    methods = {
        "CLIP": Run(data.name, "clip", 0.0, budget=third),
        "FLIP": Run(data.name, "flip", RATIO, budget=third),
        "GLIP": Run(data.name, "glip", RATIO, sigma=SIGMA, sampling="additive", budget=third),
    }
    if cluster is not None:
        methods["cluster"] = replace(cluster, data=data.name, budget=third)
    return methods


def rate_choice(run: Run, data: DataSet) -> Choice:
    return Choice([replace(run, lr=rate) for rate in LEARNING_RATES], f"tuned.{data.splits[0]}.top1", CHOICE_SEEDS)


def long_runs(data: DataSet, setting: Setting, results: Results) -> dict[str, Run]:
    """By name, those methods whose learning rate is chosen, with all of the budget."""
    taken = {name: rate_choice(run, data).taken(results) for name, run in methods_on(data, setting, results).items()}
    return {name: replace(run, budget=setting.budget) for name, run in taken.items() if run is not None}


def _tries(setting: Setting, results: Results) -> Iterator[Row]:
    for data in sets(setting):
        for name, run in methods_on(data, setting, results).items():
            choice = rate_choice(run, data)
            default = replace(run, lr=setting.recipe.lr)
            for candidate in choice.candidates:
                labels = {"data": data.name, "method": name, "learning rate": f"{candidate.lr:g}"}
                yield Row(labels, [(candidate, default)], [choice.figure])


def _rows(setting: Setting, data: DataSet, results: Results) -> Iterator[Row]:
    runs = long_runs(data, setting, results)
    if "CLIP" not in runs:
        return
    clip = runs.pop("CLIP")
    for name, run in runs.items():
        labels = {"data": data.name, "method": name}
        yield Row(
            labels,
            [(run, clip)],
            [f"tuned.{data.splits[0]}.top1"],
            primary=name == "FLIP",
            comparisons=len(METHODS) - 1,
        )
