"""transformers: most families are one row, which names the embeddings module and the path of its projection.

    "CLIPVisionEmbeddings": Host(HookSeam, "patch_embedding", 1)    # one class token in front of the patches

What lies beside the tokens with a row for each (rotary tables, biases, masks) is named in `followers`.
"""

from typing import Any

from ..seams.biases import BiasModule, HandedFlag
from ..seams.embeddings import HookSeam, UnfoldSeam
from ..seams.followers import (
    ContextAndTarget,
    CrossMask,
    KeyMask,
    KeyMaskIfAny,
    NeedsAllPatches,
    PositionMask,
    PositionsPerLayer,
    RotaryArgument,
    RotaryTables,
    TokenCount,
)
from ..seams.host import OWN_GRIDS, Follower, Host
from ..seams.image_paths import Spectrograms, Videos
from ..seams.own_grids import FlattenedPatchesSeam, MaskFromOutsideSeam, PackedSeam, PaddedGridSeam


def _class_and_registers(embeddings: Any) -> int:
    return 1 + int(embeddings.register_tokens.shape[1])


def _hidden_stride(embeddings: Any) -> str | None:
    if embeddings.config.hidden_stride == 1:
        return None
    return "its hidden_stride merges neighbouring patches of the full grid"


CONV = "patch_embedding"  # the usual names of the projection in transformers
PROJECTION = "patch_embeddings.projection"


def _beit_biases(family: str) -> dict[str, type[Follower]]:
    return {f"{family}Model": HandedFlag, f"{family}RelativePositionBias": BiasModule}


def _clip_size(config: Any) -> tuple[Any, ...]:
    return (config.num_frames, *_pair(config.image_size))


def _pair(side: Any) -> tuple[int, ...]:
    return (side, side) if isinstance(side, int) else tuple(side)


VIDEO = "Grid (T, H, W): every frame has the same Gaussian, and nothing prefers a time."
FIRST_PATCH = "`pooler_output` is made of the first kept patch."

HOSTS: dict[str, Host] = {
    # absolute positions, added in the embeddings
    "Aimv2VisionEmbeddings": Host(HookSeam, "patch_embed"),
    "AltCLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "ASTEmbeddings": Host(
        HookSeam, PROJECTION, 2, size=lambda config: (config.num_mel_bins, config.max_length), pixels=Spectrograms,
        note="The grid is (frequency, time).",
    ),
    "Blip2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "BlipVisionEmbeddings": Host(HookSeam, CONV, 1),
    "BridgeTowerVisionEmbeddings": Host(HookSeam, CONV, 1),
    "ChineseCLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "CLIPSegVisionEmbeddings": Host(HookSeam, CONV, 1),
    "CLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "DeiTEmbeddings": Host(HookSeam, PROJECTION, 2),
    "Dinov2Embeddings": Host(HookSeam, PROJECTION, 1),
    "Dinov2WithRegistersEmbeddings": Host(HookSeam, PROJECTION, _class_and_registers),
    "DPTViTEmbeddings": Host(HookSeam, PROJECTION, 1, tokens="dropout"),
    "FlavaImageEmbeddings": Host(HookSeam, PROJECTION, 1),
    "GitVisionEmbeddings": Host(HookSeam, CONV, 1, followers={"GitSelfAttention": TokenCount}),
    "IdeficsVisionEmbeddings": Host(HookSeam, CONV, 1),
    "IJepaEmbeddings": Host(HookSeam, PROJECTION, note=FIRST_PATCH),
    "InstructBlipVideoVisionEmbeddings": Host(HookSeam, CONV, 1),
    "InstructBlipVisionEmbeddings": Host(HookSeam, CONV, 1),
    "InternVLVisionEmbeddings": Host(HookSeam, PROJECTION, 1),
    "JanusVisionEmbeddings": Host(HookSeam, CONV, note=FIRST_PATCH),
    "Kosmos2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "MetaClip2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "Ovis2VisionEmbeddings": Host(HookSeam, CONV, refuse=_hidden_stride, note="With hidden_stride=1."),
    "MgpstrEmbeddings": Host(HookSeam, "proj", 1),
    "Owlv2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "OwlViTVisionEmbeddings": Host(HookSeam, CONV, 1),
    "PixioEmbeddings": Host(HookSeam, PROJECTION, lambda embeddings: embeddings.n_cls_tokens),
    "QianfanOCRVisionEmbeddings": Host(HookSeam, PROJECTION, 1),
    "RadioPatchEmbeddings": Host(
        UnfoldSeam, "", lambda embeddings: len(embeddings.cls_register_token), note="Images of one size, not packed."
    ),
    "SiglipVisionEmbeddings": Host(HookSeam, CONV),
    "Tipsv2VisionEmbeddings": Host(HookSeam, PROJECTION, _class_and_registers),
    "VideoMAEEmbeddings": Host(
        HookSeam, PROJECTION, size=_clip_size, pixels=Videos, note=f"{VIDEO} The head needs use_mean_pooling=True."
    ),
    "ViTEmbeddings": Host(HookSeam, PROJECTION, 1),
    "ViTMSNEmbeddings": Host(HookSeam, PROJECTION, 1),
    "VitPoseBackboneEmbeddings": Host(HookSeam, PROJECTION),
    "VivitEmbeddings": Host(HookSeam, PROJECTION, 1, size=_clip_size, pixels=Videos, note=VIDEO),
    "XCLIPVisionEmbeddings": Host(HookSeam, CONV, 1, note="Every frame has a mask of its own."),
    # something with a row per token lies beside the tokens
    "BeitEmbeddings": Host(HookSeam, PROJECTION, 1, followers=_beit_biases("Beit")),
    "Data2VecVisionEmbeddings": Host(HookSeam, PROJECTION, 1, followers=_beit_biases("Data2VecVision")),
    "DINOv3ViTEmbeddings": Host(
        HookSeam, "patch_embeddings", _class_and_registers, followers={"DINOv3ViTRopePositionEmbedding": RotaryTables}
    ),
    "Sapiens2Embeddings": Host(
        HookSeam, "patch_embeddings", _class_and_registers, followers={"Sapiens2RopePositionEmbedding": RotaryTables}
    ),
    "MLCDVisionEmbeddings": Host(HookSeam, CONV, 1, followers={"MLCDEncoder": RotaryArgument}),
    "VJEPA2Embeddings": Host(
        HookSeam, "patch_embeddings.proj",
        followers={
            "VJEPA2Encoder": PositionMask, "VJEPA2Model": ContextAndTarget, "VJEPA2Predictor": NeedsAllPatches,
        },
        size=lambda config: (config.frames_per_clip, *_pair(config.crop_size)), pixels=Videos,
        note=f"{VIDEO} Without its predictor (skip_predictor=True).",
    ),
    "YolosEmbeddings": Host(
        HookSeam, PROJECTION, 1, lambda embeddings: embeddings.detection_tokens.shape[1],
        followers={"InterpolateMidPositionEmbeddings": PositionsPerLayer},
    ),
    # padded or packed images with grids of their own
    "Idefics2VisionEmbeddings": Host(
        PaddedGridSeam, CONV, followers={"Idefics2Encoder": KeyMask, "Idefics2Connector": KeyMaskIfAny}, note=OWN_GRIDS
    ),
    "Idefics3VisionEmbeddings": Host(
        PaddedGridSeam, CONV, followers={"Idefics3Encoder": KeyMask}, note=OWN_GRIDS
    ),
    "SmolVLMVisionEmbeddings": Host(
        PaddedGridSeam, CONV, followers={"SmolVLMEncoder": KeyMask}, note=OWN_GRIDS
    ),
    "Kosmos2_5VisionEmbeddings": Host(
        FlattenedPatchesSeam, "patch_projection", followers={"Kosmos2_5VisionEncoder": KeyMask}, note=OWN_GRIDS
    ),
    "Pix2StructVisionEmbeddings": Host(
        FlattenedPatchesSeam, "patch_projection", note=OWN_GRIDS,
        followers={"Pix2StructVisionEncoder": KeyMask, "Pix2StructTextModel": CrossMask},
    ),
    "Siglip2VisionEmbeddings": Host(MaskFromOutsideSeam, CONV, note=OWN_GRIDS),
    "PixtralVisionModel": Host(
        PackedSeam, "patch_conv", tokens="transformer",
        note="Packed images: each keeps its own share; with grids of their own, `keep_indices` is (1, sum of all K).",
    ),
}  # fmt: skip
