"""Claims C0 and C7: choices, budgets, curves, masks that change, and what a reader is told."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from scipy import stats

import gaussmask

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import claim_report
from claim import curves as claim_curves
from claim import reader as claim_reader
from claim import run as claim_run
from claim.compute import LEARNING_RATES, long_runs
from claim.costs import CURVE_COSTS
from claim.curves import Curve, sooner
from claim.design import CIFAR10, Choice, Claim, Row, Run, flip, full_setting, smoke_setting
from claim.judge import Judged
from claim.masks import cluster_choice
from claim.plan import claims, plan
from claim.plots import plot_by_rule
from claim.records import costs_keys, training_keys
from claim.schedules import HalfRandom, masks_of, two_views
from clip_intervals import difference
from clip_training import build_model
from measure.arithmetic import Tower

CIRCUMSTANCES = {
    "seconds": 1.0,
    "date": "2026-11-27",
    "machine": dict.fromkeys(("cpu", "instructions", "cores", "os", "gpu")),
    "versions": {},
    "commit": None,
}
FULL, SETTING = full_setting("cpu"), smoke_setting()


class TestChoice:
    def test_the_highest_mean_is_taken_when_all_runs_are_there(self):
        runs = [Run("cifar10", "flip", 0.75, lr=lr) for lr in (1e-3, 2e-3)]
        choice = Choice(runs, "tuned.test.top1", (40, 41))
        results = {replace(run, seed=seed): {"tuned.test.top1": 50.0} for run in runs for seed in (40, 41)}
        results[replace(runs[1], seed=40)] = {"tuned.test.top1": 50.1}
        assert choice.taken(results) == runs[1]
        results[replace(runs[0], seed=0)] = {"tuned.test.top1": 99.0}  # a seed of the comparison itself
        assert choice.taken(results) == runs[1]
        del results[replace(runs[0], seed=41)]
        assert choice.taken(results) is None

    def test_the_cluster_mask_is_compared_when_its_settings_are_chosen(self):
        choice = cluster_choice(FULL)
        results = {
            replace(run, seed=seed): {choice.figure: 5.0 + (run.noise or 0)}
            for run in choice.candidates
            for seed in choice.seeds
        }

        def names(of):
            (c7,) = [claim for claim in claims(FULL, of) if claim.name == "C7"]
            return {row.labels["mask"]: row.pairs[0][0] for row in c7.rows if row.labels["data"] == "eurosat"}

        assert "cluster" not in names({})
        assert names(results)["cluster"].noise == max(run.noise for run in choice.candidates)
        assert {run.data for run in choice.candidates} == {"tiny-imagenet"}

    def test_every_method_has_as_many_tries_at_its_learning_rate(self):
        (rates,) = [claim for claim in claims(FULL, {}) if claim.name == "C0 rates"]
        tried = {}
        for row in rates.rows:
            tried.setdefault((row.labels["data"], row.labels["method"]), []).append(row.pairs[0][0].lr)
        assert {tuple(found) for found in tried.values()} == {LEARNING_RATES}
        assert not set(rates.seeds) & {0, 1, 2, 3, 4}

    def test_there_is_no_verdict_before_everything_is_chosen(self):
        """C0 on one of its three sets, with all the runs that the set needs."""
        results = {}
        for _ in range(3):
            for run, figures in plan(
                [c for c in claims(FULL, results) if c.name[:2] in ("C0", "C7")], range(5)
            ).items():
                if run.data == "cifar10" or run.seed in (20, 21, 22):
                    results[run] = dict.fromkeys(figures, 60.0 if run.method == "flip" else 50.0) | {"passes": 1.0}
        records = [training_keys(run, FULL) | {"results": found} | CIRCUMSTANCES for run, found in results.items()]
        texts = claim_report.scale_texts(records, FULL)
        assert "**C0 is not decided: not enough runs.** cifar10, FLIP: +10.00" in texts["claims-C0"]
        assert "| **not enough runs** | C0 " in texts["claims-summary"]


class TestBudget:
    @pytest.mark.parametrize("method", ["flip", "glip", "cluster"])
    @pytest.mark.parametrize("ratio", [0.5, 0.75, 0.918])
    def test_runs_with_a_mask_take_as_many_operations_as_those_without(self, method, ratio):
        """By the arithmetic of the two towers, which knows nothing of the counter; heads and losses are left out."""
        run = Run("cifar10", method, ratio, budget=300)
        length = claim_run.length_of(run, FULL)
        recipe = FULL.recipe_of(run)
        text = Tower(recipe.context_length, recipe.width, recipe.text_depth).flops
        kept = gaussmask.functional.num_kept_patches(64, ratio)
        masked, whole = (
            Tower(1 + count, recipe.width, recipe.depth, projected, 48).flops + text
            for count, projected in ((kept, kept), (64, 64))
        )
        spent = length.steps * masked + length.tuning_steps * whole
        assert spent == pytest.approx(300 * whole, rel=0.02)
        assert length.tuning_steps == 30

    def test_a_run_without_a_mask_spends_all_of_it_on_training(self):
        assert claim_run.length_of(Run("cifar10", "clip", 0.0, budget=300), FULL) == claim_run.Length(300, 0)

    def test_a_run_without_a_budget_has_the_steps_of_the_setting(self):
        assert claim_run.length_of(flip("cifar10"), FULL) == claim_run.Length(FULL.steps, FULL.tuning_steps)

    def test_the_curve_ends_with_the_budget(self, tmp_path):
        claim_run.write_stand_ins(tmp_path, SETTING)
        budget = 30
        for run in (Run("cifar10", "flip", 0.75, budget=budget), Run("cifar10", "clip", 0.0, budget=budget)):
            outcome = claim_run.train_and_evaluate(run, (), replace(SETTING, budget=budget), tmp_path)
            assert outcome.curve["operations"][-1] == pytest.approx(budget, rel=0.03)
            assert outcome.curve["operations"] == sorted(outcome.curve["operations"])
            length = claim_run.length_of(run, SETTING)
            assert outcome.curve["images"][-1] == (length.steps + length.tuning_steps) * SETTING.recipe.batch_size
            assert 10 <= len(outcome.curve["top1"]) <= 14
            assert outcome.figures["tuned.test.top1"] >= 0
            assert ("masked.test.top1" in outcome.figures) == (run.method == "flip")


class TestCurves:
    def test_where_a_curve_reaches_an_accuracy_lies_on_a_straight_line(self):
        curve = Curve([10, 20, 40], [1, 2, 4], [5.0, 20.0, 30.0])
        for top1 in (6.0, 20.0, 25.5):
            assert curve.spent_until(top1, "operations") == pytest.approx(np.interp(top1, [5, 20, 30], [10, 20, 40]))
        assert curve.spent_until(30.0, "seconds") == 4
        assert curve.spent_until(4.0, "operations") == 10
        assert curve.spent_until(30.1, "operations") is None

    def test_sooner_is_the_mean_of_the_seeds_ratios(self):
        clip = {seed: Curve([100, 300], None, [10.0, 30.0 + seed]) for seed in range(3)}
        flip_ = {seed: Curve([100, 100 + 20 * (seed + 1)], None, [10.0, 30.0 + seed]) for seed in range(3)}
        found = sooner({"CLIP": clip, "FLIP": flip_}, "FLIP", "operations")
        expected = stats.ttest_1samp([math.log(300 / (100 + 20 * (seed + 1))) for seed in range(3)], 0)
        assert found.factor.mean == pytest.approx(np.mean([math.log(300 / spent) for spent in (120, 140, 160)]))
        assert found.factor.low == pytest.approx(expected.confidence_interval(0.95).low)
        assert sooner({"CLIP": clip, "FLIP": flip_}, "FLIP", "seconds") is None
        never = {**flip_, 1: Curve([100, 300], None, [10.0, 20.0])}
        assert str(sooner({"CLIP": clip, "FLIP": never}, "FLIP", "operations")) == "2 of 3 seeds get there"

    def test_the_lead_after_as_many_seconds_is_read_off_the_curve(self):
        clip = {seed: Curve([1, 3], [100, 300], [10.0, 30.0 + seed]) for seed in range(3)}
        flip_ = {seed: Curve([1, 2, 3], [100, 200, 400], [20.0, 40.0, 50.0]) for seed in range(3)}
        found = claim_curves.lead_after_as_long({"CLIP": clip, "FLIP": flip_}, "FLIP", "seconds")
        expected = stats.ttest_1samp([15.0, 14.0, 13.0], 0).confidence_interval(0.95)
        assert (found.mean, found.low, found.high) == pytest.approx((14.0, expected.low, expected.high))
        short = {seed: Curve([1, 2], [100, 200], [20.0, 40.0]) for seed in range(3)}
        ended = claim_curves.lead_after_as_long({"CLIP": clip, "FLIP": short}, "FLIP", "seconds")
        assert ended.mean == pytest.approx(9.0)
        assert claim_curves.lead_after_as_long({"CLIP": clip}, "FLIP", "seconds") is None

    def test_seconds_are_those_of_masked_steps_and_in_the_tuning_of_whole_ones(self):
        third = {"budget": SETTING.budget // 3}
        runs = [Run("cifar10", "clip", 0.0, **third), Run("cifar10", "flip", 0.75, **third)]
        results = {
            replace(run, seed=seed, lr=lr): {"tuned.test.top1": 50.0}
            for run in runs
            for seed in (40, 41)
            for lr in LEARNING_RATES
        }
        long = long_runs(CIFAR10, SETTING, results)
        assert {run.budget for run in long.values()} == {SETTING.budget}
        length = claim_run.length_of(long["FLIP"], SETTING)
        batch = SETTING.recipe.batch_size
        images = [batch * steps for steps in (1, length.steps, length.steps + length.tuning_steps)]
        curve = {"images": images, "operations": [1.0, 2.0, 3.0], "top1": [10.0, 20.0, 30.0]}
        records = [training_keys(long["FLIP"], SETTING) | {"results": {}, "curve": curve}]
        costs = costs_keys(CURVE_COSTS, SETTING) | {
            "milliseconds": {"clip": [900.0, 1000.0, 2000.0], "flip 0.75": [300.0]}
        }
        found = claim_curves.curves([*records, costs], SETTING, results)
        expected = [0.3, length.steps * 0.3, length.steps * 0.3 + length.tuning_steps * 1.0]
        assert found["cifar10"]["FLIP"][0].seconds == pytest.approx(expected)
        assert claim_curves.curves(records, SETTING, results)["cifar10"]["FLIP"][0].seconds is None
        assert claim_curves.plot_curves(found).axes[-1].get_xlabel() == "seconds"


def attached(run):
    model = build_model(SETTING.recipe_of(run)).train()
    masks = masks_of(run)
    gaussmask.attach(model.visual, masks.drop)
    return model, masks


class TestSchedules:
    def test_half_of_the_kept_patches_come_by_chance(self):
        """In a picture of two grounds, of which cluster keeps one alone, unless it is drawn as an anchor."""
        pixels = torch.zeros(400, 64, 3, 4, 4) + 1.0
        pixels[:, 32:] = -1.0
        coords = gaussmask.functional.patch_coordinates((8, 8)).expand(400, -1, -1)
        drop = HalfRandom(0.75, anchors=1)
        torch.manual_seed(0)

        def on_the_ground_of_the_anchor(rule):
            upper = (rule.scores(coords, pixels=pixels, valid=None).topk(16).indices < 32).float().sum(1)
            return torch.minimum(upper, 16 - upper)

        assert on_the_ground_of_the_anchor(gaussmask.ClusterPatchDropout(0.75, anchors=1)).max() == 0
        assert on_the_ground_of_the_anchor(drop).mean() == pytest.approx(8 * 0.5, abs=0.25)  # of the eight by chance

    def test_late_random_masks_are_random_from_the_half_on(self):
        run = Run("cifar10", "cluster", 0.75, schedule="late random")
        model, masks = attached(run)
        masks.change(model.visual, 0.49)
        assert isinstance(gaussmask.attached(model.visual), gaussmask.ClusterPatchDropout)
        masks.change(model.visual, 0.5)
        now = gaussmask.attached(model.visual)
        assert isinstance(now, gaussmask.RandomPatchDropout)
        assert now.mask_ratio == 0.75

    def test_a_growing_gaussian_ends_uniform(self):
        model, masks = attached(Run("cifar10", "glip", 0.75, schedule="growing"))
        sigmas = []
        for progress in (0.0, 0.5, 0.9, 1.0):
            masks.change(model.visual, progress)
            sigmas.append(gaussmask.attached(model.visual).sigma)
        assert sigmas[:3] == pytest.approx([0.2, 0.4, 2.0])
        chance = gaussmask.keep_probability((8, 8), 0.75, sigma=sigmas[3])
        assert (chance - 0.25).abs().max() < 5e-3

    def test_two_views_share_their_texts(self):
        """Without a mask both views are the same, and the loss is that of half of the batch."""
        run = Run("cifar10", "flip", 0.75, schedule="two views")
        model, masks = attached(run)
        assert masks.step_on is two_views
        masks.drop.mask_ratio = 0.0
        images = torch.randn(8, 3, 32, 32)
        tokens = torch.randint(1, 1000, (8, SETTING.recipe.context_length))
        loss = open_clip.loss.ClipLoss()
        expected = loss(*model(images[:4], tokens[:4])).item()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found = masks.step_on(model, images, tokens, loss, optimizer, torch.autocast("cpu", enabled=False))
        assert found.item() == pytest.approx(expected, abs=1e-5)

    def test_unknown_schedules_are_refused(self):
        with pytest.raises(ValueError, match="'never'"):
            masks_of(Run("cifar10", "flip", 0.75, schedule="never"))


def judged(data, mask, points, *, ratio="0.75", stage="tuned"):
    labels = {"data": data, "ratio": ratio, "stage": stage, "mask": mask}
    row = Row(labels, [(Run(data, "grid", 0.75), flip(data))], ["tuned.test.top1"])
    return Judged(row, (50.0 + points[0], 50.0), difference(points))


class TestReader:
    def test_the_sentence_names_the_best_mask_of_each_kind_of_images_and_where_it_is_ahead(self):
        rows = [
            judged("fashion", "GLIP", [4.0, 4.1, 4.2, 4.0, 4.1]),
            judged("fashion", "cluster", [9.0, 8.0, 8.5, 9.5, 9.0]),
            judged("eurosat", "GLIP", [0.5, -0.5, 0.1, 0.2, -0.2]),
        ]
        said = claim_reader.which_sentence(rows)
        assert "; on products on white (fashion), `ClusterPatchDropout` was ahead, by +8.8 [+8.1, +9.5] points" in said
        assert "at ratio 0.75; no mask was ahead of random on the other 1 kind of images." in said
        assert "GLIP" not in said
        assert "depends on the images" in claim_reader.which_sentence([])
        assert "no other mask was ahead" in claim_reader.which_sentence(rows[2:])
        others = [
            judged("fashion", "GLIP", [20.0, 20.1, 20.2, 20.0, 20.1], ratio="0.918"),
            judged("fashion", "cluster", [7.0, 6.0, 6.5, 7.5, 7.0], ratio="0.5"),
            judged("fashion", "cluster", [7.0, 6.0], ratio="0.918"),
        ]
        said = claim_reader.which_sentence([*rows, *others])
        assert "was ahead, by +6.8 [+6.1, +7.5] points at ratio 0.5 and +8.8 [+8.1, +9.5] points at ratio 0.75;" in said
        assert "0.918" not in said
        only_there = judged("eurosat", "GLIP", [2.0, 2.1, 2.2, 2.0, 2.1], ratio="0.918")
        assert "on land from above (EuroSAT), `GaussianPatchDropout` was ahead, by +2.1" in claim_reader.which_sentence(
            [*rows, only_there]
        )
        assert "depends on the images" in claim_reader.which_sentence([only_there])

    def test_the_table_marks_what_is_shown_and_says_where_seeds_are_few(self):
        rows = [
            judged("fashion", "GLIP", [4.0, 4.1, 4.2, 4.0, 4.1]),
            judged("fashion", "cluster", [9.0, 8.0]),
            judged("eurosat", "GLIP", [0.5, -0.5, 0.1, 0.2, -0.2]),
            replace(judged("eurosat", "cluster", [2.0]), sides=(53.0, 51.0)),
            judged("eurosat", "GLIP", [7.0] * 5, stage="masked"),
        ]
        table = claim_reader.which_table(rows).replace("\N{NO-BREAK SPACE}", " ")
        assert "| products on white (fashion) | 0.75 | 50.0 | **+4.1 ± 0.1** | +8.5 (2 seeds) |" in table
        assert "| land from above (EuroSAT) | 0.75 | 50.0 | +0.0 ± 0.5 | +2.0 (1 seed) |" in table
        assert "7.0" not in table

    def test_the_plot_names_its_points_where_not_all_masks_were_run(self):
        rows = [
            judged("cifar10", "GLIP", [1.0] * 5),
            judged("cifar10", "RECLIP", [2.0] * 5),
            judged("fashion", "GLIP", [3.0] * 5),
            judged("fashion", "cluster", [4.0] * 5),
            judged("fashion", "RECLIP", [5.0, 6.0]),
        ]
        figure = plot_by_rule(Claim("C7", "", [], ("this mask", "FLIP")), rows)
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        drawn = {}
        for axes in figure.axes:
            points = [container.lines[0].get_xydata()[0] for container in axes.containers]
            drawn[axes.get_title()] = {names[int(place)]: value for value, place in points}
        assert drawn == {
            "CIFAR-10\n0.75 dropped": {"GLIP": 1.0, "RECLIP": 2.0},
            "fashion\n0.75 dropped": {"GLIP": 3.0, "cluster": 4.0, "RECLIP": 5.5},
        }

    def test_the_first_numbers_have_accuracy_only_when_it_has_been_run(self):
        assert claim_reader.first_numbers([]).count("- **") == 2
        labels = {"data": "cifar10", "method": "FLIP"}
        row = Row(labels, [(flip("cifar10"), Run("cifar10", "clip", 0.0))], ["tuned.test.top1"], primary=True)
        found = Judged(row, (55.0, 45.0), difference([10.0, 11.0, 9.0, 10.0, 10.0]))
        said = claim_reader.first_numbers([found])
        assert said.count("- **") == 3
        assert "**+10 points at equal compute**" in said
        assert "GPU" not in said.splitlines()[2]
        larger = replace(found, found=difference([8.0, 8.5, 7.5, 8.0, 8.0]))
        said = claim_reader.first_numbers([found], [larger])
        assert "**+8 to +10 points at equal compute**" in said
        assert "(+10.0 on CIFAR-10; larger ones, on a GPU: +8.0 on CIFAR-10)" in said

    def test_the_table_of_compute_has_a_row_for_every_method_that_ran(self):
        labels = {"data": "cifar10", "method": "FLIP"}
        row = Row(labels, [(flip("cifar10"), Run("cifar10", "clip", 0.0))], ["tuned.test.top1"], primary=True)
        found = Judged(row, (55.0, 45.0), difference([10.0, 11.0, 9.0, 10.0, 10.0]))
        clip = {seed: Curve([100, 300], None, [10.0, 30.0]) for seed in range(3)}
        fast = {seed: Curve([100, 200], None, [10.0, 50.0]) for seed in range(3)}
        table = claim_reader.compute_table([found], {"cifar10": {"CLIP": clip, "FLIP": fast}})
        assert "| shown | CIFAR-10 | FLIP | 45.0 | 55.0 | +10.0 [+9.1, +10.9] | 2.00× [2.00, 2.00] | 5 |" in table
        assert "seconds" not in table  # nobody has measured them
        timed = {
            name: {seed: replace(curve, seconds=curve.operations) for seed, curve in of_seeds.items()}
            for name, of_seeds in (("CLIP", clip), ("FLIP", fast))
        }
        table = claim_reader.compute_table([found], {"cifar10": timed})
        assert "| +20.0 [+20.0, +20.0] | 2.00× [2.00, 2.00] | 2.00× [2.00, 2.00] | 5 |" in table
        assert claim_reader.compute_table([Judged(row)], {}) == "Not run yet."
