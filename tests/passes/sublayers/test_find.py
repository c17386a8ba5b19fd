"""Sublayers are found in every family of models, whoever exported it, and nothing else is taken for one."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from onnx import helper

from snpc.graph import choose_dim_sizes
from snpc.passes.sublayers import SublayerGraph
from snpc.runtime.io.load import load
from snpc.types import Sublayer
from tests.models.residual import random_weights, residual_model
from tests.oracle import analysis_of

# Two blocks each, but where more is said.
KINDS = {
    "bert__ts17": "attention feed-forward attention feed-forward",
    "bert__dyn20": "attention feed-forward attention feed-forward",
    "gpt2__dyn20_sdpa": "attention feed-forward attention feed-forward",
    "llama__dyn20_sdpa": "attention feed-forward attention feed-forward",
    "llama__ts17": "attention feed-forward attention feed-forward",
    "vit_timm__ts17": "attention feed-forward attention feed-forward",
    "vit_timm_layerscale__dyn20_sdpa": "attention feed-forward attention feed-forward",
    "bart__ts17": "attention feed-forward attention feed-forward " + 2 * "attention attention feed-forward ",
    "swin_timm__ts17": 4 * "attention feed-forward ",
    "convnet__ts17": "convolution",
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_a_family_are_found(name: str) -> None:
    sublayers = analysis_of(name).sublayers
    assert [s.kind for s in sublayers] == KINDS[name].split()
    assert all(s.removable for s in sublayers), [s.reason for s in sublayers]
    assert len({s.name for s in sublayers}) == len(sublayers)


@pytest.mark.slow
def test_parallel_layers_read_the_same_stream() -> None:
    sublayers = analysis_of("phi__ts17").sublayers
    assert Counter(s.kind for s in sublayers) == {"attention": 2, "feed-forward": 2}
    streams = Counter(s.stream for s in sublayers)
    assert set(streams.values()) == {2}
    assert all(s.removable for s in sublayers)


def test_what_is_read_elsewhere_cannot_go() -> None:
    """The first attention of a T5 computes the position bias of all, through the shape of its keys."""
    first = analysis_of("t5__ts17").sublayers[0]
    assert "SelfAttention" in first.name
    assert "read outside" in first.reason


def test_costs_are_those_of_the_nodes_that_go() -> None:
    analysis = analysis_of("bert__ts17")
    names = [s.name for s in analysis.sublayers]
    macs, params = analysis.sublayer_graph.savings(names)
    assert macs == sum(s.macs for s in analysis.sublayers) == analysis.cost.macs  # it ends behind the last layer
    own = sum(s.params for s in analysis.sublayers)
    assert own <= params < analysis.cost.params  # layers may share a number


# -- graphs that show one thing --------------------------------------------------------------------------------------


def sublayers_of(nodes: list[onnx.NodeProto], weights: int, outputs: tuple[str, ...] = ("y",)) -> list[Sublayer]:
    model = load(residual_model(nodes, random_weights(weights), outputs)).graph
    return list(SublayerGraph(model, choose_dim_sizes(model)[1]).sublayers)


def test_an_activation_function_is_no_layer() -> None:
    """x + x^3 is a sum of a value and of what is computed from it, but no weight lies between."""
    found = sublayers_of(
        [
            helper.make_node("MatMul", ["x", "w0"], ["h"]),
            helper.make_node("Mul", ["h", "h"], ["square"]),
            helper.make_node("Mul", ["h", "square"], ["cube"]),
            helper.make_node("Add", ["h", "cube"], ["a"]),
            helper.make_node("MatMul", ["a", "w1"], ["b"]),
            helper.make_node("Add", ["b", "x"], ["y"]),
        ],
        2,
    )
    assert [(s.stream, s.branch, s.summed) for s in found] == [("x", "b", "y")]


def test_a_layer_whose_inside_is_an_output_cannot_go() -> None:
    (found,) = sublayers_of(
        [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("Add", ["x", "h"], ["y"])], 1, ("y", "h")
    )
    assert found.reason == "its h is an output of the model"


def test_a_layer_around_layers_cannot_go() -> None:
    """A skip over two layers, as in a U-shaped model."""
    found = sublayers_of(
        [
            helper.make_node("MatMul", ["x", "w0"], ["s0"]),
            helper.make_node("MatMul", ["s0", "w1"], ["b1"]),
            helper.make_node("Add", ["s0", "b1"], ["s1"]),
            helper.make_node("MatMul", ["s1", "w2"], ["b2"]),
            helper.make_node("Add", ["s1", "b2"], ["s2"]),
            helper.make_node("Mul", ["s2", "s2"], ["h"]),
            helper.make_node("Add", ["x", "h"], ["y"]),
        ],
        3,
    )
    assert [(s.branch, s.reason) for s in found] == [("b1", ""), ("b2", ""), ("h", "other layers lie inside it")]
