"""Segments of graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from snpc.graph.subgraph import split_into_segments
from snpc.runtime.io.load import load
from tests.command_line import write_tiny


def test_a_weight_that_is_an_output_lives_in_no_segment(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("fc1.bias", 1, [32]))
    onnx.save(model, path)
    first, second = split_into_segments(load(path).graph, [2])
    assert (first.outputs, second.inputs) == (("b",), ("b",))
    assert first.live_values == {"b"}
    assert second.outputs == ("y",)
