"""No name is unaccounted for: every model of the installed timm and every vision model of the installed transformers is
either of a family that the position oracle proves on a tiny model (tests/hosts.py), or refused with its reason.

A library newer than those of docs/hosts.md may bring names about which nobody has decided. They are expected failures,
so that a test run fails by what was changed here and not by what came out elsewhere; every week `--new-names=fail`
makes them failures.
"""

import collections
import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import transformers as tf
from hosts import ALL
from packaging.version import Version
from torch.overrides import TorchFunctionMode

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


@functools.cache
def proven():
    """The families of the tiny models."""
    return {gaussmask.describe(host.build()).family for host in ALL.values()}


def judge(library, wrong, new_names):
    """Fail for what is not accounted for, a list of (name, problem); xfail if a later version may have brought it."""
    if not wrong:
        return
    said = "".join(NEW.format(library=library, name=name, problem=why) for name, why in wrong)
    if is_later(library) and new_names == "xfail":
        pytest.xfail(said)
    pytest.fail(said, pytrace=False)


def is_later(library):
    """Whether the installed version came after the one of which every name was decided, that of docs/hosts.md."""
    page = Path(__file__).parents[1] / "docs" / "hosts.md"
    decided = re.search(rf"Measured with .*\b{library} ([\w.]+\w)", page.read_text(encoding="utf-8"))[1]
    return Version(sys.modules[library].__version__) > Version(decided)


def problem(model):
    """What is not accounted for in `model`, or None."""
    found = gaussmask.describe(model)
    if found.supported:
        return None if found.family in proven() else f"{found.family} is attached to, but no tiny model proves it"
    return f"nobody has decided about it ({found.reason})" if UNKNOWN in found.reason else None


FILLS = {
    "add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "trunc_normal_", "uniform_",
    "zero_",
}  # fmt: skip


class WithoutValues(TorchFunctionMode):
    """Initial values are not computed, which takes most of the time in which a model is built on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        filled = [*args, *(kwargs or {}).values()][:1]
        return filled[0] if getattr(func, "__name__", "") in FILLS else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta():
    """What is built within has shapes and no values."""
    with torch.device("meta"), WithoutValues():
        yield


class TestNewNames:
    """What came out after docs/hosts.md is an expected failure, but once a week; anything else always fails."""

    WRONG = (("vit_of_tomorrow (Tomorrow)", "nobody has decided about it"),)

    @pytest.mark.parametrize("library", ["timm", "transformers"])
    def test_of_a_later_library_they_fail_only_when_asked_to(self, library, monkeypatch):
        monkeypatch.setattr(sys.modules[library], "__version__", "1000.0.0")
        with pytest.raises(pytest.xfail.Exception, match=r"vit_of_tomorrow[\s\S]*HOSTS in src/gaussmask/hosts"):
            judge(library, self.WRONG, "xfail")
        with pytest.raises(pytest.fail.Exception, match="vit_of_tomorrow"):
            judge(library, self.WRONG, "fail")

    @pytest.mark.parametrize("library", ["timm", "transformers"])
    def test_a_name_that_was_decided_about_fails(self, library, monkeypatch):
        monkeypatch.setattr(sys.modules[library], "__version__", "0.9")
        with pytest.raises(pytest.fail.Exception, match="vit_of_tomorrow"):
            judge(library, self.WRONG, "xfail")

    def test_nothing_wrong_is_nothing_said(self):
        judge("timm", [], "fail")


# timm

CHUNKS = 8


def names_of_every_file():
    """Every fifth name of a file whose models are masked, and two of every other file, refused by its classes."""
    names = collections.defaultdict(list)
    for name in timm.list_models():
        names[timm.models.model_entrypoint(name).__module__].append(name)
    masked = {type(host.build()).__module__ for key, host in ALL.items() if key.startswith("timm-")}
    return [name for file, own in names.items() for name in own[:: 5 if file in masked else 1 + len(own) // 2]]


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.filterwarnings("ignore")  # overridden defaults of timm's own
def test_every_name_of_timm(chunk, request, thorough):
    names = (timm.list_models() if thorough else names_of_every_file())[chunk::CHUNKS]
    assert len(names) > 20
    wrong = []
    for name in names:
        with on_meta():
            model = timm.create_model(name)
        if (why := problem(model)) is not None:
            wrong.append((f"{name} ({type(model).__name__})", why))
    judge("timm", wrong, request.config.getoption("new_names"))


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
        with on_meta():
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
def test_every_vision_model_of_transformers(request, thorough):
    tf.logging.set_verbosity_error()
    towers = {type(host.build()).__name__ for name, host in ALL.items() if name.startswith("transformers-")}
    classes = {cls.__name__: cls for cls in vision_classes()}
    assert len(classes) > 500
    decided = READ | NO_IMAGES | towers
    refused = sorted(classes.keys() - decided)
    asked = sorted(decided & classes.keys()) + (refused if thorough else refused[::4])
    problems = ((name, unaccounted(name, classes[name], name in towers)) for name in asked)
    wrong = [(name, why) for name, why in problems if why is not None]
    judge("transformers", wrong, request.config.getoption("new_names"))
    older = (READ | NO_IMAGES) - set(classes)
    if older:
        warnings.warn(f"not in transformers {tf.__version__}: {', '.join(sorted(older))}", stacklevel=1)
