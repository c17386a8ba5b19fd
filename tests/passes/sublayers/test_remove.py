"""A graph without some sublayers says what the whole graph says in which their outputs are replaced in place."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import snpc
from snpc.errors import UserError
from snpc.passes import cost_without, remove_sublayers
from snpc.passes.sublayers import Substitute, TokenMap, maps_tokens, switch_name, with_switches
from snpc.runtime.execution import temporary_session
from snpc.types import FloatArray
from tests.models.residual import WIDTH, linear_layers, random_weights, residual_model
from tests.oracle import analysis_of, feeds_of

FAMILIES = ("bert__ts17", "gpt2__dyn20_sdpa", "llama__ts17", "vit_timm__ts17", "swin_timm__ts17", "bart__ts17")


def largest_difference(analysis: snpc.Analysis, feeds: dict[str, FloatArray], names: list[str]) -> float:
    """Between the graph without these sublayers and the oracle; a constant stands for every second one, or a map of its
    tokens where it can."""
    substitutes = {name: substitute_of(analysis, name) for name in names[::2]}
    without = remove_sublayers(analysis, names, substitutes)
    assert without.removal is not None and set(without.removal.names) == set(names)
    off = {switch_name(name): np.array(False) for name in names}
    switched = with_switches(analysis.traced_graph, without.removal.sublayers, substitutes)
    with temporary_session(switched, optimization="basic") as run:
        expected = run({**feeds, **off})
        whole = run({**feeds, **{name: np.array(True) for name in off}})
    with temporary_session(without.traced_graph.model.clone(), optimization="basic") as run:
        found = run(feeds)
    assert any(not np.allclose(expected[name], whole[name]) for name in found)  # it does change something
    return max(float(np.abs(expected[name] - found[name]).max()) for name in found)


def substitute_of(analysis: snpc.Analysis, name: str) -> Substitute:
    shapes = analysis.traced_graph.facts.shapes_by_name
    sublayer = next(s for s in analysis.sublayers if s.name == name)
    added, read = shapes[sublayer.branch], shapes[sublayer.read]
    constant, rng = np.full(added[-1], 0.25), np.random.default_rng(0)
    if not maps_tokens(read, added):
        return Substitute(constant)
    matrices = (rng.normal(size=shape) for shape in ((read[-1], 3), (3, added[-1]), (2, read[-1], 3)))
    return Substitute(constant, TokenMap(sublayer.read, *matrices))


@pytest.mark.parametrize("name", FAMILIES)
def test_removal_equals_replacement_in_place(name: str) -> None:
    analysis, rng = analysis_of(name), np.random.default_rng(0)
    sublayers = [s.name for s in analysis.sublayers]
    for count in (1, len(sublayers) // 2, len(sublayers)):
        gone = [str(n) for n in rng.choice(sublayers, count, replace=False)]
        assert largest_difference(analysis, feeds_of(name), gone) < 1e-5


@pytest.mark.parametrize("gone", [["0"], ["1"], ["0", "2"], ["1", "2"], ["0", "1", "2"]])
def test_parallel_layers_go_one_by_one(gone: list[str]) -> None:
    """Whichever goes, the rest of the sum stays; the last output may be the input itself."""
    weights = list(random_weights(3).values())
    analysis = snpc.analyze(snpc.load(linear_layers(weights)))
    by_branch = {s.branch: s.name for s in analysis.sublayers}
    without = remove_sublayers(analysis, [by_branch[f"b{k}"] for k in gone])
    x = np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32)
    with temporary_session(without.traced_graph.model.clone()) as run:
        found = run({"x": x})["y"]
    kept = [matrix for k, matrix in enumerate(weights) if str(k) not in gone]
    np.testing.assert_allclose(found, x + sum((x @ matrix for matrix in kept), np.zeros_like(x)), atol=1e-5)


def test_cost_is_that_of_the_graph_without() -> None:
    analysis = analysis_of("vit_timm__ts17")
    names = [s.name for s in analysis.sublayers if "blocks.1" in s.name]
    without = remove_sublayers(analysis, names)
    cost = cost_without(analysis, names)
    assert cost.macs == analysis.cost.macs - without.saved_before("macs")
    assert analysis.cost.params - cost.params == without.saved_before("params") > 0
    assert without.digest != analysis.digest


def test_the_stream_in_front_stands_for_the_sum_behind() -> None:
    """Two layers one after the other: in front of both, the value stands for the sum behind both."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "w0"], ["b0"], "/l0/MatMul"),
        helper.make_node("Add", ["r", "b0"], ["s0"]),
        helper.make_node("MatMul", ["s0", "w1"], ["b1"], "/l1/MatMul"),
        helper.make_node("Add", ["s0", "b1"], ["s1"]),
        helper.make_node("MatMul", ["s1", "w2"], ["b2"], "/l2/MatMul"),
        helper.make_node("Add", ["s1", "b2"], ["y"]),
    ]
    analysis = snpc.analyze(snpc.load(residual_model(nodes, random_weights(3))))
    first, second, _ = (s.name for s in analysis.sublayers)
    for constants, end, added in (
        ({}, "s1", None),
        ({first: Substitute(np.ones(WIDTH))}, "s1", 1.0),
        ({first: Substitute(np.ones(WIDTH)), second: Substitute(2 * np.ones(WIDTH))}, "s1", 3.0),
    ):
        removal = remove_sublayers(analysis, [first, second], constants).removal
        assert removal is not None
        found = removal.stands_for("r")
        assert found.summed == end
        assert found.added is None if added is None else np.all(found.added == added)
        assert removal.stands_for("y").summed == "y"


def test_what_cannot_go_is_refused() -> None:
    analysis = analysis_of("t5__ts17")
    with pytest.raises(UserError, match="has no layer 'none'; `snpc inspect` lists them"):
        remove_sublayers(analysis, ["none"])
    with pytest.raises(UserError, match=r"cannot go: .* is computed inside it and read outside"):
        remove_sublayers(analysis, [analysis.sublayers[0].name])
    bert = analysis_of("bert__ts17")
    with pytest.raises(UserError, match=r"3 numbers stand for .*, not 48"):
        remove_sublayers(bert, [bert.sublayers[0].name], {bert.sublayers[0].name: Substitute(np.ones(3))})
    narrow = Substitute(np.ones(48), TokenMap(bert.sublayers[0].read, np.ones((3, 2)), np.ones((2, 48))))
    with pytest.raises(UserError, match=r"the map that stands for .* does not fit"):
        remove_sublayers(bert, [bert.sublayers[0].name], {bert.sublayers[0].name: narrow})
