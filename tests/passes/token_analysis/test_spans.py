"""Where tokens can be merged if all have to be back: exits, and why there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from tests.models.encoders import Encoder

DENSE = Encoder(exit="all")


@pytest.mark.parametrize(
    ("encoder", "exits", "reason"),
    [
        # what block 1 gives is read in front of block 4: it has all tokens there, and block 4 starts anew
        (Encoder(exit="all", skip=True), {1: [1], 2: [2, 3], 3: [3], 4: [4]}, ""),
        # attention with a table of pairs, or with positions of its own, works on all tokens: feed-forward layers remain
        (Encoder(exit="all", bias=True), {k: [k] for k in (1, 2, 3, 4)}, ""),
        (Encoder(exit="all", again=True), {k: [k] for k in (1, 2, 3, 4)}, ""),
        (Encoder(exit="all", mixing=True), {1: [1, 2, 3], 2: [2, 3], 3: [3]}, "mixes tokens by position"),
        (Encoder(mixing=True), {1: [1, 2, 3], 2: [2, 3], 3: [3]}, ""),
        # the last token, or the largest of all, is known when all tokens are
        (Encoder(exit="last"), {1: [1, 2, 3, 4], 2: [2, 3, 4], 3: [3, 4], 4: [4]}, ""),
        (Encoder(exit="max"), {1: [1, 2, 3, 4], 2: [2, 3, 4], 3: [3, 4], 4: [4]}, ""),
    ],
)
def test_tokens_are_back_where_all_are_read(
    encoder: Encoder, exits: dict[int, list[int]], reason: str, tmp_path: Path
) -> None:
    onnx.save(encoder.model(), tmp_path / "encoder.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx")).tokens
    assert {p.block: [e.block for e in p.exits] for p in found.points} == exits
    assert [reason in pin.reason for pin in found.pins] == ([True] if reason else [])


def test_a_stream_that_is_returned_halfway_has_all_tokens_there(tmp_path: Path) -> None:
    model = DENSE.model()
    sums = [n.output[0] for n in model.graph.node if n.op_type == "Add"]
    streams = [name for name in sums if sum(name in n.input for n in model.graph.node) == 2]
    dense = model.graph.output[0]
    halfway = onnx.helper.make_tensor_value_info(streams[4], onnx.TensorProto.FLOAT, ["n", DENSE.tokens, DENSE.width])
    model.graph.output.extend([halfway])
    onnx.save(model, tmp_path / "encoder.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx")).tokens
    assert dense.name == "y"
    assert {p.block: [e.block for e in p.exits] for p in found.points} == {1: [1, 2], 2: [2], 3: [3, 4], 4: [4]}


def test_words_are_not_merged(tmp_path: Path) -> None:
    """A decoder of a fixed length would see the words that follow."""
    model = DENSE.model()
    table = np.random.default_rng(0).standard_normal((9, DENSE.width)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "embedding"))
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["embedding", "ids"], ["x"], name="embed"))
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", 12]))
    onnx.save(model, tmp_path / "text.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "text.onnx")).tokens
    assert not found.points and "tokens are those of a text" in found.pins[0].reason
