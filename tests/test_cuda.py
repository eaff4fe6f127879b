"""On a GPU: what a CPU cannot show, and the rest once more where the kernels are others.

    pytest -m cuda                  on a GPU; `make gpu` measures afterwards
    pytest -m cuda --device cpu     a rehearsal: all of it that a CPU can do

Where a model cannot do by itself what is asked of it with a drop (wait for nothing, be captured, run in half of a
precision), the test is skipped with what the model said.
"""

import contextlib
import copy
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hosts import ALL, REPRESENTATIVE, recompute_layers, result, with_stages
from oracle import ask, difference, randomise, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import gaussmask
from gaussmask import GaussianPatchDropout, PatchDropout

pytestmark = pytest.mark.filterwarnings("default")  # a GPU that nobody has tried may have other ones
on_a_gpu = pytest.mark.cuda
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES = {
    "random": gaussmask.RandomPatchDropout,
    "Gaussian": GaussianPatchDropout,
    "weighted": partial(GaussianPatchDropout, sampling="weighted"),
    "grid": gaussmask.GridPatchDropout,
    "block": gaussmask.BlockPatchDropout,
}


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    torch._dynamo.reset()
    with torch.backends.cudnn.flags(allow_tf32=False):  # whose convolutions have 10 bits of float32 otherwise
        yield torch.device(name)


def moved(value, device, dtype=None):
    """A model, a tensor or a dictionary of inputs on `device`, its floating numbers in `dtype`."""
    if isinstance(value, dict):
        return {name: moved(part, device, dtype) for name, part in value.items()}
    if isinstance(value, torch.nn.Module):
        return value.to(device, dtype)
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def loss_of(output):
    """A sum with weights, for the squares of normalised features always make as much."""
    return (output * torch.linspace(-1, 1, output.shape[-1], device=output.device)).sum()


def gradients_of(model):
    """All of them; of a part that had none, zeros, as a graph returns them."""
    found = [torch.zeros_like(own) if own.grad is None else own.grad for own in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def alone_or_skip(action, what):
    """Do with the model alone what it shall do with a drop."""
    try:
        return action()
    except Exception as error:
        pytest.skip(f"the model by itself cannot {what}: {type(error).__name__}: {str(error)[:200]}")


class Given(PatchDropout):
    """Keeps what another drop has kept."""

    needs_grid = False

    def scores(self, coords, generator=None):
        return torch.zeros(coords.shape[:2], device=coords.device).scatter_(1, self.given, 1.0)


def given(keep_indices, num_patches):
    drop = Given(1 - keep_indices.shape[1] / num_patches)
    drop.given = keep_indices.clone()
    return drop


# As on a CPU


@on_a_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_kept_tokens_are_those_of_the_full_model(name, precision, device):
    """The position oracle. In half of a precision what it leaves is compared with what no mask at all would leave."""
    host, dtype = ALL[name], PRECISIONS[precision]
    alone_or_skip(lambda: result(host, moved(host.build(), device, dtype), moved(host.inputs(2), device, dtype)), "run")
    answer = ask(host, "half", lambda value: moved(value, device, dtype))
    assert answer.drop.keep_indices.device.type == device.type
    allowed = {"float32": 5e-4, "bfloat16": answer.control / 2, "float16": answer.control / 8}
    assert answer.hidden < allowed[precision]
    assert answer.control > 0.02


def exactness(outcome, exact):
    """The error of hidden states and gradients, each in units of the exact ones."""
    return [
        ((value.double() - wanted).norm() / wanted.norm()).item() for value, wanted in zip(outcome, exact, strict=True)
    ]


@on_a_gpu
@pytest.mark.parametrize("precision", ["float64", *PRECISIONS, "bfloat16 autocast"])
@pytest.mark.parametrize("name", [name for name, stage in with_stages(REPRESENTATIVE) if stage == "pixels"])
def test_pixels_are_as_exact_as_tokens(name, precision, device):
    """Hidden states and gradients, compared with those of stage tokens in float64; in float64 they are the same."""
    host, autocast = ALL[name], precision.endswith("autocast")
    dtype = torch.float32 if autocast else getattr(torch, precision)
    model = moved(host.build(), device)
    randomise(model)
    inputs = moved(host.inputs(2), device)

    def outcome(stage, dtype):
        own = moved(copy.deepcopy(model), device, dtype)
        if stage is not None:
            gaussmask.attach(own, GaussianPatchDropout(0.5), stage=stage)
        torch.manual_seed(3)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast and dtype == torch.float32):
            hidden, _ = run(host, own, moved(inputs, device, dtype), 2)
        loss_of(hidden.double()).backward()
        keep = None if stage is None else gaussmask.attached(own).keep_indices
        return keep, [hidden.detach(), gradients_of(own)]

    alone_or_skip(lambda: outcome(None, dtype), "run")
    kept, exact = outcome("tokens", torch.float64)
    kept_by_tokens, tokens = outcome("tokens", dtype)
    kept_by_pixels, pixels = outcome("pixels", dtype)
    assert torch.equal(kept_by_tokens, kept)
    assert torch.equal(kept_by_pixels, kept)
    exact = [value.double() for value in exact]
    rounding = 20 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for own, reference in zip(exactness(pixels, exact), exactness(tokens, exact), strict=True):
        assert own < (1e-6 if precision == "float64" else 1.5 * reference + rounding)


@on_a_gpu
@pytest.mark.parametrize(("name", "stage"), with_stages(REPRESENTATIVE))
def test_checkpointing_changes_nothing(name, stage, device):
    host = ALL[name]
    model = moved(host.build(), device)
    randomise(model)
    inputs = moved(host.inputs(2), device)
    gaussmask.attach(model, GaussianPatchDropout(0.5), stage=stage)

    def gradients():
        model.zero_grad()
        loss = loss_of(result(host, model, inputs, seed=3))
        loss.backward()
        return gradients_of(model)

    expected = gradients()
    recompute_layers(model)
    assert difference(gradients(), expected) < 1e-3


@on_a_gpu
@pytest.mark.parametrize("rule", RULES)
def test_frequencies(rule, device):
    """Of 20,000 draws, against the exact chances where they are known, or else draws on the CPU: 5 standard errors."""
    drop, grid_size, draws = RULES[rule](0.75), (8, 8), 20_000
    torch.manual_seed(0)
    kept = drop.draw(draws, 64, grid_size, device=device)
    assert kept.device.type == device.type
    assert (kept.sort().values.diff() > 0).all(), "every image keeps different patches"
    exact = drop._exact_probability is not None
    wanted = drop.keep_probability(grid_size, draws=draws)
    found = torch.bincount(kept.flatten(), minlength=64).view(8, 8).cpu() / draws
    variance = wanted * (1 - wanted) * (1 if exact else 2) / draws
    assert ((found - wanted).abs() <= 5 * variance.sqrt() + 1e-4).all()


@on_a_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("timm-vit", "tokens"), ("timm-vit", "pixels"), ("timm-vit", "auto"), ("timm-eva-pe", "tokens"),
        ("transformers-CLIPModel", "tokens"), ("transformers-CLIPModel", "pixels"),
    ],
)  # fmt: skip
def test_compiled(name, stage, mode, device):
    """Several steps with a mask each, which the model in eager mode is given to keep."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("torch.compile needs a C compiler")
    host = ALL[name]
    model = moved(host.build(), device)
    randomise(model)
    eager = copy.deepcopy(model)
    drop = GaussianPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    compiled, masks = torch.compile(model, mode=None if mode == "default" else mode), []
    for _ in range(4):
        inputs = moved(host.inputs(2), device)
        model.zero_grad()
        loss = loss_of(result(host, compiled, inputs))
        masks.append(drop.keep_indices.clone())
        loss, value = loss.detach().clone(), loss
        value.backward()
        gaussmask.attach(eager, given(masks[-1], host.count), stage=stage)
        eager.zero_grad()
        expected = loss_of(result(host, eager, inputs))
        expected.backward()
        gaussmask.detach(eager)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        assert difference(gradients_of(model), gradients_of(eager)) < 1e-3
    sets = {str(mask.sort().values.tolist()) for mask in masks}
    assert len(sets) == len(masks), "a fresh mask at every step"


# What only a GPU has


@contextlib.contextmanager
def nothing_may_wait(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize(("name", "stage"), with_stages(REPRESENTATIVE))
def test_nothing_waits_for_the_gpu(name, stage, device):
    host = ALL[name]
    model, inputs = moved(host.build(), device), moved(host.inputs(2), device)

    def step():
        loss_of(result(host, model, inputs)).backward()

    def without_waiting():
        with nothing_may_wait(device):
            step()

    step()
    alone_or_skip(without_waiting, "go without waiting")
    gaussmask.attach(model, GaussianPatchDropout(0.5), stage=stage)
    without_waiting()


@on_a_gpu
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.918])
@pytest.mark.parametrize("rule", ["random", "Gaussian", "weighted"])
def test_few_kernels(rule, mask_ratio, device):
    """At most 8 forward and 2 backward, and no copy between host and device. test_kept.py counts them on a CPU."""
    if device.type != "cuda":
        pytest.skip("only a GPU has kernels")
    drop = RULES[rule](mask_ratio, num_prefix_tokens=1)
    x = torch.randn(64, 197, 768, device=device, requires_grad=True)
    torch.autograd.grad(drop(x).sum(), x)

    def launches(call):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            returned = call()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
        assert not [name for name in names if "Memcpy HtoD" in name or "Memcpy DtoH" in name]
        return names, returned

    forward, out = launches(lambda: drop(x))
    gradient = torch.ones_like(out)
    backward, _ = launches(lambda: torch.autograd.grad(out, x, gradient))
    assert 0 < len(forward) <= 8, forward
    assert 0 < len(backward) <= 2, backward


def on_a_side_stream(action, device):
    """As torch's documentation has it, before a capture."""
    if device.type != "cuda":
        action()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(step, device):
    """What repeats a step, and where its loss lies afterwards: from a CUDA graph, or in a rehearsal by itself."""
    if device.type != "cuda":
        loss = torch.zeros(())
        return lambda: loss.copy_(step().detach()), loss
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


@on_a_gpu
@pytest.mark.parametrize(
    ("name", "stage"),
    with_stages(["timm-vit", "timm-beit", "timm-eva-pe", "transformers-CLIPModel", "open_clip-tower"]),
)
def test_a_whole_step_in_a_cuda_graph(name, stage, device):
    """Forward, backward and optimizer, with a fresh mask at every replay, as the same steps without a graph."""
    host = ALL[name]
    model, inputs = moved(host.build(), device), moved(host.inputs(2), device)
    randomise(model)
    optimizers = {}

    def step(model):
        if model not in optimizers:
            optimizers[model] = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = loss_of(result(host, model, inputs))
        loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)
        return loss

    def three_steps():
        for _ in range(3):
            step(model)

    def without_waiting():
        on_a_side_stream(three_steps, device)
        with nothing_may_wait(device):
            step(model)

    alone_or_skip(without_waiting, "be captured")
    drop = GaussianPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    on_a_side_stream(three_steps, device)
    replay, static_loss = captured(lambda: step(model), device)
    eager, masks = gaussmask.detach(copy.deepcopy(model)), []
    for _ in range(4):
        replay()
        masks.append(drop.keep_indices.clone())
        gaussmask.attach(eager, given(masks[-1], host.count), stage=stage)
        expected = step(eager)
        gaussmask.detach(eager)
        torch.testing.assert_close(static_loss, expected, rtol=1e-3, atol=1e-3)
    assert len({str(mask.sort().values.tolist()) for mask in masks}) == len(masks)
    for parameter, reference in zip(model.parameters(), eager.parameters(), strict=True):
        assert difference(parameter, reference) < 1e-3


# What a CPU can tell of a GPU: tensors that are none, with the device of one


PROBE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    weight = torch.empty(4, 3, 4, 4, device="cuda", requires_grad=True)
    torch.nn.functional.conv2d(torch.empty(1, 3, 8, 8, device="cuda"), weight)
"""


@pytest.fixture(scope="session")
def fake_gpu():
    """In a process of its own, for torch 2.6 asks the GPU itself how to convolve, and aborts where there is none."""
    if subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=False).returncode:
        pytest.skip(f"torch {torch.__version__} cannot do without a GPU here")


RULES_THERE = {**RULES, "cluster": gaussmask.ClusterPatchDropout}


@pytest.mark.parametrize(
    ("name", "stage", "rule"),
    [
        *((name, stage, "Gaussian") for name, stage in with_stages(REPRESENTATIVE)),
        *(
            (name, stage, rule)
            for name, stage in with_stages(["timm-vit", "transformers-YolosModel"])
            for rule in RULES_THERE
        ),
    ],
)
def test_a_forward_mixes_no_devices_and_reads_no_values(name, stage, rule, fake_gpu):
    host = ALL[name]
    model, inputs = host.build(), host.inputs(2)

    def forward(model):
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for table in (module._parameters, module._buffers):
                    table.update({key: on_a_fake_gpu(value) for key, value in table.items() if value is not None})
            try:
                return result(host, model, {name: on_a_fake_gpu(value) for name, value in inputs.items()})
            finally:
                forget_what_classes_keep(model)

    gaussmask.attach(model, RULES_THERE[rule](0.5), stage=stage)
    try:
        output = forward(model)
    except Exception:
        alone_or_skip(lambda: forward(host.build()), "go without reading values")
        raise
    assert output.device.type == "cuda"
    assert gaussmask.attached(model).keep_indices.device.type == "cuda"


def forget_what_classes_keep(model):
    """transformers' Beit has an lru_cache of its position index: the next model of the process would get fake ones."""
    for module in model.modules():
        for attribute in vars(type(module)).values():
            for cell in getattr(getattr(attribute, "__func__", attribute), "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def on_a_fake_gpu(value):
    if isinstance(value, dict):
        return {name: on_a_fake_gpu(part) for name, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    fake = torch.empty_like(value, device="cuda")
    return torch.nn.Parameter(fake) if isinstance(value, torch.nn.Parameter) else fake
