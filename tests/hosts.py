"""Tiny host models with random weights, and what the tests have to know about each."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import open_clip
import timm
import torch
import transformers as tf
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg


class Host(NamedTuple):
    """How to build a model and call it, and where its tokens come out.

    Args:
        build: makes the model, in training mode.
        hidden: path of a module whose output is (B, P + K, D), behind the last block.
        prefix: P.
        pooled: model output to what a class token or an attention pool makes of the tokens; None for other pooling.
        inputs: batch size to keyword arguments.
        grid: (H, W) of the patches of `inputs`; None for images with grids of their own.
    """

    build: Callable
    hidden: str
    prefix: int
    pooled: Callable | None
    inputs: Callable
    grid: tuple[int, int] | None = (6, 6)


def images(batch_size, name="pixel_values", size=(48, 48), **more):
    return {name: torch.randn(batch_size, 3, *size), **more}


def with_text(inputs, name, batch_size):
    tokens = torch.randint(1, 30, (batch_size, 8))
    tokens[:, -1] = 31  # the end of the text
    return {**inputs(batch_size), name: tokens}


PADDED_GRIDS = [(6, 5), (9, 4), (3, 4)]


def padded_patches(batch_size):
    """NaFlex input: images of different grids, padded to 36 patches of 8 x 8."""
    coord, valid = torch.zeros(batch_size, 36, 2, dtype=torch.long), torch.zeros(batch_size, 36, dtype=torch.bool)
    for i, (height, width) in enumerate(PADDED_GRIDS[:batch_size]):
        coord[i, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[i, : height * width] = True
    return {"x": {"patches": torch.randn(batch_size, 36, 8 * 8 * 3), "patch_coord": coord, "patch_valid": valid}}


x_images = partial(images, name="x")


def tensor(output):
    return output


def first(output):
    return output[0]


def pooler(output):
    return output.pooler_output


def logits(output):
    return output.logits


def embeds(output):
    return output.image_embeds


# timm

TIMM_SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 48, "patch_size": 8}
NAFLEX_SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (6, 6), "patch_size": 8}


def make_timm(name="vit_base_patch16_224", **changes):
    return timm.create_model(name, **{**TIMM_SIZE, "num_classes": 5, **changes})


def make_naflex(**changes):
    return NaFlexVit(NaFlexVitCfg(**{**NAFLEX_SIZE, **changes}), num_classes=5)


def timm_host(name, prefix=1, pooled=tensor, size=(48, 48), grid=(6, 6), **changes):
    return Host(partial(make_timm, name, **changes), "blocks.1", prefix, pooled, partial(x_images, size=size), grid)


def naflex_host(prefix, padded=False, **changes):
    inputs, grid = (padded_patches, None) if padded else (x_images, (6, 6))
    return Host(partial(make_naflex, **changes), "blocks.1", prefix, tensor, inputs, grid)


VIT, CLASS, ROPE = "vit_base_patch16_224", {"class_token": True, "global_pool": "token"}, {"attn_type": "rope"}
TALL = {"size": (48, 32), "grid": (6, 4)}
# fmt: off
TIMM = {
    "vit": timm_host(VIT),
    "siglip-map": timm_host("vit_base_patch16_siglip_224", 0),
    "map-with-prefix": timm_host("test_vit3"),
    "distilled": timm_host("deit_tiny_distilled_patch16_224", 2),
    "dinov2-reg4": timm_host("vit_small_patch14_reg4_dinov2", 5),
    "avg": timm_host(VIT, 0, None, class_token=False, global_pool="avg"),
    "clip-pre-norm": timm_host("vit_base_patch16_clip_224"),
    "rectangle": timm_host(VIT, img_size=(48, 32), **TALL),
    "dynamic": timm_host(VIT, dynamic_img_size=True, **TALL),
    "dynamic-pad": timm_host(VIT, dynamic_img_size=True, dynamic_img_pad=True, size=(41, 30), grid=(6, 4)),
    "hybrid": timm_host("vit_tiny_r_s16_p8_224", img_size=96, patch_size=4, size=(96, 96)),
    "eva02": timm_host("eva02_tiny_patch14_224", global_pool="token"),
    "eva-dynamic": timm_host("eva02_tiny_patch14_224", global_pool="token", dynamic_img_size=True, **TALL),
    "eva-rope-axial": timm_host("vit_small_patch16_rope_224", global_pool="token"),
    "eva-rope-mixed": timm_host("vit_small_patch16_rope_mixed_224", global_pool="token"),
    "eva-dinov3": timm_host("vit_small_patch16_dinov3", 5, global_pool="token"),
    "eva-pe": timm_host("vit_pe_core_tiny_patch16_384"),
    "naflex-learned": naflex_host(1, **CLASS),
    "naflex-factorized": naflex_host(3, pos_embed="factorized", reg_tokens=3),
    "naflex-axial": naflex_host(2, pos_embed="none", rope_type="axial", reg_tokens=2, **ROPE),
    "naflex-mixed": naflex_host(1, rope_type="mixed", **CLASS, **ROPE),
    "naflex-padded": naflex_host(1, padded=True, **CLASS),
    "naflex-padded-map": naflex_host(0, padded=True, pos_embed="factorized"),
    "naflex-padded-axial": naflex_host(2, padded=True, rope_type="axial", reg_tokens=2, **ROPE),
    "naflex-padded-mixed": naflex_host(1, padded=True, rope_type="mixed", **CLASS, **ROPE),
}
# fmt: on

# transformers

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 48, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 8, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 31,
}  # fmt: skip


def make_hf(model, config, settings):
    return getattr(tf, model)(getattr(tf, config)(**settings)).train()


def hf_host(model, hidden, prefix, pooled, config=None, size=(48, 48), grid=(6, 6), call=None, **changes):
    config = config or model.removesuffix("Model") + "Config"
    inputs = partial(images, size=size, **(call or {}))
    return Host(partial(make_hf, model, config, VISION | changes), hidden, prefix, pooled, inputs, grid)


def hf_pair(model, prefix, pooled):
    config = model.removesuffix("Model").removesuffix("ForImageClassification") + "Config"
    build = partial(make_hf, model, config, {"vision_config": VISION, "text_config": TEXT})
    inputs = partial(with_text, images, "input_ids") if pooled else images
    return Host(build, "vision_model.encoder", prefix, pooled, inputs)


def make_timm_wrapper(model, **settings):
    return make_hf(model, "TimmWrapperConfig", {"architecture": VIT, "model_args": TIMM_SIZE, **settings})


def wrapper_host(model, pooled, **settings):
    return Host(partial(make_timm_wrapper, model, **settings), "timm_model.blocks.1", 1, pooled, images)


WIDE = {"size": (48, 64), "grid": (6, 8)}
INTERPOLATED = {**WIDE, "call": {"interpolate_pos_encoding": True}}
REGISTERS, DINO3 = {"num_register_tokens": 4}, {"pos_embed_rescale": None}
# fmt: off
TRANSFORMERS = {
    "CLIPVisionModel": hf_host("CLIPVisionModel", "encoder", 1, pooler),
    "CLIPVisionModel-interpolated": hf_host("CLIPVisionModel", "encoder", 1, pooler, **INTERPOLATED),
    "CLIPVisionModelWithProjection": hf_host(
        "CLIPVisionModelWithProjection", "vision_model.encoder", 1, embeds, "CLIPVisionConfig"),
    "CLIPModel": hf_pair("CLIPModel", 1, embeds),
    "CLIPForImageClassification": hf_pair("CLIPForImageClassification", 1, None),
    "SiglipVisionModel": hf_host("SiglipVisionModel", "encoder", 0, pooler),
    "SiglipVisionModel-interpolated": hf_host("SiglipVisionModel", "encoder", 0, pooler, **INTERPOLATED),
    "SiglipModel": hf_pair("SiglipModel", 0, embeds),
    "SiglipForImageClassification": hf_pair("SiglipForImageClassification", 0, None),
    "ViTModel": hf_host("ViTModel", "layernorm", 1, pooler),
    "ViTModel-interpolated": hf_host("ViTModel", "layernorm", 1, pooler, **INTERPOLATED),
    "ViTForImageClassification": hf_host("ViTForImageClassification", "vit.layernorm", 1, logits, "ViTConfig"),
    "DeiTModel": hf_host("DeiTModel", "layernorm", 2, pooler),
    "DeiTModel-interpolated": hf_host("DeiTModel", "layernorm", 2, pooler, **INTERPOLATED),
    "DeiTForImageClassification": hf_host("DeiTForImageClassification", "deit.layernorm", 2, logits, "DeiTConfig"),
    "DeiTWithTeacher": hf_host("DeiTForImageClassificationWithTeacher", "deit.layernorm", 2, logits, "DeiTConfig"),
    "Dinov2Model": hf_host("Dinov2Model", "layernorm", 1, pooler),
    "Dinov2Model-wide": hf_host("Dinov2Model", "layernorm", 1, pooler, **WIDE),
    "Dinov2ForImageClassification": hf_host(
        "Dinov2ForImageClassification", "dinov2.layernorm", 1, None, "Dinov2Config"),
    "Dinov2WithRegistersModel": hf_host("Dinov2WithRegistersModel", "layernorm", 5, pooler, **REGISTERS),
    "Dinov2WithRegistersForImageClassification": hf_host(
        "Dinov2WithRegistersForImageClassification", "dinov2_with_registers.layernorm", 5, None,
        "Dinov2WithRegistersConfig", **REGISTERS),
    "DINOv3ViTModel": hf_host("DINOv3ViTModel", "norm", 5, pooler, **DINO3, **REGISTERS),
    "DINOv3ViTModel-wide": hf_host("DINOv3ViTModel", "norm", 1, pooler, **DINO3, **WIDE),
    "TimmWrapperModel": wrapper_host("TimmWrapperModel", pooler),
    "TimmWrapperForImageClassification": wrapper_host("TimmWrapperForImageClassification", logits, num_labels=5),
}
# fmt: on

# open_clip

OPEN_SIZE = {"image_size": 48, "patch_size": 8, "width": 32, "layers": 2}
OPEN_TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}


def make_open_tower(**changes):
    return open_clip.transformer.VisionTransformer(
        **{**OPEN_SIZE, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16, **changes}
    )


def open_host(size=(48, 48), grid=(6, 6), **changes):
    inputs = partial(x_images, size=size)
    return Host(partial(make_open_tower, **changes), "transformer", 1, tensor, inputs, grid)


def open_pair(model, vision, hidden, size, grid):
    inputs = partial(with_text, partial(images, name="image", size=size), "text")
    return Host(partial(getattr(open_clip, model), 16, vision, OPEN_TEXT), hidden, 1, first, inputs, grid)


NATIVE, TIMM_TOWER = {**OPEN_SIZE, "head_width": 16}, {"timm_model_name": "test_vit", "timm_pool": ""}
OPEN_CLIP = {
    "tower": open_host(),
    "tower-rectangle": open_host(image_size=(48, 32), **TALL),
    "tower-patch-dropout": open_host(patch_dropout=0.25),
    "tower-attentional-pool": open_host(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
    "CLIP": open_pair("CLIP", NATIVE, "visual.transformer", (48, 48), (6, 6)),
    "CustomTextCLIP-timm": open_pair("CustomTextCLIP", TIMM_TOWER, "visual.trunk.blocks.5", (160, 160), (10, 10)),
}

ALL = {
    f"{library}-{name}": host
    for library, hosts in {"timm": TIMM, "transformers": TRANSFORMERS, "open_clip": OPEN_CLIP}.items()
    for name, host in hosts.items()
}
