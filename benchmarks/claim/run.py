"""One run of the plan: the data, the training and tuning of examples/clip_training.py, and every figure asked for.

A figure is called `stage.split.measure`. Stages: `masked` (after training, on masked images; for reclip, on small
images), `unmasked` (after training, on whole images) and `tuned` (after the unmasked tuning). Measures, in percent:
`top1`, `top5` and `mean_per_class_recall` of the zero-shot classification, `probe` of the linear probe, and retrieval's
recalls.
"""

import functools
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import captioned_scenes
import torch
import webdataset
from clip_data import CaptionedImages, load_scenes, load_shards
from clip_evaluation import Encoder, linear_probe, retrieval, zero_shot
from clip_training import build_model, operations, pretrain_and_tune
from torchvision.transforms import functional as transforms
from torchvision.transforms.v2.functional import to_pil_image

import gaussmask
from claim.design import GRID, SCENES, Run, Setting
from claim.schedules import masks_of
from gaussmask.functional import num_kept_patches

STAGES = {"masked inference": "masked", "unmasked": "unmasked", "after tuning": "tuned"}
TRAIN_SCENES_SEED, TEST_SCENES_SEED = 1, 2
MAX_TEST_SCENES = 3000
TUNING_SHARE = 0.1  # of a budget
CURVE_POINTS = 12


@dataclass(frozen=True)
class Outcome:
    """Of a run.

    Args:
        figures: every one that was asked for, and those that come with them.
        curve: of runs with all of the setting's budget: `images` seen, `operations` in steps of a model without a mask,
            and `top1` in percent on whole images, all at the same moments.
    """

    figures: dict[str, float]
    curve: dict[str, list[float]]


@dataclass(frozen=True)
class Length:
    """Of a run, in steps, and what a step of the training costs in steps of a model without a mask."""

    steps: int
    tuning_steps: int
    cost: float = 1.0


def length_of(run: Run, setting: Setting) -> Length:
    """The setting's, or what the run's budget allows: a tenth of it for the tuning, if there is a mask."""
    if run.budget is None:
        return Length(setting.steps, setting.tuning_steps)
    if run.method == "clip":
        return Length(run.budget, 0)
    recipe = replace(setting.recipe_of(run), mask_ratio=run.mask_ratio)
    cost = operations(recipe, run.method) / operations(recipe, "clip")
    tuning_steps = max(1, round(TUNING_SHARE * run.budget))
    return Length(max(1, round((run.budget - tuning_steps) / cost)), tuning_steps, cost)


def train_and_evaluate(run: Run, figures: Collection[str], setting: Setting, folder: Path) -> Outcome:
    """Every figure of the run, and no other; the linear probe only if it is among `figures`.

    The initial weights, the batches and their order depend on the seed alone, so two runs with the same seed and data
    differ by their masks.

    Args:
        folder: with the data sets.
    """
    data, test = train_data(run, setting, folder), test_data(run, setting, folder)
    config = setting.recipe_of(run)
    steps_per_pass = len(data) // config.batch_size
    if steps_per_pass == 0:
        raise ValueError(f"{run.data} has {len(data)} training images, and a batch takes {config.batch_size}")
    length = length_of(run, setting)
    config = replace(config, epochs=length.steps / steps_per_pass, tuning_epochs=length.tuning_steps / steps_per_pass)
    torch.manual_seed(run.seed)
    reclip = run.method == "reclip"
    start = replace(config, image_size=small_size(run, config.patch_size)) if reclip else config
    model = build_model(start)
    masks = masks_of(run)
    if masks.drop is not None:
        gaussmask.attach(model.visual, masks.drop)
    found: dict[str, float] = {}

    def evaluate(column: str, encoder: Encoder) -> None:
        stage = STAGES[column]
        if stage == "masked" and run.method == "clip":
            return
        for split, images in test.items():
            shown = resize(images, start.image_size) if stage == "masked" else images
            masked = stage == "masked" and masks.drop is not None
            measures = zero_shot(encoder, shown, masked=masked) if images.labels is not None else {}
            if _has_captions(run, setting) and not masked:
                measures |= retrieval(encoder, shown)
            if f"{stage}.{split}.probe" in figures:
                measures["probe"] = linear_probe(encoder, data.head(setting.probe_images), images)
            found.update({f"{stage}.{split}.{name}": value for name, value in measures.items()})

    def reveal() -> None:
        drop = gaussmask.attached(model.visual)
        if drop is not None:
            drop.mask_ratio = 0.0
        elif reclip:
            visual: Any = model.visual
            visual.set_input_size(img_size=config.image_size)

    steps = itertools.count(1)

    def change(images: int, tuning: bool) -> None:
        if not tuning:
            masks.change(model.visual, next(steps) / length.steps)

    with_curve = run.budget == setting.budget  # and not of the short runs by which a learning rate is chosen
    training, tuning = pretrain_and_tune(
        model,
        resize(data, start.image_size),
        config,
        run.seed,
        evaluate=evaluate,
        reveal=reveal,
        tuning_data=data,
        curve_data=next(iter(test.values())).head(setting.curve_images) if with_curve else None,
        curve_steps=math.ceil(length.steps / CURVE_POINTS),
        advance=change,
        step_on=masks.step_on,
    )
    if not length.tuning_steps:  # a model without a mask has nothing to get used to
        found |= {name.replace("unmasked.", "tuned."): value for name, value in found.items()}
    curve = curve_of(training, tuning, length, config.batch_size) if with_curve else {}
    return Outcome(found | {"passes": config.epochs}, curve)


def curve_of(
    training: Sequence[Mapping[str, float]], tuning: Sequence[Mapping[str, float]], length: Length, batch_size: int
) -> dict[str, list[float]]:
    """From the records of `clip_training.train`."""
    curve: dict[str, list[float]] = {"images": [], "operations": [], "top1": []}
    paid = length.steps * length.cost
    for records, cost, steps_before, paid_before in (
        (training, length.cost, 0, 0.0),
        (tuning, 1.0, length.steps, paid),
    ):
        for record in records:
            if "score" in record:
                steps = record["samples"] / batch_size
                curve["images"].append((steps_before + steps) * batch_size)
                curve["operations"].append(round(paid_before + steps * cost, 2))
                curve["top1"].append(round(record["score"], 3))
    return curve


def _has_captions(run: Run, setting: Setting) -> bool:
    return run.data != SCENES and setting.data_set(run.data).retrieval


def small_size(run: Run, patch_size: int) -> int:
    """Side of the images that have as many patches as the masks would keep, or the next lower square number."""
    kept = num_kept_patches(GRID**2, run.mask_ratio)
    return patch_size * int(kept**0.5)


def resize(data: CaptionedImages, size: int) -> CaptionedImages:
    if data.images.shape[-1] == size:
        return data
    return replace(data, images=transforms.resize(data.images, [size, size], antialias=True))


def train_data(run: Run, setting: Setting, folder: Path) -> CaptionedImages:
    if run.data == SCENES:
        data = _scenes_of(run, setting.num_scenes, setting, TRAIN_SCENES_SEED)
    else:
        data = _shards(folder, run.data, "train", setting.data_set(run.data).image_size)
    if run.train_images is None:
        return data
    if run.train_images > len(data):
        raise ValueError(f"train_images of {run} is more than the {len(data)} that {run.data} has")
    return data.head(run.train_images)


def test_data(run: Run, setting: Setting, folder: Path) -> dict[str, CaptionedImages]:
    """By split."""
    count = setting.test_images
    if run.data == SCENES:
        return {"test": _scenes_of(run, min(count, MAX_TEST_SCENES), setting, TEST_SCENES_SEED)}
    data = setting.data_set(run.data)
    by_split = {split: _shards(folder, data.name, split, data.image_size).head(count) for split in data.splits}
    return {split: replace(images, templates=[data.template]) for split, images in by_split.items()}


def _scenes_of(run: Run, count: int, setting: Setting, seed: int) -> CaptionedImages:
    if run.centering is None or run.object_size is None:
        raise ValueError(f"a run on scenes needs centering and object_size, got {run}")
    return _scenes(count, setting.scene_size, run.centering, run.object_size, seed)


@functools.lru_cache(maxsize=8)
def _shards(folder: Path, name: str, split: str, image_size: int) -> CaptionedImages:
    return load_shards(str(shard(folder, name, split)), image_size=image_size)


@functools.lru_cache(maxsize=4)
def _scenes(count: int, size: int, centering: float, object_size: float, seed: int) -> CaptionedImages:
    return load_scenes(count, image_size=size, centering=centering, object_size=object_size, seed=seed)


def shard(folder: Path, name: str, split: str) -> Path:
    """The file of a split.

    Raises:
        FileNotFoundError: when there is none.
    """
    for suffix in (".tar", ".tar.gz"):
        file = folder / name / f"{split}{suffix}"
        if file.is_file():
            return file
    raise FileNotFoundError(f"there is neither {name}/{split}.tar nor {name}/{split}.tar.gz in {folder}")


def write_stand_ins(folder: Path, setting: Setting, count: int = 160) -> None:
    """Shards of generated scenes in the place of every data set, for a run that measures nothing."""
    several = (setting.retrieval_set, *setting.more_retrieval_sets)
    for data in setting.data_sets:
        (folder / data.name).mkdir(parents=True)
        for seed, split in enumerate(("train", *data.splits)):
            scenes = captioned_scenes.make_scenes(count, image_size=data.image_size, seed=seed)
            with webdataset.TarWriter(str(folder / data.name / f"{split}.tar")) as shards:
                for index, (image, caption, label) in enumerate(zip(*scenes, strict=True)):
                    sample = {"__key__": f"{index:05}", "png": to_pil_image(image), "txt": caption}
                    if data in several:
                        sample["json"] = {"captions": [caption, f"this is {caption}"]}
                    else:
                        sample["cls"] = int(label)
                    shards.write(sample)
        if data not in several:
            classes = json.dumps({"classes": captioned_scenes.CLASSNAMES})
            (folder / data.name / "meta.json").write_text(classes, encoding="utf-8")
