"""open_clip's training program with a drop of ours: it trains, resumes and runs on two processes as it does without."""

import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import processes
import pytest
import torch
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from open_clip_train import data
from open_clip_train import main as program
from PIL import Image

import gaussmask

PROGRAM = Path(__file__).parents[1] / "examples" / "open_clip_glip.py"
NUM_PAIRS = 12
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1, "patch_dropout": 0.25}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
SETTING = {
    "--model": "vit-toy", "--device": "cpu", "--precision": "fp32", "--workers": 0, "--batch-size": 6, "--warmup": 1,
    "--train-num-samples": NUM_PAIRS, "--epochs": 1, "--force-patch-dropout": 0.5,
    "--model-config": "vit-toy.json", "--train-data": "{0..1}.tar", "--name": "run",
}  # fmt: skip
KEEP_WHAT_A_RANK_DID = f"""
import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import open_clip_glip, torch
from open_clip_train import main as program
import gaussmask

train = program.train_one_epoch

def spy(model, *args, **options):
    train(model, *args, **options)
    kept = gaussmask.attached(model).keep_indices
    torch.save({{"kept": kept, "weights": model.state_dict()}}, f"rank{{os.environ['RANK']}}.pt")

program.train_one_epoch = spy
sys.exit(open_clip_glip.main(sys.argv[1:]))
"""


def _write_shard(path: Path, number: int, *, captions: bool = True) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(NUM_PAIRS):
            image = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * index, 80 * number, 99)).save(image, "JPEG")
            contents = {"jpg": image.getvalue(), **({"txt": b"colour %d" % index} if captions else {})}
            for extension, content in contents.items():
                member = tarfile.TarInfo(f"{number}{index:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with shards 0.tar and 1.tar and the config of a tiny model, in which the program is run."""
    for number in range(2):
        _write_shard(tmp_path / f"{number}.tar", number)
    (tmp_path / "vit-toy.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def _arguments(*more: str, **changes: object) -> list[str]:
    setting = {**SETTING, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
    return [str(part) for flag, value in setting.items() if value is not None for part in (flag, value)] + [*more]


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the program in this process and gives its exit code, or its last words; what it changed is undone."""

    def run(*more, **changes):
        with monkeypatch.context() as patch:
            names = ("create_model_and_transforms", "get_data", "parse_args", "pt_load", "train_one_epoch")
            places = [(program, name) for name in names]
            for place, name in [*places, (data, "tar_file_expander"), (torch.nn.parallel, "DistributedDataParallel")]:
                patch.setattr(place, name, getattr(place, name))
            for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
                patch.setattr(open_clip.factory, name, getattr(open_clip.factory, name).copy())
            patch.setattr(program, "setup_logging", lambda *_: None)  # it would log the rest of the session
            patch.setattr(sys, "argv", [str(PROGRAM), *_arguments(*more, **changes)])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(PROGRAM), run_name="__main__")
        return stopped.value.code

    return run


def _spy(monkeypatch):
    """The arguments of every epoch, to be looked at after it was trained."""
    train, epochs = program.train_one_epoch, []

    def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, teacher, args, tb_writer=None):
        train(model, data, loss, epoch, optimizer, scaler, scheduler, teacher, args, tb_writer)
        drop = gaussmask.attached(model)
        epochs.append({"epoch": epoch, "model": model, "teacher": teacher, "drop": drop, "kept": drop.keep_indices})

    monkeypatch.setattr(program, "train_one_epoch", train_one_epoch)
    return epochs


def _execute(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_trains_and_plain_open_clip_loads_the_checkpoint(folder, monkeypatch):
    _execute(PROGRAM, *_arguments(epochs=2, val_data="0.tar", sigma=0.3, log_every_n_steps=1))
    log = (folder / "logs/run/out.log").read_text()
    assert log.count("Train Epoch") == 2 * 2  # of two batches
    assert "GaussianPatchDropout(mask_ratio=0.5, sigma=0.3" in log
    assert "sigma: 0.3" in (folder / "logs/run/params.txt").read_text().splitlines()
    metrics = [json.loads(line) for line in (folder / "logs/run/checkpoints/results.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["num_samples"]) for row in metrics] == [(1, NUM_PAIRS), (2, NUM_PAIRS)]

    for name in [name for name in sys.modules if name.partition(".")[0] == "gaussmask"]:
        monkeypatch.setitem(sys.modules, name, None)  # nothing of it can be imported
    checkpoint = folder / "logs/run/checkpoints/epoch_2.pt"
    weights = torch.load(checkpoint)["state_dict"]
    config = json.loads((folder / "vit-toy.json").read_text())
    model = open_clip.CLIP(**config)
    open_clip.load_checkpoint(model, checkpoint)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_two_processes_draw_different_masks_and_keep_equal_weights(folder):
    (folder / "spy.py").write_text(KEEP_WHAT_A_RANK_DID)
    processes.run("spy.py", *_arguments(), processes=2)
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["kept"].shape == ranks[1]["kept"].shape == (6, 8)
    assert not torch.equal(ranks[0]["kept"].sort().values, ranks[1]["kept"].sort().values)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name


@pytest.mark.parametrize(
    ("changes", "drop_class", "num_kept"),
    [
        ({"sigma": 0.1, "sampling": "weighted"}, gaussmask.GaussianPatchDropout, 8),
        ({"patch_dropout_method": "flip"}, gaussmask.RandomPatchDropout, 8),
        ({"force_patch_dropout": 0.75}, gaussmask.GaussianPatchDropout, 4),
    ],
)
def test_our_drop_masks_in_place_of_open_clips(run, monkeypatch, changes, drop_class, num_kept):
    epochs = _spy(monkeypatch)
    assert run(**changes) is None
    (epoch,) = epochs
    assert type(epoch["drop"]) is drop_class
    assert epoch["kept"].shape == (6, num_kept)
    assert not any(isinstance(module, OpenClipPatchDropout) for module in epoch["model"].modules())
    if "sigma" in changes:
        assert (epoch["drop"].sigma, epoch["drop"].sampling) == (0.1, "weighted")


@pytest.mark.parametrize(("stage", "num_embedded"), [("tokens", 6), ("pixels", 1)])  # pixels: of a blank image only
def test_the_stage_is_that_of_the_command(run, monkeypatch, stage, num_embedded):
    epochs, embedded = _spy(monkeypatch), set()
    convolve = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: embedded.add(len(x)) or convolve(self, x))
    assert run(stage=stage) is None
    assert embedded == {num_embedded}
    assert epochs[0]["kept"].shape == (6, 8)


def test_a_ratio_of_0_is_the_unmasked_tuning(run, monkeypatch):
    epochs = _spy(monkeypatch)
    assert run(force_patch_dropout=0) is None
    assert epochs[0]["kept"] is None
    assert not any(isinstance(module, OpenClipPatchDropout) for module in epochs[0]["model"].modules())


def test_the_teacher_of_a_distillation_is_left_alone(run, folder, monkeypatch):
    teacher = open_clip.CLIP(**json.loads((folder / "vit-toy.json").read_text()))
    torch.save(teacher.state_dict(), "teacher.pt")
    epochs = _spy(monkeypatch)
    assert run(distill_model="vit-toy", distill_pretrained="teacher.pt") is None
    assert epochs[0]["kept"].shape == (6, 8)
    assert gaussmask.attached(epochs[0]["teacher"]) is None
    assert isinstance(epochs[0]["teacher"].visual.patch_dropout, OpenClipPatchDropout)


def test_a_run_resumes_where_it_stopped_and_masks_again(run, folder, monkeypatch):
    epochs = _spy(monkeypatch)
    assert run(epochs=2) is None
    whole = torch.load("logs/run/checkpoints/epoch_2.pt")
    Path("logs/run/checkpoints/epoch_2.pt").unlink()  # killed in its second epoch
    assert run(epochs=2, resume="latest") is None
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 1]
    assert epochs[2]["kept"].shape == (6, 8)
    resumed = torch.load("logs/run/checkpoints/epoch_2.pt")
    assert resumed["epoch"] == whole["epoch"] == 2
    steps = [checkpoint["optimizer"]["state"][0]["step"] for checkpoint in (whole, resumed)]
    assert steps == [4, 4]


def test_a_name_that_is_taken_is_an_exit_code_as_in_open_clip(run, folder):
    (folder / "logs/run").mkdir(parents=True)
    (folder / "logs/run/out.log").touch()
    assert run() == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"force_patch_dropout": 1.5}, "mask_ratio must lie in [0, 1), got 1.5"),
        ({"force_patch_dropout": None}, "--force-patch-dropout is missing"),
        ({"sigma": -1}, "sigma must be positive"),
        ({"sampling": "often"}, "sampling must be one of"),
        ({"stage": "words"}, "stage must be one of"),
        ({"model": "vit-boy"}, "unknown model 'vit-boy'"),
        ({"model": "RN50"}, "ModifiedResNet cannot be masked"),
        ({"train_data": None}, "--train-data is missing"),
        ({"train_data": "{1..2}.tar"}, "no such shard: 2.tar"),
        ({"train_data": "{0..1}.tar::empty.tar"}, "no image with a caption (KEY.jpg and KEY.txt) in empty.tar"),
        ({"train_data": "mute.tar"}, "no image with a caption (KEY.jpg and KEY.txt) in mute.tar"),
        ({"val_data": "empty.tar"}, "no image with a caption (KEY.jpg and KEY.txt) in empty.tar"),
        ({"train_data": "0.tar.gz"}, "Tried to figure out dataset type"),
        ({"train_data": "pairs.csv"}, "[Errno 2]"),
        ({"train_num_samples": None}, "Currently, the number of dataset samples must be specified"),
        ({"workers": 3}, "number of shards must be >= total workers"),
        ({"batch_size": 100}, "nothing was trained"),
        ({"resume": "none.pt"}, "[Errno 2]"),
        ({"pretrained": "none.pt"}, "Pretrained value 'none.pt' is not"),
    ],
)
def test_wrong_arguments_are_one_line(run, changes, message):
    with tarfile.open("empty.tar", "w"):
        pass
    _write_shard(Path("mute.tar"), 3, captions=False)
    words = run(**changes)
    assert words.startswith(f"open_clip_glip.py: {message}")  # which goes to stderr with exit code 1
    assert "\n" not in words
    assert not list(Path().rglob("epoch_*.pt"))


@pytest.mark.parametrize("flag", ["--torchscript", "--trace"])
def test_models_that_cannot_draw_are_refused(run, flag):
    assert flag in run(flag)


def test_help_shows_our_flags_and_open_clips(run, capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--sigma", "--sampling", "--stage", "--train-data", "--force-patch-dropout"))


def test_errors_of_the_training_keep_their_traceback(run, monkeypatch):
    def train_one_epoch(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(program, "train_one_epoch", train_one_epoch)
    with pytest.raises(RuntimeError, match="a bug"):
        run()
