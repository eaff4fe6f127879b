"""Tiny host models with random weights, and what the tests have to know about each."""

import importlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import open_clip
import pytest
import timm
import torch
import transformers as tf
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg


class Host(NamedTuple):
    """How to build a model and call it, and where its tokens come out.

    Args:
        make: makes the model, in training mode.
        hidden: path of a module whose output is (B, P + K, D), behind the last block.
        prefix: P.
        pooled: model output to what a class token or an attention pool makes of the tokens; None for other pooling.
        inputs: batch size to keyword arguments.
        grid: (H, W) or (T, H, W) of the patches of `inputs`; None for images with grids of their own.
        suffix: tokens behind the patches.
        layouts: further (front, back) numbers of tokens around the patches, in attentions that see them so.
        num_patches: N, where there is no `grid`.
        packed: whether the model puts all images into one sequence.
    """

    make: Callable
    hidden: str
    prefix: int
    pooled: Callable | None
    inputs: Callable
    grid: tuple[int, ...] | None = (6, 6)
    suffix: int = 0
    layouts: tuple = ()
    num_patches: int = 36
    packed: bool = False

    @property
    def count(self):
        return math.prod(self.grid) if self.grid else self.num_patches

    def find_hidden(self, model):
        modules = dict(model.named_modules())
        elsewhere = (f"vision_model.{self.hidden}", self.hidden.replace("layers", "encoder.layer"))  # transformers 5.0
        return next(modules[path] for path in (self.hidden, *elsewhere) if path in modules)

    def build(self):
        """The model without the dropouts and the stochastic depth of its own; skips what the library has not yet.

        A skip cannot hide a family: test_every_name wants each one proven.
        """
        try:
            model = self.make()
        except (AttributeError, ModuleNotFoundError, RuntimeError) as error:
            if re.search("Unknown model|^module transformers has no|No module named 'transformers", str(error)):
                pytest.skip(str(error))
            raise
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return model


def result(host, model, inputs, seed=None):
    """What the host makes of its tokens: pooled ones, or else the first thing that it returns."""
    if seed is not None:
        torch.manual_seed(seed)
    output = model(**inputs)
    if host.pooled:
        return host.pooled(output)
    return output if isinstance(output, torch.Tensor) else output[0]


def recompute_layers(model):
    """Gradient checkpointing, as the model's library turns it on."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers 5.0
        model.gradient_checkpointing_enable({"use_reentrant": False})


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


def timm_host(name, prefix=1, pooled=tensor, size=(48, 48), grid=(6, 6), layouts=(), **changes):
    inputs = partial(x_images, size=size)
    return Host(partial(make_timm, name, **changes), "blocks.1", prefix, pooled, inputs, grid, layouts=layouts)


def gemma4_host(hidden, name="gemma4_vit_167m", padded=False, pooled=None, **changes):
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 48}
    build = partial(timm.create_model, name, img_size=48, patch_size=8, **{**size, **changes})
    inputs, grid = (padded_patches, None) if padded else (x_images, (6, 6))
    return Host(build, hidden, 0, pooled, inputs, grid)


def naflex_host(prefix, padded=False, **changes):
    inputs, grid = (padded_patches, None) if padded else (x_images, (6, 6))
    return Host(partial(make_naflex, **changes), "blocks.1", prefix, tensor, inputs, grid)


RELPOS, BEIT = "vit_relpos_small_patch16_224", "beit_base_patch16_224"
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
    "cait": timm_host("cait_xxs24_224", 0, None, layouts=[(1, 0)]),
    "cait-rectangle": timm_host("cait_xxs24_224", 0, None, layouts=[(1, 0)], img_size=(48, 32), **TALL),
    "beit": timm_host(BEIT, 1, tensor, global_pool="token"),
    "beit-shared": timm_host(BEIT, 1, None, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "beit-both-rectangle": timm_host(
        BEIT, 1, tensor, global_pool="token", use_shared_rel_pos_bias=True, use_abs_pos_emb=True, img_size=(48, 32),
        **TALL),
    "relpos": timm_host(RELPOS, 0, None),
    "relpos-class": timm_host("vit_relpos_base_patch16_cls_224", 1, tensor),
    "relpos-bias-rectangle": timm_host(RELPOS, 0, None, rel_pos_type="bias", img_size=(48, 32), **TALL),
    "relpos-shared": timm_host("vit_srelpos_small_patch16_224", 0, None),
    "relpos-shared-class": timm_host("vit_srelpos_small_patch16_224", 1, tensor, **CLASS),
    "gemma4": gemma4_host("encoder.blocks.1"),
    "gemma4-padded": gemma4_host("encoder.blocks.1", padded=True),
    "gemma4-encoder": gemma4_host("blocks.1", "gemma4_vit_167m_enc", global_pool="none"),
    "gemma4-encoder-padded": gemma4_host("blocks.1", "gemma4_vit_167m_enc", padded=True, global_pool="avg"),
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


def hf_host(
    model, hidden, prefix, pooled, config=None, size=(48, 48), grid=(6, 6), call=None, inputs=None, suffix=0,
    layouts=(), packed=False, **changes,
):  # fmt: skip
    config = config or model.removesuffix("Model") + "Config"
    inputs = inputs or partial(images, size=size, **(call or {}))
    build = partial(make_hf, model, config, VISION | changes)
    return Host(build, hidden, prefix, pooled, inputs, grid, suffix, layouts, packed=packed)


def videos(batch_size, name="pixel_values", frames=4, **more):
    return {name: torch.randn(batch_size, frames, 3, 48, 48), **more}


def spectrograms(batch_size):
    return {"input_values": torch.randn(batch_size, 40, 32)}  # (time, frequency)


def padded_images(batch_size):
    """Idefics input: images of different sizes, padded to 48 x 48."""
    mask = torch.zeros(batch_size, 6, 6, dtype=torch.bool)
    for i, (height, width) in enumerate([(6, 6), (5, 4), (3, 6)][:batch_size]):
        mask[i, :height, :width] = True
    return {**images(batch_size), "patch_attention_mask": mask}


def flattened_patches(batch_size, grids=PADDED_GRIDS, masked=True):
    """SigLIP 2 input: flattened patches of images of different grids, padded to 36."""
    shapes = torch.tensor(grids)[:batch_size]
    mask = (torch.arange(36) < shapes.prod(dim=1, keepdim=True)).long() if masked else None
    patches = torch.randn(batch_size, 36, 8 * 8 * 3)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def rows_and_columns(batch_size):
    """Pix2Struct input: flattened patches behind their row and column, which count from 1; padding is 0."""
    patches = torch.zeros(batch_size, 36, 2 + 8 * 8 * 3)
    for i, (height, width) in enumerate(PADDED_GRIDS[:batch_size]):
        patches[i, : height * width, :2] = torch.cartesian_prod(torch.arange(height), torch.arange(width)) + 1.0
        patches[i, : height * width, 2:] = torch.randn(height * width, 8 * 8 * 3)
    return {"flattened_patches": patches}


def several_sizes(batch_size):
    """Pixtral input: images of different sizes, which the model packs."""
    return images(batch_size, image_sizes=[(48, 48), (32, 48), (40, 24)][:batch_size])


def hf_pair(model, prefix, pooled):
    config = model.removesuffix("Model").removesuffix("ForImageClassification") + "Config"
    build = partial(make_hf, model, config, {"vision_config": VISION, "text_config": TEXT})
    inputs = partial(with_text, images, "input_ids") if pooled else images
    return Host(build, "vision_model.encoder", prefix, pooled, inputs)


def make_timm_wrapper(model, **settings):
    return make_hf(model, "TimmWrapperConfig", {"architecture": VIT, "model_args": TIMM_SIZE, **settings})


def make_class(family, model, config, modeling, settings):
    """A model that transformers does not export at its top."""
    package = f"transformers.models.{family}"
    modeling = importlib.import_module(f"{package}.{modeling or f'modeling_{family}'}")
    configuration = importlib.import_module(f"{package}.configuration_{family}")
    attention = {"attn_implementation": "sdpa"} if family == "idefics" else {}  # which 5.0 leaves open
    config = getattr(configuration, config)(**settings, **attention)
    return getattr(modeling, model)(config).train()


def hf_class(family, model, config, hidden, inputs=images, prefix=0, pooled=None, grid=(6, 6), modeling="", **changes):
    make = partial(make_class, family, model, config, modeling, VISION | changes)
    return Host(make, hidden, prefix, pooled, inputs, grid)


def wrapper_host(model, pooled, **settings):
    return Host(partial(make_timm_wrapper, model, **settings), "timm_model.blocks.1", 1, pooled, images)


WIDE = {"size": (48, 64), "grid": (6, 8)}
INTERPOLATED = {**WIDE, "call": {"interpolate_pos_encoding": True}}
VJEPA = {
    "crop_size": 48, "frames_per_clip": 4, "pred_hidden_size": 32, "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1, "num_pooler_layers": 1, "hidden_size": 48,
}  # fmt: skip
YOLOS = {"image_size": [48, 48], "num_detection_tokens": 3}
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
    "Aimv2VisionModel": hf_host("Aimv2VisionModel", "encoder", 0, pooler),
    "Aimv2VisionModel-native": hf_host("Aimv2VisionModel", "encoder", 0, pooler, is_native=True),
    "AltCLIPVisionModel": hf_host("AltCLIPVisionModel", "encoder", 1, pooler),
    "ASTModel": hf_host("ASTModel", "layernorm", 2, pooler, inputs=spectrograms, grid=(4, 5), num_mel_bins=32,
                        max_length=40, frequency_stride=8, time_stride=8),
    "Blip2VisionModel": hf_host("Blip2VisionModel", "encoder", 1, pooler),
    "BlipVisionModel": hf_host("BlipVisionModel", "encoder", 1, pooler),
    "BridgeTowerVision": hf_class(
        "bridgetower", "BridgeTowerVisionModel", "BridgeTowerVisionConfig", "visual.ln_post",
        partial(images, name="image"), prefix=1, hidden_size=64),
    "ChineseCLIPVisionModel": hf_host("ChineseCLIPVisionModel", "encoder", 1, pooler),
    "CLIPSegVisionModel": hf_host("CLIPSegVisionModel", "encoder", 1, pooler),
    "DPTModel": hf_host("DPTModel", "layernorm", 1, pooler, use_auxiliary_head=False),
    "FlavaImageModel": hf_host("FlavaImageModel", "layernorm", 1, pooler),
    "GitVisionModel": hf_host("GitVisionModel", "vision_model.post_layernorm", 1, None),
    "IdeficsVision": hf_class(
        "idefics", "IdeficsVisionTransformer", "IdeficsVisionConfig", "encoder", prefix=1, pooled=pooler,
        modeling="vision", embed_dim=32),
    "IJepaModel": hf_host("IJepaModel", "layernorm", 0, None),
    "InstructBlipVisionModel": hf_host("InstructBlipVisionModel", "encoder", 1, pooler),
    "InstructBlipVideoVisionModel": hf_host("InstructBlipVideoVisionModel", "encoder", 1, pooler),
    "InternVLVisionModel": hf_host("InternVLVisionModel", "layernorm", 1, None),
    "JanusVisionModel": hf_host("JanusVisionModel", "encoder", 0, None),
    "Kosmos2Vision": hf_class(
        "kosmos2", "Kosmos2VisionModel", "Kosmos2VisionConfig", "model.encoder", prefix=1, pooled=pooler),
    "MetaClip2VisionModel": hf_host("MetaClip2VisionModel", "encoder", 1, pooler),
    "Ovis2Vision": hf_class("ovis2", "Ovis2VisionModel", "Ovis2VisionConfig", "transformer.encoder"),
    "MgpstrModel": hf_class(
        "mgp_str", "MgpstrModel", "MgpstrConfig", "encoder", prefix=1, image_size=[48, 48], max_token_length=4,
        num_character_labels=5, num_bpe_labels=5, num_wordpiece_labels=5),
    "Owlv2VisionModel": hf_host("Owlv2VisionModel", "vision_model.encoder", 1, pooler),
    "OwlViTVisionModel": hf_host("OwlViTVisionModel", "vision_model.encoder", 1, pooler),
    "PixioModel": hf_host("PixioModel", "layernorm", 3, pooler, n_cls_tokens=3),
    "QianfanOCRVision": hf_class(
        "qianfan_ocr", "QianfanOCRVisionModel", "QianfanOCRVisionConfig", "layernorm", prefix=1),
    "RadioModel": hf_host("RadioModel", "encoder", 5, None, num_cls_tokens=2, num_registers=3, max_img_size=64),
    "RadioModel-wide": hf_host("RadioModel", "encoder", 10, None, max_img_size=96, **WIDE),
    "Tipsv2VisionModel": hf_host("Tipsv2VisionModel", "layernorm", 2, pooler),
    "VideoMAEModel": hf_host("VideoMAEModel", "encoder", 0, None, inputs=videos, grid=(2, 6, 6), num_frames=4),
    "ViTMSNModel": hf_host("ViTMSNModel", "layernorm", 1, None),
    "VitPoseBackbone": hf_host("VitPoseBackbone", "encoder", 0, None, "VitPoseBackboneConfig", image_size=[48, 48],
                               patch_size=[8, 8]),
    "VivitModel": hf_host("VivitModel", "layernorm", 1, pooler, inputs=videos, grid=(2, 6, 6), num_frames=4,
                          tubelet_size=[2, 8, 8]),
    "XCLIPVisionModel": hf_host("XCLIPVisionModel", "encoder", 1, pooler, num_frames=1, layouts=[(1, 1)]),
    "BeitModel": hf_host("BeitModel", "layers.1", 1, pooler, use_relative_position_bias=True, use_mean_pooling=False),
    "BeitModel-shared": hf_host("BeitModel", "layers.1", 1, None, use_shared_relative_position_bias=True),
    "BeitModel-interpolated": hf_host(
        "BeitModel", "layers.1", 1, None, use_relative_position_bias=True, use_absolute_position_embeddings=True,
        **INTERPOLATED),
    "Data2VecVisionModel": hf_host("Data2VecVisionModel", "encoder", 1, None, use_relative_position_bias=True),
    "Data2VecVisionModel-shared": hf_host(
        "Data2VecVisionModel", "encoder", 1, None, use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True),
    "Data2VecVisionModel-interpolated": hf_host(
        "Data2VecVisionModel", "encoder", 1, None, use_relative_position_bias=True, **INTERPOLATED),
    "Sapiens2Model": hf_host("Sapiens2Model", "norm", 5, pooler, num_register_tokens=4, pos_embed_rescale=None,
                             num_key_value_attention_heads=2),
    "MLCDVisionModel": hf_host("MLCDVisionModel", "encoder", 1, pooler),
    "MLCDVisionModel-wide": hf_host("MLCDVisionModel", "encoder", 1, pooler, **WIDE),
    "VJEPA2Model": hf_host(
        "VJEPA2Model", "encoder.layernorm", 0, None, inputs=partial(videos, name="pixel_values_videos",
        skip_predictor=True), grid=(2, 6, 6), **VJEPA),
    "VJEPA2ForVideoClassification": hf_host(
        "VJEPA2ForVideoClassification", "vjepa2.encoder.layernorm", 0, logits, "VJEPA2Config",
        inputs=partial(videos, name="pixel_values_videos"), grid=(2, 6, 6), **VJEPA),
    "YolosModel": hf_host("YolosModel", "layernorm", 1, pooler, suffix=3, **YOLOS),
    "YolosModel-wide": hf_host("YolosModel", "layernorm", 1, pooler, suffix=3, **YOLOS, **WIDE),
    "YolosModel-no-mid": hf_host("YolosModel", "layernorm", 1, pooler, suffix=3, **{
        **YOLOS, "use_mid_position_embeddings": False}),
    "Idefics2Vision": hf_class("idefics2", "Idefics2VisionTransformer", "Idefics2VisionConfig", "post_layernorm"),
    "Idefics2Vision-padded": hf_class(
        "idefics2", "Idefics2VisionTransformer", "Idefics2VisionConfig", "post_layernorm", padded_images),
    "Idefics3Vision-padded": hf_class(
        "idefics3", "Idefics3VisionTransformer", "Idefics3VisionConfig", "post_layernorm", padded_images),
    "SmolVLMVision-padded": hf_class(
        "smolvlm", "SmolVLMVisionTransformer", "SmolVLMVisionConfig", "post_layernorm", padded_images),
    "Kosmos2_5Vision": hf_class(
        "kosmos2_5", "Kosmos2_5VisionModel", "Kosmos2_5VisionConfig", "encoder", rows_and_columns, grid=None, d_ff=48,
        patch_embed_hidden_size=192, head_dim=16, max_num_patches=36),
    "Pix2StructVisionModel": hf_host(
        "Pix2StructVisionModel", "layernorm", 0, None, inputs=rows_and_columns, grid=None, d_ff=48, d_kv=16, seq_len=36,
        patch_embed_hidden_size=192),
    "Siglip2VisionModel": hf_host("Siglip2VisionModel", "encoder", 0, pooler, inputs=partial(
        flattened_patches, grids=[(6, 6)] * 3), grid=None),
    "Siglip2VisionModel-padded": hf_host(
        "Siglip2VisionModel", "encoder", 0, pooler, inputs=flattened_patches, grid=None),
    "PixtralVisionModel": hf_host("PixtralVisionModel", "transformer", 0, None, packed=True),
    "PixtralVisionModel-wide": hf_host(
        "PixtralVisionModel", "transformer", 0, None, packed=True, image_size=64, **WIDE),
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

# One host for every mechanism, and for every way in which it can be buried.
COMPILED = [
    "timm-vit", "timm-eva-pe", "timm-cait", "timm-beit", "timm-beit-both-rectangle", "timm-relpos-shared-class",
    "timm-relpos", "timm-gemma4", "transformers-CLIPModel", "transformers-DINOv3ViTModel", "transformers-BeitModel",
    "transformers-Data2VecVisionModel-shared", "transformers-MLCDVisionModel",
    "transformers-VJEPA2ForVideoClassification", "transformers-YolosModel", "transformers-RadioModel",
    "transformers-VivitModel",
]  # fmt: skip
# Of these, those with the mechanism of another one: Beit's biases twice more, relative positions and a hook.
SIMILAR = {
    "timm-beit-both-rectangle", "timm-relpos-shared-class", "transformers-Data2VecVisionModel-shared",
    "transformers-VivitModel",
}  # fmt: skip
COMPILED_WITH_PIXELS = ["timm-vit", "timm-naflex-learned", "transformers-CLIPModel", "transformers-RadioModel"]
SAVED = [
    "transformers-CLIPModel", "transformers-DINOv3ViTModel", "transformers-TimmWrapperModel",
    "transformers-BeitModel", "transformers-MLCDVisionModel", "transformers-VJEPA2ForVideoClassification",
    "transformers-YolosModel", "transformers-Siglip2VisionModel-padded",
]  # fmt: skip
REPRESENTATIVE = [
    *COMPILED, "timm-naflex-mixed", "timm-naflex-padded", "timm-gemma4-padded", "transformers-TimmWrapperModel",
    "transformers-Siglip2VisionModel-padded", "transformers-Idefics2Vision-padded", "transformers-PixtralVisionModel",
    "open_clip-tower-patch-dropout", "open_clip-CustomTextCLIP-timm",
]  # fmt: skip

# Stages

OWN_POSITIONS = "positions differ from image to image"
# Of all hosts of the tests those that cannot drop pixels, and why: known at attach, or by the call.
NO_PIXELS_AT_ATTACH = {
    "timm-hybrid": "pass through StdConv2dSame",
    "transformers-Aimv2VisionModel": "pass through Aimv2RMSNorm",
    "transformers-Aimv2VisionModel-native": "pass through Aimv2RMSNorm",
    "transformers-Ovis2Vision": "pass through Ovis2RMSNorm",
    "transformers-Idefics2Vision": OWN_POSITIONS,
    "transformers-Idefics2Vision-padded": OWN_POSITIONS,
    "transformers-Idefics3Vision-padded": OWN_POSITIONS,
    "transformers-SmolVLMVision-padded": OWN_POSITIONS,
    "transformers-Kosmos2_5Vision": OWN_POSITIONS,
    "transformers-Pix2StructVisionModel": OWN_POSITIONS,
    "transformers-PixtralVisionModel": "packs images",
    "transformers-PixtralVisionModel-wide": "packs images",
}
NO_PIXELS_AT_THE_CALL = {
    "timm-naflex-padded": "with patch_coord",
    "timm-naflex-padded-map": "with patch_coord",
    "timm-naflex-padded-axial": "with patch_coord",
    "timm-naflex-padded-mixed": "with patch_coord",
    "timm-gemma4-padded": "with patch_coord",
    "timm-gemma4-encoder-padded": OWN_POSITIONS,
    "transformers-Siglip2VisionModel-padded": OWN_POSITIONS,
}


def with_stages(names):
    """Each name with the stages that its host has."""
    pixels = [name for name in names if name not in NO_PIXELS_AT_ATTACH | NO_PIXELS_AT_THE_CALL]
    return [*((name, "tokens") for name in names), *((name, "pixels") for name in pixels)]
