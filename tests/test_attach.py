"""What `attach` promises to every host, and what it refuses."""

import copy
import gc
import inspect
import io
import pickle
import re
from functools import partial

import pytest
import timm
import torch
import transformers as tf
from hosts import (
    ALL,
    COMPILED,
    COMPILED_WITH_PIXELS,
    REPRESENTATIVE,
    SAVED,
    SIMILAR,
    TEXT,
    VISION,
    make_class,
    make_hf,
    make_naflex,
    make_open_tower,
    make_timm,
    recompute_layers,
    result,
    with_stages,
    x_images,
)
from oracle import randomise
from packaging.version import Version
from torch import nn

import gaussmask
from gaussmask import GaussianPatchDropout, RandomPatchDropout, UnsupportedModelError
from gaussmask.seams.guards import MustReachDrop
from gaussmask.seams.seam import Seam


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=with_stages(REPRESENTATIVE), ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def host(case):
    return ALL[case[0]]


@pytest.fixture
def attach(case):
    return partial(gaussmask.attach, stage=case[1])


def staged(names):
    return pytest.mark.parametrize(("name", "stage"), with_stages(names))


def structure(model, *, identity=True):
    """All that attaching could leave behind: attributes, submodules and hooks of every module."""
    return {
        name: (
            type(module),
            id(module) if identity else None,
            sorted(vars(module)),
            [(child, value is None) for child, value in module._modules.items()],
            {key: len(value) for key, value in vars(module).items() if isinstance(value, dict) and "hooks" in key},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def keeps(drop, host, batch_size, share):
    patches = host.count
    return drop.keep_indices.shape == (batch_size, int(patches * share)) and drop.keep_indices.max() < patches


def face(model):
    return type(model), list(model.state_dict()), inspect.signature(model.forward), str(getattr(model, "config", None))


def test_eval_is_bit_identical_and_the_modes_reach_the_drop(host, attach):
    model, inputs, drop = host.build().eval(), host.inputs(2), RandomPatchDropout(0.5)
    expected, before = result(host, model, inputs), face(model)
    assert attach(model, drop) is model
    assert gaussmask.attached(model) is drop
    assert not drop.training, "the drop takes the mode of the model, which from_pretrained returns in eval"
    assert torch.equal(result(host, model, inputs), expected)
    assert drop.keep_indices is drop.keep_mask is None
    assert face(model) == before

    model.train()(**inputs)
    assert keeps(drop, host, 2, 0.5)
    model.eval()(**inputs)
    assert drop.keep_indices is None
    model.train()
    drop.mask_ratio = 0.0  # unmasked tuning
    assert torch.allclose(result(host, model, inputs), expected, atol=1e-6)
    assert drop.keep_indices is None
    assert gaussmask.attached(attach(host.build(), RandomPatchDropout(0.5))).training


def test_a_model_in_eval_mode_is_told_to_be_idle():
    """By a warning at attach, by the drop's own words, and by describe."""
    model, drop = make_timm().eval(), GaussianPatchDropout(0.5)
    assert "attached" not in repr(drop)
    with pytest.warns(
        UserWarning, match=r"VisionTransformer is in eval mode.*GaussianPatchDropout is idle.*model\.train"
    ):
        gaussmask.attach(model, drop, stage="tokens")
    assert "attached to VisionTransformer at stage 'tokens', idle in eval mode" in repr(drop)
    assert "eval: nothing is dropped until model.train()" in str(gaussmask.describe(model))
    model.train()
    assert repr(drop).endswith(") attached to VisionTransformer at stage 'tokens'")
    assert "mode" not in str(gaussmask.describe(model))
    assert "attached" not in repr(copy.deepcopy(drop))
    for stage in ("auto", "pixels"):
        gaussmask.attach(model, drop, stage=stage)
        assert "at stage 'pixels'" in repr(drop)
    gaussmask.detach(model)
    assert "attached" not in repr(drop)


def test_a_drop_without_scores_is_refused():
    with pytest.raises(TypeError, match=r"PatchDropout has no scores: define scores\(self, coords"):
        gaussmask.attach(make_timm(), gaussmask.PatchDropout(0.5))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_and_a_tuple_are_named():
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.raises(UnsupportedModelError, match=r"is a scripted, traced or exported model.*that it was made of"):
        gaussmask.attach(scripted, RandomPatchDropout(0.5))
    with pytest.raises(TypeError, match=r"got tuple: pass the model alone \(open_clip\.create_model_and_transforms"):
        gaussmask.attach((make_timm(), None, None), RandomPatchDropout(0.5))


JIT = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


@JIT
@pytest.mark.parametrize("stage", ["tokens", "pixels"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva-pe", "open_clip-tower"])
def test_a_trace_in_training_mode_draws_as_the_model(name, stage):
    """Without gradients: with them torch's own differentiation of a trace draws for dropouts of p = 0 as well."""
    model, x = gaussmask.attach(ALL[name].build(), RandomPatchDropout(0.5), stage=stage), x_images(2)["x"]
    assert torch.jit.trace(model, x, check_trace=False)(x).requires_grad
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            output = traced(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(output, model(x))
        assert not torch.equal(traced(x), traced(x)), "each call draws anew"


@JIT
@pytest.mark.parametrize("mode", [True, False])
def test_what_cannot_be_scripted_or_traced_by_fx_says_detach_first(mode):
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5)).train(mode)
    for make in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises(UnsupportedModelError, match=r"carries a drop.*detach first"):
            make(model)
    torch.fx.symbolic_trace(gaussmask.detach(model))
    tower = gaussmask.attach(make_open_tower(), RandomPatchDropout(0.5)).train(mode)
    with pytest.raises(UnsupportedModelError, match=r"carries a drop.*detach first"):
        torch.jit.script(tower)
    if mode:
        with pytest.raises(UnsupportedModelError, match="detach first"):
            torch.fx.symbolic_trace(tower)
    else:
        x = x_images(2)["x"]
        torch.testing.assert_close(torch.fx.symbolic_trace(tower)(x), tower(x))


def test_the_drop_has_a_mode_of_its_own(host, attach):
    model, inputs, drop = host.build(), host.inputs(2), RandomPatchDropout(0.5)
    attach(model, drop)
    drop.eval()
    model(**inputs)
    assert drop.keep_indices is None
    model.eval()
    drop.train()
    if host.make.func is make_naflex:
        with pytest.raises(UnsupportedModelError, match="NaFlexVit skips its patch dropout in eval mode"):
            model(**inputs)
    else:
        model(**inputs)
        assert keeps(drop, host, 2, 0.5)


def test_detach_restores_and_twice_replaces(host, attach):
    model, inputs = host.build(), host.inputs(2)
    before, output = structure(model), result(host, model, inputs, seed=3)
    first, second = RandomPatchDropout(0.5), RandomPatchDropout(0.75)
    attach(model, first)
    once = structure(model, identity=False)
    for drop in (second, second):  # also by itself
        attach(model, drop)
        assert structure(model, identity=False) == once
    model(**inputs)
    assert gaussmask.attached(model) is second
    assert keeps(second, host, 2, 0.25), "the second takes the place of the first and does not come on top of it"
    assert first.keep_indices is None
    for _ in range(2):  # nothing to detach is no error
        assert gaussmask.detach(model) is model
        assert gaussmask.attached(model) is None
        assert structure(model) == before
    assert torch.equal(result(host, model, inputs, seed=3), output)


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_carry_a_drop_of_their_own(host, attach, duplicate):
    model, inputs, drop = host.build(), host.inputs(3), GaussianPatchDropout(0.5, sigma=0.7)
    plain = structure(duplicate(model), identity=False)
    attach(model, drop)(**inputs)
    mask = drop.keep_indices

    twin = duplicate(model)
    own = gaussmask.attached(twin)
    assert own is not drop
    seams = [module for module in twin.modules() if isinstance(module, Seam)]
    assert [seam.now.draw.keep_indices for seam in seams] == [None], "no draw travels"
    assert (type(own), own.mask_ratio, own.sigma, own.keep_indices) == (GaussianPatchDropout, 0.5, 0.7, None)
    assert torch.equal(result(host, twin, inputs, seed=3), result(host, copy.deepcopy(model), inputs, seed=3))
    own.mask_ratio = 0.75
    twin(**inputs)
    assert keeps(own, host, 3, 0.25)
    twin.eval()(**inputs)
    assert own.keep_indices is None
    assert drop.training
    assert drop.keep_indices is mask, "nothing that happens to the copy reaches the original"
    with pytest.raises(ValueError, match="attached to another model"):
        attach(model, own)

    gaussmask.detach(twin.train())
    assert structure(twin, identity=False) == plain
    twin(**inputs)
    assert drop.keep_indices is mask
    attach(model, own)(**inputs)
    assert keeps(own, host, 3, 0.25)


COPIED = [*COMPILED_WITH_PIXELS, "timm-beit", "transformers-DINOv3ViTModel", "transformers-Siglip2VisionModel-padded"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_torch_save])
@staged(COPIED)
def test_parts_copy_again_and_again(name, stage, duplicate):
    """A copy of any part, of its copy, and so on, also when the whole is gone; and the copy of a whole still masks."""
    host = ALL[name]
    model = gaussmask.attach(host.build(), RandomPatchDropout(0.5), stage=stage)
    model(**host.inputs(2))
    path = gaussmask.describe(model).path
    for part in sorted({path, path.rpartition(".")[0]} | {child for child, _ in model.named_children()}):
        twin = duplicate(duplicate(duplicate(model.get_submodule(part))))
        assert list(twin.state_dict()) == list(model.get_submodule(part).state_dict())
    twin = duplicate(duplicate(duplicate(model)))
    twin(**host.inputs(2))
    assert keeps(gaussmask.attached(twin), host, 2, 0.5)
    gaussmask.detach(twin)
    assert gaussmask.attached(twin) is None
    assert not any("gaussmask" in type(module).__module__ for module in twin.modules())


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getbuffer().nbytes


@staged(COPIED)
def test_no_part_carries_more_than_itself(name, stage):
    """Every module of the host, by itself, with the whole gone; and nothing that was left in it does anything."""
    host = ALL[name]
    model, drop = host.build(), RandomPatchDropout(0.5)
    sizes = {path: pickled(module) for path, module in model.named_modules()}
    gaussmask.attach(model, drop, stage=stage)
    model(**host.inputs(2))
    parts = dict(model.named_modules())
    for path, size in sizes.items():
        if type(parts[path]).__module__.startswith("gaussmask"):
            continue
        assert pickled(parts[path]) < size + 8000, path
        assert pickled(by_torch_save(copy.deepcopy(parts[path]))) < size + 8000, path
    (seam,) = (module for module in parts.values() if isinstance(module, Seam))
    assert pickled(seam) < 8000
    projection = next(path for path, module in parts.items() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)))
    twin, x = copy.deepcopy(parts[projection]), torch.randn(3, *projection_input(parts[projection]))
    plain = gaussmask.detach(copy.deepcopy(model)).get_submodule(projection)
    del model, parts, seam
    gc.collect()
    assert torch.equal(twin(x), plain(x))
    assert torch.equal(twin(x), plain(x)), "again"
    gaussmask.detach(twin)
    assert structure(twin, identity=False) == structure(plain, identity=False)


def projection_input(layer):
    """The shape of one input with a few patches in it."""
    if isinstance(layer, nn.Linear):
        return (4, layer.in_features)
    return (layer.in_channels, *(2 * side for side in layer.kernel_size))


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_detaching_a_part_of_a_copy_takes_nothing_from_the_original(stage):
    host, drop = ALL["open_clip-CLIP"], RandomPatchDropout(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    twin = copy.deepcopy(model)
    gaussmask.detach(twin.visual)
    assert twin.encode_image(x_images(2)["x"]).shape == (2, 16)
    assert gaussmask.attached(twin) is None
    twin(**host.inputs(2))  # the hooks of the pair, which lie outside of the tower, are idle
    model(**host.inputs(2))
    assert drop.keep_indices.shape == (2, 18)
    assert gaussmask.attach(twin, RandomPatchDropout(0.75), stage=stage) is twin
    twin(**host.inputs(2))
    assert gaussmask.attached(twin).keep_indices.shape == (2, 9)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_modules_that_two_models_share_keep_the_hooks_of_the_one_that_is_attached(stage):
    """Detaching, and attaching, the other one takes nothing off."""
    host = ALL["timm-vit"]
    one, other = host.build(), host.build()
    other.patch_embed, other.blocks = one.patch_embed, one.blocks
    drop, own = RandomPatchDropout(0.5), RandomPatchDropout(0.75)
    gaussmask.attach(one, drop, stage=stage)
    gaussmask.detach(other)
    one(**host.inputs(2))
    assert keeps(drop, host, 2, 0.5)
    gaussmask.attach(other, own, stage="tokens")
    gaussmask.detach(other)
    one(**host.inputs(2))
    assert keeps(drop, host, 2, 0.5)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_the_copy_of_a_tower_out_of_a_whole_model_masks_by_itself(stage):
    """As an EMA of the image tower, or its export."""
    model, drop = ALL["open_clip-CLIP"].build(), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    twin = copy.deepcopy(copy.deepcopy(model.visual))
    own, x = gaussmask.attached(twin), x_images(2)["x"]
    twin(x)
    assert own is not drop
    assert own.keep_indices.shape == (2, 18)
    assert drop.keep_indices is None
    torch.manual_seed(1)
    output = twin(x)
    torch.manual_seed(1)
    assert torch.equal(model.visual(x), output)


class ModulesToSaveWrapper(nn.Module):
    """What PEFT puts around a module that is trained whole: the frozen one, and its copy in use."""

    def __init__(self, module):
        super().__init__()
        self.original_module, self.active_adapter = module, ["default"]
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.modules_to_save["default"], name)

    def forward(self, *args, **kwargs):
        return self.modules_to_save["default"](*args, **kwargs)


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_embeddings_that_peft_saves_are_one_tower(stage):
    """After attach it says to attach again; before, the copy in use is hooked."""
    model, drop = ALL["transformers-ViTModel"].build(), RandomPatchDropout(0.5)
    inputs = ALL["transformers-ViTModel"].inputs(2)
    gaussmask.attach(model, drop, stage=stage)
    model.embeddings = ModulesToSaveWrapper(model.embeddings)
    with pytest.raises(UnsupportedModelError, match="attach again"):
        model(**inputs)
    gaussmask.detach(model)
    gaussmask.attach(model, drop, stage=stage)(**inputs)
    assert drop.keep_indices.shape == (2, 18)
    assert gaussmask.describe(model).path == "embeddings.modules_to_save.default"


def test_one_drop_serves_one_model():
    first, second, drop = make_timm(), ALL["transformers-CLIPModel"].build(), RandomPatchDropout(0.5)
    gaussmask.attach(first, drop)
    with pytest.raises(ValueError, match="this RandomPatchDropout is attached to another model: detach"):
        gaussmask.attach(second, drop)
    assert gaussmask.attached(second) is None
    assert gaussmask.attached(first) is drop
    gaussmask.attach(nn.Sequential(first), drop)  # the same tower, seen from above
    gaussmask.detach(first)
    gaussmask.attach(second, drop)
    gaussmask.attach(first, RandomPatchDropout(0.5))
    with pytest.raises(ValueError, match=r"carries 2 drops \(VisionTransformer and CLIP\w+\): ask each tower"):
        gaussmask.attached(nn.ModuleList([first, second]))
    gaussmask.detach(first)
    del second
    gc.collect()
    both = nn.ModuleList([first, nn.Sequential(first)])  # one tower under two names
    assert gaussmask.attached(gaussmask.attach(both, drop)) is drop


@staged(SAVED)
def test_save_pretrained_round_trip(name, stage, tmp_path):
    model, inputs = ALL[name].build().eval(), ALL[name].inputs(2)
    gaussmask.attach(model, RandomPatchDropout(0.5), stage=stage).save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert gaussmask.attached(loaded) is None
    assert torch.equal(result(ALL[name], loaded, inputs), result(ALL[name], model, inputs))
    model.load_state_dict(loaded.state_dict(), strict=True)


# Training machinery


TRACED_ANEW = [("timm-vit", "tokens"), ("timm-naflex-learned", "pixels")]
OF_ANOTHERS_MECHANISM = pytest.mark.thorough("another host of its mechanism is compiled always")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *(pytest.param(name, "tokens", marks=OF_ANOTHERS_MECHANISM if name in SIMILAR else ()) for name in COMPILED),
        *((name, "pixels") for name in COMPILED_WITH_PIXELS),
    ],
)
def test_compiles_without_a_graph_break(name, stage, thorough):
    """One graph for all batches of a size, and the same patches as in eager mode for the same seed.

    Tracing anew, for another size, ratio and mode, is asked of one host at each stage, and of all with --thorough.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    host, drop, kept = ALL[name], GaussianPatchDropout(0.5), []
    model = gaussmask.attach(host.build(), drop, stage=stage)
    traces_anew = thorough or (name, stage) in TRACED_ANEW
    # AOTAutograd, which takes longer than the capture, for one host of every mechanism.
    backend = "aot_eager" if name in COMPILED_WITH_PIXELS and (thorough or not traces_anew) else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert gaussmask.attached(compiled) is drop
    batches = [(3, 2), (4, 2), (5, 3)]  # the last batch of an epoch has a size of its own
    for seed, batch_size in batches if traces_anew else batches[:2]:
        inputs = host.inputs(batch_size)
        expected, keep_indices = result(host, model, inputs, seed), drop.keep_indices
        output = result(host, compiled, inputs, seed)
        assert torch.equal(drop.keep_indices, keep_indices)
        assert torch.allclose(output, expected, atol=1e-5)
        output.sum().backward()
        kept.append(keep_indices)
        if seed == 4:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(kept[0], kept[1])
    if not traces_anew:
        return
    drop.mask_ratio = 0.75
    compiled(**inputs)
    assert keeps(drop, host, 3, 0.25)
    assert torch.allclose(result(host, compiled.eval(), inputs), result(host, model, inputs), atol=1e-5)
    assert drop.keep_indices is None


@staged(REPRESENTATIVE)
def test_hooks_lie_in_the_order_in_which_they_run(name, stage):
    """An OrderedDict's order is not that of the dict below it, by whose places torch.compile may name a hook."""
    model = ALL[name].build()
    model.register_forward_pre_hook(lambda module, args: None)
    gaussmask.attach(model, GaussianPatchDropout(0.5), stage=stage)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            assert list(hooks) == list(dict.keys(hooks))
    assert isinstance(next(iter(model._forward_pre_hooks.values())).__self__, MustReachDrop)


@staged(REPRESENTATIVE)
def test_gradient_checkpointing_changes_nothing(name, stage):
    """Nor does the recomputation of a layer after another forward, which has drawn other patches."""
    host = ALL[name]
    model, batches = (
        gaussmask.attach(host.build(), RandomPatchDropout(0.5), stage=stage),
        [host.inputs(2), host.inputs(2)],
    )
    randomise(model)

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        losses = [result(host, model, inputs).square().sum() for inputs in batches]  # two forwards, then one backward
        sum(losses).backward()
        return [*losses, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    expected = step()
    recompute_layers(model)
    assert len(expected) > 10
    if "VJEPA2" in name and Version(tf.__version__) < Version("5.6"):
        with pytest.raises(UnsupportedModelError, match="positions of a later forward"):
            step()
        return
    for value, reference in zip(step(), expected, strict=True):
        assert (value - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Gemma 4's own norms
def test_autocast_keeps_the_same_patches(host, attach):
    inputs, drop = host.inputs(3), GaussianPatchDropout(0.5)
    model = attach(host.build(), drop)
    result(host, model, inputs, seed=3)
    keep_indices = drop.keep_indices
    with torch.autocast("cpu", torch.bfloat16):
        result(host, model, inputs, seed=3)
    assert torch.equal(drop.keep_indices, keep_indices)


@staged(["timm-vit", "transformers-CLIPVisionModel", "transformers-DINOv3ViTModel"])
def test_gradients_reach_the_pixels_of_kept_patches_only(name, stage):
    host, drop = ALL[name], RandomPatchDropout(0.75)
    inputs = host.inputs(2)
    (pixels,) = (value.requires_grad_() for value in inputs.values())
    result(host, gaussmask.attach(host.build(), drop, stage=stage), inputs).square().sum().backward()
    touched = pixels.grad.unflatten(2, (6, 8)).unflatten(4, (6, 8)).abs().amax(dim=(1, 3, 5)) > 0
    assert torch.equal(touched, drop.keep_mask)


# What hosts bring along


MAKERS = {
    "vit": make_timm, "eva": partial(make_timm, "eva02_tiny_patch14_224"), "naflex": partial(make_naflex, reg_tokens=1),
    "open_clip": make_open_tower,
}  # fmt: skip


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_hosts_own_patch_dropout_gives_way_and_comes_back(make):
    slot, argument = ("patch_dropout",) * 2 if make is make_open_tower else ("patch_drop", "patch_drop_rate")
    model, inputs, lengths = make(**{argument: 0.25}), x_images(2), []
    last = model.transformer if make is make_open_tower else model.blocks[-1]
    last.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    own = getattr(model, slot)
    model(**inputs)
    gaussmask.attach(model, RandomPatchDropout(0.5))(**inputs)
    gaussmask.detach(model)(**inputs)
    assert lengths == [1 + 27, 1 + 18, 1 + 27]
    assert getattr(model, slot) is own


def test_a_new_image_size_is_seen():
    model, drop = make_timm(), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop).set_input_size((64, 24))
    model(**x_images(2, size=(64, 24)))
    assert drop.keep_mask.shape == (2, 8, 3)


# Refusals


def on_meta(name, **settings):
    if name not in timm.list_models():
        pytest.skip(f"{name} is not in this version of timm")
    with torch.device(
        "meta" if Version(timm.__version__) >= Version("1.0.23") else "cpu"
    ):  # the older need real tensors
        return timm.create_model(name, **settings)


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
WINDOWS, DENSE, STAGES, NONE = "attends within windows", "dense map", "from stage to stage", "holds no vision trans"


def llava():
    language = tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=language)
    return tf.LlavaForConditionalGeneration(config)


def two_towers():
    return nn.ModuleList([make_timm(), make_open_tower()])


# fmt: off
REFUSED = [
    (partial(on_meta, "swin_tiny_patch4_window7_224"), "SwinTransformer", WINDOWS),
    (partial(on_meta, "samvit_base_patch16"), "VisionTransformerSAM", WINDOWS),
    (partial(on_meta, "hiera_tiny_224"), "Hiera", STAGES),
    (partial(on_meta, "convit_tiny"), "ConVit", "position attention"),
    (partial(on_meta, "qwen3_vit_88m"), "Qwen3VitClassifier", "on the full grid inside its encoder"),
    (partial(on_meta, "resnet18"), "ResNet", "convolutional"),
    (partial(on_meta, "gemma4_vit_167m_enc", depth=1), "Gemma4VitEncoder", "global_pool='avg'"),
    (partial(make_hf, "SwinModel", "SwinConfig", SWIN), "SwinModel", WINDOWS),
    (partial(make_hf, "ViTMAEModel", "ViTMAEConfig", VISION), "ViTMAEModel", "config.mask_ratio"),
    (partial(make_hf, "ViTMAEForPreTraining", "ViTMAEConfig", VISION), "ViTMAEForPreTraining", "config.mask_ratio"),
    (partial(make_hf, "VideoMAEForPreTraining", "VideoMAEConfig", VISION), "VideoMAEForPreTraining", "its loss"),
    (partial(make_hf, "VideoMAEForVideoClassification", "VideoMAEConfig", {**VISION, "use_mean_pooling": False}),
     "VideoMAEForVideoClassification", "reads the first patch"),
    (partial(make_hf, "Dinov2Backbone", "Dinov2Config", VISION), "Dinov2Backbone", DENSE),
    (partial(make_hf, "DINOv3ViTBackbone", "DINOv3ViTConfig", VISION), "DINOv3ViTBackbone", DENSE),
    (partial(make_hf, "DPTForDepthEstimation", "DPTConfig", VISION), "DPTForDepthEstimation", DENSE),
    (partial(make_hf, "CLIPSegForImageSegmentation", "CLIPSegConfig", {"vision_config": VISION, "text_config": TEXT}),
     "CLIPSegForImageSegmentation", DENSE),
    (partial(make_hf, "BeitForMaskedImageModeling", "BeitConfig", VISION), "BeitForMaskedImageModeling", "its loss"),
    (partial(make_hf, "ViTForMaskedImageModeling", "ViTConfig", VISION), "ViTForMaskedImageModeling", "its loss"),
    (partial(make_hf, "XCLIPModel", "XCLIPConfig", {"vision_config": VISION, "text_config": TEXT}), "XCLIPModel",
     "same patch of all frames"),
    (partial(make_class, "ovis2", "Ovis2VisionModel", "Ovis2VisionConfig", "", {**VISION, "hidden_stride": 2}),
     "Ovis2VisionTransformer", "hidden_stride"),
    (partial(make_hf, "BertModel", "BertConfig", TEXT), "BertModel", NONE),
    (llava, "LlavaForConditionalGeneration", "a place for every patch"),
    (two_towers, "ModuleList", "more than one vision tower"),
]
# fmt: on


@pytest.mark.parametrize(("build", "class_name", "reason"), REFUSED, ids=[name for _, name, _ in REFUSED])
def test_models_that_cannot_be_masked(build, class_name, reason):
    model = build()
    before = structure(model)
    drop = RandomPatchDropout(0.5)
    with pytest.raises(UnsupportedModelError, match=rf"^(\w+\.)?{class_name}.*{reason}"):
        gaussmask.attach(model, drop)
    assert structure(model) == before
    gaussmask.attach(make_timm(), drop)  # the drop is still free


@pytest.mark.parametrize("how", ["handle", "in place", "submodule"])
def test_compiled_models_come_too_late(how):
    model = make_timm()
    if how == "handle":
        model = torch.compile(model)
    elif how == "in place":
        model.compile()
    else:
        model.blocks[1] = torch.compile(model.blocks[1])
    with pytest.raises(ValueError, match=r"is compiled.*attach first, compile second"):
        gaussmask.attach(model, RandomPatchDropout(0.5))


def test_bad_arguments():
    model = make_timm()
    with pytest.raises(TypeError, match=r"drop must be a .*PatchDropout, got Dropout"):
        gaussmask.attach(model, nn.Dropout())
    with pytest.raises(TypeError, match=r"drop must be a .*PatchDropout, got the class RandomPatchDropout, not"):
        gaussmask.attach(model, RandomPatchDropout)
    for ask in (gaussmask.detach, gaussmask.attached, gaussmask.describe):
        for other, got in (
            (None, "NoneType"),
            ("vit", "str"),
            (type(model), "the class VisionTransformer, not"),
        ):
            with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, got {got}"):
                ask(other)
        with pytest.raises(TypeError, match="got the RandomPatchDropout itself"):
            ask(RandomPatchDropout(0.5))
    with pytest.raises(ValueError, match=r"stage must be one of .*'tokens'.*, got 'neck'"):
        gaussmask.attach(model, RandomPatchDropout(0.5), stage="neck")
    gaussmask.attach(model, RandomPatchDropout(0.5, num_prefix_tokens=1, grid_size=(6, 6)))(**x_images(2))
    gaussmask.attach(model, RandomPatchDropout(0.5, grid_size=(4, 9)))
    with pytest.raises(ValueError, match=re.escape("grid_size=(4, 9), but VisionTransformer has (6, 6)")):
        model(**x_images(2))


@pytest.mark.parametrize("name", ["timm-vit", "transformers-CLIPModel", "transformers-DINOv3ViTModel"])
def test_a_failed_attach_leaves_what_was_there(name):
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model = gaussmask.attach(host.build(), drop)
    before = structure(model)
    bad = RandomPatchDropout(0.5, num_prefix_tokens=3)
    with pytest.raises(ValueError, match=r"num_prefix_tokens=3, but \w+ has"):
        gaussmask.attach(model, bad)
    if name == "transformers-DINOv3ViTModel":
        with pytest.raises(UnsupportedModelError, match="lacks the rotary positions"):
            gaussmask.attach(model.embeddings, RandomPatchDropout(0.5))
    assert structure(model) == before
    model(**host.inputs(2))
    assert keeps(drop, host, 2, 0.5)
    bad.num_prefix_tokens = None
    gaussmask.attach(host.build(), bad)
