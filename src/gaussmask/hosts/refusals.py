"""Why a model cannot be masked, said by families of class names."""

import re
from typing import Any

WINDOWS = "it attends within windows of the full grid"
STAGES = "it pools, merges or convolves its tokens on the full grid, from stage to stage"
GRID = "it lays its tokens out on the full grid inside its encoder, which dropped patches leave with holes"
DENSE = "it lays the tokens out as a dense map, which dropped patches leave with holes"
CONVOLUTIONS = "it is a convolutional network and has no patch tokens"
DETECTOR = "it works on the feature maps of a backbone, which dropped patches leave with holes"
MIXER = "it mixes tokens by weights for a fixed number of patches"
PACKED = "it packs images into one sequence and merges neighbouring patches"
PLACEHOLDERS = (
    "its language model reserves a place for every patch: attach to its vision tower and train that alone, where it "
    "has one of its own"
)
EVERY_PATCH = "its loss compares every patch of the image, also the dropped ones: attach to the encoder inside it"
BY_ITSELF = "it masks by itself: set config.mask_ratio"
JOINED = "it puts patches and text into one sequence, with positions made for all patches"
FRAMES = "it joins the same patch of all frames, and every frame would keep others"
PIXELS = "it sees pixels, or codes of pixels, and no patch tokens"

# For models without a host. Beginnings of class names, by library and reason.
REFUSED = {
    "timm": {
        WINDOWS: "SwinTransformer GlobalContextVit DaVit Twins Nest HieraDet VisionTransformerSAM TinyVit",
        STAGES: """
            CoaT CPUBone CrossVit CSATv2 EdgeNeXt EfficientFormer EfficientViM EfficientVit FastVit FocalNet Hiera
            IFormer Levit LowFormer MaxxVit MetaFormer MobileNetV5 MultiScaleVit NextViT PoolingVisionTransformer
            PyramidVisionTransformer RepVit SHViT SwiftFormer Visformer VOLO Xcit
            """,
        "each of its patches has pixel tokens of its own": "TNT",
        "its position attention is computed from the number of tokens": "ConVit",
        GRID: "Qwen3Vit DeepseekVit",
        MIXER: "MlpMixer Sequencer2d",
        CONVOLUTIONS: """
            ByobNet ConvMixer ConvNeXt CspNe DenseNet DLA DPN EfficientNet FasterNet GhostNet HighPerfGpuNet
            HighResolutionNet Inception LCNet MambaOut MetaNeXt MobileNet NASNet NormFreeNet PNASNet RDNet RegNet
            RepGhost ResNet RexNet SelecSls SENet StarNet TResNet VGG VovNet Xception
            """,
    },
    "open_clip": {CONVOLUTIONS: "ModifiedResNet"},
    "transformers": {
        WINDOWS: """
            DeepseekOcr2 Donut GotOcr2 LwDetr MuseGlimmer MuseSpark PPFormulaNet Qwen2_5_V Qwen2_5Omni RfDetr Sam
            SamHQ SLANeXt Swin UnlimitedOcr VitDet VitMatte
            """,
        STAGES: """
            Cvt Dinat EdgeTam FastVlm Florence2 FocalNet GLPN GroupViT Hiera Levit MobileViT PoolFormer Pvt Sam2
            Segformer SwiftFormer
            """,
        GRID: "Eomt Llama4 GraniteDocling Gemma4Vision SegGpt Step3p7 Timesformer Mllama",
        DENSE: "DPTViTHybrid DepthPro Videomt CHMv2 DepthAnything",
        DETECTOR: """
            ConditionalDetr DabDetr DeformableDetr Deimv2 Detr DFine EfficientLoFTR GroundingDino LightGlue
            Mask2Former MaskFormer MMGroundingDino OmDetTurbo OneFormer PPDocLayout PPOCR RTDetr SuperGlue
            TableTransformer Tvp UperNet
            """,
        CONVOLUTIONS: """
            Align Bit ConvNext DINOv3ConvNext EfficientNet Gemma3n HGNet LayoutLMv2 MobileNet PPLCNet RegNet ResNet
            SLANet SuperPoint TextNet UVDoc
            """,
        PACKED: """
            CohereCompass ColQwen Cosmos3 Dots3 Ernie4_5_VL Exaone4_5 Glm4 Glm5 GlmImage GlmOcr HunYuanVL HyperCLOVAX
            HYV4VL Inkling2 Kimi Lfm3 LightOn MiniCPM MiniMaxM3 Mistral3 MistralLarge4 NemotronH_Omni PaddleOCR Qwen2V
            Qwen3 Qwen4 VideoLlama3
            """,
        "its attention is causal, so that the order of the patches counts": "Phi4MultimodalVision",
        PLACEHOLDERS: """
            Aria AyaVision Cohere2Vision ColModern ColPali Deepseek DiffusionGemma EmbeddingGemma Fuyu Gemma Granite4
            Inkling Lfm2 Llava ModernVBert Molmo2 NeoMME PaliGemma Perception Phi4Multimodal PI0 ShieldGemma T5Gemma2
            UltraVBert VideoLlava VipLlava
            """,
        FRAMES: "VideoPrism",
        JOINED: "LayoutLMv3 Vilt Udop",
        PIXELS: "Apertus1p5 Blt Chameleon Emu3 ImageGPT Perceiver",
        "its image features are made elsewhere": "Lxmert VisualBert",
        BY_ITSELF: "ViTMAE",
    },
}


def reason_against(names: list[str]) -> str | None:
    """Why a model without a host cannot be masked, by `library.Class` of one of its modules and of its bases."""
    for name in names:
        library, _, class_name = name.partition(".")
        for why, beginnings in REFUSED.get(library, {}).items():
            if class_name.startswith(tuple(beginnings.split())):
                return why
    return None


# For models that contain a host, and do with its tokens what fewer tokens make wrong.
DENSE_HEADS = r"Backbone|Segmentation|Detection|Estimation|DensePrediction|Matting|ForDepth"
REFUSED_OWNERS = {
    rf"(?!VitPoseBackbone$|YolosForObjectDetection$)\w*({DENSE_HEADS})": DENSE,
    r"\w*(MaskedImageModeling|ForPreTraining)": EVERY_PATCH,
    r"NemotronH_Omni": PLACEHOLDERS,
    r"XCLIPModel": f"{FRAMES}: attach to its vision_model and train that alone",
}
IMAGE_TOKENS = r"(image|img|video)\w*_token_(id|index)"
# Language models with image tokens of a fixed number, which a Q-Former or a perceiver makes of however many patches.
RESAMPLED = r"(Blip2|InstructBlip|InstructBlipVideo|Kosmos2|Kosmos2_5|Idefics2?)(Vision\w+|Model|For\w+)"


def reason_against_owner(names: list[str], owner: Any) -> str | None:
    """Why a host must not be masked inside `owner`, of these `library.Class` names; None if it may."""
    class_names = [name.removeprefix("transformers.") for name in names if name.startswith("transformers.")]
    class_names = [name for name in class_names if not name.endswith(("Mixin", "PreTrainedModel"))]
    if not class_names:  # a wrapper of the user's own, whose `config` may be anything
        return None
    for class_name in class_names:
        for pattern, why in REFUSED_OWNERS.items():
            if re.fullmatch(rf"({pattern})\w*", class_name):
                return why
    config = getattr(owner, "config", None)
    if "VideoMAEForVideoClassification" in class_names and not getattr(config, "use_mean_pooling", True):
        return "its head reads the first patch, which may be dropped: set config.use_mean_pooling=True"
    settings = getattr(config, "__dict__", {})
    has_image_tokens = any(value is not None and re.fullmatch(IMAGE_TOKENS, name) for name, value in settings.items())
    if has_image_tokens and not any(re.fullmatch(RESAMPLED, name) for name in class_names):
        return PLACEHOLDERS
    return None
