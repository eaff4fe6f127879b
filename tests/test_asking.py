"""Rules ask by name: what they are given, in every host at every stage, against the inputs cut by hand."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from hosts import (
    ALL,
    COMPILED,
    COMPILED_WITH_PIXELS,
    NO_PIXELS_AT_ATTACH,
    REPRESENTATIVE,
    VISION,
    make_hf,
    make_naflex,
    make_timm,
    result,
    several_sizes,
    with_stages,
    x_images,
)
from oracle import DROPS, TOLERANCE, ask, difference, randomise, run
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn
from torch.nn import functional as F

import gaussmask
from gaussmask import (
    BlockPatchDropout,
    ClusterPatchDropout,
    GridPatchDropout,
    PatchDropout,
    RandomPatchDropout,
    UnsupportedModelError,
)
from gaussmask.seams import seam as seam_module

PATCH = {"open_clip-CustomTextCLIP-timm": 16, "timm-hybrid": None}


class Seeing(PatchDropout):
    """Keeps what it was given."""

    def scores(self, coords, generator=None, *, pixels, grid_size, valid):
        self.coords, self.pixels, self.grid, self.valid = coords, pixels, grid_size, valid
        return torch.rand(coords.shape[:2])


class Touching(PatchDropout):
    """Keeps the tokens that it was given."""

    def scores(self, coords, generator=None, *, tokens):
        self.tokens = tokens
        return torch.rand(coords.shape[:2])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unfolded(images, grid, patch):
    """(B, N, C, p, q) by F.unfold, of images that are padded or cropped to whole patches."""
    height, width = (count * patch for count in grid)
    images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
    columns = F.unfold(images, patch, stride=patch)
    return columns.mT.unflatten(2, (images.shape[1], patch, patch))


def channels_last(patches, side=8):
    return patches.view(*patches.shape[:2], side, side, -1).permute(0, 1, 4, 2, 3)


def tubelets(videos, grid):
    """(B, N, C, 2, 8, 8) of (B, T, C, H, W), one by one."""
    return torch.stack(
        [
            videos[:, 2 * t : 2 * t + 2, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].transpose(1, 2)
            for t in range(grid[0])
            for y in range(grid[1])
            for x in range(grid[2])
        ],
        dim=1,
    )


def cut_by_hand(name, inputs):
    """The patches as they enter the projection, from the inputs of a host alone."""
    host, (first, *_) = ALL[name], inputs.values()
    images = first["patches"] if isinstance(first, dict) else first
    if name in ("transformers-Pix2StructVisionModel", "transformers-Kosmos2_5Vision"):
        return channels_last(images[..., 2:])
    if images.ndim == 3 and "AST" in name:
        return unfolded(images.mT.unsqueeze(1), host.grid, 8)
    if images.ndim == 3:
        patches = channels_last(images)
    elif images.ndim == 5:
        return tubelets(images, host.grid)
    else:
        if "Radio" in name:  # which normalises by itself
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
            images = (images - mean) / std
        images = F.pad(images, (2, 2, 2, 2)) if "VitPose" in name else images  # its convolution pads
        patches = unfolded(images, host.grid or (6, 6), PATCH.get(name, 8))
    return 2 * (patches - 0.5) if "gemma4" in name else patches


SEES = [name for name in ALL if name != "timm-hybrid"]


@pytest.mark.parametrize(("name", "stage"), with_stages(SEES))
def test_a_rule_sees_the_patches_of_its_images(name, stage):
    host, drop = ALL[name], Seeing(0.5)
    model, inputs = gaussmask.attach(host.build(), drop, stage=stage), host.inputs(2)
    result(host, model, inputs)
    expected = cut_by_hand(name, inputs)
    assert drop.pixels.shape == expected.shape
    torch.testing.assert_close(drop.pixels, expected, rtol=0, atol=1e-6)
    assert not drop.pixels.requires_grad
    assert drop.coords.shape == (*expected.shape[:2], 2)
    if drop.valid is None:
        assert drop.grid == host.grid
    assert drop.keep_indices is not None


@pytest.mark.parametrize(("name", "stage"), with_stages(["timm-vit", "transformers-CLIPVisionModel"]))
def test_asking_changes_nothing_about_the_tokens_that_are_kept(name, stage):
    """A rule that asks draws as one that does not, and the model makes the same of it."""

    class Looks(RandomPatchDropout):
        def scores(self, coords, generator=None, *, pixels, valid):
            return super().scores(coords, generator)

    host = ALL[name]
    model, inputs = host.build(), host.inputs(2)
    outputs = [
        result(host, gaussmask.attach(copy.deepcopy(model), drop, stage=stage), inputs, seed=3)
        for drop in (RandomPatchDropout(0.5), Looks(0.5))
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", [name for name in ALL if "Siglip2" not in name and "Pixtral" not in name])
def test_a_rule_sees_the_tokens_without_prefix_and_suffix(name):
    host, drop, reached = ALL[name], Touching(0.5), []
    model = host.build()
    randomise(model)
    gaussmask.attach(model, drop)
    take = seam_module.take_drawn_tokens
    with mock.patch.object(seam_module, "take_drawn_tokens", lambda x, *rest: reached.append(x) or take(x, *rest)):
        result(host, model, host.inputs(2))
    (tokens,) = reached
    start = tokens.shape[1] - host.count - host.suffix  # the prefix may join later
    assert torch.equal(drop.tokens, tokens[:, start : start + host.count])
    assert not drop.tokens.requires_grad


@pytest.mark.parametrize("masked", [True, False])
def test_siglip2_has_its_tokens_made_for_a_draw_before_its_embeddings(masked):
    host, drop = ALL["transformers-Siglip2VisionModel-padded"], Touching(0.5)
    model, inputs = host.build(), host.inputs(3)
    inputs = inputs if masked else inputs | {"pixel_attention_mask": None}
    module = next(module for module in model.modules() if type(module).__name__ == "Siglip2VisionEmbeddings")
    expected = module(inputs["pixel_values"], inputs["spatial_shapes"])
    calls = []
    module.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    gaussmask.attach(model, drop)
    if masked or "pixel_attention_mask" in model.forward.__code__.co_varnames:
        model(**inputs)
        assert torch.equal(drop.tokens, expected)
        assert not drop.tokens.requires_grad
    gaussmask.attach(model, RandomPatchDropout(0.5))
    calls.clear()
    model(**host.inputs(3))
    assert len(calls) == 1, "who does not ask pays for one embedding"


def test_padding_is_told_as_it_is():
    host, drop = ALL["timm-naflex-padded"], Seeing(0.5)
    inputs = host.inputs(3)
    gaussmask.attach(host.build(), drop)(**inputs)
    assert torch.equal(drop.valid, inputs["x"]["patch_valid"])
    assert drop.grid is None


class Packed(Seeing):
    def scores(self, coords, generator=None, *, pixels, tokens, grid_size, valid):
        self.tokens = tokens
        return super().scores(coords, generator, pixels=pixels, grid_size=grid_size, valid=valid)


def test_packed_images_stand_side_by_side():
    """Each image with its own patches, tokens and coordinates; behind them whatever there is, and told as padding."""
    host, drop = ALL["transformers-PixtralVisionModel"], Packed(0.5)
    model, inputs = gaussmask.attach(host.build(), drop), several_sizes(3)
    rows = []
    handle = model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0] if args else kwargs["inputs_embeds"]), with_kwargs=True
    )
    handle.remove()
    plain = gaussmask.detach(copy.deepcopy(model))
    plain.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0] if args else kwargs["inputs_embeds"]), with_kwargs=True
    )
    plain(**inputs)
    model(**inputs)
    grids = [(height // 8, width // 8) for height, width in inputs["image_sizes"]]
    assert drop.coords.shape == (3, 36, 2)
    assert drop.grid is None
    start = 0
    for image, grid in enumerate(grids):
        count = grid[0] * grid[1]
        assert drop.valid[image].tolist() == [True] * count + [False] * (36 - count)
        cropped = inputs["pixel_values"][image : image + 1, :, : 8 * grid[0], : 8 * grid[1]]
        torch.testing.assert_close(drop.pixels[image, :count], unfolded(cropped, grid, 8)[0], rtol=0, atol=0)
        assert torch.equal(drop.tokens[image, :count], rows[0][0, start : start + count])
        axes = [torch.linspace(-1, 1, side) for side in grid]
        torch.testing.assert_close(drop.coords[image, :count], torch.cartesian_prod(*axes))
        start += count


@pytest.mark.parametrize(
    ("name", "stage"), with_stages(["timm-vit", "timm-dynamic-pad", "transformers-CLIPVisionModel"])
)
def test_pixels_come_in_the_precision_of_the_projection(name, stage):
    host, drop = ALL[name], Seeing(0.5)
    model = gaussmask.attach(host.build().bfloat16(), drop, stage=stage)
    inputs = host.inputs(2)
    result(host, model, {key: value.bfloat16() for key, value in inputs.items()})
    assert drop.pixels.dtype == torch.bfloat16
    torch.testing.assert_close(drop.pixels, cut_by_hand(name, inputs).bfloat16(), rtol=0, atol=0)


# What cannot be given


class Asks(PatchDropout):
    def scores(self, coords, generator=None, *, pixels):
        return torch.rand(coords.shape[:2])


def test_a_stem_raises_with_the_reason():
    model = ALL["timm-hybrid"].build()
    reason = "scores of Asks ask for: its images pass through a backbone .* before their projection"
    with pytest.raises(UnsupportedModelError, match=reason):
        gaussmask.attach(model, Asks(0.5))
    assert gaussmask.attached(model) is None
    gaussmask.attach(model, Touching(0.5))


def strange(**changes):
    model = make_timm()
    for name, value in changes.items():
        setattr(model.patch_embed.proj, name, value)
    return model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dilation": (2, 2)}, "dilation"), ({"padding": "same"}, "padding"),
     ({"padding": (1, 1), "padding_mode": "reflect"}, "padding_mode='reflect'")],
)  # fmt: skip
def test_a_projection_of_another_kind_raises_with_the_reason(changes, reason):
    with pytest.raises(UnsupportedModelError, match=f"scores of Asks ask for: its projection .*{reason}"):
        gaussmask.attach(strange(**changes), Asks(0.5))


def test_flattened_patches_of_an_unknown_size_raise():
    model = ALL["transformers-Pix2StructVisionModel"].build()
    model.config.patch_size = 7
    with pytest.raises(UnsupportedModelError, match="192 numbers that enter its projection is not known"):
        gaussmask.attach(model, Asks(0.5))


def test_tokens_before_the_projection_raise():
    model = make_timm()
    with pytest.raises(UnsupportedModelError, match=r"of Touching ask for tokens.*stage='tokens' can be used"):
        gaussmask.attach(model, Touching(0.5), stage="pixels")
    assert gaussmask.attached(model) is None


def test_a_projection_that_was_replaced_says_attach_again():
    model = gaussmask.attach(make_timm(), Asks(0.5))
    model.patch_embed.proj = nn.Conv2d(3, 32, 8, 8)
    with pytest.raises(UnsupportedModelError, match=r"Asks asks for pixels, but nothing entered.*attach again"):
        model(**x_images(2))


class WithAdapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_around_the_projection_is_seen_through(when):
    model, drop, inputs = make_timm(), Seeing(0.5), x_images(2)
    if when == "before":
        model.patch_embed.proj = WithAdapter(model.patch_embed.proj)
    gaussmask.attach(model, drop)
    if when == "after":
        model.patch_embed.proj = WithAdapter(model.patch_embed.proj)
    model(**inputs)
    assert torch.equal(drop.pixels, unfolded(inputs["x"], (6, 6), 8))


def test_an_override_of_more_than_scores_raises_at_attach():
    class Stashes(RandomPatchDropout):
        def forward(self, x):
            self.norm = x.norm(dim=-1)
            return super().forward(x)

    class Draws(RandomPatchDropout):
        def draw(self, *args, **kwargs):
            return super().draw(*args, **kwargs)

    on_instance = RandomPatchDropout(0.5)
    on_instance.forward = lambda x: x
    for drop, name in ((Stashes(0.5), "forward"), (Draws(0.5), "draw"), (on_instance, "forward")):
        model = make_timm()
        with pytest.raises(TypeError, match=f"{type(drop).__name__} overrides {name}.*write scores alone.*pixels"):
            gaussmask.attach(model, drop)
        assert gaussmask.attached(model) is None
    assert Stashes(0.5)(torch.zeros(1, 16, 2)).shape == (1, 8, 2), "by itself it may"


# Hooks of others on the way


def look(module, args, *output):
    """A hook of somebody else's, before or after."""


ON_THE_WAY = {
    "timm-vit": ["patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop"],
    "timm-eva-pe": ["patch_embed", "patch_embed.proj"],
    "timm-naflex-learned": ["embeds", "embeds.proj"],
    "transformers-CLIPVisionModel": ["embeddings", "embeddings.patch_embedding", "embeddings.position_embedding"],
    "transformers-ViTModel": ["embeddings", "embeddings.patch_embeddings", "embeddings.dropout"],
    "open_clip-tower": ["conv1"],
}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in ON_THE_WAY.items() for path in paths])
def test_a_hook_on_any_module_of_the_embedding_is_an_obstacle_to_pixels(name, path, register):
    """It would be given one blank image. Seen at attach, and by a forward where it came later; in eval all is well."""
    host = ALL[name]
    model = host.build()
    module = dict(model.named_modules()).get(path) or model.get_submodule(f"vision_model.{path}")
    refused = pytest.raises(UnsupportedModelError, match=r"cannot drop pixels: its .*hooks .*stage='tokens'")
    handle = getattr(module, register)(look)
    with refused:
        gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")
    assert "hooks" in gaussmask.describe(model).pixels_reason
    handle.remove()
    gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")
    result(host, model, host.inputs(2))
    handle = getattr(module, register)(look)
    with refused:
        result(host, model, host.inputs(2))
    result(host, model.eval(), host.inputs(2))
    handle.remove()
    result(host, model.train(), host.inputs(2))
    assert gaussmask.attached(model).keep_indices is not None


def test_hooks_around_the_embedding_see_all_and_are_none():
    model, seen = make_timm(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    gaussmask.attach(model, RandomPatchDropout(0.5), stage="pixels")(x_images(3)["x"])
    assert seen == [(3, 3, 48, 48), (3, 19, 32)]


# With the compiler, in half of a precision, recomputed

WITH_EVERY_RULE = ("timm-vit", "timm-naflex-learned", "transformers-CLIPModel")
ALREADY_COMPILED = pytest.mark.thorough(
    "test_attach.py compiles this host, and other hosts are compiled with this rule"
)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *(
            pytest.param(name, stage, marks=() if name in WITH_EVERY_RULE else ALREADY_COMPILED)
            for stage, names in [("tokens", COMPILED), ("pixels", COMPILED_WITH_PIXELS)]
            for name in names
        ),
    ],
)
def test_rules_that_ask_compile_whole(name, stage):
    torch._dynamo.reset()
    host = ALL[name]
    model = host.build()
    inputs = host.inputs(2)
    gaussmask.attach(model, ClusterPatchDropout(0.5), stage=stage)
    expected = result(host, model, inputs, seed=3)
    kept = gaussmask.attached(model).keep_mask
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outcome = result(host, compiled, inputs, seed=3)
    assert torch.equal(gaussmask.attached(model).keep_mask, kept)
    torch.testing.assert_close(outcome, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("name", "stage"), with_stages(REPRESENTATIVE))
@pytest.mark.parametrize("make", [ClusterPatchDropout, GridPatchDropout], ids=lambda cls: cls.__name__)
def test_ready_made_rules_in_every_mechanism(name, stage, make):
    """Exactly K, gradients, and nothing left of the forward."""
    host, drop = ALL[name], make(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    inputs = host.inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        result(host, model, inputs).float().square().sum().backward()
    assert drop.keep_indices.shape == (2, host.count // 2)
    assert all(len(set(kept)) == len(kept) for kept in drop.keep_indices.tolist())
    (seam,) = (module for module in model.modules() if hasattr(module, "caught"))
    assert seam.now.entering is None
    twin = copy.deepcopy(model)
    result(host, twin, inputs)
    assert gaussmask.attached(twin).keep_indices.shape == (2, host.count // 2)
    gaussmask.detach(model)
    assert not any("gaussmask" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_gradient_checkpointing_sees_one_draw(stage):
    model, x = make_timm(), x_images(2)["x"]
    gaussmask.attach(model, ClusterPatchDropout(0.5), stage=stage)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


EVERY_RULE = {
    "cluster": ClusterPatchDropout,
    "grid": GridPatchDropout,
    "block": BlockPatchDropout,
    "cluster in tubes": partial(ClusterPatchDropout, tube=True),
}


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_rule_passes_the_position_oracle(name, rule, monkeypatch):
    monkeypatch.setitem(DROPS, "rule", (3, 0.5, EVERY_RULE[rule]))
    answer = ask(ALL[name], "rule")
    assert answer.hidden < TOLERANCE
    assert answer.control > 3e-3
    assert answer.pooled is None or answer.pooled < TOLERANCE


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("name", [name for name, stage in with_stages(REPRESENTATIVE) if stage == "pixels"])
def test_every_rule_keeps_and_makes_the_same_at_both_stages(name, rule):
    """In float64, where equal means equal."""
    host, make = ALL[name], EVERY_RULE[rule]
    model = host.build()
    randomise(model)
    inputs, outcomes = host.inputs(3), []
    for stage in ("tokens", "pixels"):
        twin = gaussmask.attach(copy.deepcopy(model), make(0.75), stage=stage).double()
        own = {key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
               for key, value in inputs.items()}  # fmt: skip
        torch.manual_seed(7)
        hidden, _ = run(host, twin, own, 3)
        outcomes.append((gaussmask.attached(twin).keep_indices, hidden))
    (kept, hidden), (kept_by_pixels, hidden_by_pixels) = outcomes
    assert torch.equal(kept, kept_by_pixels)
    assert difference(hidden_by_pixels, hidden) < 1e-10


def test_who_does_not_ask_has_nothing_caught():
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="tokens")
    assert not model.patch_embed.proj._forward_pre_hooks
    assert gaussmask.attach(model, ClusterPatchDropout(0.5), stage="tokens").patch_embed.proj._forward_pre_hooks
    assert not gaussmask.detach(model).patch_embed.proj._forward_pre_hooks


def test_naflex_with_patches_of_another_size_says_what_is_wrong():
    """timm resamples the weight there, past the projection."""
    model = make_naflex(enable_patch_interpolator=True)
    gaussmask.attach(model, Asks(0.5))
    patches = {
        "patches": torch.randn(2, 9, 16, 16, 3),
        "patch_coord": torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 9, dtype=torch.bool),
    }
    with pytest.raises(UnsupportedModelError, match="nothing entered the projection"):
        model(patches)


def test_a_tube_of_a_video_is_seen_through_time():
    host, drop = ALL["transformers-VivitModel"], Seeing(0.5, tube=True)
    inputs = host.inputs(2)
    gaussmask.attach(host.build(), drop)(**inputs)
    videos = inputs["pixel_values"]
    assert drop.grid == (6, 6)
    assert drop.pixels.shape == (2, 36, 3, 4, 8, 8)
    assert torch.equal(drop.pixels[:, 7], videos[:, :, :, 8:16, 8:16].transpose(1, 2))
    assert drop.keep_mask.shape == (2, 2, 6, 6)
    assert torch.equal(drop.keep_mask[:, 0], drop.keep_mask[:, 1])


def test_hosts_that_cannot_drop_pixels_can_give_them():
    """All but those with a stem."""
    given = []
    for name in NO_PIXELS_AT_ATTACH:
        try:
            gaussmask.attach(ALL[name].build(), Asks(0.5))
            given.append(name)
        except UnsupportedModelError:
            pass
    assert set(NO_PIXELS_AT_ATTACH) - set(given) == {"timm-hybrid"}


def test_a_model_whose_config_says_nothing_of_patches():
    model = make_hf("ViTModel", "ViTConfig", VISION)
    gaussmask.attach(model, partial(Seeing)(0.5))(torch.randn(1, 3, 48, 48))
    assert gaussmask.attached(model).pixels.shape == (1, 36, 3, 8, 8)


@pytest.mark.parametrize("stage", ["auto", "tokens", "pixels"])
def test_parts_that_are_called_by_themselves_give_the_pixels_too(stage):
    """The images are embedded whole there, whatever the stage."""
    drop = ClusterPatchDropout(0.5)
    model = gaussmask.attach(make_timm(), drop, stage=stage)
    tokens = model.patch_drop(model._pos_embed(model.patch_embed(torch.randn(2, 3, 48, 48))))
    assert tokens.shape == (2, 19, 32)
    model(torch.randn(2, 3, 48, 48))
    assert drop.keep_indices.shape == (2, 18)
