"""The options of train_clip.py, in groups: flags on the command line, or a JSON file of them.

The flags name no group (`--mask-ratio`, not `--mask.mask-ratio`), and the file is as flat. What a run writes to
`config.json`, `--config` reads.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from user_errors import UserError

Method = Literal["clip", "flip", "glip", "reclip", "reclip+flip", "reclip+glip"]
Rule = Literal["random", "gaussian", "grid", "block", "cluster"]
Reduction = Literal["truncate", "simple", "random", "shuffle", "syntax", "frequency"]


@dataclass(frozen=True)
class Data:
    """Where the pairs come from.

    Args:
        train_data: shards (path, URL, `pipe:`, braces, `*`, several joined by `::`), or with `in_memory` also an image
            folder or torchvision:NAME.
        in_memory: read all training images into memory first, at the model's image size.
        samples_per_epoch: how many samples count as one epoch; counted in local shards if not given.
        shuffle: samples in each reader's shuffle buffer.
        resampled: draw shards with replacement instead of going through all of them.
        crop_scale: share of the image's area that random crops take, at least and at most.
        decode: JPEG files: full (every pixel), reduced (at a half, quarter or eighth where the crop is so much smaller:
            less work, pixels that differ a little), or device (nvJPEG on the GPU, or libjpeg in the main process).
        workers: readers of each process. The log says the share of the time that a process `waited` for them.
        prefetch: batches that each reader has ready.
    """

    train_data: str
    in_memory: bool = False
    samples_per_epoch: int | None = None
    shuffle: int = 5000
    resampled: bool = False
    crop_scale: tuple[float, float] = (0.9, 1.0)
    decode: Literal["full", "reduced", "device"] = "full"
    workers: int = 4
    prefetch: int = 2


@dataclass(frozen=True)
class Text:
    """Captions, which the masked training may shorten; the tuning and every evaluation see whole ones.

    Args:
        captions: the first caption of an image, or each time a random one of all (`"captions"` in KEY.json).
        context_length: of the model, in tokens, instead of its own.
        caption_tokens: of a caption in the masked training, the two at its ends included; by default all of the
            context.
        caption_reduction: how a longer caption becomes so short. truncate: the first tokens. simple (a random stretch),
            random (random tokens in order), shuffle (out of order), syntax (nouns first; needs nltk and its data):
            those of open_clip, from CLIPA (arXiv 2305.07017). frequency: random words, rare ones more often, as in
            CLIPF (arXiv 2412.16148).
        caption_threshold: of frequency: a word that is a share f of all words is dropped with a weight of
            1 - sqrt(threshold / f). CLIPF takes 1e-6 for CC12M.
        caption_counts: of frequency: a file `{"word": count}`; counted in the shards once, and left in `output`, if
            not given.
    """

    captions: Literal["first", "random"] = "first"
    context_length: int | None = None
    caption_tokens: int | None = None
    caption_reduction: Reduction = "truncate"
    caption_threshold: float = 1e-6
    caption_counts: Path | None = None


@dataclass(frozen=True)
class Model:
    """Both towers.

    Args:
        model: a name of open_clip, or a .json file or folder in its format.
        image_tower: timm:NAME or transformers:NAME instead of the model's own image tower.
        image_size: instead of the model's own.
        init_from: weights to start from: a `model/` folder of a run, or a file.
    """

    model: str = "ViT-B-16"
    image_tower: str | None = None
    image_size: int | None = None
    init_from: Path | None = None


@dataclass(frozen=True)
class Mask:
    """Which patches are dropped in the masked training.

    Args:
        method: clip (no mask), flip (random), glip (centred), reclip (smaller images), or reclip with a mask.
        rule: a mask of gaussmask in place of the method's.
        rule_options: of `rule`, by the names of its class: for example `anchors 0.1 noise 0.05` of cluster.
        mask_ratio: share of the patches that is dropped.
        mask_ratio_end: the share moves evenly from `mask_ratio` to this one while the masked training runs.
        sigma: of glip: the variance of the Gaussian on the square [-1, 1]^2.
        sampling: of glip: additive (the authors' rule) or weighted (every patch has a chance).
        stage: where patches are dropped: after the projection (tokens), before (pixels), or before where that gives the
            same tokens (auto).
        small_image_size: of reclip; half of the model's image size if not given.
    """

    method: Method = "glip"
    rule: Rule | None = None
    rule_options: dict[str, int | float] = field(default_factory=dict)
    mask_ratio: float = 0.5
    mask_ratio_end: float | None = None
    sigma: float = 0.2
    sampling: Literal["additive", "weighted"] = "additive"
    stage: Literal["auto", "tokens", "pixels"] = "auto"
    small_image_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How long, in which batches, and at which rate.

    Args:
        loss: softmax over the batch (clip) or sigmoid of each pair (siglip).
        epochs: of the masked training; a fraction is part of an epoch.
        tuning_epochs: without a mask and on full-sized images, afterwards.
        batch_size: of the contrastive loss, over all processes.
        accumulate: forwards that the batch of a process is split into. The loss still compares all of it.
        tuning_batch_size: likewise in the tuning; that of training if not given.
        tuning_accumulate: likewise in the tuning, where nothing is masked; that of training if not given.
        lr: the peak; a linear warm-up comes before and a cosine to 0 after.
        tuning_lr: the peak of the tuning.
        warmup: share of the steps.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        eps: of AdamW.
        max_norm: gradients of a larger norm are scaled down to it.
        seed: of weights, order of the data and (together with the rank) masks.
    """

    loss: Literal["clip", "siglip"] = "clip"
    epochs: float = 30
    tuning_epochs: float = 1
    batch_size: int = 1280
    accumulate: int = 1
    tuning_batch_size: int | None = None
    tuning_accumulate: int | None = None
    lr: float = 1e-3
    tuning_lr: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_norm: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Compute:
    """What it runs on.

    Args:
        device: cuda or cpu.
        precision: bf16 (autocast), fp32, or auto for the faster of the two.
        compile: torch.compile. Where the ratio moves, every number of kept patches may compile anew.
        grad_checkpointing: recompute activations in the backward, for memory.
        fsdp: shard weights, gradients and moments over the processes (FSDP2) instead of replicating them (DDP).
    """

    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What the model is measured by, always on whole images and captions.

    Args:
        zero_shot: labelled test images, for zero-shot top-1 and top-5.
        imagenet: ImageNet's validation images (shards, a folder of them, or the usual folder), for zero-shot top-1 and
            top-5 with open_clip's names; see imagenet_shards.py.
        imagenet_templates: OpenAI's 80 prompts for each class, or 7 of them (simple).
        probe: labelled training images for a linear probe, which is tested on `zero_shot`.
        retrieval: images with captions, for recall at 1, 5 and 10.
        eval_every: epochs between evaluations; there is always one at the end of a phase.
        eval_batch_size: of a process.
    """

    zero_shot: str | None = None
    imagenet: str | None = None
    imagenet_templates: Literal["openai", "simple"] = "openai"
    probe: str | None = None
    retrieval: str | None = None
    eval_every: float = 1
    eval_batch_size: int = 500


@dataclass(frozen=True)
class Run:
    """What a run leaves, and how it begins.

    Args:
        output: folder for everything that the run leaves, seen by all nodes.
        resume: go on from the last checkpoint in `output`, or begin if there is none.
        config: a file of options, as a run leaves it (`config.json`); options beside it take precedence.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
        keep: so many of the latest checkpoints are kept.
        tensorboard: also log to TensorBoard's event files in `output`.
        wandb: also log to Weights & Biases (`pip install wandb`).
        trackio: also log to trackio (`pip install trackio`).
        project: of wandb and trackio; the run takes the name of `output`.
    """

    output: Path = Path("build/clip")
    resume: bool = False
    config: Path | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 3
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: str = "gaussmask"


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    data: Data
    text: Text = field(default_factory=Text)
    model: Model = field(default_factory=Model)
    mask: Mask = field(default_factory=Mask)
    recipe: Recipe = field(default_factory=Recipe)
    compute: Compute = field(default_factory=Compute)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)


def parse(arguments: Sequence[str], *, program: str, description: str) -> Config:
    """What the command line says, after the file that it names with `--config`.

    Raises:
        UserError: for a file that can't be read or holds what is no option.
    """
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("--config", type=Path)
    file = ahead.parse_known_args(arguments)[0].config
    given = [*(as_arguments(_read(file)) if file is not None else []), *arguments]  # the later one of two counts
    return tyro.cli(Config, args=given, prog=program, description=description, config=(tyro.conf.OmitArgPrefixes,))


def as_options(config: Config) -> dict[str, Any]:
    """Every option by its name, as JSON."""
    groups: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {name: value for group in groups.values() for name, value in group.items()}


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Flags that say the same as `options`, whose None is an option that is not given."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            found += [f"--{flag}", *(str(part) for pair in value.items() for part in pair)] if value else []
        elif isinstance(value, list | tuple):
            found += [f"--{flag}", *(str(part) for part in value)]
        elif value is not None:
            found.append(f"--{flag}={value}")  # which may begin with a dash
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"config {file} is no readable JSON file: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f'config {file} must hold one object of options, such as {{"mask_ratio": 0.75}}')
    known = [option.name for group in dataclasses.fields(Config) for option in dataclasses.fields(_type(group))]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"config {file}: {name!r} is no option" + (f"; did you mean {near[0]!r}?" if near else ""))
    return options


def _type(group: dataclasses.Field[Any]) -> Any:
    return group.type
