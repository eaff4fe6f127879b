"""What CLIP training costs in tokens and operations, with and without a mask: counted on the model itself.

    python examples/training_cost.py
    python examples/training_cost.py --model ViT-L-14 --mask-ratios 0 0.5 0.75 --samples 400e6 --epochs 32
    python examples/training_cost.py --mask-ratios 0.75 0.918 --caption-tokens 77 32 16 8

No data and no GPU: the model lies on the meta device, and torch's counter follows one forward and backward.
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import tyro
from clip_captions import check_reduction
from clip_step import count_operations
from clip_towers import create_model, model_config
from torch.utils.flop_counter import FlopCounterMode
from user_errors import UserError, one_line, setting_up

import gaussmask
from gaussmask.functional import num_kept_patches


@dataclass(frozen=True)
class Config:
    """What to count.

    Args:
        model: a name of open_clip, or a .json file or folder in its format.
        image_tower: timm:NAME or transformers:NAME instead of the model's own image tower.
        image_size: instead of the model's own.
        mask_ratios: shares of the patches that are dropped; 0 is training without a mask.
        caption_tokens: of a caption, each with each of the ratios; the model's context if none is named.
        stage: where they are dropped: after the projection (tokens), before (pixels), or before where that gives the
            same tokens (auto).
        samples: images of one epoch.
        epochs: of training.
    """

    model: str = "ViT-B-16"
    image_tower: str | None = None
    image_size: int | None = None
    mask_ratios: tuple[float, ...] = (0, 0.5, 0.75, 0.918)
    caption_tokens: tuple[int, ...] = ()
    stage: str = "auto"
    samples: float = 10e6
    epochs: float = 30


def main(config: Config) -> None:
    """Print a table, a row per ratio and length of the captions; `relative` is to the first one."""
    lengths = config.caption_tokens or (None,)
    rows = [count(config, mask_ratio, length) for length in lengths for mask_ratio in config.mask_ratios]
    table = pd.DataFrame(rows)
    table["relative"] = table["GFLOP per pair"] / table["GFLOP per pair"].iloc[0]
    images = config.samples * config.epochs
    table["billion image tokens"] = images * table["tokens per image"] / 1e9
    table["EFLOP"] = images * table["GFLOP per pair"] / 1e9
    formats = {"mask ratio": "g", "relative": ".2f", "tokens per image": ".0f", "tokens per caption": ".0f"}
    print(table.to_markdown(index=False, floatfmt=[formats.get(name, ".1f") for name in table.columns]))


def count(config: Config, mask_ratio: float, caption_tokens: int | None = None) -> dict[str, float]:
    """Tokens of an image, and operations of a training step per image-text pair."""
    with setting_up():
        architecture, unmasked = build(config.model, config.image_tower, config.image_size)
        facts = gaussmask.describe(unmasked)
        if facts.grid_size is None:
            raise UserError(facts.reason or "this model gives every image a grid of its own: there is no one cost")
        model = copy.deepcopy(unmasked)
        gaussmask.attach(model, gaussmask.RandomPatchDropout(mask_ratio), stage=config.stage)
        if caption_tokens is not None:
            check_reduction(architecture, caption_tokens)
    size = architecture["vision_cfg"].get("image_size", 224)
    images = torch.zeros(1, 3, size, size, device="meta")
    length = caption_tokens or architecture["text_cfg"].get("context_length", 77)
    both = count_operations(model, images, torch.zeros(1, length, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as image:
        model.encode_image(images).sum().backward()
    return {
        "mask ratio": mask_ratio,
        "tokens per image": facts.num_prefix_tokens + num_kept_patches(math.prod(facts.grid_size), mask_ratio),
        **({} if caption_tokens is None else {"tokens per caption": caption_tokens}),
        "GFLOP per image": image.get_total_flops() / 1e9,
        "GFLOP per pair": both / 1e9,
    }


@functools.cache
def build(name: str, image_tower: str | None, image_size: int | None) -> tuple[dict[str, Any], Any]:
    """The architecture, and the model without values."""
    architecture = model_config(name, image_tower=image_tower, image_size=image_size)
    return architecture, create_model(architecture).to("meta").train()


if __name__ == "__main__":
    with one_line("training_cost.py"):
        main(tyro.cli(Config))
