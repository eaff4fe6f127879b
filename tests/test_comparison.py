"""Which mask for these images: intervals, advice, and runs that fit into a given time. The runs are made up."""

import itertools
import math
from dataclasses import replace

import clip_comparison as comparison
import clip_data
import clip_training
import numpy as np
import pandas as pd
import pytest
import torch
from clip_data import CaptionedImages
from clip_evaluation import MEAN_RECALL, TOP1, retrieval, score_for
from scipy import stats
from user_errors import UserError

import gaussmask

TINY = clip_training.Config(
    width=64, depth=1, text_depth=1, batch_size=32, epochs=2, tuning_epochs=0.5, precision="fp32", device="cpu"
)
SCENES, TEST_SCENES = clip_data.load_scenes(128, seed=0), clip_data.load_scenes(40, seed=1)


def results_of(tuned="after tuning", **scores):
    """A row per method and seed."""
    rows = [
        {"method": method, "seed": seed, "masked inference": math.nan if method == "clip" else 1.0, "unmasked": 2.0,
         "after tuning": math.nan, tuned: value, "images/s": 100.0, "images seen": 64}
        for method, values in scores.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


STEADY = [50.0, 51.0, 49.0, 50.5, 49.5]


def above(points, noise=0.1):
    return [value + points + noise * sign for value, sign in zip(STEADY, [1, -1, 0.5, -0.5, 0], strict=True)]


def test_intervals_are_students_and_hold_at_once():
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(50, 3, 5) for name in ("flip", "glip", "grid", "block")}
    for name, own in comparison.differences(results_of(**scores), "flip").items():
        test = stats.ttest_1samp(scores[name] - scores["flip"], 0)
        wanted = test.confidence_interval(1 - 0.05 / 3)
        assert (own.n, own.mean) == (5, pytest.approx((scores[name] - scores["flip"]).mean()))
        assert (own.low, own.high) == (pytest.approx(wanted.low), pytest.approx(wanted.high))


def test_a_seed_that_not_all_methods_have_is_left_out():
    found = comparison.differences(results_of(flip=STEADY, glip=above(1)[:3]), "flip")
    assert found["glip"].n == 3


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"flip": STEADY, "glip": above(3), "grid": above(5)},
         ["Take grid: +5.0 points to flip, between +", "Ahead of flip too: glip (+3.0)."]),
        ({"flip": STEADY, "glip": above(0.2, 5), "block": above(-4)},
         ["No mask is ahead of flip by a difference that these runs can show: take flip.", "The nearest is glip, +0.2",
          "Behind flip: block (-4.0)."]),
        ({"flip": STEADY, "glip": above(-3), "block": above(-4)},
         ["take flip.", "Behind flip: glip (-3.0), block (-4.0)."]),
        ({"clip": above(-9), "flip": STEADY}, ["It pays", "flip is 9.0 points ahead of training without a mask"]),
        ({"clip": above(9), "flip": STEADY}, ["It does not pay here", "flip is 9.0 points behind training without"]),
        ({"clip": above(0, 9), "flip": STEADY}, ["Whether it pays these runs can't show", "flip is at"]),
        ({"clip": above(2), "flip": STEADY, "glip": above(5)}, ["Take glip", "It pays", "glip is 3.0 points ahead of"]),
        ({"clip": above(2), "flip": STEADY, "glip": above(0, 5)},
         ["take flip", "The nearest is glip", "It does not pay", "flip is 2.0 points behind"]),
        ({"grid": STEADY, "glip": above(3)}, ["Take glip: +3.0 points to grid"]),
        ({"clip": above(-9), "glip": STEADY}, ["glip is 9.0 points ahead of training without a mask"]),
        ({"flip": [50.0], "glip": [60.0]}, ["One seed cannot tell methods apart"]),
        ({"flip": STEADY}, ["nothing to compare it with"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["after tuning", "unmasked"])
def test_advice_says_what_the_runs_show_and_no_more(scores, said, column):
    text = comparison.advice(results_of(column, **scores))
    assert all(part in text for part in said), text
    assert ("Take " in text) == any(part.startswith("Take ") for part in said)
    assert ("nearest" in text) == any("nearest" in part for part in said)


def test_advice_names_the_methods_that_have_learnt_less_than_can_be_guessed():
    results = results_of(clip=above(-9), flip=STEADY, glip=above(3))
    assert "without looking" not in comparison.advice(results, blind=40.9)
    said = comparison.advice(results, blind=50.0)
    assert "50.0 % can be had without looking at the images, and these have no more: clip (41.0), flip (50.0)." in said


def test_what_can_be_had_without_looking_is_what_those_have_who_do_not_look():
    labels = torch.tensor([0, 0, 0, 1, 2])
    data = CaptionedImages(SCENES.images[:5], SCENES.captions[:5], labels, SCENES.classnames)
    assert TOP1.blind(data) == 60
    several = replace(data, all_captions=[["a"], ["b"] * 2, ["c"] * 5, ["d"] * 3, ["e"]])

    class Blind(torch.nn.Module):
        """Features at random."""

        def encode_image(self, images, normalize):
            return torch.randn(len(images), 8)

        encode_text = encode_image

    encoder = clip_training.make_encoder(Blind(), TINY)
    for some in (data, several):
        found = [MEAN_RECALL.of(replace(encoder, seed=seed), some) for seed in range(500)]
        assert MEAN_RECALL.blind(some) == pytest.approx(np.mean(found), abs=3 * np.std(found) / len(found) ** 0.5)


def test_the_table_has_a_row_per_method():
    rows = comparison.table(results_of(clip=above(-9), flip=STEADY, glip=above(3)))
    assert list(rows.index) == ["clip", "flip", "glip"]
    assert list(rows["masked inference"]) == ["–", "1.0", "1.0"]
    assert list(rows["after tuning"]) == ["41.0", "50.0", "53.0"]
    assert rows["to flip"]["flip"] == "–"
    assert rows["to flip"]["glip"].startswith("+3.0 [+2.")
    assert "after tuning" not in comparison.table(results_of("unmasked", flip=STEADY, glip=above(3))).columns
    assert comparison.table(results_of(flip=[50.0], glip=[51.0]))["to flip"]["glip"] == "+1.0"


def test_a_table_of_few_runs_is_read_without_a_conclusion():
    said = comparison.reading(results_of(flip=[50.0], glip=[61.04]))
    assert (
        said
        == "After as many operations: glip at 61.0 %, flip at 50.0 %. One seed: a difference of a few points is noise."
    )
    assert "2 seeds each" in comparison.reading(results_of(flip=[50.0, 51.0], glip=[61.0, 62.0]))
    said = comparison.reading(results_of(flip=[50.0], glip=[61.04]), blind=50.5)
    assert "50.5 % can be had without looking at the images, and these have no more: flip (50.0)." in said


def test_operations_are_those_of_the_arithmetic():
    """24 N d^2 + 4 N^2 d of a block on N tokens, three times that with the backward. Of the difference, for the rest is
    the same."""

    def block(tokens):
        return 3 * TINY.depth * (24 * tokens * TINY.width**2 + 4 * tokens**2 * TINY.width)

    whole, masked = (clip_training.operations(TINY, method) for method in ("clip", "flip"))
    projection = 2 * 48 * 3 * 16 * TINY.width * 2  # of the 48 patches that are dropped; images need no gradient
    assert whole - masked == pytest.approx(block(65) - block(17) + projection, rel=0.02)
    assert clip_training.operations(TINY, "cluster") >= clip_training.operations(TINY, "grid") == masked


def test_without_a_mask_a_run_takes_as_many_operations():
    share = comparison.share_of_the_unmasked(TINY)
    assert comparison.recipe_of("flip", TINY, share) == TINY
    clip = comparison.recipe_of("clip", TINY, share)
    assert clip.epochs * clip_training.operations(TINY, "clip") == TINY.epochs * clip_training.operations(TINY, "flip")


def test_runs_fit_into_the_minutes():
    speed, methods = comparison.Speed(masked=0.1, whole=0.3, evaluation=2.0), ("clip", "flip", "glip")
    fitted = comparison.fit_into(30, speed, TINY, methods, 5, num_train=3200, num_test=4000)
    assert fitted.tuning_epochs == pytest.approx(fitted.epochs / 10)
    share = comparison.share_of_the_unmasked(TINY)
    steps = 100 * fitted.epochs
    training = 2 * steps * 0.1 + steps * share * 0.3 + 3 * steps / 10 * 0.3
    evaluations = 3 * (3 + (8 + 1) * 1000 / 4000) * 2.0
    assert 5 * (training + evaluations) == pytest.approx(30 * 60 * comparison.USED_TIME)
    assert comparison.fit_into(30, speed, replace(TINY, tuning_epochs=0), methods, 5, 3200, 4000).tuning_epochs == 0
    with pytest.raises(UserError, match=r"minutes: 1 leave .* each of 15 runs"):
        comparison.fit_into(1, speed, TINY, methods, 5, num_train=3200, num_test=4000)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_speed_is_measured_by_a_few_steps(monkeypatch, mask_ratio):
    monkeypatch.setattr(comparison, "TIMED_SECONDS", 0.0)
    speed = comparison.measure_speed(SCENES, TEST_SCENES, replace(TINY, mask_ratio=mask_ratio), TOP1)
    assert min(speed.masked, speed.whole, speed.evaluation) > 0


@pytest.mark.parametrize("slow", [range(1, 3), range(30, 32), range(0)])
def test_other_work_for_a_while_does_not_count_for_the_speed(monkeypatch, slow):
    """A masked step takes 0.1 s and one on whole images 0.3 s, but four times that in some of the seconds."""
    clock = 0.0

    def train(model, data, config, *, epochs, **others):
        nonlocal clock
        (drop,) = (module for module in model.modules() if isinstance(module, gaussmask.PatchDropout))
        records = []
        for step in range(epochs):
            seconds = (0.1 if drop.mask_ratio else 0.3) * (4 if int(clock) in slow else 1)
            clock += seconds
            records.append({"images_per_second": config.batch_size / (seconds + 9 * (step == 0))})
        return records

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison.time, "monotonic", lambda: clock)
    speed = comparison.measure_speed(SCENES, TEST_SCENES, TINY, TOP1)
    assert (speed.masked, speed.whole) == (pytest.approx(0.1), pytest.approx(0.3))
    assert clock >= comparison.TIMED_SECONDS


@pytest.mark.parametrize(("precision", "taken"), [("auto", "bf16"), ("fp32", "fp32")])
def test_the_faster_precision_is_taken(monkeypatch, precision, taken):
    seconds = {"fp32": comparison.Speed(0.1, 0.4, 1), "bf16": comparison.Speed(0.2, 0.2, 1)}
    monkeypatch.setattr(comparison, "measure_speed", lambda train, test, config, score: seconds[config.precision])
    config, speed = comparison.fastest(SCENES, TEST_SCENES, replace(TINY, precision=precision), TOP1)
    assert (config.precision, speed) == (taken, seconds[taken])


class World:
    """Runs that take as long as they are told, and what is saved meanwhile."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.ran, self.saved = 0.0, seconds, [], []
        monkeypatch.setattr(comparison, "run", self.run)
        monkeypatch.setattr(comparison.time, "monotonic", lambda: self.now)

    def run(self, method, train_data, test_data, config, seed, *, score, curve_points, advance):
        self.ran.append((method, seed, config.epochs))
        self.now += self.seconds
        advance(64, False)
        result = {"method": method, "seed": seed, "unmasked": 1.0, "images/s": 5.0}
        return result, pd.DataFrame({"samples": [32, 64], "method": method, "seed": seed})

    def save(self, results, curves):
        self.saved.append((len(results), len(curves)))


def test_runs_go_seed_by_seed_and_are_saved_at_once(monkeypatch):
    world = World(monkeypatch, seconds=1)
    methods, seeds = ("clip", "flip"), (3, 4, 5)
    results, _ = comparison.compare_on(
        SCENES, TEST_SCENES, TINY, TOP1, methods=methods, seeds=seeds, minutes=1, save=world.save
    )
    assert [ran[:2] for ran in world.ran] == [(method, seed) for seed in seeds for method in methods]
    share = comparison.share_of_the_unmasked(TINY)
    assert [ran[2] for ran in world.ran] == [2 * share, 2] * 3
    assert world.saved == [(count, 2 * count) for count in range(1, 7)]
    assert set(results["images seen"]) == {64}


class Bar(comparison.tqdm):
    """Remembers where it ended."""

    ended = None

    def close(self):
        type(self).ended = self.n / self.total
        super().close()


@pytest.mark.parametrize("method", ["clip", "flip"])
def test_the_bar_is_full_when_the_runs_have_ended(monkeypatch, method):
    """Steps of the tuning, and of a run without a mask, cost more than those with one."""
    monkeypatch.setattr(comparison, "tqdm", Bar)
    seen = []
    advanced = Bar.update
    monkeypatch.setattr(Bar, "update", lambda bar, n: (seen.append(n), advanced(bar, n))[1])
    comparison.compare_on(SCENES, TEST_SCENES, TINY, TOP1, methods=(method,), seeds=(0,))
    assert Bar.ended == pytest.approx(1)
    whole, masked = (clip_training.operations(TINY, name) for name in ("clip", "flip"))
    assert set(seen) == {32 * whole, 32 * (whole if method == "clip" else masked)}


def test_no_seed_is_begun_that_would_end_too_late(monkeypatch, capsys):
    world = World(monkeypatch, seconds=10)
    more = {"methods": ("flip", "glip"), "seeds": (0, 1, 2, 3, 4)}
    comparison.compare_on(SCENES, TEST_SCENES, TINY, TOP1, minutes=1, **more)
    assert len(world.ran) == 2 * 3
    assert "stopped after 3 of 5 seeds: the 1 minutes are over" in capsys.readouterr().out
    world.ran.clear()
    comparison.compare_on(SCENES, TEST_SCENES, TINY, TOP1, minutes=0.01, **more)
    assert len(world.ran) == 2 * 2, "two seeds at least"


def test_images_without_classes_are_scored_by_retrieval():
    without = CaptionedImages(SCENES.images[:40], SCENES.captions[:40])
    assert score_for(SCENES) is TOP1
    assert score_for(without) is MEAN_RECALL
    torch.manual_seed(0)
    model = clip_training.build_model(TINY)
    drop = gaussmask.RandomPatchDropout(0.5)
    gaussmask.attach(model.visual, drop)
    encoder = clip_training.make_encoder(model, TINY)
    recalls = retrieval(encoder, without)
    assert drop.keep_mask is None
    assert MEAN_RECALL.of(encoder, without) == pytest.approx(sum(recalls.values()) / 6)
    MEAN_RECALL.of(encoder, without, masked=True)
    assert drop.keep_mask.sum() == 32 * 40


@pytest.mark.parametrize("method", comparison.EVERY_METHOD)
def test_every_method_trains(method):
    config = clip_training.Config(**{**vars(TINY), "epochs": 0.5, "tuning_epochs": 0.25})
    advanced = []
    result, curve = clip_training.run(
        method, SCENES, TEST_SCENES, config, 0, advance=lambda *told: advanced.append(told)
    )
    assert advanced == [(32, False), (32, False), (32, True)]
    assert math.isfinite(result["after tuning"])
    assert list(curve["samples"]) == list(itertools.accumulate([32, 32, 32]))
