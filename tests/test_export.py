"""Exported in eval mode, an attached model is the never-attached one: graph, names, weights, outputs, and ONNX."""

import copy
import pkgutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hosts import ALL, result
from onnx.reference import ReferenceEvaluator
from torch.utils._pytree import tree_leaves

import gaussmask

# torch's own, where it writes a graph
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:(torch|onnx|copyreg)", "ignore::FutureWarning:torch"
)


def attach_and_train(plain, host, stage):
    """A copy that has done a training step with a drop, and is in eval mode again."""
    model = gaussmask.attach(copy.deepcopy(plain), gaussmask.GaussianPatchDropout(0.5), stage=stage).train()
    result(host, model, host.inputs(2)).sum().backward()
    assert gaussmask.attached(model).keep_indices is not None
    model.zero_grad()
    return model.eval()


def export(model, inputs, strict=False):
    batch = {name: {0: torch.export.Dim("batch", max=4096)} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes=batch, strict=strict)


def graph(program):
    """Every node: what it calls, its name, its arguments and the modules that it is from; and what goes in and out."""
    nodes = [
        (node.op, str(node.target), node.name, str(node.args), [*node.meta.get("nn_module_stack", {}).values()])
        for node in program.graph.nodes
    ]
    return nodes, str(program.graph_signature), list(program.state_dict), str(program.range_constraints)


def traces(text):
    """The modules and files of gaussmask that `text` names; the checkout itself may lie in a folder of that name."""
    names = [module.name for module in pkgutil.iter_modules(gaussmask.__path__, "gaussmask.")]
    return [name for name in (*names, str(Path(gaussmask.__file__).parent)) if name in text]


def outputs(program, inputs):
    return [leaf for leaf in tree_leaves(program.module()(**inputs)) if leaf is not None]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # the grid that a hook sees
@pytest.mark.parametrize(
    ("name", "stages", "strict"),
    [
        ("timm-vit", ["tokens"], True),
        ("timm-vit", ["tokens", "pixels"], False),
        ("transformers-ViTModel", ["tokens"], False),
        ("transformers-CLIPVisionModel", ["tokens", "pixels"], False),
        ("open_clip-tower", ["tokens", "pixels"], False),
    ],
)
def test_nothing_of_gaussmask_is_in_an_exported_graph(name, stages, strict):
    host = ALL[name]
    plain = host.build().eval()
    expected = export(plain, host.inputs(3), strict)
    for stage in stages:
        program = export(attach_and_train(plain, host, stage), host.inputs(3), strict)
        assert graph(program) == graph(expected)
        assert not traces(str(program) + str([node.meta for node in program.graph.nodes]))
        inputs = host.inputs(2)
        for actual, leaf in zip(outputs(program, inputs), outputs(expected, inputs), strict=True):
            torch.testing.assert_close(actual, leaf, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The tensor attribute .*keep_indices was assigned during export")  # is no output
@pytest.mark.parametrize(
    ("name", "stage"),
    [("timm-vit", "pixels"), ("transformers-CLIPVisionModel", "tokens")],
)
def test_masked_inference_exports_with_the_draw_in_it(name, stage):
    """So that the test above would see a drop. Each call of the program draws anew, for a batch of any size."""
    host, drop = ALL[name], gaussmask.GaussianPatchDropout(0.5)
    model = gaussmask.attach(host.build().eval(), drop, stage=stage)
    drop.train()
    program = export(model, host.inputs(3))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    calls = [str(node.target) for graph in graphs for node in graph.nodes]
    assert [sum(call.startswith(f"aten.{op}.") for call in calls) for op in ("rand", "topk")] == [1, 1]
    named = traces(str([node.meta for graph in graphs for node in graph.nodes]))
    assert bool(named) == name.startswith("timm"), "a seam that is a module is what the test above looks for"
    inputs = host.inputs(5)
    torch.manual_seed(3)
    actual = outputs(program, inputs)[0]
    torch.manual_seed(3)
    expected = tree_leaves(model(**inputs))[0]
    assert drop.keep_indices.shape == (5, 18)
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(actual, outputs(program, inputs)[0])


@pytest.mark.parametrize(("name", "stage"), [("timm-vit", "tokens"), ("open_clip-tower", "pixels")])
def test_onnx_of_an_attached_model_is_that_of_the_plain_one(name, stage):
    host = ALL[name]
    plain, inputs = host.build().eval(), host.inputs(2)
    expected, proto = (
        torch.onnx.export(model, kwargs=inputs, dynamo=True, verbose=False).model_proto
        for model in (plain, attach_and_train(plain, host, stage))
    )
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == [node.op_type for node in expected.graph.node]
    assert proto.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert not traces(proto.SerializeToString().decode("latin-1"))
    with torch.no_grad():
        hidden = tree_leaves(plain(**inputs))[0].numpy()
    feeds = {key: value.numpy() for key, value in inputs.items()}
    np.testing.assert_allclose(ReferenceEvaluator(proto).run(None, feeds)[0], hidden, rtol=1e-4, atol=1e-5)
