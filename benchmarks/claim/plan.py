"""Every claim, and the runs that the claims need.

    claims -> rows -> pairs of runs -> the plan: every run once, for every seed

What is chosen by runs (settings of a mask, learning rates) is chosen first, so the claims depend on the results so far:
a claim gets its rows when its choice is made.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from measure.arithmetic import Tower

from claim.compute import compute_claims
from claim.design import GRID, SCENES, Claim, Results, Run, Setting
from claim.masks import CHOICE_SEEDS, masks_claims
from claim.papers import papers_claims
from gaussmask.functional import num_kept_patches


def claims(setting: Setting, results: Results) -> list[Claim]:
    """All that are tested by training, in the order in which they are run."""
    masks = masks_claims(setting, results)
    choices = [claim for claim in masks if claim.seeds == CHOICE_SEEDS]
    others = [claim for claim in masks if claim not in choices]
    return [*papers_claims(setting), *choices, *compute_claims(setting, results), *others]


def plan(of: Sequence[Claim], seeds: Sequence[int]) -> dict[Run, set[str]]:
    """Every run that the rows need, with the figures that they need of it; row by row, so that stopping leaves whole
    rows."""
    needed: dict[Run, set[str]] = {}
    for claim in of:
        for row in claim.rows:
            for seed, pair in itertools.product(claim.seeds or seeds, row.pairs):
                for run in pair:
                    needed.setdefault(replace(run, seed=seed), set()).update(row.figures)
    return needed


def work(run: Run, setting: Setting) -> float:
    """Operations of a run, roughly: for the bar, and for the plan's cost."""
    recipe = setting.recipe_of(run)
    kept = num_kept_patches(GRID**2, run.mask_ratio)
    text = Tower(recipe.context_length, recipe.width, recipe.text_depth).flops

    def image(patches: int) -> int:
        return Tower(1 + patches, recipe.width, recipe.depth, GRID**2, 3 * recipe.patch_size**2).flops

    if run.budget is not None:
        trained = run.budget * (image(GRID**2) + text)
    else:
        trained = setting.steps * (image(kept) + text) + setting.tuning_steps * (image(GRID**2) + text)
    splits = 1 if run.data == SCENES else len(setting.data_set(run.data).splits)
    return 3.0 * recipe.batch_size * trained + 2.0 * splits * min(setting.test_images, 2500) * image(GRID**2)
