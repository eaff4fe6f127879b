"""Which mask for these images: runs of every method in a given time, the intervals of their differences, and advice.

    minutes -> passes of each run -> runs, seed by seed -> differences to FLIP of the same seed -> table and sentence

Every method trains with as many operations, so that CLIP, which has no mask, sees fewer images than the masked ones.
The intervals are Student's t over the seeds: they cover weights, batches and masks, and say nothing about other images.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from clip_data import CaptionedImages
from clip_evaluation import Score
from clip_intervals import CONFIDENCE, Difference, difference
from clip_step import METHODS, OTHER_RULES, now
from clip_training import COLUMNS, CURVE_IMAGES, CURVE_POINTS, Config, build_model, make_encoder, operations, run, train
from tqdm import tqdm
from user_errors import UserError

import gaussmask

EVERY_METHOD = (*METHODS, *OTHER_RULES)
UNMASKED, REFERENCE = "clip", "flip"
FEWEST_STEPS = 20  # of a run that is worth starting
TIMED_STEPS, TIMED_SECONDS = 8, 6.0  # at a time, and at least, in turns: other work comes and goes
TUNING_SHARE = 0.1  # of the passes
USED_TIME, LATEST = 0.92, 1.1  # shares of the minutes: that runs are planned for, and after which no seed is begun


# What the runs show


def differences(results: pd.DataFrame, to: str) -> dict[str, Difference]:
    """Of every method to the method `to`, in the last column that there is.

    The intervals are so wide that all of them hold at once (Bonferroni).
    """
    by_seed = results.pivot(index="seed", columns="method", values=last_column(results)).dropna()
    others = [method for method in results["method"].unique() if method != to]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(others))
    return {method: difference(list(by_seed[method] - by_seed[to]), confidence) for method in others}


def last_column(results: pd.DataFrame) -> str:
    """What the comparison is about: after the tuning, or unmasked where there was none."""
    return COLUMNS[2] if results[COLUMNS[2]].notna().any() else COLUMNS[1]


def reference_of(results: pd.DataFrame) -> str:
    """FLIP, or without it the first method with a mask."""
    methods: list[str] = list(results["method"].unique())
    masked = [method for method in methods if method != UNMASKED]
    return REFERENCE if REFERENCE in methods else (masked or methods)[0]


# Advice


def advice(results: pd.DataFrame, blind: float = 0.0) -> str:
    """Which mask to take on these images, and whether it pays, as far as the runs can show it.

    Args:
        blind: what can be had without looking at the images, in percent.
    """
    if results["method"].nunique() < 2:
        return "One method alone: nothing to compare it with."
    if results["seed"].nunique() < 2:
        return "One seed cannot tell methods apart: give --seeds more of them, better five."
    reference = reference_of(results)
    masks = {method: own for method, own in differences(results, reference).items() if method != UNMASKED}
    taken, sentences = _which_mask(masks, reference) if masks else (reference, [])
    if UNMASKED in set(results["method"]) - {reference}:
        sentences.append(_does_it_pay(taken, differences(results, UNMASKED)[taken]))
    return " ".join([*sentences, *_blind_ones(results, blind)])


def _which_mask(masks: Mapping[str, Difference], reference: str) -> tuple[str, list[str]]:
    """The mask to take, and why."""

    def listed(names: Sequence[str]) -> str:
        return ", ".join(f"{name} ({masks[name].mean:+.1f})" for name in names)

    ahead = sorted((name for name in masks if masks[name].low > 0), key=lambda name: -masks[name].mean)
    behind = [name for name in masks if masks[name].high < 0]
    level = [name for name in masks if name not in (*ahead, *behind)]
    if ahead:
        taken, *others = ahead
        said = [f"Take {taken}: {masks[taken].mean:+.1f} points to {reference}, {_interval(masks[taken])}."]
        if others:
            said.append(f"Ahead of {reference} too: {listed(others)}.")
    else:
        taken = reference
        said = [f"No mask is ahead of {reference} by a difference that these runs can show: take {reference}."]
        if level:
            best = max(level, key=lambda name: masks[name].mean)
            said.append(f"The nearest is {best}, {masks[best].mean:+.1f} points, {_interval(masks[best])}.")
    if behind:
        said.append(f"Behind {reference}: {listed(behind)}.")
    return taken, said


def _does_it_pay(mask: str, to_unmasked: Difference) -> str:
    points, without = f"{abs(to_unmasked.mean):.1f} points", "training without a mask"
    if to_unmasked.low > 0:
        return f"It pays: with as much computing, {mask} is {points} ahead of {without}, {_interval(to_unmasked)}."
    if to_unmasked.high < 0:
        return (
            f"It does not pay here: with as much computing, {mask} is {points} behind {without}, "
            f"{_interval(to_unmasked)}. Longer runs may turn this round."
        )
    return (
        f"Whether it pays these runs can't show: with as much computing, {mask} is at {to_unmasked.mean:+.1f} points "
        f"to {without}, {_interval(to_unmasked)}."
    )


def _interval(own: Difference) -> str:
    return f"between {own.low:+.1f} and {own.high:+.1f}"


def _blind_ones(results: pd.DataFrame, blind: float) -> list[str]:
    """A sentence on the methods that have no more than `blind`, if there are any."""
    means = results.groupby("method", sort=False)[last_column(results)].mean()
    poor = ", ".join(f"{method} ({mean:.1f})" for method, mean in means.items() if mean <= blind)
    if not poor:
        return []
    return [
        f"But {blind:.1f} % can be had without looking at the images, and these have no more: {poor}. Longer runs, "
        "which learn more, tell more."
    ]


def reading(results: pd.DataFrame, blind: float = 0.0) -> str:
    """What the table says, for runs too few to conclude from.

    Args:
        blind: as in `advice`.
    """
    means = results.groupby("method")[last_column(results)].mean().sort_values(ascending=False)
    ranks = ", ".join(f"{method} at {score:.1f} %" for method, score in means.items())
    seeds = results["seed"].nunique()
    caution = "One seed: a difference of a few points is noise." if seeds == 1 else f"{seeds} seeds each."
    return " ".join([f"After as many operations: {ranks}. {caution}", *_blind_ones(results, blind)])


def table(results: pd.DataFrame) -> pd.DataFrame:
    """A row per method: means over the seeds, and the difference to the reference with its interval."""
    column, reference = last_column(results), reference_of(results)
    found = differences(results, reference)
    rows = []
    for method, own in results.groupby("method", sort=False):
        unmasked, last, masked = (own[name].mean() for name in (COLUMNS[1], column, COLUMNS[0]))
        rows.append(
            {
                "method": method,
                COLUMNS[0]: "–" if math.isnan(masked) else f"{masked:.1f}",
                COLUMNS[1]: f"{unmasked:.1f}",
                **({column: f"{last:.1f}"} if column != COLUMNS[1] else {}),
                f"to {reference}": str(found[str(method)]) if method != reference else "–",
                "images seen": f"{own['images seen'].mean():,.0f}",
                "images/s": f"{own['images/s'].median():,.0f}",
                "seeds": len(own),
            }
        )
    return pd.DataFrame(rows).set_index("method")


# Runs in a given time


@dataclass(frozen=True)
class Speed:
    """Seconds of a step with a mask, of one on whole images, and of an evaluation on all test images."""

    masked: float
    whole: float
    evaluation: float


def measure_speed(train_data: CaptionedImages, test_data: CaptionedImages, config: Config, score: Score) -> Speed:
    """By the medians of steps with a mask and without one, in turns, and two evaluations."""
    one_batch = train_data.head(config.batch_size)
    torch.manual_seed(0)
    model = build_model(config)
    drop = gaussmask.RandomPatchDropout(config.mask_ratio)
    gaussmask.attach(model.visual, drop)
    recipe: dict[str, Any] = {"epochs": TIMED_STEPS, "lr": config.lr, "seed": 0, "label": ""}
    seconds: dict[float, list[float]] = {config.mask_ratio: [], 0.0: []}
    begun = time.monotonic()
    while not seconds[0.0] or time.monotonic() - begun < TIMED_SECONDS:
        for mask_ratio, own in seconds.items():
            drop.mask_ratio = mask_ratio
            records = train(model, one_batch, config, advance=lambda images: None, **recipe)
            own += [config.batch_size / record["images_per_second"] for record in records[1:]]  # the first one is cold
    evaluations = []
    for _ in range(2):  # the first one is cold
        started = now(config.device)
        score.of(make_encoder(model, config), test_data)
        evaluations.append(now(config.device) - started)
    masked, whole = (statistics.median(own) for own in (seconds[config.mask_ratio], seconds[0.0]))
    return Speed(masked, whole, min(evaluations))


def fastest(
    train_data: CaptionedImages, test_data: CaptionedImages, config: Config, score: Score
) -> tuple[Config, Speed]:
    """The recipe in the faster precision, if it leaves that open, and its speed: small towers may be slower in bf16."""
    precisions = ("fp32", "bf16") if config.precision == "auto" else (config.precision,)
    tried = [replace(config, precision=precision) for precision in precisions]
    speeds = [measure_speed(train_data, test_data, recipe, score) for recipe in tried]
    return min(zip(tried, speeds, strict=True), key=lambda pair: pair[1].masked + pair[1].whole)


def recipe_of(method: str, config: Config, share: float) -> Config:
    """The recipe of a method: without a mask, the `share` of the passes that takes as many operations."""
    return replace(config, epochs=config.epochs * share) if method == UNMASKED else config


def share_of_the_unmasked(config: Config) -> float:
    """Operations of an image with a mask, in units of those without."""
    return operations(config, REFERENCE) / operations(config, UNMASKED)


def fit_into(
    minutes: float,
    speed: Speed,
    config: Config,
    methods: Sequence[str],
    num_seeds: int,
    num_train: int,
    num_test: int,
) -> Config:
    """The recipe with as many passes as all runs have time for, and a tenth of them for the tuning, if there is one.

    Raises:
        UserError: where that is too little to learn anything.
    """
    steps_per_pass = num_train // config.batch_size
    share, tuning_share = share_of_the_unmasked(config), TUNING_SHARE * (config.tuning_epochs > 0)
    evaluations = len(COLUMNS) + (CURVE_POINTS + 1) * min(1.0, CURVE_IMAGES / num_test)
    training = 60 * minutes * USED_TIME / num_seeds - len(methods) * evaluations * speed.evaluation
    step_of_each = sum(share * speed.whole if method == UNMASKED else speed.masked for method in methods)
    step_of_each += len(methods) * tuning_share * speed.whole
    steps = training / step_of_each
    if steps < FEWEST_STEPS:
        raise UserError(
            f"minutes: {minutes:g} leave {max(0, int(steps))} training steps for each of {num_seeds * len(methods)} "
            "runs, too few to learn anything. Give more minutes, fewer --methods or --seeds, fewer test images "
            "(--limit), or a smaller model (--config.width, --config.depth, --config.image-size)"
        )
    epochs = steps / steps_per_pass
    return replace(config, epochs=epochs, tuning_epochs=tuning_share * epochs)


def compare_on(
    train_data: CaptionedImages,
    test_data: CaptionedImages,
    config: Config,
    score: Score,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    minutes: float | None = None,
    curve_points: int = CURVE_POINTS,
    save: Callable[[pd.DataFrame, pd.DataFrame], object] = lambda results, curves: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run every method with every seed, seed by seed.

    Args:
        minutes: after which no further seed is begun, once there are two.
        curve_points: of every run, see `clip_training.run`.
        save: called with the results and the curves so far, whenever a run has ended.

    Returns:
        The results, a row per run, and the curves of all runs.
    """
    share = share_of_the_unmasked(config) if UNMASKED in methods else 1.0
    cost = {masked: operations(config, REFERENCE if masked else UNMASKED) for masked in (True, False)}
    steps_per_pass = len(train_data) // config.batch_size

    def work(method: str) -> float:
        epochs, tuning = recipe_of(method, config, share).epochs, config.tuning_epochs
        images = [
            max(1, round(passes * steps_per_pass)) * config.batch_size if passes else 0 for passes in (epochs, tuning)
        ]
        return images[0] * cost[method != UNMASKED] + images[1] * cost[False]

    results, curves, started = [], [], time.monotonic()
    layout = "{l_bar}{bar}| {elapsed}, {remaining} left"
    total = len(seeds) * sum(work(method) for method in methods)
    with tqdm(total=total, bar_format=layout, file=sys.stdout) as bar:
        for number, seed in enumerate(seeds):
            passed = time.monotonic() - started
            if minutes is not None and number >= 2 and passed * (1 + 1 / number) > 60 * minutes * LATEST:
                bar.write(f"stopped after {number} of {len(seeds)} seeds: the {minutes:g} minutes are over")
                break
            for method in methods:
                bar.set_description(f"{method}, seed {seed}")

                def advance(images: int, tuning: bool, masked: bool = method != UNMASKED) -> None:
                    bar.update(min(images * cost[masked and not tuning], total - bar.n))

                recipe = recipe_of(method, config, share)
                shown: dict[str, Any] = {"score": score, "curve_points": curve_points, "advance": advance}
                result, curve = run(method, train_data, test_data, recipe, seed, **shown)
                results.append(result | {"images seen": int(curve["samples"].max())})
                curves.append(curve)
                save(pd.DataFrame(results), pd.concat(curves, ignore_index=True))
    return pd.DataFrame(results), pd.concat(curves, ignore_index=True)
