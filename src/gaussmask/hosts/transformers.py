"""Which models take a drop, and where: one row per family.

Nothing here imports timm, transformers or open_clip: classes are recognised by name along the MRO, so that subclasses
and classes made on the fly (FSDP2) count. A family whose embedding module returns plain tokens is one line.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..seams.biases import BeitBiases, BiasModule, HandedFlag, RelPosBiases
from ..seams.embeddings import (
    FlattenedPatchesSeam,
    HookSeam,
    LatePrefixSeam,
    MaskFromOutsideSeam,
    PackedSeam,
    PaddedGridSeam,
    PositionsInOutputSeam,
    TimmHookSeam,
    UnfoldSeam,
)
from ..seams.followers import (
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
from ..seams.host import Beside, Host, Place
from ..seams.image_paths import Spectrograms, Videos
from ..seams.patch_dropout import NaFlexSeam, OpenClipSeam, TimmSeam, TimmTupleSeam
from ..seams.unsupported import UnsupportedModelError
from .refusals import reason_against, reason_against_owner


def _num_prefix_tokens(model: Any) -> int:
    return int(model.num_prefix_tokens)


def _class_and_registers(embeddings: Any) -> int:
    return 1 + int(embeddings.register_tokens.shape[1])


def _soft_pool(encoder: Any) -> str | None:
    if encoder.global_pool != "soft":
        return None
    return "its soft pooling averages k x k patches of the full grid: build it with global_pool='avg'"


def _hidden_stride(embeddings: Any) -> str | None:
    if embeddings.config.hidden_stride == 1:
        return None
    return "its hidden_stride merges neighbouring patches of the full grid"


CONV = "patch_embedding"  # the usual names of the projection in transformers
PROJECTION = "patch_embeddings.projection"


def _beit_biases(family: str) -> dict[str, type[Beside]]:
    return {f"{family}Model": HandedFlag, f"{family}RelativePositionBias": BiasModule}


def _clip_size(config: Any) -> tuple[Any, ...]:
    return (config.num_frames, *_pair(config.image_size))


def _pair(side: Any) -> tuple[int, ...]:
    return (side, side) if isinstance(side, int) else tuple(side)


VIDEO = "Grid (T, H, W): every frame has the same Gaussian, and nothing prefers a time."
FIRST_PATCH = "`pooler_output` is made of the first kept patch."
OWN_GRIDS = "A Gaussian on each image's own grid; padding is kept last."

HOSTS: dict[str, Host] = {
    # timm
    "timm.VisionTransformer": Host(TimmSeam, "patch_embed", _num_prefix_tokens),
    "timm.Eva": Host(TimmTupleSeam, "patch_embed", _num_prefix_tokens),
    "timm.NaFlexVit": Host(NaFlexSeam, "embeds", _num_prefix_tokens, note=f"{OWN_GRIDS} No masking in eval mode."),
    "timm.Cait": Host(TimmHookSeam, "patch_embed", 0, tokens="pos_drop", note="The class token joins in later layers."),
    "timm.Beit": Host(TimmHookSeam, "patch_embed", 1, tokens="pos_drop", besides={"Beit": BeitBiases}),
    "timm.VisionTransformerRelPos": Host(
        LatePrefixSeam, "patch_embed", _num_prefix_tokens, tokens="patch_embed",
        besides={"VisionTransformerRelPos": RelPosBiases},
    ),
    "timm.Gemma4VitEncoder": Host(
        PositionsInOutputSeam, "patch_embed", 0, tokens="patch_embed", refuse=_soft_pool,
        note=f"{OWN_GRIDS} Pooling 'avg' or none.",
    ),
    # open_clip
    "open_clip.VisionTransformer": Host(OpenClipSeam, "conv1", 1, slot="patch_dropout"),
    # transformers: absolute positions, added in the embeddings
    "transformers.Aimv2VisionEmbeddings": Host(HookSeam, "patch_embed"),
    "transformers.AltCLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.ASTEmbeddings": Host(
        HookSeam, PROJECTION, 2, size=lambda config: (config.num_mel_bins, config.max_length), pixels=Spectrograms,
        note="The grid is (frequency, time).",
    ),
    "transformers.Blip2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.BlipVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.BridgeTowerVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.ChineseCLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.CLIPSegVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.CLIPVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.DeiTEmbeddings": Host(HookSeam, PROJECTION, 2),
    "transformers.Dinov2Embeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.Dinov2WithRegistersEmbeddings": Host(HookSeam, PROJECTION, _class_and_registers),
    "transformers.DPTViTEmbeddings": Host(HookSeam, PROJECTION, 1, tokens="dropout"),
    "transformers.FlavaImageEmbeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.GitVisionEmbeddings": Host(HookSeam, CONV, 1, besides={"GitSelfAttention": TokenCount}),
    "transformers.IdeficsVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.IJepaEmbeddings": Host(HookSeam, PROJECTION, note=FIRST_PATCH),
    "transformers.InstructBlipVideoVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.InstructBlipVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.InternVLVisionEmbeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.JanusVisionEmbeddings": Host(HookSeam, CONV, note=FIRST_PATCH),
    "transformers.Kosmos2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.MetaClip2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.Ovis2VisionEmbeddings": Host(HookSeam, CONV, refuse=_hidden_stride, note="With hidden_stride=1."),
    "transformers.MgpstrEmbeddings": Host(HookSeam, "proj", 1),
    "transformers.Owlv2VisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.OwlViTVisionEmbeddings": Host(HookSeam, CONV, 1),
    "transformers.PixioEmbeddings": Host(HookSeam, PROJECTION, lambda embeddings: embeddings.n_cls_tokens),
    "transformers.QianfanOCRVisionEmbeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.RadioPatchEmbeddings": Host(
        UnfoldSeam, "", lambda embeddings: len(embeddings.cls_register_token), note="Images of one size, not packed."
    ),
    "transformers.SiglipVisionEmbeddings": Host(HookSeam, CONV),
    "transformers.Tipsv2VisionEmbeddings": Host(HookSeam, PROJECTION, _class_and_registers),
    "transformers.VideoMAEEmbeddings": Host(
        HookSeam, PROJECTION, size=_clip_size, pixels=Videos, note=f"{VIDEO} The head needs use_mean_pooling=True."
    ),
    "transformers.ViTEmbeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.ViTMSNEmbeddings": Host(HookSeam, PROJECTION, 1),
    "transformers.VitPoseBackboneEmbeddings": Host(HookSeam, PROJECTION),
    "transformers.VivitEmbeddings": Host(HookSeam, PROJECTION, 1, size=_clip_size, pixels=Videos, note=VIDEO),
    "transformers.XCLIPVisionEmbeddings": Host(HookSeam, CONV, 1, note="Every frame has a mask of its own."),
    # transformers: something with a row per token lies beside the tokens
    "transformers.BeitEmbeddings": Host(HookSeam, PROJECTION, 1, besides=_beit_biases("Beit")),
    "transformers.Data2VecVisionEmbeddings": Host(HookSeam, PROJECTION, 1, besides=_beit_biases("Data2VecVision")),
    "transformers.DINOv3ViTEmbeddings": Host(
        HookSeam, "patch_embeddings", _class_and_registers, besides={"DINOv3ViTRopePositionEmbedding": RotaryTables}
    ),
    "transformers.Sapiens2Embeddings": Host(
        HookSeam, "patch_embeddings", _class_and_registers, besides={"Sapiens2RopePositionEmbedding": RotaryTables}
    ),
    "transformers.MLCDVisionEmbeddings": Host(HookSeam, CONV, 1, besides={"MLCDEncoder": RotaryArgument}),
    "transformers.VJEPA2Embeddings": Host(
        HookSeam, "patch_embeddings.proj", besides={"VJEPA2Encoder": PositionMask, "VJEPA2Predictor": NeedsAllPatches},
        size=lambda config: (config.frames_per_clip, *_pair(config.crop_size)), pixels=Videos,
        note=f"{VIDEO} Without its predictor (skip_predictor=True).",
    ),
    "transformers.YolosEmbeddings": Host(
        HookSeam, PROJECTION, 1, lambda embeddings: embeddings.detection_tokens.shape[1],
        besides={"InterpolateMidPositionEmbeddings": PositionsPerLayer},
    ),
    # transformers: padded or packed images with grids of their own
    "transformers.Idefics2VisionEmbeddings": Host(
        PaddedGridSeam, CONV, besides={"Idefics2Encoder": KeyMask, "Idefics2Connector": KeyMaskIfAny}, note=OWN_GRIDS
    ),
    "transformers.Idefics3VisionEmbeddings": Host(
        PaddedGridSeam, CONV, besides={"Idefics3Encoder": KeyMask}, note=OWN_GRIDS
    ),
    "transformers.SmolVLMVisionEmbeddings": Host(
        PaddedGridSeam, CONV, besides={"SmolVLMEncoder": KeyMask}, note=OWN_GRIDS
    ),
    "transformers.Kosmos2_5VisionEmbeddings": Host(
        FlattenedPatchesSeam, "patch_projection", besides={"Kosmos2_5VisionEncoder": KeyMask}, note=OWN_GRIDS
    ),
    "transformers.Pix2StructVisionEmbeddings": Host(
        FlattenedPatchesSeam, "patch_projection", note=OWN_GRIDS,
        besides={"Pix2StructVisionEncoder": KeyMask, "Pix2StructTextModel": CrossMask},
    ),
    "transformers.Siglip2VisionEmbeddings": Host(MaskFromOutsideSeam, CONV, note=OWN_GRIDS),
    "transformers.PixtralVisionModel": Host(
        PackedSeam, "patch_conv", tokens="transformer",
        note="Packed images: each keeps its own share; with grids of their own, `keep_indices` is (1, sum of all K).",
    ),
}  # fmt: skip


def names(module: nn.Module) -> list[str]:
    """`library.Class` for the class of `module` and its bases."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__]


def _places(module: nn.Module, owners: tuple[nn.Module, ...] = (), path: str = "") -> Iterator[Place]:
    """The hosts in `module`, outermost only."""
    key = next((name for name in names(module) if name in HOSTS), None)
    if key is not None:
        yield Place(HOSTS[key], key, module, owners, path)
        return
    for name, child in module.named_children():
        yield from _places(child, (*owners, module), f"{path}.{name}" if path else name)


def find_host(model: nn.Module) -> Place:
    """The one vision tower of `model` that can be masked; raises UnsupportedModelError where there is none."""
    places = list({id(place.module): place for place in _places(model)}.values())
    if len(places) > 1:
        towers = " and ".join(place.name for place in places)
        raise UnsupportedModelError(
            f"{type(model).__name__} has more than one vision tower ({towers}): attach to each by itself"
        )
    if not places:
        for module in model.modules():
            if why := reason_against(names(module)):
                raise UnsupportedModelError(f"{type(module).__name__} cannot be masked: {why}")
        raise UnsupportedModelError(
            f"{names(model)[0]} holds no vision transformer that gaussmask knows (the documentation lists them under "
            "Hosts). In a model of your own, call the drop on the tokens, behind their position embedding: "
            "x = drop(x), with num_prefix_tokens=1 if a class token stands in front"
        )
    (place,) = places
    for owner in place.owners:
        if why := reason_against_owner(names(owner), getattr(owner, "config", None)):
            raise UnsupportedModelError(f"{type(owner).__name__} cannot be masked: {why}")
    if why := place.host.refuse(place.module):
        raise UnsupportedModelError(f"{place.name} cannot be masked: {why}")
    return place
