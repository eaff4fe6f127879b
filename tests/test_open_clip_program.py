"""The two programs side by side: both run with the drop on, and the figures are those of their logs."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import open_clip_program as side_by_side
import report
from clip_shards import expand
from open_clip_program import OURS, THEIRS, Config, Job, main
from user_errors import UserError

SMALL = side_by_side.EXAMPLES / "small_clip.json"
JOB = Job(
    model=str(SMALL), batch_size=4, steps=4, log_every=2, workers=1, threads=1, precision="fp32", seed=0, device="cpu"
)  # fmt: skip
TINY = Config(device="cpu", precision="fp32", ratios=(0.5,), rounds=2, photos=2, photo_size=16)
THEIR_LOG = """\
2026-11-27,07:01:54 | INFO | Patches in the blocks: 16
2026-11-27,07:01:55 | INFO | Train Epoch: 0 [ 4/24 (17%)] Data (t): 0.396 Batch (t): 1.470, 2.72030/s, 2.72030/s/gpu \
LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 1.6921 (1.6921) Loss: 1.6921 (1.6921)
2026-11-27,07:01:57 | INFO | Train Epoch: 0 [12/24 (50%)] Data (t): 0.046 Batch (t): 0.670, 5.78056/s, 5.78056/s/gpu \
LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 1.3853 (1.5387) Loss: 1.3853 (1.5387)
2026-11-27,07:01:57 | INFO | Train Epoch: 0 [20/24 (83%)] Data (t): 0.006 Batch (t): 0.429, 8.62357/s, 8.62357/s/gpu \
LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 1.4547 (1.5107) Loss: 1.4547 (1.5107)
2026-11-27,07:01:58 | INFO | Train Epoch: 0 [24/24 (100%)] Data (t): 0.007 Batch (t): 0.394, 10.1608/s, 10.1608/s/gpu \
LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 1.5054 (1.5094) Loss: 1.5054 (1.5094)
"""


def our_log(patches="16/64"):
    """Of three windows of two steps, with 4, 8 and 16 images per second, and one of a step, with 100; each is of 4."""
    speeds = {2: 4.0, 4: 8.0, 6: 16.0, 7: 100.0}
    records = [{"step": step, "images_per_second": speed, "patches": patches} for step, speed in speeds.items()]
    return "\n".join(map(json.dumps, [*records, {"step": 7, "zero_shot": 0.5}])) + "\n"


def write(file, text):
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")


def program(text, file):
    """A command that only leaves a log."""
    code = "import pathlib, sys; file = pathlib.Path(sys.argv[1]); file.parent.mkdir(); file.write_text(sys.argv[2])"
    return [sys.executable, "-c", code, str(file), text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a quick run leaves behind."""
    output = tmp_path_factory.mktemp("side by side")
    main(Config(quick=True, device="cpu", precision="fp32", output=output))
    return output


@pytest.mark.thorough("test_train_clip.py and test_open_clip_glip.py start each of the two")
def test_both_programs_train_on_a_quarter_of_the_patches(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [(run["round"], run["mask_ratio"], run["program"]) for run in results["runs"]] == [
        (1, 0.75, THEIRS), (1, 0.75, OURS),
    ]  # fmt: skip
    for run in results["runs"]:
        assert run["patches"] == 16  # of 64, in the blocks
        assert [window[:2] for window in run["windows"]] == [[2, 3], [3, 4]]
        assert run["images_per_s"] == pytest.approx(2 * 4 / sum(window[2] for window in run["windows"]), rel=0.01)
    (row,) = results["rows"]
    ours, theirs = (next(run for run in results["runs"] if run["program"] == name) for name in (OURS, THEIRS))
    assert row["speed_up"] == pytest.approx(ours["images_per_s"] / theirs["images_per_s"])
    assert set(results) >= {"machine", "versions", "date", "command", "seed", "git", "config", "dtype"}
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert f"| ratio | patches | {THEIRS}, images/s | {OURS}, images/s | times as fast |" in table
    assert "\n| 0.75 | 16 | " in table


def test_their_window_takes_its_mean_and_not_its_last_step(tmp_path):
    write(tmp_path / THEIRS / "out.log", THEIR_LOG)
    windows, patches = side_by_side.read_their_log(tmp_path, JOB)
    assert [window[:2] for window in windows] == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert [window.seconds for window in windows] == pytest.approx([1.470, 2 * 0.670, 2 * 0.429, 0.394])
    assert patches == 16


@pytest.mark.parametrize(("said", "patches"), [("16/64", 16), ("all", 64)])
def test_our_windows_and_patches(tmp_path, said, patches):
    write(tmp_path / OURS / "metrics.jsonl", our_log(said))
    assert side_by_side.read_our_log(tmp_path, JOB) == (
        [(0, 2, 2.0), (2, 4, 1.0), (4, 6, 0.5), (6, 7, 0.04)], patches,
    )  # fmt: skip


def test_the_first_steps_and_those_behind_do_not_count(monkeypatch):
    monkeypatch.setattr(
        side_by_side, "our_command", lambda _, folder: program(our_log(), folder / OURS / "metrics.jsonl")
    )
    monkeypatch.setattr(
        side_by_side, "their_command", lambda _, folder: program(THEIR_LOG, folder / THEIRS / "out.log")
    )
    job = replace(JOB, workers=0)
    ours = side_by_side.measure(OURS, job)
    assert ours == {"images_per_s": 4 * 4 / 1.5, "patches": 16, "windows": [[2, 4, 1.0], [4, 6, 0.5]]}
    theirs = side_by_side.measure(THEIRS, replace(job, steps=2))
    assert theirs == {"images_per_s": pytest.approx(4 / 0.429), "patches": 16, "windows": [[3, 5, 0.858]]}


@pytest.mark.parametrize(("workers", "log_every", "steps"), [(0, 5, 20), (1, 5, 20), (2, 1, 3), (16, 5, 20), (3, 4, 8)])
def test_enough_steps_for_both_logs_and_all_workers(workers, log_every, steps):
    job = replace(JOB, workers=workers, log_every=log_every, steps=steps)
    assert job.warm_up >= 2 * workers
    assert job.warm_up % log_every == 0
    assert job.all_steps % max(1, workers) == 0
    assert job.all_steps >= job.warm_up + steps + 1 + 2 * workers  # the last of open_clip's windows ends one step later


def test_rounds_take_turns_at_being_first():
    turns = list(side_by_side.turns(3, (0.0, 0.5)))
    assert turns[:4] == [(1, 0.0, THEIRS), (1, 0.0, OURS), (1, 0.5, THEIRS), (1, 0.5, OURS)]
    assert [turn[2] for turn in turns[::2]] == [THEIRS, THEIRS, OURS, OURS, THEIRS, THEIRS]
    assert len(set(turns)) == 12


def test_ratios_are_formed_within_rounds():
    speeds = {OURS: (30, 11, 90), THEIRS: (20, 10, 45)}  # 1.5, 1.1 and 2 times; a machine that has its moods
    runs = [
        {"round": number, "mask_ratio": 0.5, "program": program, "images_per_s": speed, "patches": 32}
        for program, all_speeds in speeds.items()
        for number, speed in enumerate(all_speeds, 1)
    ]
    unpaired = {"round": 4, "mask_ratio": 0.5, "program": OURS, "images_per_s": 1000, "patches": 32}
    (row,) = side_by_side.summarize([*runs, unpaired], JOB)
    assert (row["rounds"], row["speed_up"], row["images_per_s"], row["baseline_images_per_s"]) == (3, 1.5, 30, 20)
    assert (row["speed_up_q25"], row["speed_up_q75"]) == pytest.approx((1.3, 1.75))
    assert (row["images_per_s_min"], row["images_per_s_max"]) == (11, 90)


def test_an_interrupted_command_keeps_what_it_measured(tmp_path, monkeypatch):
    def measure(program, job):
        saved = tmp_path / "results.json"
        if saved.exists() and len(json.loads(saved.read_text(encoding="utf-8"))["runs"]) == 3:
            raise KeyboardInterrupt
        return {"images_per_s": 12.0 if program == OURS else 10.0, "patches": 32, "windows": []}

    monkeypatch.setattr(side_by_side, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(replace(TINY, output=tmp_path))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [run["program"] for run in results["runs"]] == [THEIRS, OURS, OURS]
    assert [(row["rounds"], row["speed_up"]) for row in results["rows"]] == [(1, 1.2)]
    assert "| 0.5 | 32 | 10 (10–10) | 12 (12–12) | 1.20× |" in report.text(results)


def test_a_program_that_fails_is_a_line_and_the_other_is_measured(tmp_path, monkeypatch, capsys):
    broken = [sys.executable, "-c", "raise MemoryError('no room')"]
    monkeypatch.setattr(side_by_side, "their_command", lambda *_: broken)
    monkeypatch.setattr(
        side_by_side, "our_command", lambda job, folder: program(our_log(), folder / OURS / "metrics.jsonl")
    )
    main(replace(TINY, steps=2, log_every=2, workers=0, batch_size=4, output=tmp_path))
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (
        "Not measured:\n\n- program, small_clip, 0.5, eager, open_clip_train: exit code 1: MemoryError: no room\n"
        in text
    )
    assert "not measured: program, small_clip, 0.5, eager, open_clip_train" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert ["images_per_s" in run for run in results["runs"]] == [False, True, True, False]


def test_what_stands_behind_an_error_is_not_taken_for_it():
    trace = "Traceback (most recent call last):\nKeyError: 'fname'\nI1127 06:40 torch: cache_hits: 0\n"
    assert side_by_side.last_words(trace) == "KeyError: 'fname'"
    assert side_by_side.last_words("train_clip.py: no shard\n\n") == "train_clip.py: no shard"
    assert side_by_side.last_words("") == "without a word"


def test_stand_ins_are_pairs_with_as_many_bytes_as_photos_have(tmp_path):
    shards = expand(side_by_side.write_photos(tmp_path, Config(photos=20, photo_size=256)))
    assert len(shards) == 10
    pairs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(pairs) == 20
    for pair in pairs:
        assert Image.open(io.BytesIO(pair["jpg"])).size == (256, 256)
        assert 0.15 < len(pair["jpg"]) / 256**2 < 0.5
        assert len(pair["txt"].split()) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.5, 1.0)}, "ratios must lie in [0, 1), got 0.5 1.0"),
        ({"ratios": ()}, "ratios must lie in [0, 1), got none"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"steps": 7}, "steps must be a multiple of log_every=5, got 7"),
        ({"model": "ViT-C-16"}, "unknown model 'ViT-C-16'"),
        ({"model": "RN50"}, "the image tower of RN50 is no ViT of open_clip's own"),
        ({"model": "ViT-B-16-SigLIP"}, "the image tower of ViT-B-16-SigLIP is no ViT of open_clip's own"),
        ({"model": "none.json"}, "[Errno 2]"),
        ({"train_data": "none.tar"}, "there is no shard none.tar"),
        (
            {"train_data": str(SMALL), "workers": 2},
            "open_clip_train needs a shard for each of 2 workers, and there are 1",
        ),
        ({"workers": 3}, "open_clip_train needs a shard for each of 3 workers, and there are 2"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError) as raised:
        main(replace(TINY, output=tmp_path / "none", **changes))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()
