"""Claim C2: images per second and memory of a training step with a mask, in turns with the step without one."""

import functools
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from clip_step import autocast, make_optimizer, train_step
from clip_training import Config as Recipe
from clip_training import build_model, tokenizer
from measure.arithmetic import Tower, clip_ceiling
from measure.memory import peak_mib
from measure.timing import Contender, clock_for, interleave, warm_up

import gaussmask
from claim.design import RATIOS, Run, flip, glip
from claim.schedules import masks_of
from gaussmask.functional import num_kept_patches

BASELINE = "clip"
CURVE_COSTS = "the curves of C0"  # a measurement of its own, of that claim's methods


def papers_runs(data: str) -> list[Run]:
    """What C2 compares."""
    return [method(data, ratio) for ratio in RATIOS for method in (flip, glip)]


def measure_costs(recipe: Recipe, rounds: int, runs: Sequence[Run], seed: int = 0) -> dict[str, Any]:
    """The masks of `runs`, with one model, one optimizer and one batch, so that only the drop changes.

    Returns:
        By contender (`clip`, `flip 0.75`, `glip 0.75`, ...): `milliseconds` of a step, one per round; `peak_mib` above
        weights and moments; and `ceiling`, the speed-up over clip that the arithmetic allows.
    """
    torch.manual_seed(seed)
    model = build_model(recipe).train()
    optimizer = make_optimizer(model.parameters(), lr=1e-5, weight_decay=recipe.weight_decay)
    contrastive_loss = open_clip.loss.ClipLoss()
    images = torch.randn(recipe.batch_size, 3, recipe.image_size, recipe.image_size, device=recipe.device)
    tokens = tokenizer(recipe.context_length)(["a photo of a dog."] * recipe.batch_size).to(recipe.device)

    def step() -> None:
        precision = autocast(recipe.precision, recipe.device)
        train_step(model, images, tokens, contrastive_loss, optimizer, precision)

    def prepare(drop: gaussmask.PatchDropout | None) -> None:
        gaussmask.detach(model.visual)
        if drop is not None:
            gaussmask.attach(model.visual, drop)

    patches = (recipe.image_size // recipe.patch_size) ** 2
    image = Tower(1 + patches, recipe.width, recipe.depth, patches, 3 * recipe.patch_size**2)
    text = Tower(recipe.context_length, recipe.width, recipe.text_depth)
    taking_turns = [Contender(BASELINE, step, recipe.batch_size, functools.partial(prepare, None), {"ceiling": 1.0})]
    for run in runs:
        dropped = patches - num_kept_patches(patches, run.mask_ratio)
        ceiling = {"ceiling": clip_ceiling(image, text, dropped=dropped, stage="tokens")}
        turn = functools.partial(prepare, masks_of(run).drop)
        taking_turns.append(Contender(f"{run.method} {run.mask_ratio:g}", step, recipe.batch_size, turn, ceiling))
    clock = clock_for(recipe.device)
    repeats, peaks = [], {}
    for contender in taking_turns:
        repeats.append(warm_up(contender, clock))
        peaks[contender.name] = peak_mib(contender.call, recipe.device)
    samples = interleave(taking_turns, repeats, rounds, clock)
    return {
        "batch": recipe.batch_size,
        "milliseconds": {name: samples[name].tolist() for name in samples},
        "peak_mib": peaks,
        "ceiling": {contender.name: contender.facts["ceiling"] for contender in taking_turns},
    }
