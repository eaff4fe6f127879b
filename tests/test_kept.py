"""What is kept between forwards: never another tensor than would be made anew, and few steps of work where it is."""

import copy
import pickle
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hosts import ALL, make_timm, result, x_images
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from measure.launches import launches

import gaussmask
from gaussmask import GaussianPatchDropout, RandomPatchDropout
from gaussmask.functional import take_patches, take_tokens
from gaussmask.sampling import kept as module
from gaussmask.sampling.grids import coordinates_on
from gaussmask.sampling.kept import LIMIT, kept


@pytest.fixture(autouse=True)
def fresh():
    module._kept.clear()
    torch.manual_seed(0)
    yield
    module._kept.clear()


def coordinates(side=4, device="cpu"):
    return kept(coordinates_on, (side, side), device=device)


def test_the_same_settings_give_the_same_tensor():
    assert coordinates() is coordinates()
    assert coordinates(5) is not coordinates(4)
    assert coordinates().shape == (16, 2)
    assert coordinates(device=torch.device("cpu")) is coordinates()
    assert coordinates(device="meta").is_meta


def test_what_somebody_wrote_into_is_made_anew():
    expected = coordinates().clone()
    coordinates().mul_(2)
    assert torch.equal(coordinates(), expected)

    class Spoils(gaussmask.PatchDropout):
        def scores(self, coords, generator=None):
            return coords.mul_(3)[..., 0]

    Spoils(0.5)(torch.zeros(1, 16, 4))
    assert torch.equal(coordinates(), expected)


def test_nothing_is_kept_or_taken_where_it_must_not_be():
    def seen(x):
        found.append(coordinates())
        return x + found[-1].sum()

    own, found = coordinates(), []
    with FakeTensorMode():
        seen(torch.zeros(1))
    make_fx(seen)(torch.zeros(1))
    with FlopCounterMode(display=False):
        seen(torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(seen, torch.zeros(1), check_trace=False)
    assert all(tensor is not own for tensor in found)
    assert len(found) >= 4
    assert coordinates() is own
    assert kept(coordinates_on, (4, 4), device=None) is not own
    assert next(iter(module._kept.values()))[0] is own
    assert len(module._kept) == 1
    graph = torch.compile(lambda x: x + coordinates(), fullgraph=True, backend="eager")
    assert torch.equal(graph(torch.zeros(1)), own)


TRANSFORMS = {
    "functionalize": lambda call: torch.func.functionalize(call)(torch.ones(2)),
    "vmap": lambda call: torch.vmap(call)(torch.ones(3, 2)),
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(torch.ones(2)),
    "jvp": lambda call: torch.func.jvp(call, (torch.ones(2),), (torch.ones(2),)),
    "jacrev": lambda call: torch.func.jacrev(call)(torch.ones(2)),
    "vmap in grad": lambda call: torch.func.grad(lambda x: torch.vmap(call)(x).sum())(torch.ones(3, 2)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, of jvp
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_leaves_nothing(name):
    """Its tensors are wrappers that have no values when it has ended."""
    TRANSFORMS[name](lambda x: x * coordinates()[0].sum())
    assert not module._kept
    assert coordinates().tolist() == coordinates_on((4, 4), device="cpu").tolist()


def test_a_tensor_of_inference_mode_serves_training():
    with torch.inference_mode():
        assert not coordinates().is_inference()
    weight = torch.ones(2, requires_grad=True)
    (coordinates() * weight).sum().backward()


def test_it_is_bounded():
    for side in range(1, LIMIT + 40):
        coordinates(side)
    assert len(module._kept) == LIMIT


def test_threads_may_share_it():
    def work():
        for side in list(range(1, 60)) * 3:
            assert coordinates(side).shape == (side * side, 2)

    raised = []
    threads = [threading.Thread(target=lambda: raised.append(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == [None] * 4


def test_nothing_of_it_travels():
    model = gaussmask.attach(make_timm(), GaussianPatchDropout(0.5))
    size = len(pickle.dumps(model))
    model(**x_images(2))
    assert len(pickle.dumps(model)) < size + 200
    assert not any("coord" in name for name in model.state_dict())
    copy.deepcopy(model)(**x_images(2))


RULES = {
    "random": RandomPatchDropout,
    "additive": GaussianPatchDropout,
    "weighted": lambda ratio: GaussianPatchDropout(ratio, sampling="weighted", center=(0.3, -0.2)),
    "tiny sigma": lambda ratio: GaussianPatchDropout(ratio, sigma=1e-9),
}


@pytest.mark.parametrize("grid_size", [(4, 4), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_the_short_way_to_the_scores_gives_the_very_scores(make, grid_size):
    drop, num_patches = make(0.5), torch.Size(grid_size).numel()
    coords = coordinates_on(grid_size, device=None).expand(6, -1, -1)
    for _ in range(2):  # made, and taken
        torch.manual_seed(3)
        expected = drop.scores(coords)
        torch.manual_seed(3)
        assert torch.equal(drop._scores_of_noise(torch.rand(6, num_patches), grid_size), expected)
    drop.draw(6, num_patches, grid_size)
    seen = []
    drop.scores = lambda coords: (seen.append(coords), torch.rand(coords.shape[:2]))[1]
    drop.draw(6, num_patches, grid_size)
    assert len(seen) == 1, "somebody's own are asked"


@pytest.mark.parametrize("name", ["timm-vit", "transformers-CLIPModel", "transformers-YolosModel", "open_clip-tower"])
def test_later_forwards_are_as_the_first(name):
    """Of other batches and ratios in between, in both stages."""
    host = ALL[name]
    for stage in ("tokens", "pixels"):
        model = gaussmask.attach(host.build(), GaussianPatchDropout(0.5), stage=stage)
        outputs = []
        for batch, ratio in ((2, 0.5), (3, 0.75), (2, 0.5), (1, 0.25), (2, 0.5)):
            gaussmask.attached(model).mask_ratio = ratio
            torch.manual_seed(5)
            inputs = host.inputs(batch)
            outputs.append(result(host, model, inputs, seed=5) if batch == 2 else result(host, model, inputs))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[0], outputs[4])


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_taking_after_other_sizes(memory):
    for batch, side in ((2, 32), (3, 40), (2, 32), (1, 32)):
        images = torch.randn(batch, 3, side, side).contiguous(memory_format=memory)
        keep = torch.stack([torch.randperm((side // 8) ** 2)[:5] for _ in range(batch)])
        whole = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).transpose(1, 2)
        expected = torch.stack([patches[rows] for patches, rows in zip(whole, keep, strict=True)])
        assert torch.equal(take_patches(images, keep, 8), expected)
        tokens = torch.randn(batch, 2 + (side // 8) ** 2, 4)
        rows = torch.cat([torch.tensor([[0, 1]]).expand(batch, -1), keep + 2], 1)
        assert torch.equal(take_tokens(tokens, keep, 2), tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)))


def kernels(call):
    call()
    return launches(call, "cpu")


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.918])
@pytest.mark.parametrize(("rule", "limit"), [("random", 5), ("additive", 6), ("weighted", 8)])
def test_a_drop_is_few_kernels(rule, limit, mask_ratio):
    """rand, plus the Gaussian, top-k, plus the first row, the prefix in front, index_select."""
    drop = RULES[rule](mask_ratio)
    drop.num_prefix_tokens = 1
    x = torch.randn(4, 197, 8, requires_grad=True)
    assert len(kernels(lambda: drop(x))) <= limit, kernels(lambda: drop(x))
    out = drop(x)
    found = kernels(lambda: torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True))
    assert [name.startswith(("zero_", "index_add", "scatter_add")) for name in found] == [True, True]
