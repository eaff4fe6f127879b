"""Pytest plugin: runs tests of timm and transformers on models that carry a drop. `nox -s upstream` uses it.

Every model of the classes in CLASSES is attached to where it is made, at the stage of `--stage`, with half of its
patches dropped in training mode. So the libraries' own expectations are put to attached models: in eval mode they must
behave as if there were no drop; in training mode they must give every gradient, with checkpointing too; they must be
saved, loaded, copied, resized and cast. `--stage none` attaches nothing, which tells a failure of theirs from ours.

What is not run, or with a drop that is idle, and why, is in NOT_RUN and IDLE: nothing else of the chosen tests is left
out. The run fails where no model was attached, or none dropped anything.

timm's tests come with its sdist. The sdist of transformers has the common tests of models, without those of the
families: `test_transformers.py` brings the small models that they run on.
"""

import functools
import re

import pytest

import gaussmask

CLASSES = {
    "timm": (
        "timm.models.VisionTransformer", "timm.models.VisionTransformerDistilled", "timm.models.Eva",
        "timm.models.naflexvit.NaFlexVit", "timm.models.VisionTransformerRelPos", "timm.models.Beit",
    ),
    "transformers": (
        "transformers.ViTModel", "transformers.ViTForImageClassification", "transformers.CLIPVisionModel",
        "transformers.CLIPVisionModelWithProjection", "transformers.Dinov2Model",
        "transformers.Dinov2ForImageClassification", "transformers.DINOv3ViTModel", "transformers.SiglipVisionModel",
        "transformers.BeitModel", "transformers.BeitForImageClassification",
    ),
}  # fmt: skip
# The models of timm's tests that go through every name: small ones, of each kind of positions and of pooling.
TIMM_NAMES = {
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224", "vit_pe_core_tiny_patch16_384", "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_siglip", "beit_base_patch16_224",
}  # fmt: skip
# Names of tests, from their beginning, and why they are not run; with a stage only there.
NOT_RUN = {
    "test_model_inference": "weights from the hub",
    "test_model_load_pretrained": "weights from the hub",
    "test_model_features_pretrained": "weights from the hub",
    "test_model_forward_torchscript": "torch.jit.script refuses an attached model: detach first",
    "test_model_forward_fx": "torch.fx refuses an attached model: detach first",
    "test_model_backward_fx": "torch.fx refuses an attached model: detach first",
    "test_reverse_loading_mapping": "wants every class of a family, and its tests",
    "test_naflexvit_key_only_attn_mask_is_opt_in": "counts what timm's own patch dropout leaves, which stands aside",
}
NOT_RUN_AT = {
    "pixels": {
        "test_naflexvit_patch_interpolation_capability": "stage pixels refuses patches that pass through a resampler",
    },
}
# Run with mask_ratio=0.0, because in training mode they expect what a drop is there to change.
IDLE = {
    "test_prune_intermediate_layers_contract": "dense maps of forward_intermediates, refused while patches are dropped",
    "test_naflexvit_sapiens2_conversion": "the same output of padded images, of which another number is kept",
}


def pytest_addoption(parser):
    parser.addoption("--stage", choices=("tokens", "pixels", "none"), default="tokens")
    parser.addoption("--library", choices=tuple(CLASSES))


class State:
    mask_ratio = 0.5
    attached = 0
    draws = 0


def reason_for(reasons, item):
    return next((why for name, why in reasons.items() if item.originalname.startswith(name)), None)


def not_run(config):
    return NOT_RUN | NOT_RUN_AT.get(config.getoption("--stage"), {})


def pytest_configure(config):
    stage = config.getoption("--stage")
    if stage == "none" or config.getoption("--library") is None:
        return
    for path in CLASSES[config.getoption("--library")]:
        attach_when_made(load(path), stage)
    draw = gaussmask.PatchDropout.draw

    @functools.wraps(draw)
    def counted(self, *args, **kwargs):
        State.draws += 1
        return draw(self, *args, **kwargs)

    gaussmask.PatchDropout.draw = counted


def load(path):
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def attach_when_made(cls, stage):
    """Not in the `__init__` of a subclass, which goes on making its model afterwards."""
    init = cls.__init__

    @functools.wraps(init)
    def attached(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is cls:
            gaussmask.attach(self, gaussmask.RandomPatchDropout(State.mask_ratio), stage=stage)
            State.attached += 1

    cls.__init__ = attached


def pytest_collection_modifyitems(config, items):
    all_are = config.getoption("--library") != "timm"  # of transformers' there are only those of test_transformers.py
    kept = [item for item in items if (all_are or is_of_a_vit(item)) and reason_for(not_run(config), item) is None]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def is_of_a_vit(item):
    """Whether a test of timm makes a model of CLASSES."""
    parameters = getattr(item, "callspec", None)
    name = parameters and parameters.params.get("model_name")
    if name is not None:
        return name in TIMM_NAMES
    return re.search("naflexvit|vit_classifier|radio|eva|beit|sapiens", item.originalname) is not None


@pytest.fixture(autouse=True)
def _drop_or_idle(request):
    State.mask_ratio = 0.0 if reason_for(IDLE, request.node) else 0.5


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--stage") != "none" and exitstatus == 0 and not (State.attached and State.draws):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--stage") != "none":
        terminalreporter.write_line(f"{State.attached} models were attached to, {State.draws} forwards dropped patches")
    for title, reasons in (("not run", not_run(config)), ("with an idle drop", IDLE)):
        for name, reason in reasons.items():
            terminalreporter.write_line(f"{title}: {name}: {reason}")
