"""What would run on fewer tokens and be wrong: each is mended (which the oracle proves too) or raises the way out."""

import copy
import threading
import warnings
from functools import partial

import pytest
import timm
import torch
import transformers
from hosts import (
    ALL,
    PADDED_GRIDS,
    TEXT,
    VISION,
    images,
    make_hf,
    make_naflex,
    make_open_tower,
    make_timm,
    result,
    rows_and_columns,
    several_sizes,
    videos,
    with_stages,
    x_images,
)
from oracle import TOLERANCE, difference, masked_keys, randomise

import gaussmask
from gaussmask import ClusterPatchDropout, GaussianPatchDropout, PatchDropout, RandomPatchDropout, UnsupportedModelError
from gaussmask.seams.call import Argument, Draw
from gaussmask.seams.followers import Batched, KeyMask
from gaussmask.seams.link import Link


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Dense feature maps


MAKERS = {
    "vit": make_timm,
    "eva": partial(make_timm, "eva02_tiny_patch14_224"),
    "naflex": partial(make_naflex, reg_tokens=1),
    "beit": ALL["timm-beit"].build,
    "relpos": ALL["timm-relpos-class"].build,
    "cait": ALL["timm-cait"].build,
    "gemma4": ALL["timm-gemma4-encoder"].build,
    "open_clip": make_open_tower,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_dense_feature_maps_raise_instead_of_being_scrambled(make):
    model, x = make().eval(), x_images(2)["x"]
    expected = model.forward_intermediates(x, intermediates_only=True)
    gaussmask.attach(model, RandomPatchDropout(0.75))  # 9 of 36 patches: maps of 8 channels would fit
    model.train()
    for more in ({}, {"output_fmt": "NCHW"}):
        with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.forward_intermediates .* dense map"):
            model.forward_intermediates(x, **more)
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert (tokens["image_intermediates"] if isinstance(tokens, dict) else tokens)[0].shape == (2, 9, 32)
    maps = copy.deepcopy(model).eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)


def test_a_forward_intermediates_of_ones_own_stays_in_use_and_comes_back():
    model = ALL["timm-vit"].build()
    model.forward_intermediates = own = partial(type(model).forward_intermediates, model, output_fmt="NLC")
    gaussmask.attach(model, RandomPatchDropout(0.75))
    x = x_images(2)["x"]
    with pytest.raises(UnsupportedModelError, match="dense map"):
        model.forward_intermediates(x)
    model.eval()
    assert model.forward_intermediates(x, intermediates_only=True)[0].ndim == 3
    assert gaussmask.detach(model).forward_intermediates is own


def test_dense_feature_maps_behind_a_wrapper():
    x, dense = x_images(2)["x"], pytest.raises(UnsupportedModelError, match="dense map")
    trunk = gaussmask.attach(make_timm(features_only=True, out_indices=(0, 1)), RandomPatchDropout(0.75))
    with dense:
        trunk(x)
    trunk.output_fmt = type(trunk.output_fmt)("NLC")
    assert trunk(x)[0].shape == (2, 9, 32)
    wrapper = gaussmask.attach(ALL["transformers-TimmWrapperModel"].build(), RandomPatchDropout(0.75))
    with dense:
        wrapper(x, output_hidden_states=True)
    pair = gaussmask.attach(ALL["open_clip-CLIP"].build(), RandomPatchDropout(0.75))
    with dense:
        pair.forward_intermediates(x)
    assert pair.forward_intermediates(x, image_output_fmt="NLC")["image_intermediates"][0].shape == (2, 9, 32)


# Positions


def test_the_predictor_of_vjepa2_does_not_take_kept_patches_for_all():
    host = ALL["transformers-VJEPA2Model"]
    model, inputs = gaussmask.attach(host.build(), RandomPatchDropout(0.5)), host.inputs(2)
    with pytest.raises(UnsupportedModelError, match=r"VJEPA2Predictor needs every patch.*skip_predictor=True"):
        model(inputs["pixel_values_videos"])
    assert model(**inputs).last_hidden_state.shape[1] == 36
    assert model.eval()(inputs["pixel_values_videos"]).predictor_output is not None


def test_positions_that_are_asked_for_before_the_draw_raise():
    model = gaussmask.attach(ALL["transformers-DINOv3ViTModel"].build(), RandomPatchDropout(0.5))
    x = images(2)["pixel_values"]
    with pytest.raises(
        UnsupportedModelError, match="DINOv3ViTModel asked for positions before its patches were dropped"
    ):
        model.rope_embeddings(x)
    model(x)
    model.eval()(x)
    assert model.rope_embeddings(x)[0].ndim == 2, "nothing is left of the draw before"


@pytest.mark.parametrize("length", [1, 35, 37, 42])
def test_a_table_of_unknown_rows_raises(length):
    draw = Draw(num_prefix_tokens=2, num_suffix_tokens=1)
    draw.num_patches, draw.keep_indices = 36, torch.tensor([[5, 0]])
    assert draw.rows(36).tolist() == [[5, 0]]
    assert draw.rows(39).tolist() == [[0, 1, 7, 2, 38]]
    with pytest.raises(
        UnsupportedModelError, match=f"table of {length} rows lies beside 39 tokens, 36 of them patches"
    ):
        draw.rows(length)


def test_an_interpolated_bias_is_made_for_all_patches_wherever_the_flag_is_passed():
    host = ALL["transformers-BeitModel-interpolated"]
    model, (x, *_) = gaussmask.attach(host.build(), RandomPatchDropout(0.5)), host.inputs(2).values()
    torch.manual_seed(1)
    by_name = model(x, interpolate_pos_encoding=True)[0]
    torch.manual_seed(1)
    assert torch.equal(model(x, None, True)[0], by_name)


@pytest.mark.parametrize("name", ["timm-beit", "timm-relpos", "timm-relpos-shared"])
def test_a_recomputation_finds_its_draw_where_forward_is_gone_round(name):
    """timm's forward_features is called by itself, so that nothing tells the seam that a forward begins."""
    model, batches = ALL[name].build(), [x_images(2)["x"], x_images(2)["x"]]
    randomise(model)
    gaussmask.attach(model, RandomPatchDropout(0.5))
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        sum(model.forward_head(model.forward_features(x)).square().sum() for x in batches).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(*gradients) < 1e-5


def test_a_host_that_turns_out_to_be_another_is_left_as_it_was(monkeypatch):
    model = ALL["transformers-BeitModel"].build()
    known = Argument.known
    monkeypatch.setattr(
        Argument, "known", staticmethod(lambda module, name: name != "dim_size" and known(module, name))
    )
    with pytest.raises(UnsupportedModelError, match="takes no argument 'dim_size'"):
        gaussmask.attach(model, RandomPatchDropout(0.5))
    assert gaussmask.attached(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*(searchsorted|non-tuple sequence)")  # timm's own resizing of the tables
@pytest.mark.parametrize("name", ["timm-beit", "timm-beit-shared", "timm-relpos", "timm-relpos-shared"])
def test_biases_follow_a_new_image_size(name):
    model, drop = ALL[name].build(), RandomPatchDropout(0.5)
    if not hasattr(model, "set_input_size"):
        pytest.skip("this timm does not resize it")
    gaussmask.attach(model, drop).set_input_size((64, 24))
    model(**x_images(2, size=(64, 24)))
    assert drop.keep_mask.shape == (2, 8, 3)
    assert gaussmask.detach(model)(**x_images(2, size=(64, 24))).shape == (2, 5)


def test_a_rotary_table_is_batched_in_one_way_only():
    table = torch.zeros(2, 3, 4)
    assert Batched(table).unsqueeze(0) is table
    with pytest.raises(UnsupportedModelError, match="unsqueezed at dim 1"):
        Batched(table).unsqueeze(1)


def test_a_host_without_an_argument_that_is_needed_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear.forward takes no argument 'position_mask'"):
        Argument.of(torch.nn.Linear(1, 1), "position_mask")


# Padding and packing


def test_an_attention_mask_that_is_no_tensor_raises():
    link = Link()
    link.seam = type("", (), {"host_name": "Idefics2VisionTransformer"})()
    with pytest.raises(
        UnsupportedModelError, match=r"passes its attention mask as object, .*attn_implementation='sdpa'"
    ):
        KeyMask(link).kept(object(), Draw(0, 0))


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_an_attention_mask_loses_the_dropped_keys_and_where_it_has_them_the_dropped_queries(queries):
    draw = Draw(0, 0)
    draw.num_patches, draw.keep_indices = 4, torch.tensor([[3, 1], [0, 2]])
    mask = torch.arange(2 * queries * 4).view(2, 1, queries, 4)
    kept = KeyMask(None).kept(mask, draw)
    for image, rows in enumerate(draw.keep_indices):
        expected = mask[image, 0][rows] if queries == 4 else mask[image, 0]
        assert torch.equal(kept[image, 0], expected[:, rows])
    assert torch.equal(KeyMask(None).kept(mask[:, 0, 0], draw), mask[:, 0, 0].gather(1, draw.keep_indices))


@pytest.mark.parametrize("name", ["transformers-ViTModel", "transformers-BeitModel", "transformers-FlavaImageModel"])
def test_an_attention_mask_over_all_tokens_raises_while_patches_are_dropped(name):
    model, inputs = gaussmask.attach(ALL[name].build(), RandomPatchDropout(0.5)), ALL[name].inputs(2)
    if not Argument.known(model, "attention_mask"):
        pytest.skip("this transformers takes no such mask")
    with pytest.raises(UnsupportedModelError, match="attention_mask over all its tokens, which does not follow"):
        model(**inputs, attention_mask=torch.ones(2, 37, dtype=torch.long))
    gaussmask.attached(model).eval()
    if "Flava" not in name:  # whose encoder wants four dimensions
        assert model(**inputs, attention_mask=torch.ones(2, 37, dtype=torch.long))[0].shape[1] == 37


class Recording(PatchDropout):
    """Keeps the coordinates that it was given."""

    def scores(self, coords, generator=None):
        self.seen = coords
        return torch.rand(coords.shape[:2])


def valid_of(inputs):
    """Which patches are real, as the input of each kind of padded host tells it."""
    inputs = inputs.get("x", inputs)
    if "flattened_patches" in inputs:
        return inputs["flattened_patches"].sum(-1) != 0
    names = ("patch_valid", "pixel_attention_mask", "patch_attention_mask")
    return next(inputs[name] for name in names if name in inputs).flatten(1).bool()


PADDED = [
    "timm-naflex-padded", "timm-gemma4-padded", "transformers-Siglip2VisionModel-padded",
    "transformers-Idefics2Vision-padded", "transformers-Idefics3Vision-padded", "transformers-SmolVLMVision-padded",
    "transformers-Kosmos2_5Vision", "transformers-Pix2StructVisionModel",
]  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_each_image_of_a_padded_batch_has_its_own_coordinates_and_padding_comes_last(name):
    host, drop = ALL[name], Recording(0.5)
    inputs = host.inputs(3)
    gaussmask.attach(host.build(), drop)(**inputs)
    grids = [(6, 6), (5, 4), (3, 6)] if "Idefics" in name or "SmolVLM" in name else PADDED_GRIDS
    valid = valid_of(inputs)
    for image, (height, width) in enumerate(grids):
        grid = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
        torch.testing.assert_close(drop.seen[image][valid[image]], grid)
    assert (drop.keep_mask.flatten(1) & valid).sum(dim=1).tolist() == [min(18, h * w) for h, w in grids]
    assert drop.keep_indices.shape == (3, 18)


@pytest.mark.parametrize("name", [*PADDED, "packed"])
def test_a_grid_of_the_drops_own_is_not_ignored_where_every_image_has_one(name):
    host = ALL["transformers-PixtralVisionModel" if name == "packed" else name]
    inputs = several_sizes(3) if name == "packed" else host.inputs(3)
    model = gaussmask.attach(host.build(), RandomPatchDropout(0.5, grid_size=(4, 9)))
    with pytest.raises(
        ValueError, match=r"the drop says grid_size=\(4, 9\), but \w+ has (a grid for every image|\(6, 6\))"
    ):
        model(**inputs)


def test_a_pool_over_real_patches_averages_the_kept_ones():
    host, drop = ALL["timm-gemma4-padded"], RandomPatchDropout(0.25)
    model, inputs = gaussmask.attach(host.build(), drop), host.inputs(3)
    torch.manual_seed(3)
    logits = model(**inputs)
    real = inputs["x"]["patch_valid"].gather(1, drop.keep_indices).unsqueeze(-1)
    assert real.sum(1).flatten().tolist() == [27, 27, 12]
    torch.manual_seed(3)
    tokens = model.forward_features(inputs["x"])
    torch.testing.assert_close(logits, model.head(model.norm((tokens * real).sum(1) / real.sum(1))))


def test_the_mask_of_siglip2_is_shortened_once_wherever_it_comes_in():
    """Through the model with its head, through a method that calls the tower alone, and after a forward that failed."""
    settings = {"vision_config": VISION | {"num_patches": 36}, "text_config": TEXT, "num_labels": 3}
    model = make_hf("Siglip2ForImageClassification", "Siglip2Config", settings)
    drop = RandomPatchDropout(0.5)
    gaussmask.attach(model, drop)
    inputs = ALL["transformers-Siglip2VisionModel-padded"].inputs(3)
    with pytest.raises(AttributeError):
        model(**inputs | {"pixel_values": None})
    assert model(**inputs).logits.isfinite().all()
    assert drop.keep_indices.shape == (3, 18)
    pair = make_hf("Siglip2Model", "Siglip2Config", settings)
    gaussmask.attach(pair, RandomPatchDropout(0.75)).get_image_features(**inputs)
    assert gaussmask.attached(pair).keep_indices.shape == (3, 9)
    if Argument.known(pair.vision_model, "pixel_attention_mask"):
        without_mask = inputs | {"pixel_attention_mask": None}
    else:  # transformers 5.0 names it otherwise in the tower
        without_mask = {"pixel_values": inputs["pixel_values"], "spatial_shapes": inputs["spatial_shapes"]}
        without_mask["attention_mask"] = None
    assert pair.vision_model(**without_mask).last_hidden_state.shape[1] == 9
    assert (gaussmask.attached(pair).keep_mask.sum(1) == 9).all()


def test_packed_images_keep_their_own_shares():
    """Images of 36, 24 and 15 patches: the oracle for a sequence of all of them, whose mask keeps them apart."""
    host, drop = ALL["transformers-PixtralVisionModel"], GaussianPatchDropout(0.5, sigma=0.5)
    model, inputs = host.build(), several_sizes(3)
    randomise(model)
    full = copy.deepcopy(model)
    hidden = gaussmask.attach(model, drop)(**inputs)[0]
    (kept,) = drop.keep_indices
    assert drop.keep_mask.shape == (1, 75)
    starts = torch.tensor([0, 36, 60, 75])
    assert torch.bucketize(kept, starts, right=True).tolist() == [1] * 18 + [2] * 12 + [3] * 7
    with masked_keys(drop.keep_mask, [(0, 0)]):
        expected = full(**inputs)[0]
    assert difference(hidden, expected[:, kept]) < TOLERANCE
    assert difference(hidden, full(**inputs)[0][:, kept]) > 1e-2
    model(**inputs | {"image_sizes": torch.tensor(inputs["image_sizes"])})
    assert drop.keep_indices.shape == (1, 37)


def test_packed_images_that_only_sequence_lengths_keep_apart_raise():
    host = ALL["transformers-PixtralVisionModel"]
    model = gaussmask.attach(host.build(), RandomPatchDropout(0.5))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"by sequence lengths and not by a mask.*'sdpa'"):
        model(**host.inputs(2))


def test_radio_packs_images_only_without_a_drop():
    model = gaussmask.attach(ALL["transformers-RadioModel"].build(), RandomPatchDropout(0.5))
    patches, grids = torch.randn(24, 3 * 8 * 8), torch.tensor([[2, 6], [4, 3]])
    with pytest.raises(UnsupportedModelError, match="images of many sizes packed into one sequence"):
        model.embeddings(patches, grids)
    assert model.eval().embeddings(patches, grids).shape == (1, 24 + 2 * 5, 32)


# Videos


def test_every_frame_has_the_same_coordinates_and_nothing_prefers_a_time():
    host, drop = ALL["transformers-VideoMAEModel"], Recording(0.5)
    gaussmask.attach(host.build(), drop)(**videos(2, frames=4))
    assert drop.keep_mask.shape == (2, 2, 6, 6)
    frames = drop.seen.unflatten(1, (2, 36))
    assert torch.equal(frames[:, 0], frames[:, 1])
    gaussian = GaussianPatchDropout(0.5, sigma=0.2)
    gaussian.draw(4000, 3 * 16, (3, 4, 4))
    frequency = gaussian.keep_mask.float().mean(0)
    assert (frequency[:, 1:3, 1:3].mean((1, 2)) > frequency[:, 0].mean(1) + 0.2).all(), "centred in every frame"
    assert (frequency.mean((1, 2)) - 0.5).abs().max() < 0.01  # 5 standard errors of 16 x 4,000 independent draws


# open_clip


def test_open_clips_forced_patch_dropout_gives_way_and_comes_back():
    import open_clip

    vision = {"image_size": 48, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    for extra in ({}, {"multimodal_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1}}):
        settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **extra}
        if extra:  # CoCa
            settings["custom_text"] = True
            settings["vision_cfg"] = vision | {"attentional_pool": True, "attn_pooler_heads": 2}
        open_clip.factory._MODEL_CONFIGS["gaussmask-tiny"] = settings
        model = open_clip.create_model("gaussmask-tiny", force_patch_dropout=0.25)
        assert type(model).__name__ == ("CoCa" if extra else "CLIP")
        forced, drop = model.visual.patch_dropout, GaussianPatchDropout(0.5)
        assert forced.prob == 0.25
        gaussmask.attach(model, drop).train().encode_image(x_images(2)["x"])
        assert drop.keep_indices.shape == (2, 18)
        assert gaussmask.detach(model).visual.patch_dropout is forced
    del open_clip.factory._MODEL_CONFIGS["gaussmask-tiny"]


# A forward that never comes to the drop


class CallsTheParts(torch.nn.Module):
    """As people write it to get at the tokens of a ViT: without the seam of the ViT."""

    def __init__(self):
        super().__init__()
        self.vit = make_timm()

    def forward(self, x):
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x).mean(1)


class OverridesForward(timm.models.VisionTransformer):
    def forward_features(self, x, **kwargs):
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


PAST_THE_DROP = "embedded patches and went on without its patch dropout"


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_a_model_that_calls_the_parts_of_a_vit(stage):
    x = x_images(2)["x"]
    model = CallsTheParts()
    expected = model(x)
    drop = RandomPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=f"VisionTransformer {PAST_THE_DROP}"):
            model(x)
    drop.eval()
    assert torch.equal(model(x), expected)
    drop.train()
    assert model.vit(x).shape == (2, 5), "called as it is meant to be, it goes on"
    assert drop.keep_indices is not None


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_parts_of_a_vit_that_is_never_called_itself(stage):
    """Seen before its first block computes anything, in the first call as in every later one."""
    x, computed = x_images(2)["x"], []
    model = CallsTheParts()
    drop = RandomPatchDropout(0.5)
    gaussmask.attach(model.vit, drop, stage=stage)
    model.vit.blocks[0].norm1.register_forward_hook(lambda *_: computed.append(1))
    for _ in range(3):
        with pytest.raises(UnsupportedModelError, match=PAST_THE_DROP):
            model(x)
    assert not computed
    drop.eval()
    model(x)
    assert computed


def encode_clip(model, inputs):
    """As wrappers call the parts of a tower of transformers."""
    tokens = model.embeddings(**inputs)
    for layer in model.encoder.layers:
        tokens = layer(tokens, attention_mask=None)
    return tokens


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_parts_of_a_tower_that_come_to_the_drop_may_be_called(stage):
    """The drop of transformers is a hook on the embeddings, which such a call does not go past."""
    host, drop = ALL["transformers-CLIPVisionModel"], RandomPatchDropout(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    tower = model if hasattr(model, "embeddings") else model.vision_model
    output = encode_clip(tower, host.inputs(2))
    assert (output if torch.is_tensor(output) else output[0]).shape == (2, 19, 32)


@pytest.mark.parametrize("name", ALL)
def test_every_tower_has_a_first_block_that_is_watched(name):
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model = gaussmask.attach(host.build(), drop)
    (seam,) = (module for module in model.modules() if hasattr(module, "guard"))
    watched = [
        module
        for module in model.modules()
        if any(
            getattr(hook, "__func__", None) is type(seam.guard).before_block
            for hook in module._forward_pre_hooks.values()
        )
    ]
    assert len(watched) == 1
    calls = []
    watched[0].register_forward_pre_hook(lambda *_: calls.append(drop.keep_indices is not None))
    result(host, model, host.inputs(2))
    assert calls[0], "it runs behind the drop"


def test_a_subclass_whose_forward_has_no_patch_dropout():
    x = x_images(2)["x"]
    model = OverridesForward(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    gaussmask.attach(model, RandomPatchDropout(0.5))
    with pytest.raises(UnsupportedModelError, match=f"OverridesForward {PAST_THE_DROP}.*x = drop"):
        model(x)
    model.eval()(x)


def test_a_forward_that_broke_off_is_not_held_against_the_next():
    x = x_images(2)["x"]
    drop = RandomPatchDropout(0.5)
    model = gaussmask.attach(make_timm(), drop)
    handle = model.patch_embed.register_forward_hook(lambda *_: torch.zeros(1)[2])
    with pytest.raises(IndexError):
        model(x)
    handle.remove()
    model(x)
    model.patch_embed(x)  # nor is a look at the patches
    model(x)
    assert drop.keep_indices is not None


def test_tokens_that_a_subclass_adds_in_front():
    class Prompted(timm.models.VisionTransformer):
        def _pos_embed(self, x):
            x = super()._pos_embed(x)
            return torch.cat([x[:, :1], x.new_zeros(len(x), 4, x.shape[-1]), x[:, 1:]], dim=1)

    x = x_images(2)["x"]
    model = Prompted(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    drop = RandomPatchDropout(0.5)
    gaussmask.attach(model, drop)
    with pytest.raises(UnsupportedModelError, match=r"6 x 6 patches, but 40 tokens .* its num_prefix_tokens"):
        model(x)
    model.num_prefix_tokens = 5
    gaussmask.attach(model, drop)
    model(x)
    assert drop.keep_indices.shape == (2, 18)


# Parts that are replaced or frozen after attach


def new_conv(module, name):
    old = getattr(module, name)
    setattr(module, name, torch.nn.Conv2d(12, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None))


def replace_embeddings(model):
    model.embeddings = type(model.embeddings)(model.config)


REPLACED = {
    "timm projection": ("timm-vit", lambda model: new_conv(model.patch_embed, "proj"), 12),
    "timm patch_embed": (
        "timm-vit", lambda model: setattr(model, "patch_embed", timm.layers.PatchEmbed(48, 8, 12, 32)), 12),
    "transformers projection": (
        "transformers-ViTModel", lambda model: new_conv(model.embeddings.patch_embeddings, "projection"), 3),
    "transformers embeddings": ("transformers-ViTModel", replace_embeddings, 3),
    "open_clip projection": ("open_clip-tower", lambda model: new_conv(model, "conv1"), 12),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLACED)
def test_what_is_replaced_after_attach_works_or_says_attach_again(case):
    name, change, channels = REPLACED[case]
    model, drop = ALL[name].build(), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop)
    change(model)
    if case == "transformers projection":
        model.embeddings.patch_embeddings.num_channels = channels = 12
    x = torch.randn(2, channels, 48, 48)
    try:
        model(x)
        assert drop.keep_indices.shape == (2, 18)
    except UnsupportedModelError as error:
        assert "attach again" in str(error)  # noqa: PT017  # either will do
        gaussmask.attach(model, drop)(x)
        assert drop.keep_indices.shape == (2, 18)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize(
    ("name", "path"),
    [("timm-vit", "patch_embed"), ("transformers-ViTModel", "embeddings"),
     ("transformers-CLIPVisionModel", "embeddings"), ("open_clip-tower", "conv1")],
)  # fmt: skip
def test_frozen_embeddings_in_eval_mode_do_not_stop_the_drop(name, path, stage):
    """The mode is that of the tower, in every library."""
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    part = dict(model.named_modules()).get(path) or model.get_submodule(f"vision_model.{path}")
    part.requires_grad_(False).eval()
    result(host, model, host.inputs(2))
    assert drop.keep_indices.shape == (2, 18)
    result(host, model.eval(), host.inputs(2))
    assert drop.keep_indices is None


# Arguments that presuppose the number or the order of the tokens


CAUSAL = ["timm-vit", "timm-eva02", "timm-eva-dinov3", "timm-map-with-prefix", "transformers-ViTModel",
          "transformers-CLIPVisionModel", "transformers-DINOv3ViTModel"]  # fmt: skip


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attention_needs_the_patches_in_their_order(name, stage):
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model, inputs = gaussmask.attach(host.build(), drop, stage=stage), host.inputs(2)
    with pytest.raises(UnsupportedModelError, match=r"called with is_causal.*set drop\.ordered = True"):
        model(**inputs, is_causal=True)
    drop.ordered = True
    model(**inputs, is_causal=True)
    drop.ordered = False
    model(**inputs, is_causal=False)
    model.eval()(**inputs, is_causal=True)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_over_all_tokens_does_not_follow(name):
    """By keyword, and in timm also where forward is gone round."""
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model, inputs = gaussmask.attach(host.build(), drop), host.inputs(2)
    length = host.prefix + 36
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    argument = "attn_mask" if name.startswith("timm") else "attention_mask"
    refused = pytest.raises(UnsupportedModelError, match=f"called with an {argument} over all its tokens")
    with refused:
        model(**inputs, **{argument: mask})
    if name.startswith("timm"):
        with refused:
            model.forward_features(**inputs, attn_mask=mask)
        with refused:
            model.forward_features(inputs["x"], mask)
    drop.mask_ratio = 0.0
    if "map" not in name:
        model.forward_features(**inputs, attn_mask=mask) if argument == "attn_mask" else model(**inputs)


# Replicas


def replica_of(module):
    """What nn.DataParallel makes of a model for one of its devices."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None:
            replica._modules[name] = replica_of(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach())
    return replica


@pytest.mark.parametrize(
    "name", ["timm-vit", "transformers-DINOv3ViTModel", "transformers-CLIPModel", "open_clip-CLIP"]
)
def test_replicas_of_data_parallel_raise_in_the_first_forward(name):
    host = ALL[name]
    model, inputs = gaussmask.attach(host.build(), RandomPatchDropout(0.5)), host.inputs(2)
    replica = replica_of(model)
    with pytest.raises(UnsupportedModelError, match=r"replica of torch\.nn\.DataParallel.*DistributedDataParallel"):
        replica(**inputs)
    result(host, model, inputs)
    with torch.no_grad():
        result(host, replica_of(model.eval()), inputs)


# What wrappers keep in their attributes


@pytest.mark.parametrize("config", [{"backbone": "vit"}, "base", ["a"], 3, None, True], ids=repr)
def test_a_wrapper_may_call_anything_its_config(config):
    wrapper = torch.nn.Sequential(make_timm())
    wrapper.config = config
    assert gaussmask.describe(wrapper).supported
    gaussmask.attach(wrapper, RandomPatchDropout(0.5))(x_images(2)["x"])
    assert gaussmask.attached(wrapper).keep_indices.shape == (2, 18)


def test_a_timm_that_is_too_old(monkeypatch):
    model = make_timm()
    monkeypatch.delattr(timm.layers.PatchEmbed, "dynamic_feat_size")
    with pytest.raises(UnsupportedModelError, match=r"no dynamic_feat_size, .* timm 1\.0\.20 or newer"):
        gaussmask.attach(model, RandomPatchDropout(0.5))


# Threads, and forwards inside of forwards


def in_threads(*works):
    """What each raised, or None."""
    raised = [None] * len(works)

    def run(number):
        try:
            works[number]()
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


class Even(PatchDropout):
    """Keeps every other patch, and does something meanwhile."""

    def scores(self, coords, generator=None):
        self.meanwhile()
        return (torch.arange(coords.shape[1], device=coords.device) % 2).float().expand(len(coords), -1)

    def meanwhile(self):
        pass


IN_THREADS = ["timm-vit", "timm-beit", "transformers-DINOv3ViTModel", "open_clip-CLIP"]


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize("name", IN_THREADS)
def test_two_threads_in_one_model_raise(name, stage):
    """The second to come, before it has touched anything of the first, which gets what it gets alone."""
    host, drop = ALL[name], Even(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    one, other = host.inputs(2), host.inputs(3)
    expected, begun, over = result(host, model, one), threading.Event(), threading.Event()
    outputs = []

    def first():
        drop.meanwhile = lambda: (begun.set(), over.wait(20))
        outputs.append(result(host, model, one))

    def second():
        begun.wait(20)
        try:
            result(host, model, other)
        finally:
            over.set()

    nothing, error = in_threads(first, second)
    assert nothing is None
    assert isinstance(error, UnsupportedModelError)
    assert "called by two threads at once" in str(error)
    torch.testing.assert_close(outputs[0], expected)
    drop.meanwhile = lambda: None
    assert in_threads(lambda: result(host, model, other)) == [None], "one after the other they may"
    torch.testing.assert_close(result(host, model, one), expected)


def test_a_forward_that_broke_off_in_another_thread_blocks_nobody():
    host, drop = ALL["timm-vit"], Even(0.5)
    model = gaussmask.attach(host.build(), drop)
    drop.meanwhile = lambda: 1 / 0
    (error,) = in_threads(lambda: result(host, model, host.inputs(2)))
    assert isinstance(error, ZeroDivisionError)
    drop.meanwhile = lambda: None
    result(host, model, host.inputs(2))


NESTED = [
    *IN_THREADS, "timm-relpos-shared", "timm-gemma4", "transformers-YolosModel", "transformers-Idefics3Vision-padded",
    "transformers-Siglip2VisionModel-padded",
]  # fmt: skip


@pytest.mark.parametrize(("name", "stage"), with_stages(NESTED))
def test_a_rule_may_call_the_model_in_eval_mode(name, stage):
    host, drop = ALL[name], Even(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    inputs, other = host.inputs(2), host.inputs(3)
    expected = result(host, model, inputs)
    whole = result(host, model.eval(), other)
    model.train()
    inner = []

    def meanwhile():
        model.eval()
        inner.append(result(host, model, other))
        model.train()

    drop.meanwhile = meanwhile
    torch.testing.assert_close(result(host, model, inputs), expected)
    torch.testing.assert_close(inner[0], whole)
    assert drop.keep_indices.shape == (2, 18)


# Parts, towers and layers that are not where they were


def model_of(name, drop=None, stage="tokens"):
    host = ALL[name]
    model = host.build()
    randomise(model)
    return gaussmask.attach(model, drop or RandomPatchDropout(0.5), stage=stage), host.inputs(2)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize("name", ["timm-vit", "open_clip-tower", "timm-relpos"])
def test_a_patch_embedding_by_itself_embeds_every_patch_of_every_image(name, stage):
    """As often as it is called, before, between and after forwards; a look at the patches refuses nothing."""
    model, inputs = model_of(name, Even(0.5), stage)
    images, path = inputs["x"], "conv1" if name.startswith("open") else "patch_embed.proj"
    part = model.get_submodule(path)
    expected, output = gaussmask.detach(copy.deepcopy(model)).get_submodule(path)(images), model(images)
    for _ in range(2):
        torch.testing.assert_close(part(images), expected)
        torch.testing.assert_close(model(images), output)
    if hasattr(model, "forward_features"):
        part(images)
        model.forward_features(images)
    loss = model(images).sum()
    part(images)
    loss.backward()
    part(images)
    model.eval()(images)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_a_patch_embedding_that_two_towers_share(stage):
    one, inputs = model_of("timm-vit", Even(0.5), stage)
    other = ALL["timm-vit"].build()
    other.patch_embed = one.patch_embed
    expected = other.eval()(**inputs)
    masked = one(**inputs)
    for _ in range(3):
        torch.testing.assert_close(other(**inputs), expected)
    torch.testing.assert_close(one(**inputs), masked)


def test_a_recomputation_after_a_look_at_the_patches():
    model, inputs = model_of("timm-vit")
    model.set_grad_checkpointing(True)
    loss = model(**inputs).sum()
    model.patch_embed(inputs["x"])
    loss.backward()


def test_positions_of_a_forward_that_is_over_or_of_another_batch_raise():
    x = images(2)["pixel_values"]
    model, _ = model_of("transformers-DINOv3ViTModel")
    model(x)
    with pytest.raises(UnsupportedModelError, match="asked for positions before its patches were dropped"):
        model.rope_embeddings(x)
    tokens = model.embeddings(x)
    assert model.rope_embeddings(x)[0].shape[-2] == 18
    assert tokens.shape[1] < 36
    model.embeddings(x)
    model.embeddings(x)
    with pytest.raises(UnsupportedModelError, match="for several batches in turn"):
        model.rope_embeddings(x)
    assert model.eval().rope_embeddings(x)[0].shape[0] == 36
    layers = model_of("transformers-VJEPA2Model")[0].encoder
    clips = [ALL["transformers-VJEPA2Model"].inputs(2)["pixel_values_videos"] for _ in range(2)]
    one, _ = (layers.embeddings(clip) for clip in clips)
    with pytest.raises(UnsupportedModelError, match="for several batches in turn"):
        layers.layer[0](one)


@pytest.mark.parametrize("name", ["transformers-BeitModel", "transformers-Data2VecVisionModel-shared"])
def test_a_forward_that_goes_round_the_hooks_it_needs_says_to_call_the_model(name):
    model, inputs = model_of(name)
    with pytest.raises(UnsupportedModelError, match=r"goes round: call the model, model\(\.\.\.\)"):
        model.forward(**inputs)
    model(**inputs)
    model.eval().forward(**inputs)


@pytest.mark.parametrize("name", ["transformers-ViTModel", "transformers-DINOv3ViTModel"])
@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_a_forward_that_goes_round_no_hook_it_needs_is_right(name, stage):
    model, inputs = model_of(name, Even(0.5), stage)
    torch.testing.assert_close(model.forward(**inputs)[0], model(**inputs)[0])
    model.embeddings.eval()
    torch.testing.assert_close(model.forward(**inputs)[0], model(**inputs)[0])
    assert model.embeddings(inputs["pixel_values"]).shape[1] > 36, "by itself, in eval mode"


def test_causal_attention_that_goes_round_the_tower_needs_ordered_tokens_too():
    model, inputs = model_of("transformers-ViTModel")
    with pytest.raises(UnsupportedModelError, match="called with is_causal"):
        model.forward(**inputs, is_causal=True)
    gaussmask.attached(model).ordered = True
    model.forward(**inputs, is_causal=True)


def test_naflex_takes_no_mask_over_all_its_tokens_and_makes_its_own():
    padded, inputs = model_of("timm-naflex-padded")
    with pytest.raises(UnsupportedModelError, match="NaFlexVit was called with an attn_mask over all its tokens"):
        padded(**inputs, attn_mask=torch.ones(2, 1, 37, 37, dtype=torch.bool))
    padded(**inputs)
    padded.embeds.eval()
    padded(**inputs)
    assert gaussmask.attached(padded).keep_indices.shape == (2, 18)


def test_v_jepa_2_takes_no_indices_of_the_whole_clip():
    model, inputs = model_of("transformers-VJEPA2Model")
    some = [torch.arange(10).expand(2, -1)]
    with pytest.raises(UnsupportedModelError, match="called with context_mask, which counts the patches"):
        model(**inputs, context_mask=some, target_mask=some)
    model.eval()(**inputs, context_mask=some, target_mask=some)


BESIDE = {
    "transformers-DINOv3ViTModel": "rope_embeddings",
    "transformers-MLCDVisionModel": "encoder",
    "transformers-Idefics3Vision-padded": "encoder",
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_tokens_and_was_replaced_says_attach_again(name):
    model, inputs = model_of(name)
    other = ALL[name].build()
    replaced = BESIDE[name]
    path = next(path for path, _ in model.named_modules() if path.rpartition(".")[2] == replaced)
    owner = model.get_submodule(path.rpartition(".")[0])
    setattr(owner, replaced, other.get_submodule(path))
    with pytest.raises(UnsupportedModelError, match=rf"{replaced} of \w+ was replaced after attach.*attach again"):
        result(ALL[name], model, inputs)
    result(ALL[name], gaussmask.attach(model, gaussmask.attached(model)), inputs)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_layers_that_were_replaced_say_attach_again():
    model, inputs = model_of("transformers-VJEPA2Model")
    model.encoder.layer[1] = ALL["transformers-VJEPA2Model"].build().encoder.layer[1]
    with pytest.raises(UnsupportedModelError, match="a layer of VJEPA2Encoder was replaced after attach: attach again"):
        model(**inputs)
    model, inputs = model_of("timm-beit")
    model.blocks[1] = ALL["timm-beit"].build().blocks[1]
    with pytest.raises(UnsupportedModelError, match="a block was replaced after attach: attach again"):
        model(**inputs)
    model, inputs = model_of("timm-beit")
    with pytest.raises(UnsupportedModelError, match="a layer of Beit was called by itself"):
        model.blocks[0](torch.randn(2, 18, 32))


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize(("name", "tower"), [("open_clip-CLIP", "visual"), ("transformers-CLIPModel", "vision_model")])
def test_a_tower_that_was_replaced_whole_says_attach_again(name, tower, stage):
    model, inputs = model_of(name, stage=stage)
    own = getattr(model, tower)
    setattr(model, tower, getattr(ALL[name].build(), tower))
    with pytest.raises(UnsupportedModelError, match=r"had at attach was replaced by another one.*attach again"):
        model(**inputs)

    class Wrapper(torch.nn.Module):  # as FSDP, torch.compile and others put around it
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    setattr(model, tower, Wrapper(own))
    if name == "open_clip-CLIP":
        model(**inputs)
        assert gaussmask.attached(model).keep_indices.shape == (2, 18)


def test_the_ratio_of_the_hosts_own_patch_dropout_is_set_at_the_drop():
    model, _ = model_of("open_clip-tower")
    with pytest.raises(AttributeError, match=r"has no 'prob': set gaussmask.attached\(model\).mask_ratio"):
        model.patch_dropout.prob = 0.0


def test_what_prepare_qat_makes_of_a_model_runs_on_tokens_and_says_why_not_on_pixels():
    from torch.ao import quantization

    for stage in ("tokens", "pixels"):
        model, inputs = model_of("timm-vit", stage=stage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.qconfig = quantization.get_default_qat_qconfig("x86")
            quantization.prepare_qat(model, inplace=True)
        if stage == "tokens":
            model(**inputs)
            assert gaussmask.attached(model).keep_indices.shape == (2, 18)
        else:
            with pytest.raises(UnsupportedModelError, match=r"projection is a torch\.ao\.nn\.qat\S+Conv2d"):
                model(**inputs)
        model.eval()(**inputs)


@pytest.mark.parametrize("make", [ClusterPatchDropout, GaussianPatchDropout])
@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_rules_trace_in_training_mode(make, stage):
    model, inputs = model_of("timm-vit", make(0.5), stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs["x"], check_trace=False)
    assert gaussmask.attached(model).keep_indices.shape == (2, 18)


def test_what_a_model_is_not():
    class NoSuper(PatchDropout):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def scores(self, coords, generator=None):
            return coords[..., 0]

    class Config(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = ALL["timm-vit"].build()

        @property
        def config(self):
            raise RuntimeError("not yet")

    with pytest.raises(TypeError, match=r"__init__ of NoSuper did not call super\(\).__init__\(mask_ratio\)"):
        gaussmask.attach(ALL["timm-vit"].build(), NoSuper())
    gaussmask.attach(Config(), RandomPatchDropout(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(timm.create_model("test_vit", scriptable=True).eval())
    with pytest.raises(UnsupportedModelError, match="scripted, traced or exported model"):
        gaussmask.attach(scripted, RandomPatchDropout(0.5))


def test_a_setting_of_another_rule_raises():
    with pytest.raises(AttributeError, match=r"RandomPatchDropout has no attribute 'sigma'.*no 'sigma' either"):
        RandomPatchDropout(0.5).sigma = 0.3
    with pytest.raises(AttributeError, match="did you mean 'grid_size'"):
        RandomPatchDropout(0.5).grid = (2, 2)
    with pytest.raises(TypeError, match=r"RandomPatchDropout.__init__\(\) got an unexpected keyword argument 'sigma'"):
        RandomPatchDropout(0.5, sigma=0.2)


def test_the_warning_of_a_sigma_points_at_the_line_of_the_user():
    for act in (lambda: GaussianPatchDropout(0.5, sigma=50), lambda: setattr(GaussianPatchDropout(0.5), "sigma", 50)):
        with pytest.warns(UserWarning, match="no number of pixels") as caught:
            act()
        assert caught[0].filename == __file__


def test_an_attached_drop_by_itself_keeps_the_prefix_of_its_host():
    model, _ = model_of("timm-vit")
    tokens = torch.arange(37.0).view(1, 37, 1).expand(2, 37, 4)
    kept = gaussmask.attached(model)(tokens)
    assert kept.shape == (2, 19, 4)
    assert (kept[:, 0] == 0).all()


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_a_batch_of_no_images(stage):
    model, _ = model_of("timm-vit", stage=stage)
    assert model(torch.randn(0, 3, 48, 48)).shape == (0, 5)


# Behind the tower, and after an error


def test_a_head_finds_the_draw_of_its_tokens_after_other_forwards():
    host = ALL["timm-gemma4-padded"]
    model, inputs = model_of("timm-gemma4-padded")
    valid, other = inputs["x"]["patch_valid"], host.inputs(3)
    features = model.forward_features(inputs["x"])
    expected = model.forward_head(features, patch_valid=valid)
    for _ in range(3):
        model.forward_features(other["x"])
        torch.testing.assert_close(model.forward_head(features, patch_valid=valid), expected)
    del features
    assert len(next(m for m in model.modules() if hasattr(m, "remembers")).now.drawn) <= 1, "not longer than the tokens"


def test_a_decoder_finds_the_draw_of_the_encoding_that_it_is_given():
    sizes = {"hidden_size": 32, "d_kv": 16, "d_ff": 48, "dropout_rate": 0.0}
    text = {"vocab_size": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, **sizes}
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 36, "patch_embed_hidden_size": 192, **sizes}
    config = transformers.Pix2StructConfig(text_config=text, vision_config={**vision, "attention_dropout": 0.0})
    model = transformers.Pix2StructForConditionalGeneration(config).train()
    randomise(model)
    gaussmask.attach(model, RandomPatchDropout(0.5))
    one, other = (rows_and_columns(3)["flattened_patches"] for _ in range(2))
    other = other.flip(0)
    words = torch.randint(2, 30, (3, 5))

    def decode(encoding):
        mask = (one.sum(-1) != 0).float()
        return model(encoder_outputs=encoding, attention_mask=mask, decoder_input_ids=words).logits

    encoding = model.encoder(one, attention_mask=(one.sum(-1) != 0).float())
    expected = decode(encoding)
    model.encoder(other, attention_mask=(other.sum(-1) != 0).float())
    torch.testing.assert_close(decode(encoding), expected)


@pytest.mark.parametrize("name", ["timm-vit", "transformers-CLIPModel", "open_clip-CLIP"])
@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_nothing_is_left_of_a_forward_that_broke_off(name, stage):
    """Wherever the error comes from; the next forward, in another thread too, is as ever."""
    host, drop = ALL[name], Even(0.5)
    model, inputs = gaussmask.attach(host.build(), drop, stage=stage), host.inputs(2)
    expected = result(host, model, inputs)
    (seam,) = (module for module in model.modules() if hasattr(module, "guard"))
    norm = next(module for module in reversed(list(model.modules())) if isinstance(module, torch.nn.LayerNorm))

    def stop(*_):
        raise ZeroDivisionError

    for where in ("rule", "norm"):
        handle = norm.register_forward_hook(stop) if where == "norm" else None
        drop.meanwhile = stop if where == "rule" else lambda: None
        (error,) = in_threads(lambda: result(host, model, inputs))
        assert isinstance(error, ZeroDivisionError)
        now = seam.now
        assert [now.running, now.pending, now.expected, now.images] == [False, False, False, None]
        drop.meanwhile = lambda: None
        if handle is not None:
            handle.remove()
        torch.testing.assert_close(result(host, model, inputs), expected)
