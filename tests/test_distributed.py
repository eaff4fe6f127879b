"""Wrappers of distributed training, over gloo on the CPU, for one host of every mechanism."""

import copy

import processes
import pytest
import torch
import torch.distributed as dist
from hosts import ALL, REPRESENTATIVE, make_timm, result, with_stages, x_images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gaussmask
from gaussmask import ClusterPatchDropout, RandomPatchDropout


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:  # a logit scale, which fully_shard wants with an axis
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1)))
    return dist.fsdp.fully_shard(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # DINOv3's pooled output
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 before attach"])
@pytest.mark.parametrize(("name", "stage"), with_stages(REPRESENTATIVE))
def test_wrapped_models_drop_and_give_the_drop_back(name, stage, wrapper):
    if wrapper != "ddp" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has no FSDP2 on the CPU")
    torch.manual_seed(0)
    host, drop = ALL[name], RandomPatchDropout(0.5)
    model = host.build()
    if wrapper == "fsdp2 before attach":
        gaussmask.attach(shard(model), drop, stage=stage)
    else:
        gaussmask.attach(model, drop, stage=stage)
        model = DistributedDataParallel(model) if wrapper == "ddp" else shard(model)
    assert gaussmask.attached(model) is drop
    result(host, model, host.inputs(2)).sum().backward()
    assert drop.keep_indices.shape == (2, host.count // 2)
    assert gaussmask.attached(gaussmask.detach(model)) is None


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "stage"), with_stages(["timm-vit", "transformers-CLIPModel", "open_clip-tower-patch-dropout"])
)
def test_rules_that_ask_are_given_their_pixels_under_a_wrapper(name, stage, wrapper):
    if wrapper == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has no FSDP2 on the CPU")
    torch.manual_seed(0)
    host, drop = ALL[name], ClusterPatchDropout(0.5)
    model, inputs = host.build(), host.inputs(2)
    gaussmask.attach(model, drop, stage=stage)
    expected = result(host, model, inputs, seed=3).detach()
    kept = drop.keep_mask
    model = DistributedDataParallel(model) if wrapper == "ddp" else shard(model)
    output = result(host, model, inputs, seed=3)
    assert torch.equal(drop.keep_mask, kept)
    torch.testing.assert_close(output, expected)
    output.sum().backward()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("path", ["patch_embed.proj", "patch_embed"])
def test_a_projection_sharded_by_itself_drops_no_pixels(path):
    """Its weight is whole in its own forward only, and not where the kept patches are projected."""
    model = gaussmask.attach(make_timm(), RandomPatchDropout(0.5), stage="pixels")
    dist.fsdp.fully_shard(model.get_submodule(path))
    reason = "its projection is sharded by itself" if path.endswith("proj") else "its patch_embed is sharded by itself"
    with pytest.raises(gaussmask.UnsupportedModelError, match=reason):
        shard(model)(**x_images(2))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("path", ["patch_embed.proj", "patch_embed", ""])
def test_auto_takes_tokens_where_the_projection_is_sharded_by_itself(path):
    model, drop = make_timm(), RandomPatchDropout(0.5)
    whole = gaussmask.attach(copy.deepcopy(model), RandomPatchDropout(0.5), stage="tokens")
    gaussmask.attach(model, drop)
    if path:
        dist.fsdp.fully_shard(model.get_submodule(path))
    torch.manual_seed(3)
    output = shard(model)(**x_images(2))
    output.sum().backward()
    assert drop.keep_indices.shape == (2, 18)
    assert gaussmask.describe(model).stage == ("tokens" if path else "pixels")
    torch.manual_seed(3)
    torch.testing.assert_close(output, whole(**x_images(2)))


def train_step_of_two(rank, store, results):
    """One process: what it kept, and the gradients after the reduction, for every host."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    outcome = {}
    for name, stage in with_stages(REPRESENTATIVE):
        host, drop = ALL[name], RandomPatchDropout(0.5)
        torch.manual_seed(0)
        try:
            model = host.build()
        except pytest.skip.Exception:  # not in this version of its library
            continue
        model = DistributedDataParallel(gaussmask.attach(model, drop, stage=stage), find_unused_parameters=True)
        torch.manual_seed(rank)
        result(host, model, host.inputs(2)).square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        outcome[name, stage] = (drop.keep_indices, torch.cat([gradient.flatten() for gradient in gradients]))
    torch.save(outcome, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_draw_apart_and_share_gradients(tmp_path):
    processes.spawn(train_step_of_two, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) > 20
    for (name, stage), (kept, gradient) in first.items():
        other_kept, other_gradient = second[name, stage]
        assert kept.shape == other_kept.shape == (2, ALL[name].count // 2), name
        assert not torch.equal(kept.sort().values, other_kept.sort().values), name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, other_gradient), name
