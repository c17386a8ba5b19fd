"""Programs over batches: sums are those of numpy, values are kept, renamed and dropped as a program says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from snpc.graph import make_node
from snpc.runtime.batches import BatchProgram, LocalBatchValues
from snpc.runtime.execution import Execution

BATCHES = [np.random.default_rng(k).normal(size=(2, 3)).astype(np.float32) for k in range(5)]


def doubling() -> ir.Model:
    """y = x + x."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 3]))
    node = make_node("Add", [x, x], name="twice", outputs=["y"])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


@pytest.mark.parametrize("limit", [None, 1])
def test_a_program_adds_up_keeps_and_drops(limit: int | None) -> None:
    values = LocalBatchValues(({"x": x, "rest": x} for x in BATCHES), Execution(memory_limit=limit))
    sums = values.run(BatchProgram(doubling(), ("y",), {"y": "z"}, live=frozenset({"z", "rest"})))
    assert [set(batch) for batch in values.batches] == [{"z", "rest"}] * len(BATCHES)
    for batch, x in zip(values.batches, BATCHES, strict=True):
        np.testing.assert_array_equal(batch["z"], 2 * x)
    exact = [2 * x.astype(np.float64) for x in BATCHES]
    np.testing.assert_allclose(sums.even["y"], exact[0] + exact[2] + exact[4], rtol=1e-15)
    np.testing.assert_allclose(sums.odd["y"], exact[1] + exact[3], rtol=1e-15)
    np.testing.assert_allclose(sums.total("y"), sum(exact), rtol=1e-15)


def test_one_batch_has_no_odd_half() -> None:
    sums = LocalBatchValues([{"x": BATCHES[0]}]).run(BatchProgram(doubling(), ("y",)))
    assert not sums.odd
    np.testing.assert_array_equal(sums.total("y"), 2 * BATCHES[0].astype(np.float64))
