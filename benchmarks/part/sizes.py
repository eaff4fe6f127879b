"""How large the measured models and batches are: on a CPU, on a GPU, and in a quick run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

FEATURES = 512  # of CLIP's joint space, in a full run


@dataclass(frozen=True)
class VisionModel:
    """A timm ViT, the batch it is trained with, and what to change about it."""

    name: str
    batch: int
    overrides: Mapping[str, Any] = field(default_factory=lambda: {"num_classes": FEATURES})

    def build(self, **more: Any) -> nn.Module:
        model: nn.Module = timm.create_model(self.name, **self.overrides, **more)
        return model


@dataclass(frozen=True)
class Photos:
    """Width and height of the stand-ins that are loaded, side of the crops, and how many are a batch."""

    photos: tuple[tuple[int, int], ...] = ((500, 375), (1000, 750))
    crop: int = 224
    batch: int = 64


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured.

    Args:
        layer: shape (B, 1 + N, D) of the tokens in part layer.
        step: models of part step.
        image, text: towers of part clip; `text` are the arguments of open_clip's TextTransformer.
        loader: photos of part loader.
    """

    layer: tuple[int, int, int]
    step: tuple[VisionModel, ...]
    image: VisionModel
    text: Mapping[str, int]
    loader: Photos = Photos()


CLIP_TEXT = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "output_dim": FEATURES,
}  # fmt: skip
VIT_B = "vit_base_patch16_224"
CPU = Sizes(
    layer=(64, 197, 768),
    step=(VisionModel("vit_tiny_patch16_224", 32), VisionModel("vit_small_patch16_224", 16), VisionModel(VIT_B, 8)),
    image=VisionModel(VIT_B, 1),
    text=CLIP_TEXT,
)
CUDA = Sizes(
    layer=(512, 197, 768),
    step=(VisionModel("vit_tiny_patch16_224", 512), VisionModel("vit_small_patch16_224", 512), VisionModel(VIT_B, 256)),
    image=VisionModel(VIT_B, 1),
    text=CLIP_TEXT,
)
TINY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 16}
QUICK = Sizes(
    layer=(4, 17, 32),
    step=(VisionModel("vit_tiny_patch16_224", 4, TINY),),
    image=VisionModel("vit_tiny_patch16_224", 1, TINY),
    text={"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "output_dim": 16},
    loader=Photos(((80, 60),), 16, 4),
)
