"""Stage "pixels" is stage "tokens", with the projection behind the drop; where it could not be, it raises."""

import copy
import math
from functools import partial

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from hosts import (
    ALL,
    NO_PIXELS_AT_ATTACH,
    NO_PIXELS_AT_THE_CALL,
    OWN_POSITIONS,
    VISION,
    make_hf,
    make_naflex,
    make_open_tower,
    make_timm,
    result,
    x_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DROPS, randomise, run
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

import gaussmask
from gaussmask import (
    ClusterPatchDropout,
    GaussianPatchDropout,
    PatchDropout,
    RandomPatchDropout,
    UnsupportedModelError,
)
from gaussmask.functional import sample_keep_indices, take_patches
from gaussmask.seams import pixels as pixels_module

POSSIBLE = [name for name in ALL if name not in NO_PIXELS_AT_ATTACH | NO_PIXELS_AT_THE_CALL]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_half():
    return RandomPatchDropout(0.5)


def both(build, make_drop=random_half):
    """The same model twice, with the same kind of drop at stage "tokens" and at stage "pixels"."""
    tokens = build()
    randomise(tokens)
    pixels = copy.deepcopy(tokens)
    gaussmask.attach(tokens, make_drop(), stage="tokens")
    return tokens, gaussmask.attach(pixels, make_drop(), stage="pixels")


class AsksForTokens(PatchDropout):
    """Keeps the longest tokens."""

    def scores(self, coords, generator=None, *, tokens):
        return tokens.norm(dim=-1) + torch.rand(coords.shape[:2])


def difference(value, reference, scale=None):
    scale = reference.abs().max() if scale is None else scale
    return ((value - reference).abs().max() / scale).item() if value.numel() else 0.0


def in_double(inputs):
    """Inputs as float64 leaves, so that the images get a gradient."""
    return {
        name: value.double().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("share", ["half", "most"])
@pytest.mark.parametrize("name", POSSIBLE)
def test_same_draws_outputs_and_gradients_as_the_tokens(name, share):
    """In float64, where equal means equal: hidden states, and the gradients of all parameters and of the images."""
    host, (batch_size, mask_ratio, make_drop) = ALL[name], DROPS[share]
    models = [model.double() for model in both(host.build, partial(make_drop, mask_ratio))]
    inputs, outcomes = host.inputs(batch_size), []
    for model in models:
        own = in_double(inputs)
        torch.manual_seed(7)
        hidden, _ = run(host, model, own, batch_size)
        hidden.backward(torch.ones_like(hidden).cumsum(1).sin())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        images = {name: value.grad for name, value in own.items() if torch.is_tensor(value) and value.requires_grad}
        outcomes.append((gaussmask.attached(model).keep_indices, hidden, gradients, images))
    (keep, hidden, gradients, images), (keep_pixels, hidden_pixels, gradients_pixels, images_pixels) = outcomes
    assert torch.equal(keep_pixels, keep)
    assert difference(hidden_pixels, hidden) < 1e-12
    scale = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None and gradient.numel())
    for parameter, gradient in gradients.items():
        assert (gradients_pixels[parameter] is None) == (gradient is None), parameter
        if gradient is not None:  # Siglip 2 resizes its positions in float32
            tolerance = 1e-6 if "Siglip2" in name and "position" in parameter else 1e-10
            assert difference(gradients_pixels[parameter], gradient, scale) < tolerance, parameter
    assert len(images) == 1
    assert all(difference(images_pixels[key], images[key]) < 1e-10 for key in images)


@pytest.mark.parametrize("name", POSSIBLE)
def test_the_same_in_float32_to_the_contract(name):
    host = ALL[name]
    inputs, hidden = host.inputs(3), []
    for model in both(host.build):
        torch.manual_seed(3)
        hidden.append(run(host, model, inputs, 3)[0])
    assert difference(*hidden[::-1]) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_auto_is_equal_to_the_tokens_and_takes_pixels_where_it_can(name):
    """Draws, hidden states and gradients; by default, and without an error that tokens would not raise.

    In float64 where pixels can be dropped; where they can't, it is the same computation.
    """
    host = ALL[name]
    tokens = host.build()
    randomise(tokens)
    auto, outcomes = copy.deepcopy(tokens), []
    gaussmask.attach(tokens, random_half(), stage="tokens")
    gaussmask.attach(auto, random_half())
    can = name in POSSIBLE
    taken, inputs = [], host.inputs(2)
    for model in (tokens.double(), auto.double()) if can else (tokens, auto):
        (seam,) = (module for module in model.modules() if hasattr(module, "pixels"))
        if seam.pixels is not None:
            embed = seam.pixels.embed
            seam.pixels.embed = lambda *args, embed=embed: (taken.append(True), embed(*args))[1]
        torch.manual_seed(7)
        hidden, _ = run(host, model, in_double(inputs) if can else inputs, 2)
        hidden.backward(torch.ones_like(hidden).cumsum(1).sin())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        outcomes.append((gaussmask.attached(model).keep_indices, hidden, torch.cat([g.flatten() for g in gradients])))
    (keep, hidden, gradients), (keep_auto, hidden_auto, gradients_auto) = outcomes
    assert torch.equal(keep_auto, keep)
    assert difference(hidden_auto, hidden) < 1e-12
    assert difference(gradients_auto, gradients) < (1e-6 if "Siglip2" in name else 1e-10)
    assert bool(taken) == can
    described = gaussmask.describe(auto)
    assert described.stage == ("tokens" if name in NO_PIXELS_AT_ATTACH else "pixels")
    assert gaussmask.describe(tokens).stage == "tokens"
    assert (described.stage_reason is None) == (described.stage == "pixels")


def test_auto_decides_anew_when_something_changed():
    """A dropout, a hook, a projection of another kind; and back."""
    model, drop, x = make_timm(), GaussianPatchDropout(0.5), x_images(2)["x"]
    model.pos_drop = torch.nn.Dropout(0.0)
    gaussmask.attach(model, drop)
    (seam,) = (module for module in model.modules() if hasattr(module, "pixels"))
    embed, taken = seam.pixels.embed, []
    seam.pixels.embed = lambda *args: (taken.append(True), embed(*args))[1]

    def stage():
        taken.clear()
        model(x)
        assert f"at stage {gaussmask.describe(model).stage!r}" in repr(drop)
        assert gaussmask.describe(model).stage == ("pixels" if taken else "tokens")
        return gaussmask.describe(model).stage

    assert stage() == "pixels"
    model.pos_drop.p = 0.1
    assert stage() == "tokens"
    assert "set pos_drop.p to 0" in gaussmask.describe(model).stage_reason
    model.pos_drop.p = 0.0
    assert stage() == "pixels"
    seen = []
    handle = model.patch_embed.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert stage() == "tokens"
    assert seen == [2], "somebody's hook sees the whole batch"
    handle.remove()
    assert stage() == "pixels"
    own = model.patch_embed.proj
    model.patch_embed.proj = torch.nn.Conv2d(3, own.out_channels, own.kernel_size, own.stride)
    assert stage() == "tokens"
    model.patch_embed.proj = own
    assert stage() == "pixels"
    torch.nn.utils.parametrize.register_parametrization(own, "weight", torch.nn.Identity())
    assert stage() == "tokens"
    torch.nn.utils.parametrize.remove_parametrizations(own, "weight")
    assert stage() == "pixels"
    model.patch_embed.forward = model.patch_embed.forward
    assert stage() == "tokens"


@pytest.mark.parametrize("breaks", [False, True])
def test_auto_takes_tokens_in_a_graph_that_could_not_look_for_obstacles(breaks, monkeypatch):
    """As those of torch 2.6; in eager mode it takes pixels there too."""
    monkeypatch.setattr(pixels_module, "BREAKS_GRAPHS", breaks)
    torch._dynamo.reset()
    model, x, taken = gaussmask.attach(make_timm(), RandomPatchDropout(0.5)), x_images(2)["x"], []
    (seam,) = (module for module in model.modules() if hasattr(module, "pixels"))
    embed = seam.pixels.embed
    seam.pixels.embed = lambda *args: (taken.append(torch.compiler.is_compiling()), embed(*args))[1]
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    assert taken == [False] + [True] * (not breaks)


@pytest.mark.parametrize("rule", [ClusterPatchDropout, AsksForTokens], ids=lambda rule: rule.__name__)
def test_auto_gives_rules_what_they_ask_for(rule):
    """Pixels in either way; tokens where there are tokens."""
    model, x = make_timm(), x_images(2)["x"]
    model.pos_drop = torch.nn.Dropout(0.0)
    whole = copy.deepcopy(model)
    auto = gaussmask.attach(model, rule(0.5))
    tokens = gaussmask.attach(whole, rule(0.5), stage="tokens")
    for p in (0.0, 1e-9, 0.0):  # with a dropout: tokens
        outputs = []
        for one in (auto, tokens):
            one.pos_drop.p = p
            torch.manual_seed(3)
            outputs.append(one(x))
            assert gaussmask.attached(one).keep_indices.shape == (2, 18)
        assert torch.equal(gaussmask.attached(auto).keep_indices, gaussmask.attached(tokens).keep_indices)
        torch.testing.assert_close(*outputs)
    assert ("ask for tokens" in (gaussmask.describe(auto).stage_reason or "")) == (rule is AsksForTokens)


@pytest.mark.parametrize("name", NO_PIXELS_AT_ATTACH)
def test_what_cannot_be_equal_raises_at_attach(name):
    model, drop = ALL[name].build(), RandomPatchDropout(0.5)
    with pytest.raises(
        UnsupportedModelError, match=rf"cannot drop pixels: .*{NO_PIXELS_AT_ATTACH[name]}.*stage='tokens' can be used"
    ):
        gaussmask.attach(model, drop, stage="pixels")
    assert gaussmask.attached(model) is None
    gaussmask.attach(model, drop)


@pytest.mark.parametrize("name", NO_PIXELS_AT_THE_CALL)
def test_what_cannot_be_equal_raises_at_the_call(name):
    host = ALL[name]
    model = gaussmask.attach(host.build(), RandomPatchDropout(0.5), stage="pixels")
    with pytest.raises(
        UnsupportedModelError, match=rf"cannot drop pixels: .*{NO_PIXELS_AT_THE_CALL[name]}.*stage='tokens' can be used"
    ):
        model(**host.inputs(2))
    gaussmask.attached(model).eval()
    model(**host.inputs(2))


@pytest.mark.parametrize("name", ALL)
def test_describe_tells_what_attach_does(name):
    reason = gaussmask.describe(ALL[name].build()).pixels_reason
    assert (reason is None) == (name not in NO_PIXELS_AT_ATTACH)
    if reason is not None:
        assert NO_PIXELS_AT_ATTACH[name] in reason


# What the images are like


def wrapped(size, **changes):
    return partial(make_timm, **changes), partial(x_images, size=size)


def make_cropping():
    """A model that leaves out the pixels which fill no patch."""
    model = make_timm(dynamic_img_size=True)
    model.patch_embed.strict_img_size = False
    model.patch_embed.img_size = None
    return model


SHAPES = {
    "padded": wrapped((45, 61), dynamic_img_size=True, dynamic_img_pad=True),
    "cropped": (make_cropping, partial(x_images, size=(45, 61))),
    "rectangle": wrapped((48, 32), img_size=(48, 32)),
    "oblong patches": wrapped((48, 48), patch_size=(8, 16)),
    "no class token": wrapped((48, 48), class_token=False, global_pool="avg"),
    "map pooling": wrapped((48, 48), class_token=False, global_pool="map"),
    "registers": wrapped((48, 48), reg_tokens=4),
    "distilled": wrapped((48, 48), name="deit_tiny_distilled_patch16_224"),
    "eva": wrapped((48, 64), name="eva02_tiny_patch14_224", img_size=(48, 64)),
    "no bias": wrapped((48, 48), pre_norm=True),
    "naflex, padded": (partial(make_naflex, dynamic_img_pad=True), partial(x_images, size=(45, 61))),
    "naflex, convolution": (partial(make_naflex, embed_proj_type="conv"), partial(x_images, size=(48, 64))),
    "open_clip, cropped": (partial(make_open_tower, image_size=(48, 48)), partial(x_images, size=(53, 49))),
    "transformers, cropped": (
        partial(make_hf, "CLIPVisionModel", "CLIPVisionConfig", VISION),
        lambda batch_size: {"pixel_values": torch.randn(batch_size, 3, 53, 60), "interpolate_pos_encoding": True},
    ),
    "spectrogram, overlapping": (
        partial(
            make_hf, "ASTModel", "ASTConfig",
            {**VISION, "num_mel_bins": 32, "max_length": 44, "frequency_stride": 5, "time_stride": 6},
        ),
        lambda batch_size: {"input_values": torch.randn(batch_size, 44, 32)},
    ),
}  # fmt: skip


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["as made", "channels last", "strided"])
def test_shapes_and_layouts_of_images(shape, memory):
    build, make_inputs = SHAPES[shape]
    models = both(build, partial(GaussianPatchDropout, 0.6))
    inputs = make_inputs(3)
    (name, images), *_ = inputs.items()
    if memory == "channels last":
        images = images.to(memory_format=torch.channels_last) if images.ndim == 4 else images.mT.contiguous().mT
    elif memory == "strided":
        images = torch.randn(6, *(side + 3 for side in images.shape[1:])).mul_(2)[
            (slice(None, None, 2), *(slice(2, side + 2) for side in images.shape[1:]))
        ]
    outcomes = []
    for model in models:
        torch.manual_seed(5)
        outcomes.append(pooled(model(**{**inputs, name: images})))
    assert torch.equal(*(gaussmask.attached(model).keep_mask for model in models))
    assert difference(*outcomes[::-1]) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_model_in_channels_last(channels_last):
    tokens, pixels = both(make_timm)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(3, 3, 48, 48).to(memory_format=layout)
    outputs = [
        F.normalize(model.to(memory_format=layout)(images)) for model in (tokens, pixels) if torch.manual_seed(1)
    ]
    assert difference(*outputs[::-1]) < 1e-5


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva-pe", "timm-naflex-mixed", "transformers-CLIPVisionModel",
                                  "transformers-DINOv3ViTModel", "open_clip-tower"])  # fmt: skip
def test_bfloat16_within_its_rounding(name, how):
    """No further from float32 than the tokens' stage is, on average; and of the same dtype."""
    host = ALL[name]
    tokens, pixels = both(host.build)
    inputs = host.inputs(3)
    exact = result(host, tokens, inputs, seed=3)
    if how == "cast":
        tokens, pixels = tokens.bfloat16(), pixels.bfloat16()
        inputs = {key: value.bfloat16() if torch.is_tensor(value) else value for key, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        low, low_pixels = (result(host, model, inputs, seed=3) for model in (tokens, pixels))
    assert low.dtype == low_pixels.dtype
    assert (low_pixels - exact).pow(2).mean() < 2 * (low - exact).pow(2).mean()
    assert difference(low, exact) > 1e-4, "bfloat16 was at work"


# Modes


def test_eval_masked_inference_and_unmasked_tuning():
    model, drop, inputs = make_timm(), RandomPatchDropout(0.5), x_images(2)
    expected = model.eval()(**inputs)
    gaussmask.attach(model, drop, stage="pixels")
    assert torch.equal(model(**inputs), expected)
    drop.train()
    assert not torch.allclose(model(**inputs), expected)
    assert drop.keep_indices.shape == (2, 18)
    drop.mask_ratio = 0.0
    assert torch.equal(model(**inputs), expected)
    assert drop.keep_indices is None
    drop.mask_ratio = 0.75
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert drop.keep_indices.shape == (2, 9)
    gaussmask.attach(model, drop)  # and back to the tokens
    model(**inputs)
    assert torch.equal(gaussmask.detach(model).eval()(**inputs), expected)


class Largest(TorchDispatchMode):
    """Records the most elements that an operation returned in memory of its own."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        inputs = {id(value.untyped_storage()) for value in args if isinstance(value, torch.Tensor)}
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(value, torch.Tensor) and id(value.untyped_storage()) not in inputs:
                self.most = max(self.most, value.numel())
        return output


@pytest.mark.parametrize("name", ["timm-vit", "timm-naflex-learned", "transformers-CLIPVisionModel", "open_clip-tower"])
def test_no_tensor_of_all_tokens_is_made(name):
    """Neither forward nor backward: everything is smaller than the (B, N, D) that stage "tokens" makes."""
    host, batch_size = ALL[name], 16
    inputs, most = host.inputs(batch_size), []
    for model in both(host.build, partial(RandomPatchDropout, 0.918)):
        with Largest() as largest:
            result(host, model, inputs).sum().backward()
        most.append(largest.most)
    all_tokens = batch_size * host.count * 32
    assert most[0] >= all_tokens
    assert most[1] < all_tokens / 2


@pytest.mark.parametrize("name", ["timm-vit", "timm-naflex-learned", "transformers-CLIPVisionModel", "open_clip-tower"])
def test_the_projection_works_for_the_kept_patches_alone(name):
    """And for one patch of the blank image, all of which are alike: counted in operations of the forward."""
    host, batch_size = ALL[name], 4
    inputs, operations = host.inputs(batch_size), []
    for model in both(host.build):
        with FlopCounterMode(display=False) as counter:
            result(host, model, inputs)
        operations.append(counter.get_total_flops())
    width, pixels = 32, 3 * 8 * 8
    assert operations[0] - operations[1] == 2 * width * pixels * (batch_size * (host.count - host.count // 2) - 1)


# What comes in between


def hook(module, args, output):
    return output


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.patch_embed.proj)


def hooked(model):
    model.patch_embed.proj.register_forward_hook(hook)


def with_dropout(model):
    model.pos_drop.p = 0.1


class LowRank(nn.Module):
    """A projection with something added, as adapters do it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.low, self.up = nn.Conv2d(3, 2, 8, 8), nn.Conv2d(2, 32, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.low(x))


def adapted(model):
    model.patch_embed.proj = LowRank(model.patch_embed.proj)


def normed(model):
    model.patch_embed.norm = nn.LayerNorm(32)


def shadowed(model):
    model.patch_embed.proj.forward = partial(type(model.patch_embed.proj).forward, model.patch_embed.proj)


def another(model):
    model.patch_embed.proj = copy.deepcopy(model.patch_embed.proj)


def dilated(model):
    model.patch_embed.proj.dilation = (2, 2)


def grouped(model):
    model.patch_embed.proj = nn.Conv2d(3, 36, 8, 8, groups=3)


CHANGES = {
    hooked: "carries hooks", parametrized: "ParametrizedConv2d, and no plain", with_dropout: "set pos_drop.p to 0",
    adapted: "LowRank, and no plain", normed: "pass through LayerNorm", shadowed: "a forward of somebody else's",
    dilated: r"dilation=\(2, 2\)", grouped: "groups=3",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_obstacles_are_seen_before_attach(change):
    model = make_timm()
    change(model)
    assert CHANGES[change].replace("\\", "") in gaussmask.describe(model).pixels_reason
    with pytest.raises(UnsupportedModelError, match=f"VisionTransformer cannot drop pixels: .*{CHANGES[change]}"):
        gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")


@pytest.mark.parametrize(
    "change", [*[change for change in CHANGES if change is not grouped], another], ids=lambda change: change.__name__
)
def test_obstacles_are_seen_after_attach(change):
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    model(**x_images(2))
    change(model)
    reason = CHANGES.get(change, "replaced after attach")
    with pytest.raises(UnsupportedModelError, match=f"VisionTransformer cannot drop pixels: .*({reason})"):
        model(**x_images(2))


class OwnEmbeddings(CLIPVisionEmbeddings):
    """A subclass that makes more of a patch than the class does."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).tanh()


def embeddings_of(model):
    return getattr(model, "vision_model", model).embeddings  # transformers 5.0 has a tower in between


def of_a_class(model):
    embeddings_of(model).__class__ = OwnEmbeddings


def of_the_instance(model):
    embeddings_of(model).forward = partial(OwnEmbeddings.forward, embeddings_of(model))


@pytest.mark.parametrize("change", [of_a_class, of_the_instance], ids=lambda change: change.__name__)
def test_code_of_somebody_elses_on_the_way_to_the_tokens(change):
    model = ALL["transformers-CLIPVisionModel"].build()
    change(model)
    with pytest.raises(UnsupportedModelError, match="its forward is not the one of its library"):
        gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    model._pos_embed = partial(type(model)._pos_embed, model)
    with pytest.raises(UnsupportedModelError, match="its _pos_embed is not the one of its library"):
        model(**x_images(2))
    model = make_timm()
    model.patch_embed.forward = partial(type(model.patch_embed).forward, model.patch_embed)
    assert "the forward of its PatchEmbed" in gaussmask.describe(model).pixels_reason


def test_a_weight_that_is_no_plain_tensor():
    class Quantised(torch.Tensor):
        pass

    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    weight = model.patch_embed.proj.weight
    del model.patch_embed.proj.weight
    model.patch_embed.proj.weight = weight.detach().as_subclass(Quantised)
    with pytest.raises(UnsupportedModelError, match="the weight of its projection is a Quantised"):
        model(**x_images(2))


@pytest.mark.parametrize("name", ["transformers-ViTModel", "transformers-IJepaModel", "transformers-VideoMAEModel"])
def test_masked_positions_of_the_users_own(name):
    host = ALL[name]
    model = gaussmask.attach(host.build(), RandomPatchDropout(0.5), stage="pixels")
    inputs = host.inputs(1)
    mask = torch.zeros(1, host.count, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="it was called with bool_masked_pos"):
        model(**inputs, bool_masked_pos=mask)


def test_dropout_of_a_configuration():
    model = tf.ViTModel(tf.ViTConfig(**{**VISION, "hidden_dropout_prob": 0.1}))
    assert (
        "its dropout is a dropout with p=0.1, of which all images would share one draw: set dropout.p to 0"
        in gaussmask.describe(model).pixels_reason
    )
    model.embeddings.dropout.p = 0.0
    gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")


def test_tokens_that_did_not_come_from_images():
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    with pytest.raises(UnsupportedModelError, match=r"without the patch embedding|no images had gone through"):
        model.patch_drop(torch.randn(2, 37, 32))


def test_images_of_one_shape_pass_as_flattened_patches():
    host = ALL["transformers-Siglip2VisionModel"]
    tokens, pixels = both(host.build)
    inputs = host.inputs(3)
    assert difference(result(host, pixels, inputs, 3), result(host, tokens, inputs, 3)) < 1e-5
    inputs["spatial_shapes"] = torch.tensor([[6, 6], [4, 9], [6, 6]])
    with pytest.raises(UnsupportedModelError, match=OWN_POSITIONS):
        pixels(**inputs)


def test_flattened_patches_without_a_padding_mask():
    """Where the patches are drawn behind the embeddings, which saw one shape only."""
    tokens, pixels = both(ALL["transformers-Siglip2VisionModel"].build)
    inputs = {**ALL["transformers-Siglip2VisionModel"].inputs(3), "pixel_attention_mask": None}
    outcomes = [model(**inputs).last_hidden_state for model in (tokens, pixels) if torch.manual_seed(3)]
    assert outcomes[1].shape == (3, 18, 32)
    assert difference(*outcomes[::-1]) < 1e-5


def test_a_host_that_casts_its_images():
    tokens, pixels = (model.bfloat16() for model in both(ALL["transformers-CLIPVisionModel"].build))
    inputs = ALL["transformers-CLIPVisionModel"].inputs(3)
    outcomes = [model(**inputs).pooler_output for model in (tokens, pixels) if torch.manual_seed(3)]
    assert outcomes[0].dtype == outcomes[1].dtype == torch.bfloat16
    assert difference(*outcomes[::-1]) < 0.1


def test_images_that_a_host_changes_in_a_way_of_its_own():
    """V-JEPA 2 repeats the frames of a clip that is too short."""
    model = ALL["transformers-VJEPA2Model"].build()
    gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")
    with pytest.raises(UnsupportedModelError, match="clips of 1 frames are shorter than a patch of 2"):
        model(pixel_values_videos=torch.randn(2, 1, 3, 48, 48), skip_predictor=True)


def test_nothing_of_a_forward_travels_or_stays():
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    (seam,) = (module for module in model.modules() if hasattr(module, "pixels"))
    model(**x_images(2))
    assert seam.now.images is seam.now.blank is None
    copies = []

    def copy_it(module, args):
        if not copies:
            assert seam.now.images is not None
            copies.append(copy.deepcopy(model))

    seam.register_forward_pre_hook(copy_it)
    model(**x_images(2))
    assert next(m for m in copies[0].modules() if hasattr(m, "pixels")).now.images is None
    assert seam.now.images is seam.now.blank is None


# Cutting patches out of images


def windows(images, keep_indices, patch_size, stride):
    """The reference: every window of the image, by F.unfold, and the kept ones by a loop."""
    (height, width), channels = patch_size, images.shape[1]
    columns = F.unfold(images, patch_size, stride=stride)  # (B, C * p * q, N)
    rows = [columns[image].T[kept] for image, kept in enumerate(keep_indices)]
    return torch.stack(rows).view(*keep_indices.shape, channels, height, width)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "view": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "one grey channel": lambda x: x[:, :1].expand_as(x),
    "one image": lambda x: x[:1].expand_as(x),
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
}


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_take_patches_is_unfold(data):
    sides = st.integers(1, 4)
    patch_size, stride = (data.draw(st.tuples(sides, sides)) for _ in range(2))
    shape = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))]
    shape += [patch + data.draw(st.integers(0, 9)) for patch in patch_size]
    images = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](torch.randn(shape))
    num_patches = math.prod((s - p) // t + 1 for s, p, t in zip(images.shape[2:], patch_size, stride, strict=True))
    keep_indices = torch.rand(len(images), num_patches).argsort(1)[:, : data.draw(st.integers(1, num_patches))]
    expected = windows(images, keep_indices, patch_size, stride)
    assert torch.equal(take_patches(images, keep_indices, patch_size, stride), expected)
    leaf = images.clone().requires_grad_()
    taken = take_patches(leaf, keep_indices, patch_size, stride)
    assert torch.equal(taken, expected)
    (gradient,) = torch.autograd.grad(taken.square().sum(), leaf)
    leaf = images.clone().requires_grad_()
    (reference,) = torch.autograd.grad(windows(leaf, keep_indices, patch_size, stride).square().sum(), leaf)
    assert torch.allclose(gradient, reference)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_take_patches_of_any_dtype_and_compiled(dtype, compiled):
    images = torch.randint(0, 200, (3, 3, 30, 33)).to(dtype)
    keep_indices = sample_keep_indices(3, (4, 4), 0.5)
    take = torch.compile(take_patches, fullgraph=True, backend="aot_eager") if compiled else take_patches
    patches = take(images, keep_indices, 7)
    assert patches.dtype == dtype
    assert torch.equal(patches.double(), windows(images.double(), keep_indices, (7, 7), (7, 7)))


def test_take_patches_stands_for_a_convolution():
    images, conv, keep_indices = torch.randn(2, 3, 32, 32), nn.Conv2d(3, 8, 8, 8), sample_keep_indices(2, (4, 4), 0.5)
    patches = take_patches(images, keep_indices, 8)
    kept = conv(images).flatten(2).mT.take_along_dim(keep_indices.unsqueeze(-1), 1)
    assert torch.allclose(F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias), kept, atol=1e-5)
    video = torch.randn(2, 3, 4, 16, 16)
    conv = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8))
    patches = take_patches(video, torch.tensor([[7, 0], [2, 3]]), (2, 8, 8))
    kept = conv(video).flatten(2).mT.take_along_dim(torch.tensor([[7, 0], [2, 3]]).unsqueeze(-1), 1)
    assert torch.allclose(F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias), kept, atol=1e-5)


def test_no_images_no_patches():
    assert take_patches(torch.randn(0, 3, 8, 8), torch.zeros(0, 2, dtype=torch.int64), 4).shape == (0, 2, 3, 4, 4)


BAD = [
    ({"images": [1.0]}, TypeError, "images must be a tensor, got list"),
    ({"images": torch.zeros(2, 3, 8)}, ValueError, r"images must have shape .* got \(2, 3, 8\)"),
    ({"patch_size": 9}, ValueError, r"patch_size=\(9, 9\) is larger than images"),
    ({"patch_size": (4, 4, 4)}, ValueError, r"patch_size must be an integer or 2 of them"),
    ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
    ({"patch_size": "4"}, TypeError, "patch_size must be an integer"),
    ({"stride": 0.5}, TypeError, "stride must be an integer"),
    ({"keep_indices": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"keep_indices must be int64 of shape \(2, k"),
    ({"keep_indices": torch.zeros(2, 1)}, ValueError, "keep_indices must be int64"),
    ({"keep_indices": None}, TypeError, "keep_indices must be a tensor"),
    ({"keep_indices": torch.tensor([[0], [4]])}, ValueError, r"must lie in \[0, 4\), got values from 0 to 4"),
    ({"keep_indices": torch.tensor([[0], [-1]])}, ValueError, r"must lie in \[0, 4\), got values from -1 to 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_take_patches_names_what_is_wrong(change, error, message):
    arguments = {"images": torch.zeros(2, 3, 8, 8), "keep_indices": torch.zeros(2, 1, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        take_patches(**{**arguments, "patch_size": 4, **change})


def test_out_of_range_raises_under_compile_too():
    take = torch.compile(take_patches, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"keep_indices must lie in \[0, 4\)"):
        take(torch.zeros(2, 3, 8, 8), torch.tensor([[0], [4]]), 4)


# Stage "auto" among the tools of others


def offloaded(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def with_lora(model):
    projection = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return get_peft_model(model, LoraConfig(target_modules=[projection], init_lora_weights=False))


def with_dropout(model):
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).p = 1e-9
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("change", [offloaded, with_lora, with_dropout])
@pytest.mark.parametrize("name", ["timm-vit", "transformers-ViTModel"])
def test_auto_goes_through_tokens_with_the_same_numbers(name, change):
    """What stands in the way of pixels after attach: no error, and what stage tokens gives."""
    host, inputs = ALL[name], ALL[name].inputs(2)
    model = host.build()
    randomise(model)
    tokens = copy.deepcopy(model)
    auto = gaussmask.attach(model, RandomPatchDropout(0.5))
    gaussmask.attach(tokens, RandomPatchDropout(0.5), stage="tokens")
    outputs = []
    for one in (auto, tokens):
        torch.manual_seed(0)
        changed = change(one).train()
        torch.manual_seed(3)
        output = changed(**inputs)
        outputs.append(output if torch.is_tensor(output) else output[0])
        assert gaussmask.attached(changed).keep_indices.shape == (2, 18)
    assert gaussmask.describe(auto).stage == "tokens"
    torch.testing.assert_close(*outputs)
