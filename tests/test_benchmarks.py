"""The benchmarks run, compare like with like, and report what they measured. Nothing here looks at a time."""

import functools
import itertools
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import report
from measure.arithmetic import Tower, clip_ceiling
from measure.memory import peak_mib
from measure.precision import choose_dtype
from measure.timing import Contender, HostClock, interleave, summarize
from part import clip as part_clip
from part import layer as part_layer
from part import loader as part_loader
from part import overhead as part_overhead
from part import sizes
from part import step as part_step
from part.groups import Group, run_group
from run import Config, main

from gaussmask.functional import num_kept_patches

BENCHMARKS = Path(report.__file__).parent
STAGES = ("tokens", "pixels")
GROUP = ["part", "model", "dtype", "mask_ratio", "mode", "pass"]
MASKED = {f"gaussmask {stage}" for stage in STAGES}
CONTENDERS = {
    "layer": set(part_layer.layers(0.5, 4)),
    "overhead": set(part_overhead.models(0.5, STAGES)),
    "step": {"unmasked", "timm patch_drop_rate", "ideal"} | MASKED,
    "clip": {"no mask"} | MASKED,
    "loader": set(part_loader.loaders(16)),
}
EVERY_LOADER = {"read", "tokenize"}  # passes of part loader that are the same for all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a quick run leaves behind."""
    output = tmp_path_factory.mktemp("benchmarks")
    main(Config(quick=True, output=output, device="cpu"))
    return output


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_run_leaves_the_figures_the_tables_and_the_plots(folder, results):
    left = {path.name for path in folder.iterdir()}
    assert left == {"results.json", "results.md", "layer.png", "step.png", "clip.png"}
    assert set(results) >= {"machine", "versions", "date", "command", "seed", "git", "config", "dtype", "rows"}
    figures = [value for row in results["rows"] for value in row.values() if isinstance(value, int | float)]
    assert all(math.isfinite(figure) for figure in figures)
    assert (folder / "results.md").read_text(encoding="utf-8").count("gaussmask tokens") > 0


def test_every_contender_is_in_every_group(results):
    def key(row):
        return [str(row[name]) for name in GROUP]

    groups = {tuple(k): list(rows) for k, rows in itertools.groupby(sorted(results["rows"], key=key), key=key)}
    assert {name[0] for name in groups} == set(CONTENDERS)
    assert {name[5] for name in groups if name[0] == "loader"} == {*part_loader.STAGES, "whole"}
    for name, rows in groups.items():
        expected = {part_loader.ANYONE} if name[5] in EVERY_LOADER else CONTENDERS[name[0]]
        expected = expected | ({part_loader.DEVICE} if name[5] == part_loader.WHOLE else set())
        assert {row["contender"] for row in rows} == expected
        assert len(rows) == len(expected)
        own = {row["contender"]: row for row in rows}
        assert {own[row["reference"]][f"ratio{end}"] for row in rows for end in ("", "_q25", "_q75")} == {1}
        assert {own[row["baseline"]]["speed_up"] for row in rows} == {1}
        for row in rows:
            assert 0 < row["ms_q25"] <= row["ms"] <= row["ms_q75"]
            assert row["rounds"] == 2
            assert row["peak_mib"] > 0 or name[0] == "loader"  # PIL's memory is not torch's


def test_texts_go_between_the_markers_of_a_page_and_nowhere_else(results):
    page = "# Page\n\n<!-- results: cpu -->\nold\n<!-- end -->\n\n<!-- results: cuda -->\nkept\n<!-- end -->\nbehind\n"
    filled = report.fill(page, {"cpu": report.text(results), "other": "nowhere"})
    assert filled == page.replace("\nold\n", f"\n\n{report.text(results)}\n\n")
    assert report.fill(filled, {"cpu": report.text(results)}) == filled
    contenders = set().union(*CONTENDERS.values())
    assert all(f"| {contender} |" in filled for contender in contenders)


def test_the_pages_show_the_figures_that_lie_in_the_repository():
    texts = report.committed()
    assert texts
    pages = [(folder / "README.md").read_text(encoding="utf-8") for folder in (BENCHMARKS, BENCHMARKS.parent)]
    pages.append((BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8"))
    for page in pages:
        assert page == report.fill(page, texts), (
            "run `python benchmarks/report.py --pages benchmarks/README.md README.md docs/performance.md`"
        )
    named = [name for name in texts if not name.endswith("-summary")]
    assert all(f"<!-- results: {name} -->" in pages[0] for name in named)
    assert "<!-- results: h200-step-summary -->" in pages[2]


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9, 0.918])
def test_the_layers_do_the_same_job(mask_ratio):
    x = torch.randn(3, 1 + 100, 8)
    kept = {num_kept_patches(100, mask_ratio), int(100 * (1 - mask_ratio))}  # timm and open_clip round down
    for name, layer in part_layer.layers(mask_ratio, 100).items():
        out = layer.train()(x)
        assert out.shape[::2] == (3, 8)
        assert out.shape[1] - 1 in kept, name
        torch.testing.assert_close(out[:, 0], x[:, 0], rtol=0, atol=0)
        same = (out[:, :, None] == x[:, None]).all(-1)
        assert (same.sum(2) == 1).all(), name  # each a row of x, of its own image
        assert same.sum(1).max() == 1, name  # and none twice


def test_the_loaders_do_the_same_job_and_every_stage_its_part_of_it():
    """The crops of open_clip's transform, of stand-ins that are photos; tokens and images of the whole shard."""
    shards = part_loader.stand_ins(80, 60, 6)
    samples = part_loader.pairs(shards, 6)
    assert len({sample.image for sample in samples}) == 6
    assert len(part_loader.pairs(shards, 15)) == 15  # from the beginning again
    found = {}
    for name, loader in part_loader.loaders(16).items():
        stages = part_loader.calls(loader, shards, samples, open_clip.SimpleTokenizer(), "cpu")
        decoded = {np.asarray(parts[0]).size // 3 for parts in map(loader.open, [sample.image for sample in samples])}
        assert (max(decoded) < 80 * 60) if name == "reduced" else (decoded == {80 * 60})
        torch.manual_seed(0)
        crops = [loader(sample.image) for sample in samples]
        shared = part_loader.hand_over(crops, [16, 16])
        assert shared.is_shared()
        found[name] = loader.on("cpu", shared)
        assert found[name].dtype == torch.float32
        assert stages["whole"]().shape == (6, 3, 16, 16)
        assert len(stages["crop"]()) == len(stages["tokenize"]()) == len(stages["read"]()) == 6
    before, full, reduced = found.values()
    torch.testing.assert_close(full, before, rtol=0, atol=0.06)
    assert 0 < (reduced - before).abs().mean() < 0.3


def test_the_numbers_of_workers_are_those_of_the_model_and_the_loader():
    keys = {"part": "loader", "model": "500 x 375 px", "mode": "m", "pass": "whole", "mask_ratio": 0.0}
    keys |= {"baseline": "a", "reference": "b"}
    speeds = {"a": 200.0, "b": 450.0, "c": 1000.0}
    loaders = [keys | {"contender": name, "images_per_s": speed} for name, speed in speeds.items()]
    clip = {"part": "clip", "mask_ratio": 0.75, "contender": "gaussmask pixels", "images_per_s": 901.0}
    for results in ({"rows": [*loaders, clip]}, {"rows": loaders, "beside": {"rows": [clip]}}):
        table = report.workers_table(report.pd.DataFrame(loaders), report.trainers(results))
        assert table.splitlines()[-1] == "| 0.75 | gaussmask pixels | 901 | 5 | 3 |"


def test_a_run_takes_the_photos_and_the_model_of_the_user(tmp_path, results):
    (tmp_path / "other.json").write_text(json.dumps(results), encoding="utf-8")
    changes = {"photos": part_loader.stand_ins(40, 50, 3)[0], "beside": tmp_path / "other.json"}
    main(Config(quick=True, output=tmp_path, device="cpu", dtype="float32", parts=("loader",), **changes))
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "Photos of one's own, crops of 16 px, one core, ms per image:" in text
    assert "| 0.918 | gaussmask pixels |" in text


def test_a_group_on_one_core_does_not_count_what_it_waits_and_leaves_the_threads_as_they_were():
    def work_and_wait():
        until = time.process_time() + 0.002
        while time.process_time() < until:
            pass
        time.sleep(0.006)

    waiting = [Contender(name, work_and_wait, 1) for name in ("ideal", "unmasked")]
    rows = run_group(replace(group_of(*waiting), one_core=True), device="cpu", seed=0, advance=lambda _: None)
    assert all(2 <= row["ms"] < 6 for row in rows)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        names = ("ideal", "unmasked")
        contenders = [Contender(name, lambda: seen.append(torch.get_num_threads()), 1) for name in names]
        run_group(replace(group_of(*contenders), one_core=True), device="cpu", seed=0, advance=lambda _: None)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mask_ratio", [0.5, 0.918])
def test_the_blocks_of_the_ideal_get_as_many_tokens_as_masked_ones(mask_ratio):
    seen = {}
    for name, job in part_step.jobs(sizes.QUICK.step[0], mask_ratio, STAGES, "cpu").items():
        vit = getattr(job.model, "vit", job.model)
        vit.blocks[0].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape}))
        part_step.training_step(job, dtype=torch.float32, compiled=False)()
        assert job.inputs.grad is None
        assert all(p.grad is None for p in job.model.parameters())
    whole, masked = (4, 17, 32), (4, 1 + num_kept_patches(16, mask_ratio), 32)
    assert seen.pop("unmasked") == whole
    assert seen.keys() == CONTENDERS["step"] - {"unmasked"}
    assert set(seen.values()) == {masked}
    without = part_step.jobs(sizes.QUICK.step[0], mask_ratio, STAGES, "cpu", unmasked=False)
    assert without.keys() == CONTENDERS["step"] - {"unmasked"}


def test_a_compiled_step_trains(monkeypatch):
    """As far as the tracing goes; the compiler behind it takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    for job in part_step.jobs(sizes.QUICK.step[0], 0.5, STAGES, "cpu").values():
        weight = getattr(job.model, "vit", job.model).head.weight
        before = weight.detach().clone()
        part_step.training_step(job, dtype=torch.float32, compiled=True)()
        assert not torch.equal(weight, before)


class Hours:
    """Contenders whose calls take as long as they are told, in a world that gets slower from round to round."""

    def __init__(self):
        self.now, self.order, self.slowness = 0.0, [], 1.0

    def contender(self, name, seconds, batch=1):
        def call():
            self.order.append(name)
            self.now += seconds * self.slowness

        return Contender(name, call, batch)

    def slow_down(self):
        self.slowness *= 2


def test_rounds_rotate_and_ratios_are_formed_within_them():
    world = Hours()
    contenders = [world.contender("a", 1), world.contender("b", 3), world.contender("c", 2, batch=4)]
    after = itertools.count(1)
    samples = interleave(
        contenders, [1, 1, 2], 4, HostClock(lambda: world.now), lambda: next(after) % 3 or world.slow_down()
    )
    assert "".join(world.order) == "abcc" + "bcca" + "ccab" + "abcc"
    assert samples["a"].tolist() == [1000, 2000, 4000, 8000]
    rows = {row["contender"]: row for row in summarize(samples, contenders, reference="a", baseline="b")}
    assert {rows["a"][f"ratio{end}"] for end in ("", "_q25", "_q75")} == {1}
    assert {rows["b"][f"ratio{end}"] for end in ("", "_q25", "_q75")} == {3}
    assert rows["c"]["ratio"] == 0.5
    assert rows["c"]["speed_up"] == 6
    assert rows["c"]["rounds"] == 4
    assert rows["b"]["ms"] == 9000
    assert rows["c"]["images_per_s"] == 4 / 6


def test_peak_memory_of_a_known_pattern():
    lay_there = [torch.empty(2**20)]

    def allocate():
        first = torch.empty(10 * 2**18)
        second = torch.empty(20 * 2**18)
        del first
        third = torch.empty(15 * 2**18)
        return second, third

    assert peak_mib(allocate, "cpu") == pytest.approx(35, abs=0.01)
    assert peak_mib(allocate, "cpu") == pytest.approx(35, abs=0.01)  # what came before does not count
    assert peak_mib(lambda: lay_there, "cpu") == 0


def test_peak_memory_counts_a_backward():
    x = torch.randn(2**18, requires_grad=True)  # 1 MiB

    def square():
        torch.autograd.grad(x.exp().sum(), x)

    assert peak_mib(square, "cpu") == pytest.approx(2, abs=0.01)  # what exp saves, and the gradient


def test_the_ceiling_is_that_of_the_arithmetic():
    with torch.device("meta"):
        image, text = part_clip.CLIP(sizes.CPU).towers
    assert (image, text) == (Tower(197, 768, 12, 196, 768), Tower(77, 512, 12))
    dropped = [196 - num_kept_patches(196, ratio) for ratio in (0.5, 0.75, 0.918)]
    tokens, pixels = ([clip_ceiling(image, text, dropped=n, stage=stage) for n in dropped] for stage in STAGES)
    assert [round(ceiling, 2) for ceiling in tokens] == [1.76, 2.78, 4.52]
    assert all(above < ceiling < 1.03 * above for above, ceiling in zip(tokens, pixels, strict=True))


def test_short_captions_raise_the_ceiling_and_are_contenders_of_their_own():
    """Of a text tower of 4 instead of 8 tokens: (image + text) / (masked image + short text), by the arithmetic."""
    image, text = Tower(17, 32, 2, 16, 768), Tower(8, 32, 1)
    short = clip_ceiling(image, text, dropped=8, stage="tokens", caption_tokens=4)
    whole = clip_ceiling(image, text, dropped=8, stage="tokens")
    per_token = [24 * n * 32**2 + 4 * n**2 * 32 for n in (8, 4)]
    both = image.flops + text.flops
    assert both / short == pytest.approx(both / whole - per_token[0] + per_token[1])
    options = {"device": "cpu", "dtype": torch.float32, "budget_mib": 5, "rounds": 1}
    (group,) = part_clip.groups(sizes.QUICK, ratios=(0.5,), stages=("pixels",), caption_tokens=(8, 4), **options)
    rows = {row["contender"]: row for row in run_group(group, device="cpu", seed=0, advance=lambda seconds: None)}
    assert list(rows) == ["no mask", "gaussmask pixels", "gaussmask pixels, 4 caption tokens"]
    assert [row["caption_tokens"] for row in rows.values()] == [8, 8, 4]
    ceilings = [row["ceiling"] for row in rows.values()]
    assert 1 == ceilings[0] < ceilings[1] < ceilings[2]


@pytest.mark.parametrize(("gradients", "budget"), [(10, 1000), (400, 1000), (10, 24)])
def test_the_largest_batch_fills_the_budget_and_no_more(gradients, budget):
    asked = []

    def peak(batch):
        asked.append(batch)
        return max(gradients + batch, 7 * batch)  # gradients outweigh the activations of a small batch

    batch = part_clip.largest_batch(peak, budget)
    assert peak(batch) <= budget < peak(math.ceil(1.02 * batch) + 1)
    assert all(after <= 2 * before for before, after in itertools.pairwise(asked[1:]))
    with pytest.raises(ValueError, match="batch 2"):
        part_clip.largest_batch(peak, 9)


def test_a_batch_that_does_not_fit_after_all_is_made_smaller():
    """By 3 % at a time, whatever the measured peaks say; a batch of 2 that does not fit is an error."""

    def peak(batch, fits=480):
        if batch > fits:
            raise torch.OutOfMemoryError(f"batch {batch}")
        return max(10 + batch, 7 * batch)

    batch = part_clip.largest_batch(peak, 7 * 1000)
    assert 0.96 * 480 <= batch <= 480
    assert part_clip.in_memory(500, peak) == (batch := 470, peak(batch))
    assert part_clip.in_memory(3, peak) == (3, 21)
    with pytest.raises(torch.OutOfMemoryError, match="batch 2"):
        part_clip.in_memory(9, functools.partial(peak, fits=1))


def group_of(*contenders):
    keys = {
        "part": "step",
        "model": "m",
        "dtype": "float32",
        "mask_ratio": 0.5,
        "mode": "eager",
        "pass": "training step",
    }
    return Group(keys, lambda: contenders, "ideal", "unmasked", rounds=2, round_seconds=0.01)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory: 5 GiB\nand much advice")


def test_a_contender_that_fails_is_a_row_and_the_others_are_measured():
    names = ("ideal", "unmasked", "timm", "pixels")
    rows = run_group(
        group_of(*(Contender(name, out_of_memory if name == "timm" else list, 1) for name in names)),
        device="cpu", seed=0, advance=lambda _: None,
    )  # fmt: skip
    assert {row["contender"]: row.get("failed") for row in rows} == {
        "ideal": None, "unmasked": None, "pixels": None, "timm": "OutOfMemoryError: CUDA out of memory: 5 GiB",
    }  # fmt: skip
    assert all(row["ms"] > 0 for row in rows if "failed" not in row)


@pytest.mark.parametrize("broken", ["ideal", "unmasked"])
def test_without_what_it_is_compared_with_a_group_fails_and_says_so(broken):
    contenders = [Contender(name, out_of_memory if name == broken else list, 1) for name in ("ideal", "unmasked")]
    rows = run_group(group_of(*contenders), device="cpu", seed=0, advance=lambda _: None)
    assert [row["contender"] for row in rows] == ["ideal", "unmasked"]
    assert all("OutOfMemoryError" in row["failed"] for row in rows)


def test_a_group_that_cannot_be_built_is_a_row():
    group = replace(group_of(), build=out_of_memory)
    (row,) = run_group(group, device="cpu", seed=0, advance=lambda _: None)
    assert row["contender"] == "every contender"
    assert row["failed"] == "OutOfMemoryError: CUDA out of memory: 5 GiB"


def test_what_fails_and_what_the_time_does_not_suffice_for_is_in_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(part_step, "training_step", lambda *args, **kwargs: out_of_memory)
    main(Config(quick=True, output=tmp_path, device="cpu", dtype="float32", parts=("step", "overhead")))
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.index("what is added to a forward") < text.index("Not measured:\n\n- step, vit_tiny_patch16_224")
    assert "gaussmask pixels: RuntimeError: unmasked, which the others are compared with: OutOfMemoryError" in text
    main(Config(quick=True, output=tmp_path, device="cpu", dtype="float32", parts=("step", "overhead"), minutes=0))
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    for part, what in (("step vit_tiny_patch16_224", "training step"), ("overhead ViT of one block", "forward")):
        assert all(f"- {part} float32 {ratio} eager {what}: the time was over\n" in text for ratio in (0.5, 0.918))
    assert len(text.partition("Not measured:\n\n")[2].splitlines()) == 4


@pytest.mark.parametrize(("figure", "said"), [(2343.7, "2,344"), (110.0, "110"), (1.0712, "1.07"), (26.04, "26")])
def test_figures_are_as_a_person_says_them(figure, said):
    assert report.plain(figure) == said


def test_no_page_has_a_power_of_ten():
    assert not [text for text in report.committed().values() if re.search(r"\de[+-]\d\d", text)]


def test_the_dtype_comes_with_its_reason():
    assert choose_dtype("bfloat16", "cpu") == (torch.bfloat16, "as asked for")
    dtype, reason = choose_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16)
    assert "times as long as in float32" in reason


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="'layers'"):
        Config(parts=("layers",))
