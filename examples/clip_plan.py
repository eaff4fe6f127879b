"""What train_clip.py does with its options: the phases of a run and its model, or one line that says why not.

options -> training (masked, perhaps on short captions) -> tuning (everything whole)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clip_captions import check_reduction
from clip_checkpoints import Ranks
from clip_options import Config, Mask, as_options
from clip_step import make_drop
from clip_towers import model_config
from user_errors import UserError

import gaussmask


@dataclass(frozen=True)
class Phase:
    """Training with masks, or tuning without.

    Args:
        mask_ratio_end: of `drop`, whose ratio moves to it while the phase runs.
        caption_tokens: of a caption; None is the whole context.
        weights: to begin with.
    """

    name: str
    epochs: float
    batch_size: int
    accumulate: int
    lr: float
    image_size: int
    drop: gaussmask.PatchDropout | None
    mask_ratio_end: float | None
    caption_tokens: int | None
    weights: Path | None
    seed: int


def plan(config: Config, ranks: Ranks) -> list[Phase]:
    """The phases of the run; raises for settings that can't be meant."""
    architecture = configure_model(config)
    size = architecture["vision_cfg"].get("image_size", 224)
    mask, recipe, text = config.mask, config.recipe, config.text
    drop = choose_drop(mask)
    if text.caption_tokens is not None:
        check_reduction(architecture, text.caption_tokens, text.caption_reduction, text.caption_threshold)
    elif text.caption_reduction != "truncate":
        raise UserError(f"caption_reduction {text.caption_reduction} needs caption_tokens: to how many it reduces")
    training = Phase(
        name="training",
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        lr=recipe.lr,
        image_size=(mask.small_image_size or size // 2) if mask.method.startswith("reclip") else size,
        drop=drop,
        mask_ratio_end=mask.mask_ratio_end,
        caption_tokens=text.caption_tokens,
        weights=config.model.init_from,
        seed=recipe.seed,
    )
    tuning = Phase(
        name="tuning",
        epochs=recipe.tuning_epochs,
        batch_size=recipe.tuning_batch_size or recipe.batch_size,
        accumulate=recipe.tuning_accumulate or recipe.accumulate,
        lr=recipe.tuning_lr,
        image_size=size,
        drop=None,
        mask_ratio_end=None,
        caption_tokens=None,
        weights=config.run.output / "training" / "model" if recipe.epochs > 0 else config.model.init_from,
        seed=recipe.seed + 1_000_000,
    )
    phases = [phase for phase in (training, tuning) if phase.epochs > 0]
    if not phases:
        raise UserError("epochs and tuning_epochs are both 0: there is nothing to do")
    for phase in phases:
        if phase.batch_size < 1 or phase.accumulate < 1 or phase.batch_size % (ranks.world_size * phase.accumulate):
            raise UserError(
                f"batch_size of {phase.name} must be a multiple of processes x accumulate = {ranks.world_size} x "
                f"{phase.accumulate}, got {phase.batch_size}"
            )
    every = {"eval_every": config.evaluation.eval_every}
    every |= {name: getattr(config.run, name) for name in ("log_every", "checkpoint_every", "keep")}
    for name, value in every.items():
        if value <= 0:
            raise UserError(f"{name} must be positive, got {value}")
    if mask.method.startswith("reclip") and (config.model.image_tower or "").startswith("transformers:"):
        raise UserError("reclip needs an image tower of open_clip or timm: those of transformers keep their image size")
    if config.evaluation.probe and not config.evaluation.zero_shot:
        raise UserError("probe needs zero_shot: the probe is tested on its images")
    if config.compute.compile and config.compute.device == "cpu" and torch.__version__ < "2.7":
        raise UserError(
            f"compile on the CPU needs torch 2.7, got {torch.__version__}: where a token is repeated, torch 2.6 loses "
            "gradients of its embedding there"
        )
    return phases


def choose_drop(mask: Mask) -> gaussmask.PatchDropout | None:
    """What drops patches, at `mask_ratio`; None for training on all of them."""
    method = mask.rule or mask.method.removeprefix("reclip").removeprefix("+") or "clip"
    if mask.rule is None and mask.rule_options:
        raise UserError(f"rule_options {mask.rule_options} belong to a rule, and none is given: --rule cluster")
    if mask.rule is not None and mask.method == "clip":
        raise UserError(f"method clip has no mask, and rule {mask.rule} is one: leave out one of the two")
    drop = make_drop(method, mask.mask_ratio, sigma=mask.sigma, sampling=mask.sampling, options=mask.rule_options)
    if mask.mask_ratio_end is not None:
        if drop is None:
            raise UserError(f"mask_ratio_end {mask.mask_ratio_end} needs a mask, and method {mask.method} has none")
        drop.mask_ratio, drop.mask_ratio = mask.mask_ratio_end, mask.mask_ratio  # which refuses what is no ratio
    return drop


def ratio_at(progress: float, mask: Mask) -> float:
    """The mask ratio at a share of the masked training."""
    end = mask.mask_ratio if mask.mask_ratio_end is None else mask.mask_ratio_end
    return mask.mask_ratio + (end - mask.mask_ratio) * progress


def configure_model(config: Config, image_size: int | None = None) -> dict[str, Any]:
    """open_clip's configuration of the model, for images of `image_size`."""
    architecture = model_config(
        config.model.model,
        image_tower=config.model.image_tower,
        image_size=image_size or config.model.image_size,
        siglip=config.recipe.loss == "siglip",
    )
    if config.text.context_length is not None:
        architecture["text_cfg"]["context_length"] = config.text.context_length
    if config.compute.fsdp:
        architecture["nonscalar_logit_scale"] = True  # FSDP2 shards no scalars
    return architecture


def prepare_output(config: Config, ranks: Ranks) -> None:
    """The folder of the run, which must be new or asked to be resumed."""
    folder = config.run.output
    if ranks.first:
        begun = folder / "config.json"
        if begun.exists() and not config.run.resume:
            raise UserError(f"{folder} holds a run already: take another --output, or --resume to go on with it")
        folder.mkdir(parents=True, exist_ok=True)
        setting = as_options(config)
        if begun.exists():
            before = json.loads(begun.read_text(encoding="utf-8"))
            for name in ("model", "image_tower", "method", "loss"):
                if before[name] != setting[name]:
                    raise UserError(
                        f"{folder} holds a run with {name} {before[name]}, this one has {setting[name]}: take "
                        "another --output"
                    )
            changed = [
                f"{name} {before[name]} -> {value}"
                for name, value in setting.items()
                if name in before and value != before[name] and name not in ("resume", "config")
            ]
            if changed:
                print(f"changed since the run began: {', '.join(changed)}")
        begun.write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")
