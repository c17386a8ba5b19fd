"""Segments are as large as the limit lets them be, and end where little crosses."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from snpc.graph import ShapeFacts, infer_graph
from snpc.runtime.batches.partition import crossing_bytes, partition, weights_of
from snpc.runtime.execution.memory import session_bytes
from snpc.runtime.io import read_model
from tests.models.layouts import Llama, write_llama

LLAMA = Llama(layers=4, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=50, positions=64)
LAYER = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # bytes of its weights, in half precision and as floats


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, ShapeFacts]:
    model = read_model(write_llama(tmp_path_factory.mktemp("llama"), LLAMA))
    return model, infer_graph(model, {"batch": 2, "sequence": 8})


def test_a_layer_is_a_segment(llama: tuple[ir.Model, ShapeFacts]) -> None:
    """Each ends with the residual sum behind a layer; rotary tables and mask are carried along."""
    model, facts = llama
    segments = partition(model, facts, int(1.2 * LAYER))
    ends = [list(model.graph)[s.last - 1].outputs[0].name for s in segments]
    assert ends == [*(f"model.layers.{k}.second" for k in range(3)), "logits"]  # the head fits in too
    for segment in segments[1:]:
        assert set(segment.inputs) == {segment_input(segment.inputs), "cos", "sin", "mask"}


def segment_input(names: tuple[str, ...]) -> str:
    return next(name for name in names if name.endswith(".second"))


@pytest.mark.parametrize("share", [0.3, 0.7, 1.5, 2.6])
def test_no_segment_takes_more_than_the_limit(llama: tuple[ir.Model, ShapeFacts], share: float) -> None:
    """And all nodes are in one, in their order."""
    model, facts = llama
    limit = int(share * LAYER)
    segments = partition(model, facts, limit)
    nodes = list(model.graph)
    sizes = [session_bytes(weights_of(nodes[s.first : s.last])) for s in segments]
    assert max(sizes) <= limit
    assert sum(sizes) >= (len(sizes) - 1) * limit * 0.4  # and few segments serve
    assert [s.first for s in segments] == [0, *(s.last for s in segments[:-1])]
    assert segments[-1].last == len(nodes)


def test_spans_are_not_separated(llama: tuple[ir.Model, ShapeFacts]) -> None:
    model, facts = llama
    ends = {s.last for s in partition(model, facts, LAYER // 4)}
    middle = sorted(ends)[2]
    together = {s.last for s in partition(model, facts, LAYER // 4, [(middle - 1, middle)])}
    assert middle in ends
    assert middle not in together


def test_nothing_crosses_whose_type_is_unknown(llama: tuple[ir.Model, ShapeFacts]) -> None:
    model, facts = llama
    unknown = next(v for node in model.graph for v in node.outputs if v.name == "model.layers.1.second")
    types = {v: None if v is unknown else dtype for v, dtype in facts.dtype.items()}
    segments = partition(model, ShapeFacts(facts.shape, types), int(1.2 * LAYER))
    assert len(segments) > 3
    assert all("model.layers.1.second" not in s.inputs for s in segments)


def test_crossing_bytes_are_those_of_live_values(llama: tuple[ir.Model, ShapeFacts]) -> None:
    """At the end of a layer: the residual stream [2, 8, 64], two tables [8, 16] and the mask [8, 8], all halves."""
    model, facts = llama
    position = next(k for k, n in enumerate(model.graph) if n.outputs[0].name == "model.layers.1.second") + 1
    assert crossing_bytes(model, facts)[position] == 2 * (2 * 8 * 64 + 2 * 8 * 16 + 8 * 8)
    assert crossing_bytes(model, facts)[0] == 0
