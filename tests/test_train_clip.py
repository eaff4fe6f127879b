"""Training at scale: the split step, several processes, broken shards, crashes, checkpoints, and what a run leaves."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import clip_checkpoints
import clip_data
import clip_evaluation
import clip_images
import clip_options
import clip_step
import clip_stream
import numpy as np
import open_clip
import processes
import pytest
import torch
import torch.distributed as dist
import train_clip
import training_cost
import webdataset
from clip_runs import EXAMPLES, TINY, assert_same_weights, metrics, options, write_shards
from clip_shards import count_samples, expand
from safetensors.torch import load_file
from torch.torch_version import TorchVersion
from user_errors import UserError, one_line

import gaussmask

PROGRAM = EXAMPLES / "train_clip.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 4 shards of 12 pairs each in `data`, and the tiny model's configuration."""
    folder = tmp_path_factory.mktemp("clip")
    write_shards(folder / "data", 48, 12)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def config(place: Path, output: Path, **changes) -> clip_options.Config:
    setting = {
        "train_data": str(place / "data" / "shard-{000..003}.tar"), "model": str(place / "tiny.json"),
        "mask_ratio": 0.5, "epochs": 1, "tuning_epochs": 0, "batch_size": 8, "workers": 0, "shuffle": 10,
        "precision": "fp32", "device": "cpu", "log_every": 1, "checkpoint_every": 2, "output": output,
    }  # fmt: skip
    return options(**setting | changes)


def tiny_model(siglip: bool = False):
    torch.manual_seed(0)
    bias = {"init_logit_bias": -10.0} if siglip else {}
    return open_clip.CLIP(**json.loads(json.dumps(TINY)), **bias).train()


def tiny_batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 49000, (count, 8), generator=generator)
    tokens[:, -1] = 49407
    return images, tokens


class Gradients(torch.optim.SGD):
    """Changes nothing, and keeps the gradients of the step."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.named = dict(model.named_parameters())

    def step(self, closure=None):
        self.kept = {
            name.removeprefix("module."): getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)().clone()
            for name, parameter in self.named.items()
            if parameter.grad is not None
        }


def gradients(model, images, tokens, loss, parts: int) -> tuple[float, dict[str, torch.Tensor]]:
    optimizer = Gradients(model)
    plain = torch.autocast("cpu", enabled=False)
    value = clip_step.train_step_in_parts(model, images.chunk(parts), tokens.chunk(parts), loss, optimizer, plain)
    return float(value), optimizer.kept


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max())
        assert error <= 1e-5 * scale, f"{name}: {error:.1e} of {scale:.1e}"


class Means(torch.nn.Module):
    """The least that has a drop and compiles quickly: means of kept patches, and a map of the tokens' numbers.

    No embedding, whose compiled gradients are wrong in torch 2.6 on the CPU.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.drop = gaussmask.RandomPatchDropout(0.5)
        self.proj = torch.nn.Linear(3 * 64, 8)
        self.text = torch.nn.Linear(8, 8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images, tokens):
        kept = self.drop(images.reshape(len(images), 16, 3 * 64))
        features = self.proj(kept).mean(1), self.text(tokens / 49408)
        return *(torch.nn.functional.normalize(feature, dim=-1) for feature in features), self.logit_scale.exp()


class TestStep:
    @pytest.mark.parametrize("siglip", [False, True])
    @pytest.mark.parametrize("stage", ["tokens", "pixels"])
    def test_a_split_batch_gives_the_gradients_of_the_whole_one(self, stage, siglip):
        """With masks: torch.rand gives three parts the numbers that it gives the whole, so the masks are the same."""
        loss = open_clip.loss.SigLipLoss() if siglip else open_clip.loss.ClipLoss()
        results = []
        for parts in (1, 3):
            drop = gaussmask.GaussianPatchDropout(0.5)
            model = gaussmask.attach(tiny_model(siglip), drop, stage=stage)
            torch.manual_seed(3)
            results.append(gradients(model, *tiny_batch(12), loss, parts))
            results[-1] += (torch.rand(1),)
        (whole_loss, whole, whole_next), (split_loss, split, split_next) = results
        assert split_loss == pytest.approx(whole_loss, rel=1e-6)
        assert_same_gradients(split, whole)
        assert torch.equal(split_next, whole_next)  # the generator is where one pass over the batch leaves it

    def test_the_second_forward_sees_the_masks_of_the_first(self):
        drop = gaussmask.RandomPatchDropout(0.5)
        model = gaussmask.attach(tiny_model(), drop)
        seen = []
        model.visual.register_forward_hook(lambda *_: seen.append(drop.keep_indices))
        gradients(model, *tiny_batch(8), open_clip.loss.ClipLoss(), 2)
        assert len(seen) == 4
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])
        assert not torch.equal(seen[0], seen[1])

    def test_masks_repeat_when_compiled(self, monkeypatch):
        """Inductor's own random numbers need not be the same with and without gradients."""
        monkeypatch.setattr(torch._inductor.config, "fallback_random", torch._inductor.config.fallback_random)
        setting = options(train_data="none", compile=True, device="cpu")
        results = []
        for parts in (1, 2):
            model = Means()
            if parts == 2:
                model = train_clip.prepare_model(model, setting, clip_checkpoints.Ranks())
            torch.manual_seed(3)
            results.append(gradients(model, *tiny_batch(8), open_clip.loss.ClipLoss(), parts)[1])
        assert_same_gradients(results[1], results[0])

    def test_the_learning_rate_warms_up_and_falls(self):
        rates = [clip_step.learning_rate(step, num_steps=100, num_warmup=10, peak=1.0) for step in range(100)]
        assert rates[0] == pytest.approx(1 / 11)
        assert max(rates) == rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 1e-3

    def test_the_logit_scale_stays_below_a_hundred(self):
        model = tiny_model()
        model.logit_scale.data.fill_(10.0)
        gradients(model, *tiny_batch(4), open_clip.loss.ClipLoss(), 1)
        assert float(model.logit_scale.detach().exp()) == pytest.approx(100)


def steps_of_a_process(rank: int, world_size: int, store: str, results: str) -> None:
    """Every way to spread a batch over processes: loss, gradients and masks of each."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ranks = clip_checkpoints.Ranks(rank, world_size)
    images, tokens = (tensor.chunk(world_size)[rank] for tensor in tiny_batch(12))
    outcome = {}
    for siglip, parts, sharded in [(False, 1, False), (False, 3, False), (False, 3, True), (True, 2, False)]:
        model = tiny_model(siglip)
        if sharded:
            model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
        setting = options(train_data="none", fsdp=sharded, loss="siglip" if siglip else "clip", device="cpu")
        wrapped = train_clip.prepare_model(model, setting, ranks)
        loss = train_clip.make_loss(setting, ranks)
        outcome[siglip, parts, sharded] = gradients(wrapped, images, tokens, loss, parts)
    drop = gaussmask.RandomPatchDropout(0.5)
    model = train_clip.prepare_model(gaussmask.attach(tiny_model(), drop), setting, ranks)
    masks = []
    for seed in (7 + rank, 7):
        torch.manual_seed(seed)
        model(images, tokens)
        masks.append(drop.keep_indices)
    torch.save((outcome, masks), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_computes(tmp_path):
    """The gathered loss and its gradients; masks differ between processes, unless their seeds are equal."""
    processes.spawn(steps_of_a_process, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for (siglip, parts, sharded), (_, spread) in found[0][0].items():
        loss = open_clip.loss.SigLipLoss() if siglip else open_clip.loss.ClipLoss()
        value, expected = gradients(tiny_model(siglip), *tiny_batch(12), loss, 1)
        mean = np.mean([outcome[siglip, parts, sharded][0] for outcome, _ in found])
        assert mean == pytest.approx(value, rel=1e-5)
        if sharded:
            expected["logit_scale"] = expected["logit_scale"].reshape(1)
        assert_same_gradients(spread, expected)
    (first, first_again), (second, second_again) = (masks for _, masks in found)
    assert not torch.equal(first, second)
    assert torch.equal(first_again, second_again)


def numbers(batches, count: int) -> list[int]:
    """The pairs of `count` batches, by the number in their caption."""
    return [int(row) for batch, _ in zip(batches, range(count), strict=False) for row in batch.tokens[:, 0]]


def last_word(captions: list[str]) -> torch.Tensor:
    """The number in it, and two random ones, as a tokenizer may draw them."""
    chance = [int(torch.randint(1000, ())), random.randrange(1000)]
    return torch.tensor([[int(caption.split()[-1]), *chance] for caption in captions])


def stream(shards, batch_size=4, seed=5, workers=0, progress=None, rank=0, world_size=1, decode="full", **options):
    crop = clip_images.RandomCrop(32, (0.3, 1.0), decode)
    captions = clip_stream.CaptionStream(
        clip_stream.Shards([str(shard) for shard in shards], seed, shuffle=10, **options), crop, last_word,
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, progress=progress, random_captions=True,
    )  # fmt: skip
    return clip_stream.open_loader(captions, workers=workers)


class BrokenCrop(clip_images.RandomCrop):
    def __call__(self, image):
        random.random()
        raise ValueError("broken")


def readable_pairs(shard: Path) -> set[int]:
    """The pairs of a truncated shard that lie in it whole, by tarfile."""
    members = set()
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                archive.extractfile(member).read()
                members.add(member.name)
    except tarfile.ReadError:
        pass
    return {int(name[:6]) for name in members if {name[:7] + "jpg", name[:7] + "json", name[:7] + "txt"} <= members}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines with few cores
class TestStream:
    @pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 2)])
    def test_a_pass_gives_every_pair_once_to_one_reader(self, place, processes, workers):
        """48 pairs in 4 shards: with 6 readers, pairs are dealt out instead of shards."""
        shards = expand(str(place / "data" / "*.tar"))
        seen = []
        for rank in range(processes):
            seen += numbers(stream(shards, workers=workers, rank=rank, world_size=processes), 12 // processes)
        assert sorted(seen) == list(range(48))
        assert seen != list(range(48))

    def test_every_pass_has_another_order_and_the_seed_repeats_it(self, place):
        shards = expand(str(place / "data" / "*.tar"))
        first = numbers(stream(shards), 24)
        assert sorted(first[:48]) == sorted(first[48:])
        assert first[:48] != first[48:]
        assert numbers(stream(shards), 24) == first
        assert numbers(stream(shards, seed=6), 24) != first

    @pytest.mark.parametrize("workers", [0, 3])
    @pytest.mark.parametrize("cut", [1, 5, 12, 17])
    def test_a_resumed_stream_goes_on_with_the_next_batch(self, place, workers, cut):
        """Pairs, captions and augmentation, in the middle of a pass and in later ones."""
        shards = expand(str(place / "data" / "*.tar"))
        progress, whole = clip_stream.Progress(), []
        for batch, _ in zip(stream(shards, workers=workers), range(20), strict=False):
            whole.append(batch)
            if len(whole) <= cut:
                progress.take(batch)
        resumed = stream(shards, workers=workers, progress=progress)
        rest = [batch for batch, _ in zip(resumed, range(20 - cut), strict=False)]
        assert torch.equal(torch.stack([b.images for b in rest]), torch.stack([b.images for b in whole[cut:]]))
        assert torch.equal(torch.stack([b.tokens for b in rest]), torch.stack([b.tokens for b in whole[cut:]]))

    def test_reading_draws_nothing_from_the_generator_of_the_masks(self, place):
        torch.manual_seed(0)
        random.seed(0)
        before = torch.get_rng_state(), random.getstate()
        numbers(stream(expand(str(place / "data" / "*.tar"))), 12)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()

    def test_a_broken_image_leaves_the_generators_as_they_were(self):
        source = clip_stream.Memory(clip_data.CaptionedImages(torch.zeros(4, 3, 8, 8), ["number 0"] * 4), 0)
        captions = clip_stream.CaptionStream(source, BrokenCrop(8), last_word, batch_size=2, seed=0)
        random.seed(0)
        before = random.getstate()
        with pytest.raises(UserError, match=r"for example image \d: broken"):
            next(iter(captions))
        assert random.getstate() == before

    def test_shards_drawn_with_replacement_go_on_for_ever(self, place):
        seen = numbers(stream(expand(str(place / "data" / "*.tar")), resampled=True), 24)
        assert len(seen) == 96
        assert set(seen) <= set(range(48))

    @pytest.mark.parametrize(("workers", "decode"), [(0, "full"), (2, "full"), (0, "reduced"), (0, "device")])
    def test_what_is_broken_is_skipped_and_reported_and_nothing_else_is_lost(self, tmp_path, workers, decode):
        """A truncated shard, one that is no tar at all, JPEGs that break off, and a pair without a caption."""
        shards = write_shards(tmp_path, 48, 8)
        content = shards[0].read_bytes()
        shards[0].write_bytes(content[: len(content) // 2 + 700])  # within a member
        shards[1].write_bytes(b"no tar" * 100)
        with tarfile.open(shards[2]) as archive:
            members = [(member, archive.extractfile(member).read()) for member in archive]
        with tarfile.open(shards[2], "w") as archive:
            for member, data in members:
                if member.name in ("000017.txt", "000017.json"):
                    continue
                cut = {"000018.jpg": 20, "000019.jpg": len(data) - 40}.get(member.name)  # in the header; behind it
                data = data[:cut]
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        expected = sorted({*readable_pairs(shards[0]), *range(16, 48)} - {17, 18, 19})
        assert len(expected) > 30
        seen, skipped = [], []
        for batch in stream(shards, batch_size=1, workers=workers, decode=decode):
            if batch.position[0] > 0:  # the next pass
                if workers == 0:
                    break
                if len(seen) >= len(expected):
                    break
                continue
            seen += batch.tokens[:, 0].tolist()
            skipped += batch.skipped
        assert sorted(seen) == expected
        text = "\n".join(skipped)
        assert "shard-000.tar" in text
        assert "shard-001.tar" in text
        assert "sample 000017: no caption" in text
        assert "shard-002.tar, sample 000018: cannot identify image file" in text
        assert "shard-002.tar, sample 000019: image file is truncated" in text

    def test_images_in_memory_are_dealt_out_in_the_same_way(self):
        captions = [f"number {number}" for number in range(10)]
        source = clip_stream.Memory(clip_data.CaptionedImages(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), captions), 0)
        first, second = ([row for who in range(3) for row in source.samples(epoch, who, 3, print)] for epoch in (0, 1))
        assert sorted(first) == sorted(second) == list(range(10))
        assert first != second
        pair = source.parse(4)
        assert pair.captions == ["number 4"]
        assert clip_images.RandomCrop(6)(pair.image).shape == (3, 6, 6)

    def test_pairs_are_counted_with_or_without_reading(self, place, tmp_path):
        shards = expand(str(place / "data" / "*.tar"))
        assert count_samples(shards) == 48
        paths = write_shards(tmp_path, 4, 2)
        (tmp_path / "sizes.json").write_text(json.dumps({path.name: 100 for path in paths}))
        assert count_samples([str(path) for path in paths]) == 200

    def test_pipes_are_read_and_failing_ones_reported(self, place):
        shards = [f"pipe:cat {place}/data/shard-000.tar", f"pipe:cat {place}/data/none.tar 2>/dev/null"]
        batches = [batch for batch, _ in zip(stream(shards, batch_size=3), range(8), strict=False)]
        assert sorted(numbers(batches, 4)) == list(range(12))
        problems = [problem for batch in batches for problem in batch.skipped if "none.tar" in problem]
        assert len(problems) == 1 + max(batch.position[0] for batch in batches)  # once in every pass


class TestRun:
    def test_glip_then_tuning_logs_evaluates_and_leaves_a_model(self, place, tmp_path):
        """Masked training, unmasked tuning; every figure of the log; bit-identical with TensorBoard on or off."""
        data = str(place / "data" / "*.tar")
        setting = config(
            place, tmp_path, tuning_epochs=0.5, zero_shot=data, probe=data, retrieval=data, captions="random",
            accumulate=2, tensorboard=True, eval_every=0.5, max_norm=1.0, warmup=0.2,
        )  # fmt: skip
        train_clip.main(setting)
        records = metrics(tmp_path)
        steps = [record for record in records if "loss" in record]
        assert [(record["phase"], record["step"]) for record in steps] == [
            *(("training", step) for step in range(1, 7)), *(("tuning", step) for step in range(1, 4)),
        ]  # fmt: skip
        assert {record["patches"] for record in steps[:6]} == {"8/16"}
        assert {record["patches"] for record in steps[6:]} == {"all"}
        assert [record["samples"] for record in steps[:6]] == [8, 16, 24, 32, 40, 48]
        assert all(record["images_per_second"] > 0 and record["memory_gib"] > 0 for record in steps)
        evaluations = [record for record in records if "zero_shot_top1" in record]
        assert [record["step"] for record in evaluations] == [3, 6, 3]
        assert "zero_shot_masked_top1" in evaluations[0]
        assert "zero_shot_masked_top1" not in evaluations[-1]
        assert {"zero_shot_top5", "linear_probe", "image_to_text_r1", "text_to_image_r10"} <= evaluations[0].keys()
        assert evaluations[0]["zero_shot_top5"] == 100  # of four classes
        assert list((tmp_path / "tensorboard").rglob("events*"))
        checkpoints = sorted(path.name for path in (tmp_path / "training" / "checkpoints").iterdir())
        assert checkpoints == ["step-00000002", "step-00000004"]

    def test_evaluations_leave_the_training_as_it_is(self, place, tmp_path):
        data = str(place / "data" / "shard-000.tar")
        train_clip.main(config(place, tmp_path / "without"))
        train_clip.main(config(place, tmp_path / "with", zero_shot=data, eval_every=0.2))
        assert_same_weights(tmp_path / "without", tmp_path / "with")

    def test_the_speed_is_that_of_the_steps(self, place, tmp_path, monkeypatch):
        """Also where an evaluation comes between two lines of the log."""
        step = train_clip.train_step_in_parts

        def slow_step(*args, **options):
            time.sleep(0.1)
            return step(*args, **options)

        monkeypatch.setattr(train_clip, "train_step_in_parts", slow_step)
        data = str(place / "data" / "shard-000.tar")
        train_clip.main(config(place, tmp_path, log_every=3, zero_shot=data, eval_every=0.2))
        speeds = [record["images_per_second"] for record in metrics(tmp_path) if "loss" in record]
        assert len(speeds) == 2
        assert all(10 < speed < 8 / 0.1 for speed in speeds)

    @pytest.mark.parametrize(
        ("changes", "kept"),
        [
            ({"method": "clip"}, "all"),
            ({"method": "flip", "mask_ratio": 0.75, "stage": "pixels"}, "4/16"),
            ({"method": "reclip"}, "all"),
            ({"method": "reclip+glip", "loss": "siglip", "tuning_epochs": 0.2}, "2/4"),
            ({"in_memory": True, "grad_checkpointing": True, "context_length": 6}, "8/16"),
            ({"resampled": True, "sampling": "weighted", "precision": "bf16"}, "8/16"),
            ({"image_tower": "timm:test_vit", "method": "reclip+flip", "image_size": 64, "tuning_epochs": 0.2}, "2/4"),
        ],
    )
    def test_methods_and_options(self, place, tmp_path, changes, kept):
        train_clip.main(config(place, tmp_path, epochs=0.5, **changes))
        records = metrics(tmp_path)
        assert {record["patches"] for record in records if record["phase"] == "training"} == {kept}
        assert all(np.isfinite(record["loss"]) for record in records)
        assert (tmp_path / "training" / "model" / "open_clip_model.safetensors").is_file()

    def test_training_learns_what_the_captions_say(self, place, tmp_path):
        data = str(place / "data" / "*.tar")
        train_clip.main(config(place, tmp_path, epochs=8, lr=3e-3, zero_shot=data, in_memory=True, eval_every=8))
        assert [record["zero_shot_top1"] for record in metrics(tmp_path) if "zero_shot_top1" in record][-1] > 60

    def test_tuning_of_a_model_that_is_there_begins_with_it(self, place, tmp_path):
        train_clip.main(config(place, tmp_path / "first", epochs=0.2))
        model = tmp_path / "first" / "training" / "model"
        train_clip.main(
            config(place, tmp_path / "second", init_from=model, epochs=0, tuning_epochs=0.2, tuning_lr=1e-12)
        )
        assert not (tmp_path / "second" / "training").exists()
        folders = (model, tmp_path / "second" / "tuning" / "model")
        before, after = (load_file(folder / "open_clip_model.safetensors") for folder in folders)
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_models_open_without_gaussmask(place, tmp_path):
    """In plain open_clip, timm and transformers, with the features that the trained towers give."""
    tower = {
        "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8,
        "intermediate_size": 64, "architectures": ["ViTModel"],
    }  # fmt: skip
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps(tower))
    towers = {"own": None, "timm": "timm:test_vit", "transformers": f"transformers:{tmp_path}/vit"}
    for name, image_tower in towers.items():
        train_clip.main(config(place, tmp_path / name, epochs=0.2, image_tower=image_tower))
    (tmp_path / "open.py").write_text(
        f"""
import sys
sys.modules["gaussmask"] = None
import open_clip, timm, torch, transformers
images = torch.rand(2, 3, 32, 32)
def model(name):
    return f"{tmp_path}/{{name}}/training/model"
own = open_clip.create_model("local-dir:" + model("own"), require_pretrained=True).eval()
assert own(images, open_clip.get_tokenizer("local-dir:" + model("own"))(["a", "b"]))[0].shape == (2, 16)
clip = open_clip.create_model("local-dir:" + model("timm"), load_weights=False, force_image_size=32).eval()
open_clip.load_checkpoint(clip, model("timm") + "/open_clip_model.safetensors")
trunk = timm.create_model("local-dir:" + model("timm") + "/timm", pretrained=True).eval()
torch.testing.assert_close(trunk(images), clip.visual.trunk(images))
vit = transformers.AutoModel.from_pretrained(model("transformers") + "/transformers").eval()
weights = open_clip.factory.load_state_dict(model("transformers") + "/open_clip_model.safetensors")
for name, tensor in vit.state_dict().items():
    assert torch.equal(tensor, weights["visual.trunk." + name]), name
"""
    )
    processes.run(tmp_path / "open.py")


def arguments(place: Path, output: Path, **changes) -> list[str]:
    setting = {
        "train-data": place / "data" / "*.tar", "model": place / "tiny.json", "epochs": 2, "tuning-epochs": 1,
        "batch-size": 4, "workers": 2, "shuffle": 10, "precision": "fp32", "device": "cpu", "log-every": 1,
        "checkpoint-every": 3, "captions": "random", "output": output,
    }  # fmt: skip
    return [text for name, value in (setting | changes).items() for text in (f"--{name}", str(value))]


SHORT = {"caption-tokens": 4, "caption-reduction": "frequency", "caption-threshold": 0.01, "mask-ratio-end": 0.75}


@pytest.mark.parametrize(
    "more",
    [pytest.param({}, marks=pytest.mark.thorough("with short captions there is more to restore")), SHORT],
    ids=["whole captions", "short captions, moving ratio"],
)
def test_killed_runs_go_on_to_the_weights_of_the_uninterrupted_one(place, tmp_path, more):
    """SIGKILL in the middle of training, then of tuning; with workers, random crops and captions, bit for bit."""
    printed = processes.run(PROGRAM, *arguments(place, tmp_path / "whole", **more))
    assert "steps/s" not in printed  # a bar, which moves, is not for the file of a job
    for phase, step in [("training", 10), ("tuning", 7), (None, None)]:
        resume = [] if phase == "training" else ["--resume"]
        run = processes.Program(PROGRAM, *arguments(place, tmp_path / "killed", **more), *resume)
        text = ""
        for line in run.output:
            text += line
            if phase is not None and f"{phase} {step}:" in line:
                run.kill()
                break
        assert run.wait()[0] == (0 if phase is None else -signal.SIGKILL), text
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed", "tuning")
    # The log has every step once, with the same losses.
    logs = [{(r["phase"], r["step"]): r["loss"] for r in metrics(tmp_path / name)} for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert len(metrics(tmp_path / "killed")) == len(logs[0])


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_trackers_get_the_numbers_of_the_log(place, tmp_path, monkeypatch, library):
    """Through the three functions that both libraries have: init, log and finish."""
    seen = []

    class Run:
        def log(self, record, step):
            seen.append((step, record))

        def finish(self):
            seen.append("finished")

    def init(**given):
        seen.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, library, types.SimpleNamespace(init=init))
    train_clip.main(config(place, tmp_path / "a run", project="ours", **{library: True}))
    assert (seen[0]["project"], seen[0]["name"], seen[0]["resume"]) == ("ours", "a run-training", "allow")
    assert seen[0]["config"]["mask_ratio"] == 0.5
    assert seen[-1] == "finished"
    assert [step for step, _ in seen[1:-1]] == list(range(1, 7))
    assert [record["loss"] for _, record in seen[1:-1]] == [record["loss"] for record in metrics(tmp_path / "a run")]
    assert "patches" not in seen[1][1]  # which is no number


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_says_so(place, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"{library} is not installed: pip install {library}, or leave out --{library}"):
        train_clip.main(config(place, tmp_path, **{library: True}))

    def init(**given):
        raise KeyError("no account")

    monkeypatch.setitem(sys.modules, library, types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=f"{library} could not begin a run: 'no account'"):
        train_clip.main(config(place, tmp_path, resume=True, **{library: True}))


def test_the_slurm_script_starts_the_program_and_goes_on_with_it(place, tmp_path):
    """With stand-ins for Slurm's two commands: one node of two processes, cut off after a checkpoint, queued again."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, line in [("scontrol", "echo localhost"), ("srun", 'exec "$@"')]:
        (bin / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    file = tmp_path / "run.json"
    file.write_text(json.dumps(clip_options.as_options(config(place, tmp_path / "run", batch_size=4))))
    for epochs, last in [("0.5", 6), ("1", 12)]:
        for folder in (tmp_path / "run" / "training").glob("model"):
            folder.rename(tmp_path / "earlier")
        ran = subprocess.run(
            ["bash", "examples/train_clip.slurm", "--config", str(file), "--epochs", epochs],
            cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert metrics(tmp_path / "run")[-1]["step"] == last
        assert ("going on from" in ran.stdout) == (last == 12)


def test_two_processes_train_shard_and_resume(place, tmp_path):
    """DDP and FSDP2, the latter resumed, also by one process; the log is of the whole batch."""
    changes = {
        "epochs": 1,
        "tuning-epochs": 0,
        "batch-size": 8,
        "accumulate": 2,
        "workers": 1,
        "zero-shot": place / "data/*.tar",
    }
    for name, more in [("ddp", []), ("fsdp", ["--fsdp"])]:
        processes.run(PROGRAM, *arguments(place, tmp_path / name, **changes), *more, processes=2)
        assert [r["samples"] for r in metrics(tmp_path / name) if "samples" in r] == [8, 16, 24, 32, 40, 48]
    weights = [load_file(tmp_path / n / "training/model/open_clip_model.safetensors") for n in ("ddp", "fsdp")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name].reshape(tensor.shape), tensor, rtol=1e-3, atol=1e-5)
    checkpoint = tmp_path / "fsdp/training/checkpoints/step-00000003"
    ranks = [torch.load(checkpoint / f"rank-{rank}.pt") for rank in range(2)]
    assert not torch.equal(ranks[0]["torch"], ranks[1]["torch"])  # the generators that masks come from
    for count, more in [(2, ["--fsdp"]), (1, [])]:
        cut = tmp_path / f"by {count}"
        shutil.copytree(checkpoint, cut / "training/checkpoints" / checkpoint.name)
        command = [*arguments(place, cut, **changes), *more, "--resume"]
        assert "going on from" in processes.run(PROGRAM, *command, processes=count)
        assert [r["step"] for r in metrics(cut) if "loss" in r] == [4, 5, 6]
    assert_same_weights(tmp_path / "fsdp", tmp_path / "by 2")


class TestCheckpoints:
    def save(self, folder: Path, step: int, model, keep: int = 2) -> None:
        optimizer = clip_step.make_optimizer(model.parameters(), lr=1e-3, weight_decay=0.1)
        model(*tiny_batch(2))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        progress = clip_stream.Progress(3, {0: (1, 2)}, 4)
        clip_checkpoints.save_checkpoint(
            folder, step, model, optimizer, progress, {}, clip_checkpoints.Ranks(), keep=keep
        )

    def test_the_last_ones_are_kept_and_unfinished_ones_are_not_seen(self, tmp_path):
        for step in (1, 2, 30):
            self.save(tmp_path, step, tiny_model())
        (tmp_path / ".step-00000031.part").mkdir()
        assert clip_checkpoints.latest_checkpoint(tmp_path).name == "step-00000030"
        assert sorted(path.name for path in tmp_path.glob("step*")) == ["step-00000002", "step-00000030"]

    def test_a_full_disk_says_so_and_leaves_the_last_good_one(self, tmp_path):
        """A limit on the size of files makes the real writes fail."""
        self.save(tmp_path, 1, tiny_model())
        model = tiny_model()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(UserError, match=r"step 2 could not be written .*the last good one is .*step-00000001"):
                self.save(tmp_path, 2, model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        optimizer = clip_step.make_optimizer(model.parameters(), lr=1e-3, weight_decay=0.1)
        found = clip_checkpoints.load_checkpoint(
            tmp_path / "step-00000001", model, optimizer, clip_checkpoints.Ranks(), own_state=True
        )
        assert found == clip_stream.Progress(3, {0: (1, 2)}, 4)

    def test_a_folder_that_cannot_be_written_to_says_so(self, tmp_path):
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(UserError, match=r"could not be written .*there is no earlier one"):
            self.save(tmp_path / "taken", 1, tiny_model())

    def test_another_model_says_so(self, tmp_path):
        self.save(tmp_path, 1, tiny_model())
        other = open_clip.CLIP(**{**TINY, "embed_dim": 24})
        optimizer = clip_step.make_optimizer(other.parameters(), lr=1e-3, weight_decay=0.1)
        with pytest.raises(UserError, match="another model"):
            clip_checkpoints.load_checkpoint(
                tmp_path / "step-00000001", other, optimizer, clip_checkpoints.Ranks(), own_state=True
            )


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mask_ratio": 1.5}, r"mask_ratio .*1\.5"),
            ({"model": "ViT-B-17"}, "unknown model 'ViT-B-17'.*ViT-B-16"),
            ({"model": "coca_ViT-B-32"}, "loss of its own"),
            ({"train_data": "/no/such/{000..002}.tar"}, "no shard /no/such/000.tar"),
            ({"train_data": "/no/such/*.tar"}, "no shard matches"),
            ({"train_data": "http://localhost/{000..002}.tar"}, "samples_per_epoch must be given"),
            ({"batch_size": 9, "accumulate": 2}, "multiple of processes x accumulate"),
            ({"epochs": 0}, "nothing to do"),
            ({"checkpoint_every": 0}, "checkpoint_every must be positive, got 0"),
            ({"image_tower": "resnet"}, "timm:NAME or transformers:NAME"),
            (
                {"image_tower": "transformers:vit", "method": "reclip"},
                "reclip needs an image tower of open_clip or timm",
            ),
            ({"image_tower": "timm:resnet18"}, "ResNet"),
            ({"init_from": Path("/no/such/weights")}, "no weights at /no/such/weights"),
            ({"fsdp": True}, "torchrun"),
            ({"probe": "somewhere"}, "probe needs zero_shot"),
            ({"method": "clip", "rule": "grid"}, "method clip has no mask, and rule grid is one"),
            ({"method": "clip", "mask_ratio_end": 0.9}, "mask_ratio_end 0.9 needs a mask"),
            ({"mask_ratio_end": 1.5}, r"mask_ratio .*1\.5"),
            ({"rule_options": {"anchors": 0.1}}, "belong to a rule, and none is given"),
            ({"rule": "grid", "rule_options": {"anchors": 0.1}}, "anchors"),
            ({"caption_tokens": 9}, "caption_tokens must be from 3 to 8, the context of the model, got 9"),
            ({"caption_reduction": "random"}, "caption_reduction random needs caption_tokens"),
            ({"caption_tokens": 4, "caption_reduction": "syntax"}, "pip install nltk"),
            ({"caption_tokens": 4, "caption_reduction": "frequency", "caption_threshold": 0}, "above 0, got 0"),
            (
                {"caption_tokens": 4, "caption_reduction": "frequency", "caption_counts": Path("/no/such.json")},
                "caption_counts /no/such.json is no JSON file",
            ),
        ],
    )
    def test_one_line_names_what_is_wrong(self, place, tmp_path, changes, message):
        with pytest.raises(UserError, match=message) as caught:
            train_clip.main(config(place, tmp_path, **changes))
        with pytest.raises(SystemExit) as left, one_line("train_clip.py"):
            raise caught.value
        assert str(left.value.code).startswith("train_clip.py: ")
        assert "\n" not in left.value.code

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "is no readable JSON file"),
            ("[1]", "must hold one object of options"),
            ('{"mask_ration": 0.5}', "'mask_ration' is no option; did you mean 'mask_ratio'?"),
        ],
    )
    def test_a_file_of_options_that_is_none(self, tmp_path, content, message):
        file = tmp_path / "run.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=re.escape(message)):
            options(config=file)

    def test_a_torch_that_compiles_wrong_gradients_is_refused(self, place, tmp_path, monkeypatch):
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
        with pytest.raises(UserError, match=r"compile on the CPU needs torch 2\.7, got 2\.6\.0\+cpu"):
            train_clip.main(config(place, tmp_path, compile=True))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_shards_without_a_single_pair(self, place, tmp_path, workers):
        webdataset.TarWriter(str(tmp_path / "empty.tar")).close()
        changes = {"train_data": str(tmp_path / "empty.tar"), "workers": workers}
        with pytest.raises(UserError, match="holds no images"):
            train_clip.main(config(place, tmp_path / "out", **changes))
        message = r"^train_clip\.py: reader 1 of 1 found no complete image-text pair"
        with pytest.raises(SystemExit, match=message), one_line("train_clip.py"):
            train_clip.main(config(place, tmp_path / "other", samples_per_epoch=10, **changes))

    def test_a_second_run_in_the_same_folder_and_weights_of_another_model(self, place, tmp_path, capsys):
        train_clip.main(config(place, tmp_path, epochs=0.2))
        with pytest.raises(UserError, match="holds a run already"):
            train_clip.main(config(place, tmp_path, epochs=0.2))
        with pytest.raises(UserError, match="method glip, this one has flip"):
            train_clip.main(config(place, tmp_path, epochs=0.2, method="flip", resume=True))
        capsys.readouterr()
        train_clip.main(config(place, tmp_path, epochs=0.2, lr=1e-4, resume=True))
        assert capsys.readouterr().out.splitlines() == [
            "changed since the run began: lr 0.001 -> 0.0001",
            "training is finished already",
        ]
        for name, change in {
            "projection": {"embed_dim": 24},
            "text": {"text_cfg": {**TINY["text_cfg"], "width": 32}},
        }.items():
            (place / f"{name}.json").write_text(json.dumps({**TINY, **change}))
            changes = {"model": str(place / f"{name}.json"), "init_from": tmp_path / "training" / "model"}
            with pytest.raises(UserError, match="weights of another model"):
                train_clip.main(config(place, tmp_path / name, **changes))

    def test_a_loss_that_is_no_number_stops_the_run(self, place, tmp_path):
        with pytest.raises(UserError, match=r"the loss is .* at step .*lower lr"):
            train_clip.main(config(place, tmp_path, lr=1e30, epochs=4))

    def test_the_program_ends_with_one_line(self, tmp_path):
        run = processes.Program(PROGRAM, "--train-data", "/no/such.tar", "--output", tmp_path / "out")
        assert run.wait() == (1, "train_clip.py: there is no shard /no/such.tar\n")


class TestEvaluation:
    def encoder(self, images: torch.Tensor, texts: torch.Tensor):
        class Given(torch.nn.Module):
            def encode_image(self, pixels, normalize):
                return images[pixels[:, 0, 0, 0].round().long()]

            def encode_text(self, tokens, normalize):
                return texts[tokens[:, 0]]

        return clip_evaluation.Encoder(
            Given(), lambda captions: torch.tensor([[int(c)] for c in captions]), "cpu", "fp32", (0, 0, 0),
            (1 / 255,) * 3, batch_size=7,
        )  # fmt: skip

    def test_retrieval_counts_what_a_plain_loop_counts(self):
        generator = np.random.default_rng(0)
        images, texts = (generator.normal(size=(count, 8)).astype(np.float32) for count in (20, 50))
        owners = np.sort(generator.integers(0, 20, 50 - 20).tolist() + list(range(20)))
        texts += 1.2 * images[owners]
        captions = [[str(t) for t in range(50) if owners[t] == image] for image in range(20)]
        pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 2, 2)
        data = clip_data.CaptionedImages(pixels, [own[0] for own in captions], all_captions=captions)
        found = clip_evaluation.retrieval(self.encoder(torch.tensor(images), torch.tensor(texts)), data)
        similarity = images @ texts.T
        for k in (1, 5, 10):
            texts_hit = [any(owners[t] == i for t in np.argsort(-similarity[i])[:k]) for i in range(20)]
            images_hit = [owners[t] in np.argsort(-similarity[:, t])[:k] for t in range(50)]
            assert found[f"image_to_text_r{k}"] == pytest.approx(100 * np.mean(texts_hit))
            assert found[f"text_to_image_r{k}"] == pytest.approx(100 * np.mean(images_hit))
        assert 0 < found["text_to_image_r1"] < 100

    def test_a_probe_finds_what_the_features_tell(self):
        labels = torch.arange(40) % 4
        features = torch.nn.functional.one_hot(labels, 4).float() + 0.1 * torch.randn(40, 4)
        pixels = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2)
        data = clip_data.CaptionedImages(pixels, ["0"] * 40, labels)
        encoder = self.encoder(features, torch.zeros(1, 4))
        assert clip_evaluation.linear_probe(encoder, data, data) == 100
        shuffled = clip_data.CaptionedImages(pixels, ["0"] * 40, labels.roll(1))
        assert clip_evaluation.linear_probe(encoder, data, shuffled) == 0


class TestCost:
    def test_the_count_is_what_the_arithmetic_says(self):
        """Blocks, projections of the kept patches and output: three times a forward, a multiply-add as two."""
        for mask_ratio, kept in [(0, 196), (0.75, 49)]:
            found = training_cost.count(training_cost.Config(), mask_ratio)
            tokens, width = 1 + kept, 768
            blocks = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
            edges = 2 * kept * 768 * width * 2 / 3 + 2 * 512 * width  # the image itself needs no gradient
            assert found["tokens per image"] == tokens
            assert found["GFLOP per image"] == pytest.approx(3 * (blocks + edges) / 1e9, rel=2e-3)

    @pytest.mark.parametrize("more", [{}, {"mask_ratios": (0, 0.75, 0.918), "caption_tokens": (77, 16, 8)}])
    def test_the_page_has_what_the_program_prints(self, capsys, more):
        training_cost.main(training_cost.Config(**more))
        printed, page = (
            [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in text.splitlines()
                if line.startswith("|")
            ]
            for text in (capsys.readouterr().out, (EXAMPLES / "README.md").read_text())
        )
        start = page.index(printed[0])
        assert page[start : start + len(printed)] == printed

    def test_short_captions_take_fewer_operations(self):
        """Of a text tower of width 512 and depth 12: 24 N d^2 + 4 N^2 d per block, three times."""
        config = training_cost.Config()
        whole, short = (training_cost.count(config, 0.75, length)["GFLOP per pair"] for length in (77, 16))
        blocks = [12 * (24 * n * 512**2 + 4 * n**2 * 512) for n in (77, 16)]
        assert whole - short == pytest.approx(3 * (blocks[0] - blocks[1]) / 1e9, rel=0.02)
        with pytest.raises(UserError, match="caption_tokens must be from 3 to 77"):
            training_cost.count(config, 0.75, 78)

    def test_hours_are_those_of_the_measured_speeds(self):
        rows = json.loads((EXAMPLES.parent / "benchmarks/results/h200-clip.json").read_text())["rows"]
        speeds = {row["mask_ratio"]: row["images_per_s"] for row in rows if row["contender"] == "gaussmask pixels"}
        speeds[0] = next(row["images_per_s"] for row in rows if row["contender"] == "no mask")
        page = (EXAMPLES / "README.md").read_text()
        shown = re.findall(r"^\| H200 \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", page, re.MULTILINE)
        assert len(shown) == 3
        for ratio, speed, hours in shown:
            assert speed == f"{speeds[float(ratio)]:,.0f}"
            assert hours == f"{30 * 10e6 / speeds[float(ratio)] / 3600:.1f}"
