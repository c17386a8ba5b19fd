"""Single nodes are evaluated in the opset that they are written in."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from snpc.ops import evaluate_node

AXES_ATTRIBUTE, AXES_INPUT = (1, 9, 11, 12), (13, 17)


@pytest.mark.parametrize("version", (*AXES_ATTRIBUTE, *AXES_INPUT))
@pytest.mark.parametrize("operator", ["Squeeze", "Unsqueeze", "ReduceSum"])
def test_axes_are_attributes_in_old_opsets(operator: str, version: int) -> None:
    data = np.arange(3.0).reshape(1, 3)
    if version in AXES_ATTRIBUTE:
        node, feeds = helper.make_node(operator, ["x"], ["y"], axes=[0]), {"x": data}
    else:
        node, feeds = helper.make_node(operator, ["x", "axes"], ["y"]), {"x": data, "axes": np.asarray([0])}
    (result,) = evaluate_node(node, feeds, version)
    expected = {"Squeeze": data[0], "Unsqueeze": data[None], "ReduceSum": data.sum(0, keepdims=True)}[operator]
    assert result.shape == expected.shape
    assert (result == expected).all()


def test_bounds_of_a_slice_are_attributes_below_opset_10() -> None:
    data = np.arange(10)
    old = evaluate_node(helper.make_node("Slice", ["x"], ["y"], starts=[2], ends=[5]), {"x": data}, 9)
    bounds = {"x": data, "starts": np.asarray([2]), "ends": np.asarray([5])}
    new = evaluate_node(helper.make_node("Slice", list(bounds), ["y"]), bounds, 10)
    assert old[0].tolist() == new[0].tolist() == [2, 3, 4]
