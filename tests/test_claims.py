"""The claims: one recipe for all methods, statistics that SciPy agrees with, runs that are never repeated or torn."""

import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from scipy import stats

import gaussmask

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import claim_report
import claims
from claim import run as claim_run
from claim.costs_report import judge_costs
from claim.design import SCENES, Claim, DataSet, Row, Run, flip, full_setting, glip, smoke_setting, weighted
from claim.masks import CHOICE_SEEDS, CONFIRMING_SEEDS, cluster_choice, schedule_choice
from claim.plan import plan
from claim.records import curves_by_run, pending, read, results_by_run, training_keys, write
from claim.schedules import Masks
from claim.verdicts import CONTRADICTED, NOT_ENOUGH, NOT_SHOWN, SHOWN, combined, verdict
from clip_intervals import Difference, difference
from user_errors import UserError

SETTING = smoke_setting()
FULL = full_setting("cpu")
PAPERS = "C1", "C6a", "C6b", "C4", "C5", "C3", "C6", "border"
OF_A_MASK = {"method", "sigma", "sampling", "anchors", "noise", "schedule"}


def known(setting, results=None):
    return claims.claims(setting, results or {})


def papers(setting):
    return [claim for claim in known(setting) if claim.name in PAPERS]


def record(run, setting=FULL, **results):
    circumstances = claims.circumstances(None, "cpu", 0.0)
    return {**training_keys(run, setting), "results": results, **circumstances}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins") / "data"
    claim_run.write_stand_ins(folder, SETTING)
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, request):
    """A smoke run that is over: of all claims with --thorough, else of those with every kind of run, row and figure."""
    only = () if request.config.getoption("thorough") else ("C0", "C1", "C2", "C7 cluster")
    config = claims.Config(smoke=True, output=tmp_path_factory.mktemp("claims"), only=only)
    with pytest.MonkeyPatch.context() as patch:  # workers of its own kind are started by the second call
        patch.setattr(claims, "get_context", lambda method: processes.CONTEXT)
        claims.main(config)
    return config


def settled(setting):
    """Results by which every choice is made."""
    results = {}
    for _ in range(3):  # a choice may wait for another one
        needed = plan(known(setting, results), (0,))
        results |= {run: dict.fromkeys(figures, 50.0) for run, figures in needed.items()}
    return results


class TestStatistics:
    @pytest.mark.parametrize("n", [2, 5, 12])
    def test_the_interval_is_that_of_the_paired_t_test(self, n):
        rng = np.random.default_rng(n)
        first, second = rng.normal(50, 2, n), rng.normal(49, 2, n)
        found = difference(list(first - second))
        low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert (found.n, found.mean) == (n, pytest.approx((first - second).mean()))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))

    def test_one_run_has_no_interval_and_none_no_difference(self):
        assert math.isnan(difference([1.0]).low)
        with pytest.raises(ValueError, match="at least one pair"):
            difference([])

    def test_one_interval_in_twenty_misses_the_truth(self):
        rng = np.random.default_rng(0)
        found = [difference(list(rng.normal(0.3, 1, 5))) for _ in range(2000)]
        missed = sum(not one.low < 0.3 < one.high for one in found)
        assert stats.binomtest(missed, 2000, 0.05).pvalue > 0.01

    @pytest.mark.parametrize(
        ("n", "low", "high", "margin", "said"),
        [
            (5, 0.1, 0.9, 0.0, SHOWN),
            (5, -0.1, 0.9, 0.0, NOT_SHOWN),
            (5, -0.9, -0.1, 0.0, CONTRADICTED),
            (5, -0.9, -0.1, -1.0, SHOWN),
            (5, -1.9, -1.1, -1.0, CONTRADICTED),
            (4, 0.1, 0.9, 0.0, NOT_ENOUGH),
        ],
    )
    def test_verdicts_follow_the_rule(self, n, low, high, margin, said):
        assert verdict(Difference(n, (low + high) / 2, low, high), margin) == said
        assert verdict(None) == NOT_ENOUGH

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ([SHOWN, SHOWN], SHOWN),
            ([SHOWN, NOT_SHOWN], NOT_SHOWN),
            ([SHOWN, CONTRADICTED], CONTRADICTED),
            ([CONTRADICTED, NOT_ENOUGH], NOT_ENOUGH),
            ([], NOT_ENOUGH),
        ],
    )
    def test_a_claim_follows_from_its_primary_rows(self, rows, said):
        assert combined(rows) == said


class TestPlan:
    @pytest.mark.parametrize("setting", [FULL, SETTING], ids=["full", "smoke"])
    def test_both_runs_of_a_pair_have_the_recipe_and_all_but_the_mask_in_common(self, setting):
        of_masks = [claim for claim in known(setting, settled(setting)) if not claim.name.startswith("C0")]
        assert {"C1", "C7", "C7 best"} <= {claim.name for claim in of_masks}
        for claim in of_masks:
            for row in claim.rows:
                for first, second in row.pairs:
                    differ = {name for name, value in asdict(first).items() if value != getattr(second, name)}
                    assert differ
                    assert differ <= OF_A_MASK
                    assert setting.recipe_of(first) == setting.recipe_of(second)

    def test_no_column_of_a_table_hides_another(self):
        for claim in known(FULL, settled(FULL)):
            for row in claim.rows:
                assert not {*row.labels} & {*claim.sides, "verdict", "n", "difference (95 %)", "each image seen"}

    def test_every_run_is_planned_once_for_every_seed_with_all_figures_that_rows_ask_for(self):
        needed = plan(papers(FULL), (3, 4))
        assert {run.seed for run in needed} == {3, 4}
        assert {replace(run, seed=3) for run in needed if run.seed == 4} == {run for run in needed if run.seed == 3}
        shared = needed[replace(flip("cifar10", 0.75), seed=3)]
        assert shared >= {"masked.test.top1", "tuned.test.top1", "tuned.test.probe"}

    def test_stopping_anywhere_leaves_whole_rows(self):
        every = known(FULL, settled(FULL))
        order = list(plan(every, range(5)))
        so_far = set()
        for claim in every:
            for row in claim.rows:
                seeds = claim.seeds or range(5)
                so_far |= {replace(run, seed=seed) for pair in row.pairs for run in pair for seed in seeds}
                assert set(order[: len(so_far)]) == so_far

    def test_the_rule_says_what_is_run(self):
        rule = " ".join((claim_report.ROOT / "docs" / "claims-rule.md").read_text(encoding="utf-8").split())
        recipe = FULL.recipe
        assert f"width {recipe.width}, depth {recipe.depth}, heads of {recipe.head_width}" in rule
        assert f"{FULL.steps} steps of {recipe.batch_size} images" in rule
        assert f"{FULL.tuning_steps} steps of {recipe.batch_size} whole images" in rule
        assert f"{FULL.num_scenes:,} for training" in rule
        assert f"lr {recipe.lr:.0e}".replace("e-0", "e-") in rule
        for claim in known(FULL, settled(FULL)):
            if any(row.primary for row in claim.rows):
                assert f"| {claim.name} " in rule


class TestRuns:
    def test_the_masks_are_all_that_differs(self, folder, monkeypatch):
        """With the same drop for all of them, every method comes out the same."""
        monkeypatch.setattr(claim_run, "masks_of", lambda run: Masks(gaussmask.RandomPatchDropout(0.5)))
        runs = [flip("cifar10"), glip("cifar10"), weighted("cifar10"), glip("cifar10", sigma=0.05)]
        found = [claim_run.train_and_evaluate(replace(run, seed=7), (), SETTING, folder).figures for run in runs]
        assert all(results == found[0] for results in found)

    def test_a_run_repeats_itself_and_seeds_differ(self, folder):
        run = glip("tiny-imagenet", 0.918)
        once, again, other = (
            claim_run.train_and_evaluate(replace(run, seed=seed), (), SETTING, folder).figures for seed in (0, 0, 1)
        )
        assert once == again
        assert once != other
        splits = SETTING.data_set("tiny-imagenet").splits
        assert {name for name in once if name.endswith("top1")} == {
            f"{stage}.{split}.top1" for stage in ("masked", "unmasked", "tuned") for split in splits
        }

    def test_reclip_trains_on_small_images_and_tunes_on_whole_ones(self, folder, monkeypatch):
        seen = []
        train = claim_run.pretrain_and_tune

        def spy(model, data, config, *args, tuning_data, **kwargs):
            seen.append((data.images.shape[-1], model.visual.patch_embed.num_patches, tuning_data.images.shape[-1]))
            return train(model, data, config, *args, tuning_data=tuning_data, **kwargs)

        monkeypatch.setattr(claim_run, "pretrain_and_tune", spy)
        claim_run.train_and_evaluate(Run("cifar10", "reclip", 0.918), (), SETTING, folder)
        assert seen == [(8, 4, 32)]

    def test_the_images_of_scenes_are_those_of_the_run(self):
        central, anywhere = (Run(SCENES, "flip", 0.75, centering=c, object_size=0.4) for c in (1.0, 0.0))
        first, second = (claim_run.train_data(run, SETTING, Path()) for run in (central, anywhere))
        assert len(first) == SETTING.steps * SETTING.recipe.batch_size
        assert not torch.equal(first.images, second.images)
        few = claim_run.train_data(replace(central, train_images=8), SETTING, Path())
        assert torch.equal(few.images, first.images[:8])
        with pytest.raises(ValueError, match="more than the 32 that scenes has"):
            claim_run.train_data(replace(central, train_images=33), SETTING, Path())
        with pytest.raises(ValueError, match="centering"):
            claim_run.train_data(Run(SCENES, "flip", 0.75), SETTING, Path())

    def test_a_set_smaller_than_a_batch_is_refused(self, folder):
        setting = replace(SETTING, recipe=replace(SETTING.recipe, batch_size=1000))
        with pytest.raises(ValueError, match="cifar10 has 160 training images"):
            claim_run.train_and_evaluate(flip("cifar10"), (), setting, folder)


class TestRecords:
    def test_a_finished_run_is_not_pending_and_one_with_a_missing_figure_is(self):
        run = replace(flip("cifar10"), seed=2)
        needed = {run: {"tuned.test.top1"}, replace(run, seed=3): {"tuned.test.top1"}}
        done = record(run, **{"tuned.test.top1": 50.0})
        assert list(pending(needed, FULL, [done])) == [replace(run, seed=3)]
        assert list(pending({run: {"tuned.test.probe"}}, FULL, [done])) == [run]

    @pytest.mark.parametrize("change", [{"steps": 1}, {"tuning_steps": 1}, {"recipe": replace(FULL.recipe, lr=1.0)}])
    def test_a_run_with_another_recipe_is_another_run(self, change):
        run = flip("cifar10")
        assert results_by_run([record(run, replace(FULL, **change), a=1.0)], FULL) == {}
        assert results_by_run([record(run, FULL, a=1.0)], FULL) == {run: {"a": 1.0}}
        repeated = [record(run, FULL, a=1.0), record(run, FULL, a=2.0, b=3.0)]
        assert results_by_run(repeated, FULL) == {run: {"a": 1.0, "b": 3.0}}
        curves = [one | {"curve": {"top1": [place]}} for place, one in enumerate(repeated)]
        assert curves_by_run(curves, FULL) == {run: {"top1": [0]}}

    def test_records_of_other_data_are_left_alone(self):
        cifar_only = full_setting("cpu", (DataSet("cifar10", 32),))
        others = [record(flip("tiny-imagenet"), a=1.0), record(flip("cifar10"), a=2.0)]
        assert results_by_run(others, cifar_only) == {flip("cifar10"): {"a": 2.0}}
        assert claims.describe(claims.claims(cifar_only, {}), cifar_only, (0,), others)

    def test_what_is_written_is_read_and_replaces_the_file_at_once(self, tmp_path, monkeypatch):
        file, records = tmp_path / "claims.jsonl", [record(flip("cifar10"), a=1.0)]
        assert read(file) == []
        write(file, records)
        assert read(file) == records

        def killed(self, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(file, records * 2)
        assert read(file) == records


class TestReport:
    def figures(self, run, points):
        return {f"{stage}.test.top1": points for stage in ("masked", "unmasked", "tuned")} | {"passes": 1.5}

    def test_differences_are_paired_by_seed_and_averaged_within_it(self):
        """Against the same sums on a plain table: seeds 0 to 4, and one seed without its partner."""
        rng = np.random.default_rng(1)
        top1 = rng.normal(50, 3, (3, 2, 6))
        records = []
        for at, ratio in enumerate((0.5, 0.75, 0.918)):
            for side, method in enumerate((glip, flip)):
                for seed in range(6 if side == 0 else 5):
                    run = replace(method("cifar10", ratio), seed=seed)
                    records.append(record(run, **self.figures(run, top1[at, side, seed])))
        c1 = next(claim for claim in known(FULL) if claim.name == "C1")
        judged = {tuple(row.row.labels.values()): row for row in claim_report.judge(c1, results_by_run(records, FULL))}
        mean = judged["cifar10", "tuned", "mean"]
        expected = (top1[:, 0, :5] - top1[:, 1, :5]).mean(axis=0)
        interval = stats.ttest_1samp(expected, 0).confidence_interval(0.95)
        assert mean.found.n == 5
        assert mean.found.mean == pytest.approx(expected.mean())
        assert (mean.found.low, mean.found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert mean.row.primary
        assert judged["cifar10", "tuned", "0.5"].sides[1] == pytest.approx(top1[0, 1, :5].mean())
        assert judged["tiny-imagenet", "tuned", "mean"].verdict == NOT_ENOUGH

    def test_costs_are_ratios_of_images_per_second(self):
        milliseconds = {"clip": [400.0] * 5}
        for ratio in ("0.5", "0.75", "0.918"):
            milliseconds |= {f"flip {ratio}": [100.0] * 5, f"glip {ratio}": [99.0, 100.0, 101.0, 100.0, 100.0]}
        costs = {
            "batch": 8,
            "milliseconds": milliseconds,
            "peak_mib": dict.fromkeys(milliseconds, 10.0),
            "ceiling": dict.fromkeys(milliseconds, 4.5),
        }
        keys = claims.costs_keys("the recipe's model", FULL)
        found = judge_costs([keys | costs], FULL)
        assert [cost.mask_ratio for cost in found] == [0.5, 0.75, 0.918]
        assert math.exp(found[1].speed.mean) == pytest.approx(1, abs=1e-4)
        assert math.exp(found[1].speed_ups[0].mean) == pytest.approx(4)
        assert [cost.verdict for cost in found] == [SHOWN] * 3
        heavy = costs | {"peak_mib": {name: 10.4 if "glip" in name else 10.0 for name in milliseconds}}
        assert judge_costs([keys | heavy], FULL)[1].verdict == CONTRADICTED
        slow = {name: [2 * ms for ms in rounds] if "glip" in name else rounds for name, rounds in milliseconds.items()}
        assert judge_costs([keys | costs | {"milliseconds": slow}], FULL)[1].verdict == CONTRADICTED

    def test_the_pages_and_plots_show_the_records_that_lie_in_the_repository(self):
        records = read(claim_report.RECORDS)
        assert records
        texts = claim_report.page_texts(records)
        for page in claim_report.PAGES:
            text = page.read_text(encoding="utf-8")
            assert text == claim_report.fill(text, texts), "run `python benchmarks/claim_report.py`"
        pages = "".join(page.read_text(encoding="utf-8") for page in claim_report.PAGES)
        assert set(re.findall(r"<!-- results: (\S+) -->", pages)) == set(texts)
        digest = claim_report.records_digest(records)
        plots = list(claim_report.PLOTS.iterdir())
        assert {plot.stem for plot in plots} == claim_report.shown_on_pages() >= {*PAPERS, "C2", "C0-curves"}
        for plot in plots:
            with Image.open(plot) as drawn:
                assert drawn.info["Records"] == digest, "run `python benchmarks/claim_report.py`"

    def test_seeds_that_a_choice_was_made_with_are_in_no_other_row(self):
        run, other = flip("tiny-imagenet"), Run("tiny-imagenet", "grid", 0.75)
        seeds = (*CHOICE_SEEDS, *CONFIRMING_SEEDS, 0, 7)
        records = [
            record(replace(one, seed=seed), **{"tuned.val.top1": 50.0, "passes": 1.0})
            for one in (run, other)
            for seed in seeds
        ]
        results = results_by_run(records, FULL)
        by_name = {claim.name: claim for claim in known(FULL, results)}
        on_rules = [row for row in claim_report.judge(by_name["C7"], results) if row.found]
        on_choice = [row for row in claim_report.judge(by_name["C7 schedules"], results) if row.found]
        assert [row.found.n for row in on_rules] == [2]
        assert [row.found.n for row in on_choice] == [len(CHOICE_SEEDS)]

    def test_rows_that_are_read_together_have_wider_intervals(self):
        """Those of Bonferroni, against SciPy's t interval."""
        rng = np.random.default_rng(3)
        points = rng.normal(50, 2, (2, 5))
        runs = (Run("eurosat", "grid", 0.75), flip("eurosat"))
        records = [
            record(replace(run, seed=seed), **{"tuned.test.top1": points[side, seed], "passes": 1.0})
            for side, run in enumerate(runs)
            for seed in range(5)
        ]
        results = results_by_run(records, FULL)
        c7 = next(claim for claim in known(FULL, settled(FULL)) if claim.name == "C7")
        (row,) = [row for row in claim_report.judge(c7, results) if row.found]
        interval = stats.ttest_1samp(points[0] - points[1], 0).confidence_interval(1 - 0.05 / 6)
        assert row.row.comparisons == 6
        assert (row.found.low, row.found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _train_for_a_minute(pids):
    claims.get_context = lambda method: processes.CONTEXT
    with claims._pool(claims.Config(workers=1), SETTING) as pool:
        pids.send(pool.executor.submit(os.getpid).result())
        pool.executor.submit(time.sleep, 60).result()


class TestCommand:
    def test_workers_end_when_the_program_is_killed(self):
        pids, sending = processes.CONTEXT.Pipe(duplex=False)
        program = processes.CONTEXT.Process(target=_train_for_a_minute, args=(sending,))
        program.start()
        worker = pids.recv()
        program.kill()
        until = time.monotonic() + 20
        while _runs(worker) and time.monotonic() < until:
            time.sleep(0.05)
        assert not _runs(worker)

    def test_smoke_runs_everything(self, smoke, thorough):
        left = {path.name for path in smoke.output.iterdir()}
        records = read(smoke.output / "claims.jsonl")
        every = known(SETTING, results_by_run(records, SETTING))
        names = [*(claim.name for claim in every), "C2", "C0 curves"]
        assert left <= {"claims.jsonl", "claims.md"} | {f"{name.replace(' ', '-')}.png" for name in names}
        assert left >= {"claims.jsonl", "claims.md", "C0.png", "C0-curves.png", "C1.png", "C2.png", "C7-cluster.png"}
        assert len(left) == 2 + len(names) or not thorough
        needed = plan(claims._wanted(smoke, SETTING, records), (0,))
        assert not pending(needed, SETTING, records)
        assert len(records) == len(needed) + len(SETTING.cost_models) + 1
        assert all(record.keys() >= {"seconds", "date", "machine", "versions", "commit"} for record in records)
        page = (smoke.output / "claims.md").read_text(encoding="utf-8")
        assert page.count("not enough runs") > 50
        assert "| each image seen |" in page
        assert "nan" not in page
        assert "Not run yet" not in page or not thorough
        assert os.environ.get("TQDM_DISABLE") is None

    def test_a_second_call_repeats_nothing_and_goes_on_where_the_first_stopped(self, smoke, capsys, monkeypatch):
        monkeypatch.setattr(claim_report, "save_plots", lambda *_: None)  # the first call has drawn them
        file = smoke.output / "claims.jsonl"
        records = read(file)
        lost = [record for record in records if record["kind"] == "training"][-2:]
        kept = [record for record in records if record not in lost]
        write(file, kept)
        claims.main(replace(smoke, workers=1))
        assert "2 of 2 runs" in capsys.readouterr().out
        again = read(file)
        assert again[:-2] == kept
        results = [[json.dumps(one["results"]) for one in some if "results" in one] for some in (again, records)]
        assert sorted(results[0]) == sorted(results[1])

    def test_no_run_starts_after_the_time_is_up(self, tmp_path):
        claims.main(claims.Config(smoke=True, output=tmp_path, only=("C1",), minutes=0))
        assert not read(tmp_path / "claims.jsonl")

    def test_the_plan_says_what_is_left(self, capsys, tmp_path):
        claims.main(claims.Config(data=tmp_path, plan=True, output=tmp_path))
        lines = capsys.readouterr().out.splitlines()
        assert next(line for line in lines if line.startswith("| all")).split("|")[3].strip() == str(
            len(plan(known(FULL), range(5)))
        )

    def test_the_plan_counts_a_run_once_and_again_where_a_claim_lacks_a_figure_of_it(self):
        pair = glip("cifar10"), flip("cifar10")
        of = [Claim(figure, "title", [Row({}, [pair], [figure])]) for figure in ("a", "b", "c")]
        done = [record(run, a=1.0) for run in pair]
        lines = claims.describe(of, FULL, (0,), done).splitlines()[2:]
        assert [[int(cell) for cell in line.split("|")[3:5]] for line in lines] == [[2, 0], [0, 2], [0, 0], [2, 2]]

    def test_a_name_takes_the_parts_of_a_claim_and_sets_are_left_out(self, tmp_path):
        config = claims.Config(smoke=True, output=tmp_path, only=("C7",), sets=("eurosat",), minutes=0)
        assert {claim.name for claim in claims._wanted(config, SETTING, [])} == {
            "C7", "C7 cluster", "C7 schedules", "C7 best", "C7 retrieval", "C7 ratios", "C7 top-5",
            "C7 by class"
        }  # fmt: skip
        assert {run.data for run in claims._needed(config, SETTING, [], (0,))} == {"eurosat"}
        assert claims._belongs("C6", "C6")
        assert not claims._belongs("C6a", "C6")

    def test_masks_are_taken_out_of_their_row_with_what_they_are_compared_with(self, tmp_path):
        config = claims.Config(output=tmp_path, only=("C7",), sets=("fashion",), masks=("weighted", "grid"))
        needed = claims._needed(config, FULL, [], (0, 1))
        grids, gaussians, random = (
            {run for run in needed if run.method == method} for method in ("grid", "glip", "flip")
        )
        assert grids | gaussians | random == set(needed)
        assert {run.sampling for run in gaussians} == {"weighted"}
        wanted = {(ratio, seed) for ratio in (0.5, 0.75, 0.918) for seed in (0, 1)}
        for runs in (grids, gaussians, random):
            assert {(run.mask_ratio, run.seed) for run in runs} == wanted

    def test_top_5_is_of_the_runs_that_top_1_is_of(self):
        by_name = {claim.name: claim for claim in known(FULL, settled(FULL))}
        top1 = [row for name in ("C7", "C7 ratios") for row in by_name[name].rows if row.labels["stage"] == "tuned"]
        top5 = by_name["C7 top-5"].rows
        assert [(row.labels, row.pairs) for row in top5] == [(row.labels, row.pairs) for row in top1]
        assert {figure.rpartition(".")[2] for row in top5 for figure in row.figures} == {"top5"}

    def test_by_class_is_of_the_runs_on_the_set_with_uneven_classes(self):
        by_name = {claim.name: claim for claim in known(FULL, settled(FULL))}
        rows = by_name["C7 by class"].rows
        top5 = [row for row in by_name["C7 top-5"].rows if row.labels["data"] == "fashion"]
        assert [(row.labels, row.pairs) for row in rows] == [(row.labels, row.pairs) for row in top5]
        assert {tuple(row.figures) for row in rows} == {("tuned.test.mean_per_class_recall",)}

    def test_the_larger_scale_has_the_same_plan_but_its_choices_of_masks_and_its_own_records(self, capsys, tmp_path):
        claims.main(claims.Config(data=tmp_path, plan=True, output=tmp_path, scale="gpu"))
        assert "| C0 rates " in capsys.readouterr().out
        larger = full_setting("gpu")
        chosen = [cluster_choice(larger).taken({}), schedule_choice(larger).taken({})]
        assert [(run.method, run.anchors, run.noise, run.schedule) for run in chosen] == [
            ("cluster", 0.1, 0.05, None), ("glip", None, None, "growing")
        ]  # fmt: skip
        cheap = replace(FULL, clusters=larger.clusters, tries=larger.tries)
        plans = [[replace(run, budget=None) for run in plan(known(of), (0,))] for of in (larger, cheap)]
        assert plans[0] == plans[1]
        assert {claim.name for claim in known(FULL)} - {claim.name for claim in known(larger)} == {
            "C7 cluster", "C7 schedules"
        }  # fmt: skip
        assert results_by_run([record(flip("cifar10"), FULL, a=1.0)], larger) == {}
        length = claim_run.length_of(Run("cifar10", "flip", 0.75, budget=larger.budget), larger)
        assert length.steps * length.cost + length.tuning_steps == pytest.approx(larger.budget, abs=1)

    def test_hours_left_are_told_by_the_runs_of_the_same_scale(self):
        small = record(flip("cifar10"), FULL, a=1.0) | {"seconds": 100.0}
        larger = full_setting("gpu")
        assert claims.speed([small], FULL) == claims.work(flip("cifar10"), FULL) / 100
        assert claims.speed([small], larger) == claims.speed([], larger)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_the_larger_scale_needs_a_gpu(self, tmp_path):
        with pytest.raises(UserError, match="torch sees none here"):
            claims.main(claims.Config(data=tmp_path, output=tmp_path, scale="gpu"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "--data is missing"),
            ({"data": Path("nowhere")}, "neither .* in nowhere"),
            ({"data": Path("nowhere"), "only": ("C9",)}, "only must be of C1"),
            ({"data": Path("nowhere"), "sets": ("stl10",)}, "sets must be of cifar10"),
            ({"data": Path("nowhere"), "sets": ("stl10",), "plan": True}, "sets must be of cifar10"),
            ({"data": Path("nowhere"), "masks": ("glip",)}, "masks must be of CLIP"),
            ({"data": Path("nowhere"), "only": ("C1",), "masks": ("GLIP",)}, "masks must be of none"),
            ({"data": Path("nowhere"), "class_sets": ("stl10",)}, "NAME:SIZE:SPLIT"),
        ],
    )
    def test_what_the_user_can_mend_is_said(self, changes, message, tmp_path):
        with pytest.raises(UserError, match=message):
            claims.main(claims.Config(**changes, output=tmp_path))
