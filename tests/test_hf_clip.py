"""The example for transformers' Trainer: at small sizes, without a network, in one process and in two."""

import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import hf_clip
import numpy as np
import processes
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

import gaussmask

EXAMPLES = Path(__file__).parents[1] / "examples"
COLORS = ("red", "green", "blue", "grey")
COUNT = 8
TINY = {
    "image-size": 32, "patch-size": 8, "width": 32, "depth": 1, "text-depth": 1, "embed-dim": 16,
    "context-length": 12, "per-device-train-batch-size": 2, "logging-steps": 1, "use-cpu": True,
}  # fmt: skip
TINY_MODEL = hf_clip.Config(
    "", "", image_size=32, patch_size=8, width=32, depth=1, text_depth=1, embed_dim=16, context_length=12
)
# One step of plain gradient descent with this rate takes the gradient off the weights.
ONE_STEP = {
    "num-train-epochs": 1, "optim": "sgd", "learning-rate": 1, "lr-scheduler-type": "constant", "warmup-steps": 0,
    "weight-decay": 0, "max-grad-norm": 0, "eval-strategy": "no", "save-strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard of 8 images of 4 classes, with two captions each, and their class names beside it."""
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "pairs.tar", "w") as archive:
        for number in range(COUNT):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            captions = [f"number {number} in {COLORS[number % 4]}", f"a {COLORS[number % 4]} picture, the {number}th"]
            sample = {"png": image.getvalue(), "txt": captions[0].encode(), "cls": str(number % 4).encode()}
            sample["json"] = json.dumps({"captions": captions}).encode()
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "classnames.txt").write_text("\n".join(COLORS))
    return folder / "pairs.tar"


def arguments(shards, output, **options):
    """The command line of a tiny run."""
    settings = {"train": shards, "test": shards, "output-dir": output, **TINY}
    settings |= {name.replace("_", "-"): value for name, value in options.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Recorder(transformers.TrainerCallback):
    """The masks of every step, by the number of the step."""

    def __init__(self, drop):
        self.drop = drop
        self.masks = {}

    def on_step_end(self, args, state, control, **others):
        self.masks[state.global_step] = self.drop.keep_indices

    @property
    def unmasked(self):
        return [step for step, mask in self.masks.items() if mask is None]


def recorded_trainer(*argv):
    """A trainer that carries a `recorder`, and its `batches`."""
    trainer = hf_clip.make_trainer(*hf_clip.parse(argv))
    trainer.batches = []
    drop = gaussmask.attached(trainer.model)
    if drop is not None:
        trainer.recorder = Recorder(drop)
        trainer.add_callback(trainer.recorder)
    compute_loss = trainer.compute_loss

    def recording(model, inputs, **options):
        trainer.batches.append(inputs)
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = recording
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A finished run: its folder, its trainer, and what it printed."""
    output = tmp_path_factory.mktemp("run")
    made = []

    def make(*args):
        made.append(make_trainer(*args))
        return made[-1]

    make_trainer = hf_clip.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_clip, "make_trainer", make)
        hf_clip.main(arguments(shards, output, num_train_epochs=2))
    return output, made[0]


class TestRun:
    def test_every_epoch_is_evaluated(self, run):
        output, _ = run
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        evaluations = [entry for entry in history if "eval_text_to_image_r1" in entry]
        assert [entry["epoch"] for entry in evaluations] == [1, 2]
        figures = {f"eval_{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        assert figures | {"eval_top1", "eval_top5"} <= evaluations[0].keys()
        assert evaluations[-1]["eval_text_to_image_r10"] == 100  # of 8 images

    def test_the_model_opens_without_gaussmask_and_gives_the_same(self, run, tmp_path):
        output, trainer = run
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
        image.save(tmp_path / "image.png")
        (tmp_path / "open.py").write_text(
            f"""
import sys
sys.modules["gaussmask"] = None
import torch, transformers
from PIL import Image
model = transformers.CLIPModel.from_pretrained({str(output)!r})
processor = transformers.CLIPProcessor.from_pretrained({str(output)!r})
image = Image.open({str(tmp_path / "image.png")!r})
inputs = processor(text=["number 0 in red", "blue"], images=image, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
result = [model.state_dict(), dict(inputs), outputs.image_embeds, outputs.text_embeds]
torch.save(result, {str(tmp_path / "result.pt")!r})
"""
        )
        processes.run(tmp_path / "open.py")
        opened, inputs, image_embeds, text_embeds = torch.load(tmp_path / "result.pt")
        assert_equal_weights(opened, weights(trainer.model))
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs)
        torch.testing.assert_close(image_embeds, expected.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(text_embeds, expected.text_embeds, rtol=0, atol=1e-6)

    def test_training_goes_on_from_what_was_saved(self, run, shards, tmp_path):
        output, trainer = run
        further = hf_clip.make_trainer(*hf_clip.parse(arguments(shards, tmp_path, model=output, method="flip")))
        assert_equal_weights(weights(further.model), weights(trainer.model))
        anew = hf_clip.make_trainer(*hf_clip.parse([*arguments(shards, tmp_path, model=output), "--from-scratch"]))
        assert anew.model.config.to_dict() == further.model.config.to_dict()
        assert not torch.equal(anew.model.visual_projection.weight, further.model.visual_projection.weight)

    def test_the_processor_prepares_what_was_trained_on(self, run):
        output, trainer = run
        processor = transformers.CLIPProcessor.from_pretrained(output)
        batch = trainer.train_dataset.__getitems__([3])
        image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 48, 3), dtype=np.uint8))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == batch["pixel_values"].shape
        assert (pixels - batch["pixel_values"]).abs().max() < 0.05  # rounded to a byte here and not there
        captions = ["a red picture, the 3th", "It's 42 o'clock: übergroß!", "one word " * 20]
        ids = processor.tokenizer(captions, padding="max_length", truncation=True)["input_ids"]
        end = processor.tokenizer.eos_token_id
        for own, theirs in zip(ids, hf_clip.SimpleTokenizer(context_length=12)(captions).tolist(), strict=True):
            assert own[: own.index(end) + 1] == theirs[: theirs.index(end) + 1]

    def test_padding_changes_no_text(self, run):
        _, trainer = run
        towers, tokenize = trainer.encoder.model.eval(), trainer.encoder.tokenize
        with torch.no_grad():
            alone = towers.encode_text(tokenize(["blue"]))
            beside = towers.encode_text(tokenize(["blue", "a red picture, the 3th"]))
        torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(beside[0], beside[1], atol=1e-3)

    def test_any_of_the_captions_is_drawn(self, run):
        _, trainer = run
        drawn = {tuple(trainer.train_dataset.__getitems__([0])["input_ids"][0].tolist()) for _ in range(50)}
        assert len(drawn) == 2


class TestTuning:
    @pytest.mark.parametrize(
        ("options", "unmasked", "steps"),
        [
            ({"tuning_epochs": 1}, [9, 10, 11, 12], 12),
            ({"tuning_epochs": 0.5}, [11, 12], 12),
            ({"tuning_epochs": 0}, [], 12),
            ({"tuning_epochs": 1, "gradient_accumulation_steps": 3}, [5, 6], 6),
            ({"tuning_epochs": 1, "max_steps": 6}, [3, 4, 5, 6], 6),
        ],
    )
    def test_the_last_epochs_see_whole_images(self, shards, tmp_path, options, unmasked, steps):
        options = {"num_train_epochs": 3, "eval_strategy": "no", "save_strategy": "no"} | options
        trainer = recorded_trainer(*arguments(shards, tmp_path, **options))
        trainer.train()
        assert list(trainer.recorder.masks) == list(range(1, steps + 1))
        assert trainer.recorder.unmasked == unmasked
        assert all(mask.shape == (2, 8) for mask in trainer.recorder.masks.values() if mask is not None)

    def test_a_resumed_run_is_the_whole_run(self, shards, tmp_path):
        """Also its captions, masks and evaluations; whether it stopped before the tuning or in the middle of it."""
        options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 10}
        argv = arguments(shards, tmp_path, **options)
        whole = recorded_trainer(*argv)
        whole.train()
        for start, same in ((4, True), (6, False), (10, False)):  # in mid-epoch the order of captions is not the same
            argv += ["--resume-from-checkpoint", str(tmp_path / f"checkpoint-{start}")]
            resumed = recorded_trainer(*argv)
            resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint)
            assert list(resumed.recorder.masks) == list(range(start + 1, 13))
            assert resumed.recorder.unmasked == [step for step in (9, 10, 11, 12) if step > start]
            if same:
                assert_equal_weights(weights(resumed.model), weights(whole.model))

    def test_clip_drops_nothing(self, shards, tmp_path):
        trainer = recorded_trainer(*arguments(shards, tmp_path, method="clip", mask_ratio=0.9))
        assert gaussmask.attached(trainer.model) is None


def test_the_logit_scale_stays_below_one_hundred(shards, tmp_path):
    trainer = recorded_trainer(*arguments(shards, tmp_path, **ONE_STEP, learning_rate=0))
    trainer.model.logit_scale.data.fill_(10.0)
    trainer.train()
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(100))


def test_no_decay_on_vectors_and_scalars(shards, tmp_path):
    trainer = recorded_trainer(*arguments(shards, tmp_path))
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "visual_projection.weight" in decayed
    assert not {"logit_scale", "vision_model.post_layernorm.weight"} & set(decayed)


def test_gradient_accumulation_averages_separate_batches(shards, tmp_path):
    options = ONE_STEP | {"method": "clip", "gradient-accumulation-steps": 2, "per-device-train-batch-size": 4}
    trainer = recorded_trainer(*arguments(shards, tmp_path, **options))
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert [len(batch["pixel_values"]) for batch in trainer.batches] == [4, 4]
    trainer.model.load_state_dict(before)
    trainer.model.zero_grad()
    losses = [trainer.model(**batch, return_loss=True).loss / 2 for batch in trainer.batches]
    sum(losses).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item(), abs=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(before[name] - after[name], parameter.grad, rtol=0, atol=1e-5)


def two_processes(rank, port, commands, results):
    """One of two processes: trains with every command, and saves what it saw and what came of it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    outcomes = []
    for argv in commands:
        trainer = recorded_trainer(*argv)
        trainer.train()
        outcome = {"weights": weights(trainer.model), "loss": trainer.state.log_history[0]["loss"]}
        outcome |= {"batches": trainer.batches, "mask": trainer.recorder.masks[1], "figures": trainer.evaluate()}
        outcomes.append(outcome)
    torch.save(outcomes, f"{results}/{rank}.pt")
    trainer.accelerator.end_training()


class SamePatches(gaussmask.PatchDropout):
    """Keeps the patches that it is told to keep."""

    def __init__(self, keep_indices):
        super().__init__(0.5)
        self.kept = keep_indices

    def scores(self, coords, generator=None):
        return torch.zeros(coords.shape[:2]).scatter(1, self.kept, 1.0)


def test_two_processes_are_one_with_a_batch_of_twice_the_size(shards, tmp_path):
    """The same loss, gradients and figures as one process has on all images, whose masks are drawn separately."""
    model, processor = hf_clip.small_model(TINY_MODEL)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ONE_STEP | {"model": tmp_path / "model", "per-device-train-batch-size": COUNT // 2, "tuning-epochs": 0}
    commands = [arguments(shards, tmp_path, **options, mask_ratio=ratio) for ratio in (0.0, 0.5)]
    processes.spawn(two_processes, (processes.free_port(), commands, str(tmp_path)), nprocs=2)
    for command, ranks in zip(
        commands, zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(2)), strict=True), strict=True
    ):
        batches = [outcome["batches"][0] for outcome in ranks]
        whole = {"pixel_values": torch.cat([batch["pixel_values"] for batch in batches])}
        assert len(whole["pixel_values"].unique(dim=0)) == COUNT  # nobody saw what another process saw
        length = max(batch["input_ids"].shape[1] for batch in batches)
        for name, filling in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0)):
            rows = [F.pad(batch[name], (0, length - batch[name].shape[1]), value=filling) for batch in batches]
            whole[name] = torch.cat(rows)
        reference = transformers.CLIPModel.from_pretrained(tmp_path / "model").train()
        masks = [outcome["mask"] for outcome in ranks]
        if "0.5" in command:
            assert not torch.equal(*masks)
            gaussmask.attach(reference, SamePatches(torch.cat(masks)))
        else:
            assert masks == [None, None]
        loss = reference(**whole, return_loss=True).loss  # transformers' own
        loss.backward()
        assert_equal_weights(ranks[0]["weights"], ranks[1]["weights"])
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(parameter - ranks[0]["weights"][name], parameter.grad, rtol=0, atol=1e-5)
        single = hf_clip.make_trainer(*hf_clip.parse([*command, "--per-device-train-batch-size", "2"]))
        single.model.load_state_dict(ranks[0]["weights"])
        figures = single.evaluate()
        for outcome in ranks:
            assert outcome["loss"] == pytest.approx(loss.item(), abs=1e-5)
            assert {**outcome["figures"], "epoch": None} == {**figures, "epoch": None}


def test_a_dual_encoder_of_two_families_is_trained_and_saved(shards, tmp_path):
    """A ViT and a BERT, whose text tower is told by the attention mask where the padding is."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "number", "in", "a", "picture", ",", "the", "##th"]
    vocabulary = {word: number for number, word in enumerate([*words, *COLORS, *map(str, range(10))])}
    processor = transformers.VisionTextDualEncoderProcessor(
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}), transformers.BertTokenizer(vocabulary)
    )
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**both, image_size=32, patch_size=8),
        transformers.BertConfig(**both, vocab_size=len(vocabulary), max_position_embeddings=12),
        projection_dim=16,
    )
    transformers.VisionTextDualEncoderModel(shape).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    argv = arguments(shards, tmp_path / "out", model=tmp_path / "model", num_train_epochs=2, stage="pixels")
    trainer = recorded_trainer(*argv)
    trainer.train()
    assert trainer.recorder.unmasked == [5, 6, 7, 8]
    assert not all(batch["attention_mask"].all() for batch in trainer.batches)
    trainer.save_model()
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert_equal_weights(weights(opened), weights(trainer.model))


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask_ratio": 1.5}, "mask_ratio must lie in .* got 1.5"),
            ({"sigma": -1}, "sigma must be .* got -1"),
            ({"method": "glop"}, "method must be one of .* got 'glop'"),
            ({"stage": "patches"}, "stage must be one of .* got 'patches'"),
            ({"train": "nowhere/train.tar"}, "no shard nowhere/train.tar"),
            ({"test": "nowhere/test-*.tar"}, "no shard matches nowhere/test"),
            ({"model": "no/such/folder"}, "cannot open the model 'no/such/folder'"),
            ({"per_device_train_batch_size": 9}, "pairs.tar holds 8 images, and .* takes 9"),
            ({"resume_from_checkpoint": "nowhere"}, "no checkpoint nowhere"),
            ({"num_train_epochs": "many"}, "num_train_epochs.* invalid float value: 'many'"),
            ({"mask_rato": 0.5}, "--mask-rato"),
            ({"lr": 0.5}, "--lr"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_are_one_line(self, shards, tmp_path, options, message):
        with pytest.raises(SystemExit) as exit_:
            hf_clip.main(arguments(shards, tmp_path, **options))
        assert re.match(rf"hf_clip\.py: .*{message}", exit_.value.code)
        assert "\n" not in exit_.value.code

    def test_empty_shards_and_models_of_another_kind(self, shards, tmp_path):
        tarfile.open(tmp_path / "empty.tar", "w").close()
        with pytest.raises(SystemExit, match=r"empty\.tar holds no image"):
            hf_clip.main(arguments(shards, tmp_path, train=tmp_path / "empty.tar"))
        transformers.SiglipConfig().save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match="got siglip"):
            hf_clip.main(arguments(shards, tmp_path, model=tmp_path))

    def test_processes_that_would_train_alone(self, shards, tmp_path, monkeypatch):
        args = hf_clip.parse(arguments(shards, tmp_path))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(hf_clip.UserError, match="would train alone"):
            hf_clip.make_trainer(*args)

    def test_on_the_command_line(self, shards, tmp_path):
        command = [sys.executable, EXAMPLES / "hf_clip.py", *arguments(shards, tmp_path, mask_ratio=1.5)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"hf_clip\.py: .*mask_ratio.*1\.5.*\n", done.stderr)
