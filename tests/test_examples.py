"""The examples: their data, their training loop, the command and the notebook, at small sizes and without a network."""

import io
import json
import math
import re
import runpy
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import clip_comparison
import clip_data
import clip_training
import compare_methods
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from captioned_scenes import CLASSNAMES, make_scenes
from clip_evaluation import zero_shot
from nbclient import NotebookClient
from PIL import Image
from sklearn.metrics import recall_score
from user_errors import UserError

import gaussmask

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = clip_training.Config(
    width=64, depth=1, text_depth=1, batch_size=32, epochs=1, tuning_epochs=0.5, precision="fp32", device="cpu"
)
SCENES = clip_data.load_scenes(128, seed=0)
TEST_SCENES = clip_data.load_scenes(40, seed=1)


class TestScenes:
    def test_the_same_seed_draws_the_same_scenes_and_another_seed_others(self):
        first, again, other = make_scenes(8, seed=3), make_scenes(8, seed=3), make_scenes(8, seed=4)
        assert torch.equal(first.images, again.images)
        assert first.captions == again.captions
        assert not torch.equal(first.images, other.images)

    def test_captions_name_the_label(self):
        scenes = make_scenes(50)
        assert all(CLASSNAMES[label] in caption for label, caption in zip(scenes.labels, scenes.captions, strict=True))

    @pytest.mark.parametrize(("centering", "low", "high"), [(1.0, 0.0, 0.05), (0.5, 0.1, 0.3), (0.0, 0.25, 0.6)])
    def test_centering_says_how_far_the_object_lies_from_the_centre(self, centering, low, high):
        images = make_scenes(300, centering=centering, num_distractors=0, object_size=0.3, seed=5).images.float()
        background = images[:, :, :2].mean((2, 3), keepdim=True)
        weight = ((images - background).norm(dim=1) > 90).float()  # the object's pixels
        axis = torch.linspace(-1, 1, images.shape[-1])
        mass = weight.sum((1, 2)).clamp(min=1)
        y, x = (weight.sum(2) @ axis) / mass, (weight.sum(1) @ axis) / mass
        offset = torch.hypot(y, x)[mass > 20].median()
        assert low <= offset <= high

    @pytest.mark.parametrize("bad", [{"centering": 1.5}, {"object_size": 0.0}])
    def test_arguments_out_of_range_are_named(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make_scenes(1, **bad)


def _jpeg(color: int, size: tuple[int, int] = (20, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def _write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


class TestData:
    @pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
    def test_shards_are_read_with_labels_and_the_class_names_beside_them(self, tmp_path, suffix):
        for shard in range(2):
            samples = [{"jpg": _jpeg(100 * n), "txt": b"a cat. ", "cls": str(n).encode()} for n in range(2)]
            _write_shard(tmp_path / f"train-{shard}.{suffix}", samples)
        (tmp_path / "meta.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
        data = clip_data.load(f"{tmp_path}/train-{{0..1}}.{suffix}", image_size=16, train=True)
        assert data.images.shape == (4, 3, 16, 16)
        assert data.captions == ["a cat."] * 4
        assert data.labels.tolist() == [0, 1, 0, 1]
        assert data.classnames == ["cat", "dog"]
        assert len(clip_data.load(f"{tmp_path}/train-0.{suffix}", image_size=16, train=True, limit=1)) == 1

    def test_shards_without_labels_are_image_text_pairs(self, tmp_path):
        _write_shard(tmp_path / "pairs.tar", [{"png": _jpeg(1), "txt": b"one"}, {"jpg": _jpeg(2)}])
        data = clip_data.load(str(tmp_path / "pairs.tar"), image_size=8, train=True)
        assert data.captions == ["one"]  # the sample without a caption is left out
        assert data.labels is None
        with pytest.raises(ValueError, match="labels"):
            zero_shot(clip_training.make_encoder(clip_training.build_model(TINY), TINY), data)

    def test_shards_without_a_single_pair_say_so(self, tmp_path):
        _write_shard(tmp_path / "empty.tar", [{"txt": b"no image"}])
        with pytest.raises(ValueError, match="no image with a caption"):
            clip_data.load(str(tmp_path / "empty.tar"), image_size=8, train=True)

    def test_a_folder_of_classes_gets_captions_from_its_names(self, tmp_path):
        for name in ("grey_cat", "dog"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "0.jpg").write_bytes(_jpeg(50))
        data = clip_data.load(str(tmp_path), image_size=16, train=True)
        assert data.captions == ["a photo of a dog.", "a photo of a grey cat."]
        assert data.labels.tolist() == [0, 1]

    def test_torchvision_sets_are_loaded_by_name(self, tmp_path, monkeypatch):
        class Toy:
            classes = ("cat", "dog")

            def __init__(self, root, train, download):
                assert download
                self.train = train

            def __len__(self):
                return 2 if self.train else 1

            def __getitem__(self, index):
                return Image.new("L", (9, 9)), index

        monkeypatch.setattr(clip_data.torchvision.datasets, "Toy", Toy, raising=False)
        assert clip_data.load("torchvision:Toy", image_size=8, train=True).images.shape == (2, 3, 8, 8)
        assert len(clip_data.load("torchvision:Toy", image_size=8, train=False)) == 1


class TestTraining:
    @pytest.mark.parametrize("method", clip_training.METHODS)
    def test_a_run_has_every_column_and_a_curve(self, method):
        result, curve = clip_training.run(method, SCENES, TEST_SCENES, TINY, seed=3)
        assert result["method"] == method
        assert result["seed"] == 3
        assert math.isnan(result["masked inference"]) == (method == "clip")
        assert all(result[name] >= 0 for name in ("unmasked", "after tuning", "images/s"))
        # 4 steps with masks and 2 of tuning, equally many images for every method.
        assert curve["samples"].tolist() == [32, 64, 96, 128, 160, 192]
        assert curve["seconds"].is_monotonic_increasing
        assert curve["score"].notna().all()  # shorter runs than a curve has points are evaluated at every step
        per_step = curve["seconds"].diff().fillna(curve["seconds"].iloc[0])
        assert np.allclose(per_step, TINY.batch_size / curve["images_per_second"])
        for over in ("samples", "seconds"):
            assert clip_training.plot_curves(curve, over=over).axes

    def test_methods_start_from_the_same_weights_and_a_seed_repeats_its_run(self):
        first = clip_training.run("glip", SCENES, TEST_SCENES, TINY, seed=5)
        again = clip_training.run("glip", SCENES, TEST_SCENES, TINY, seed=5)
        assert first[1]["loss"].tolist() == again[1]["loss"].tolist()
        unmasked = clip_training.Config(**{**vars(TINY), "mask_ratio": 0.0})
        clip = clip_training.run("clip", SCENES, TEST_SCENES, TINY, seed=5)[1]["loss"]
        flip = clip_training.run("flip", SCENES, TEST_SCENES, unmasked, seed=5)[1]["loss"]
        assert clip.tolist() == flip.tolist()

    def test_training_lowers_the_loss(self):
        config = clip_training.Config(**{**vars(TINY), "epochs": 6, "tuning_epochs": 0})
        losses = clip_training.run("glip", SCENES, TEST_SCENES, config, seed=0)[1]["loss"]
        assert losses.tail(3).mean() < losses.head(3).mean() - 0.1

    def test_masked_evaluation_masks_and_the_unmasked_one_does_not(self):
        torch.manual_seed(0)
        model = clip_training.build_model(TINY)
        drop = gaussmask.RandomPatchDropout(0.5)
        gaussmask.attach(model.visual, drop)
        encoder = clip_training.make_encoder(model, TINY)
        zero_shot(encoder, TEST_SCENES, masked=True)
        assert drop.keep_mask.sum() == 32 * len(TEST_SCENES)
        zero_shot(encoder, TEST_SCENES)
        assert drop.keep_mask is None

    def test_zero_shot_counts_what_an_oracle_gets_right(self):
        """Ten of forty images are wrong, most of them of one class."""
        classes = torch.eye(len(CLASSNAMES))
        by_class = TEST_SCENES.labels.argsort()
        guesses = TEST_SCENES.labels.clone()
        guesses[by_class[:10]] = (guesses[by_class[:10]] + 1) % len(CLASSNAMES)

        class Oracle(torch.nn.Module):
            def encode_text(self, tokens, normalize):
                known = clip_training.tokenizer(TINY.context_length)
                texts = [template.format(name) for name in CLASSNAMES for template in TEST_SCENES.templates]
                index = {tuple(row): i // len(TEST_SCENES.templates) for i, row in enumerate(known(texts).tolist())}
                return torch.stack([classes[index[tuple(row)]] for row in tokens.tolist()])

            def encode_image(self, images, normalize):
                return classes[guesses]

        encoder = clip_training.make_encoder(Oracle(), TINY)
        found = zero_shot(encoder, TEST_SCENES)
        assert found["top1"] == 75
        there = TEST_SCENES.labels.unique()
        assert len(there) < len(CLASSNAMES)  # classes without images do not count
        by_scikit_learn = recall_score(TEST_SCENES.labels, guesses, labels=there, average="macro")
        assert found["mean_per_class_recall"] == pytest.approx(100 * by_scikit_learn) != 75

    def test_too_few_images_for_a_batch_say_so(self):
        with pytest.raises(ValueError, match="batch of 32"):
            clip_training.run("clip", SCENES.head(20), TEST_SCENES, TINY, seed=0)


def test_the_command_leaves_its_results(tmp_path):
    for split in ("train", "test"):
        for label, color in enumerate(("red", "blue")):
            (tmp_path / split / color).mkdir(parents=True)
            for number in range(8):
                pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 * label] = 255
                Image.fromarray(pixels).save(tmp_path / split / color / f"{number}.png")
    arguments = ["--train", tmp_path / "train", "--test", tmp_path / "test", "--output", tmp_path / "out"]
    arguments += ["--seeds", 0, 1]
    setting = {"image-size": 16, "width": 64, "depth": 1, "text-depth": 1, "batch-size": 8, "epochs": 1}
    for name, value in setting.items():
        arguments += [f"--config.{name}", value]
    command = [sys.executable, EXAMPLES / "compare_methods.py", *arguments, "--config.device", "cpu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "with as much computing" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.csv", "curves.png", "results.csv", "results.md",
    ]  # fmt: skip
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results["method"].tolist() == 2 * list(clip_comparison.EVERY_METHOD)
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8").partition("\n")[0] in done.stdout


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere-{0..3}.tar", "there is no shard nowhere-0.tar"),
     ("torchvision:Nothing", "torchvision has no data set 'Nothing'")],
)  # fmt: skip
def test_data_that_is_not_there_is_said(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compare_methods.main(train=source, test=source, config=TINY)


def test_an_error_of_the_user_is_one_line(monkeypatch):
    program = str(EXAMPLES / "compare_methods.py")
    monkeypatch.setattr(sys, "argv", [program, "--train", "nowhere", "--test", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(program, run_name="__main__")
    said = ended.value.code  # Python writes it to standard error, and exits with 1
    assert said.startswith("compare_methods.py: there is no shard nowhere")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"methods": ("flip", "flip")}, "methods must be one or more, each of them once, got flip flip"),
     ({"methods": ("flip", "mae")}, "method must be one of clip, flip, glip, weighted, grid, block, cluster, got"),
     ({"seeds": ()}, "seeds must be one or more, each of them once, got none"),
     ({"minutes": math.nan}, "minutes must be a number above 0, got nan"),
     ({"minutes": 0}, "minutes must be a number above 0, got 0"),
     ({"config": replace(TINY, mask_ratio=1.5)}, "mask_ratio must lie in"),
     ({"config": replace(TINY, width=65)}, "config.width must be a multiple of config.head-width=64, got 65")],
)  # fmt: skip
def test_a_comparison_that_cannot_end_well_is_not_begun(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compare_methods.main(**{"train": "nowhere", "test": "nowhere", "config": TINY} | setting)


def test_the_notebook_runs_at_a_small_size_and_is_committed_with_its_outputs(tmp_path, monkeypatch):
    notebook = nbformat.read(EXAMPLES / "flip_vs_glip.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebook`"
    told = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.*)", told, re.MULTILINE) == [
        "The masks",
        "The data",
        "Does masking pay?",
        "When does the centre pay?",
        "What to take from this",
    ]
    shown = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4  # rules, data, curves, places
    assert not any("without looking" in output.get("text", "") for output in shown)  # see clip_comparison.reading
    assert not any("needs_background" in output.get("metadata", {}) for output in shown)  # a box around a plot
    monkeypatch.setenv("GAUSSMASK_QUICK", "1")
    monkeypatch.setenv("GAUSSMASK_OUTPUT", str(tmp_path))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}})
    client.execute()
    results = pd.read_csv(tmp_path / "results.csv")
    assert results["method"].tolist() == list(clip_training.METHODS)
    by_centering = pd.read_csv(tmp_path / "centering.csv")
    assert by_centering.groupby("centering")["method"].agg(list).tolist() == [["flip", "glip"]] * 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"rules.png", "curves.png", "centering.png"}
