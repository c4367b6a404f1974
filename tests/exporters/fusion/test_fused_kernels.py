"""Grafts as chains of nodes compute what their functions do; every node through its kernel's reference
implementation."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from exporters.fusion.fused_kernels import FusedKernels
from exporters.fusion.node import KernelNode
from exporters.tensorrt.plugins.variants import largest, variant_specs_for
from exporters.tensorrt.profiles import Profile, Range
from exporters.tensorrt.rewrites import InlineFunctions, rewrite
from graft_graphs import inputs_of, model_of
from surgeon.memory.visibility import Visibility

PROFILE = Profile(name="any", sizes={"B": Range.of(1, 4), "S": Range.of(1, 5), "M": Range.of(1, 1024)})


def fused(model: ir.Model) -> FusedKernels:
    attributes = {"plugin_version": "1", "plugin_namespace": "surgeon"}
    fusion = FusedKernels(variant_specs_for([PROFILE]), largest([PROFILE]), attributes=attributes)
    fusion(model)
    return fusion


def operator_of(name: str, plugin: KernelNode) -> type[OpRun]:
    """A plugin's node for onnx.reference."""
    kernel, step = plugin.step.kernel, plugin.step
    there = [each for each in kernel.inputs if each in plugin.variants[0].launch.inputs]

    class Operator(OpRun):
        op_domain = "surgeon"

        def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            assert attributes == {"plugin_version": "1", "plugin_namespace": "surgeon"}
            tensors = dict(zip(there, map(torch.tensor, inputs), strict=True))
            outputs = kernel.definition(*(tensors.get(each) for each in kernel.inputs), **step.options)
            return tuple(each.numpy() for each in outputs)

    Operator.__name__ = name
    return Operator


def evaluate(model: ir.Model, feeds: dict[str, np.ndarray], plugins: dict[str, KernelNode] | None = None) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, check_custom_domain=False)
    operators = [operator_of(*each) for each in (plugins or {}).items()]
    inputs = {value.name: feeds[value.name] for value in proto.graph.input}
    output: np.ndarray = ReferenceEvaluator(proto, new_ops=operators).run(None, inputs)[0]
    return output


@pytest.mark.parametrize("visibility", ["all", "causal"])
@pytest.mark.parametrize(
    ("kind", "added"), [("pvm", ""), ("pvm", "first"), ("pvm", "last"), ("mixin", ""), ("mixin", "first")]
)
def test_a_chain_computes_what_its_function_does(kind: str, added: str, visibility: Visibility) -> None:
    before, after = (model_of(kind, added, visibility=visibility) for _ in range(2))
    rewritten = fused(after)
    (function,) = before.functions
    assert rewritten.replaced == 1 and rewritten.functions == {function[1]: 1}
    kinds = [node.op_type for node in after.graph]
    assert kinds == list(rewritten.nodes) + ["Add"] * (kind == "mixin" and added != "")
    assert not after.functions
    for length in (1, 5):
        feeds = inputs_of(kind, length, visibility=visibility)
        want, got = evaluate(before, feeds), evaluate(after, feeds, rewritten.nodes)
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-5
        # tokens with an empty memory stay as they are, in rows that have one too
        nothing = (feeds["stream"] if added else 0.0) + (feeds["hidden_states"] if kind == "mixin" else 0.0 * got)
        sees = np.broadcast_to(feeds["memory_mask"].any(-1).reshape(4, -1), (4, length))
        assert (got[~sees] == nothing[~sees]).all() and np.abs(got[:2] - nothing[:2]).max() > 0.1
        assert not sees[2].any() and sees[0, 0] == (visibility == "all" or length == 1)


def test_what_is_read_elsewhere_is_not_added_by_the_chain() -> None:
    model = model_of("pvm", added="first")
    (old,) = [node.outputs[0] for node in model.graph if node.domain == "surgeon"]
    model.graph.outputs.append(old)
    feeds, before = inputs_of("pvm", 2), ir.from_proto(ir.to_proto(model))
    rewritten = fused(model)
    assert [node.op_type for node in model.graph][-1] == "Add"
    assert [str(value.name) for value in model.graph.outputs] == ["sum", str(before.graph.outputs[1].name)]
    assert np.abs(evaluate(model, feeds, rewritten.nodes) - evaluate(before, feeds)).max() < 1e-5


@pytest.mark.parametrize("head_dim", [16, 48])
def test_what_the_kernels_do_not_take_stays_and_is_told(head_dim: int) -> None:
    model = model_of("pvm", head_dim=head_dim)
    with pytest.warns(UserWarning, match=f"head_dim {head_dim}.*standard operators stay") as warned:
        rewritten = fused(model)
    assert len(warned) == 1
    assert rewritten.replaced == 0 and not rewritten.nodes and len(model.functions) == 1
    with warnings.catch_warnings(action="ignore"):
        counts = rewrite(model, [FusedKernels(variant_specs_for([PROFILE]), largest([PROFILE]))])
    assert counts["FusedKernels"] == 0 and counts["InlineFunctions"] == 1


def test_what_is_fused_is_left_by_the_other_rewrites() -> None:
    model = model_of("pvm")
    counts = rewrite(model, [FusedKernels(variant_specs_for([PROFILE]), largest([PROFILE]))])
    assert list(counts)[0] == "FusedKernels" and counts["FusedKernels"] == 1 and counts["InlineFunctions"] == 0
    assert {node.domain for node in model.graph} == {"surgeon"} and model.graph.opset_imports["surgeon"] == 1


@pytest.fixture
def twins() -> Iterator[tuple[ir.Model, FusedKernels]]:
    """A model with the same graft three times, the last of them with another eps."""
    model = model_of("pvm")
    (node,) = model.graph
    for eps in (node.attributes.get_float("eps"), 1e-3):
        like = node.outputs[0]
        output = ir.Value(name=f"out_{eps}", shape=like.shape, type=like.type)
        attributes = {"eps": eps}
        again = ir.node(
            node.op_type, list(node.inputs), attributes, domain=node.domain, outputs=[output], name=str(eps)
        )
        model.graph.append(again)
        model.graph.outputs.append(output)
    yield model, fused(model)


def test_layers_that_are_alike_share_their_plugins(twins: tuple[ir.Model, FusedKernels]) -> None:
    model, rewritten = twins
    names = [node.op_type for node in model.graph]
    assert rewritten.replaced == 3
    steps = ["pvm_text", "pvm_attend", "pvm_retrieve", "pvm_swiglu", "pvm_down", "pvm_inject"]
    assert names[:6] == names[6:12] == steps
    # those without an eps are still alike
    assert names[12:] == ["pvm_text", "pvm_attend_2", "pvm_retrieve", "pvm_swiglu_2", "pvm_down", "pvm_inject_2"]
    assert len({node.name for node in model.graph}) == 18


def test_inlining_first_would_leave_nothing_to_fuse() -> None:
    model = model_of("mixin")
    InlineFunctions()(model)
    assert fused(model).replaced == 0


def test_what_is_spread_over_the_result_is_not_added_by_the_chain() -> None:
    """A launch reads its residual in the result's own shape."""
    model = model_of("pvm", added="first")
    (stream,) = [value for value in model.graph.inputs if value.name == "stream"]
    assert stream.shape is not None
    stream.shape = ir.Shape(stream.shape[2:])
    feeds, before = inputs_of("pvm", 2), ir.from_proto(ir.to_proto(model))
    feeds["stream"] = feeds["stream"][0, 0]
    rewritten = fused(model)
    assert [node.op_type for node in model.graph][-1] == "Add"
    assert np.abs(evaluate(model, feeds, rewritten.nodes) - evaluate(before, feeds)).max() < 1e-5
