"""No name is unaccounted for: every model of the installed timm and every vision model of the installed transformers is
either of a family that the position oracle proves on a tiny model (tests/hosts.py), or refused with its reason.

A new version of a library that brings new names fails here, and the message says what to do.
"""

import importlib
import inspect
import pkgutil
import warnings

import pytest
import timm
import torch
import transformers as tf
from hosts import ALL

import gaussmask
from gaussmask.hosts.refusals import reason_against, reason_against_owner

NEW = """
{library} brings {name}, which gaussmask does not know: {problem}.
  - If its patches are one flat sequence with attention over all of them, add a row to HOSTS in src/gaussmask/hosts/,
    in the file of its library, and a tiny model to tests/hosts.py, so that the oracle proves it.
  - Otherwise add the beginning of its class name to REFUSED in src/gaussmask/hosts/refusals.py, under its reason.
  - Then run `make hosts`, which writes docs/hosts.md anew.
"""
UNKNOWN = "holds no vision transformer that gaussmask knows"
PROVEN = {gaussmask.describe(host.build()).family for host in ALL.values()}


def problem(model):
    """What is not accounted for in `model`, or None."""
    found = gaussmask.describe(model)
    if found.supported:
        return None if found.family in PROVEN else f"{found.family} is attached to, but no tiny model proves it"
    return f"nobody has decided about it ({found.reason})" if UNKNOWN in found.reason else None


# timm

CHUNKS = 16


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.filterwarnings("ignore")  # overridden defaults of timm's own
def test_every_name_of_timm(chunk):
    names = timm.list_models()[chunk::CHUNKS]
    assert len(names) > 50
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        why = problem(model)
        assert why is None, NEW.format(library="timm", name=f"{name} ({type(model).__name__})", problem=why)


# transformers

# Parts that take tokens, features or text, and no images: they are told that they hold no vision transformer.
NO_IMAGES = {
    "Aimv2TextModel", "Blip2QFormerModel", "Blip2TextModelWithProjection", "CLIPSegDecoder", "DINOv3ViTEncoder",
    "Dinov2Encoder", "Dinov2WithRegistersEncoder", "FlavaImageCodebook", "FlavaMultimodalModel",
    "Idefics2PerceiverResampler", "InstructBlipQFormerModel", "InstructBlipVideoQFormerModel", "JanusVQVAE",
    "Kosmos2TextForCausalLM", "Kosmos2_5VisionEncoder", "OwlViTTextTransformer", "Owlv2TextTransformer",
    "RadioEncoder", "Sapiens2Encoder", "Tipsv2VisionEncoder", "VitPoseBackboneEncoder",
}  # fmt: skip
# Models that attach accepts, beside the towers of tests/hosts.py. What each does with its tokens was read, and many run
# in tests/test_whole_models.py: it takes the class token, pools by mean or attention, resamples, or attends across.
READ = {
    "ASTForAudioClassification", "Aimv2Model", "AltCLIPModel", "BeitForImageClassification",
    "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval", "Blip2Model", "Blip2VisionModelWithProjection",
    "BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipModel",
    "BridgeTowerForContrastiveLearning", "BridgeTowerForImageAndTextRetrieval", "BridgeTowerForMaskedLM",
    "BridgeTowerModel", "BridgeTowerVisionModel", "CLIPForImageClassification", "CLIPModel", "CLIPSegModel",
    "CLIPVisionModelWithProjection", "ChineseCLIPModel", "Data2VecVisionForImageClassification",
    "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification", "FlavaModel", "GitForCausalLM", "GitModel",
    "IJepaForImageClassification", "Idefics2ForConditionalGeneration", "Idefics2Model", "IdeficsForVisionText2Text",
    "IdeficsModel", "InstructBlipForConditionalGeneration", "InstructBlipModel",
    "InstructBlipVideoForConditionalGeneration", "InstructBlipVideoModel", "Kosmos2ForConditionalGeneration",
    "Kosmos2Model", "Kosmos2VisionTransformer", "Kosmos2_5ForConditionalGeneration", "Kosmos2_5Model",
    "MetaClip2ForImageClassification", "MetaClip2Model", "MetaClip2VisionModelWithProjection",
    "MgpstrForSceneTextRecognition", "OwlViTModel", "OwlViTVisionTransformer", "Owlv2Model", "Owlv2VisionTransformer",
    "PeVideoEncoder", "Pix2StructForConditionalGeneration", "Siglip2ForImageClassification", "Siglip2Model",
    "SiglipForImageClassification", "SiglipModel", "Tipsv2Model", "VJEPA2ForVideoClassification",
    "ViTForImageClassification", "ViTMSNForImageClassification", "VideoMAEForVideoClassification",
    "VisionEncoderDecoderModel", "VisionTextDualEncoderModel", "VivitForVideoClassification",
    "YolosForObjectDetection",
}  # fmt: skip
# What the default configuration lacks.
SETTINGS = {"BridgeTowerForContrastiveLearning": {"contrastive_hidden_size": 32, "logit_scale_init_value": 2.6}}
DEPTHS = {
    "num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "num_experts", "n_routed_experts",
    "num_local_experts",
}  # fmt: skip


def vision_classes():
    """All classes of transformers that take images, videos or spectrograms, and are no abstract base."""
    for family in pkgutil.iter_modules(tf.models.__path__):
        for file in pkgutil.iter_modules([f"{tf.models.__path__[0]}/{family.name}"]):
            if not file.name.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{family.name}.{file.name}")
            except ImportError:  # it needs a library that is not here
                continue
            for name, value in vars(module).items():
                if (
                    not inspect.isclass(value)
                    or value.__module__ != module.__name__
                    or name.endswith("PreTrainedModel")
                ):
                    continue
                if issubclass(value, tf.PreTrainedModel):
                    takes = f"{value.main_input_name} {value.input_modalities}"
                    if any(word in takes for word in ("pixel", "image", "video")) or name.startswith("AST"):
                        yield value


def make_shallow(config):
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PreTrainedConfig):
            make_shallow(value)
        elif name in DEPTHS and isinstance(value, int) and value > 2:
            setattr(config, name, 2)


def build_on_meta(cls):
    """The model of the default configuration with few layers; None where that is not enough to build it."""
    try:
        config = cls.config_class()
        make_shallow(config)
        for name, value in SETTINGS.get(cls.__name__, {}).items():
            setattr(config, name, value)
        with torch.device("meta"):
            return cls(config)
    except Exception:  # whatever a default configuration may lack
        return None


def unaccounted(name, cls, is_proven_tower):
    model = build_on_meta(cls)
    if model is None:
        bases = [f"transformers.{base.__name__}" for base in cls.__mro__]
        known = is_proven_tower or reason_against(bases) or reason_against_owner(bases, None)
        return None if known else "its default configuration does not build, and no rule refuses it"
    found = gaussmask.describe(model)
    if name in NO_IMAGES:
        return None if UNKNOWN in str(found.reason) else "it was taken for a part that gets no images"
    if name in READ and not found.supported:
        return f"it is refused: {found.reason}"
    if found.supported and name not in READ and not is_proven_tower:
        return "attach accepts it, but nobody has read what it does with its tokens (READ in this test)"
    return problem(model)


@pytest.mark.filterwarnings("ignore")
def test_every_vision_model_of_transformers():
    tf.logging.set_verbosity_error()
    towers = {type(host.build()).__name__ for name, host in ALL.items() if name.startswith("transformers-")}
    classes = {cls.__name__: cls for cls in vision_classes()}
    assert len(classes) > 500
    for name, cls in classes.items():
        why = unaccounted(name, cls, name in towers)
        assert why is None, NEW.format(library="transformers", name=name, problem=why)
    older = (READ | NO_IMAGES) - set(classes)
    if older:
        warnings.warn(f"not in transformers {tf.__version__}: {', '.join(sorted(older))}", stacklevel=1)
