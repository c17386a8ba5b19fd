"""Single nodes: evaluated in the opset that they are written in, and remembered by all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import pytest
from onnx import defs, helper

from snpc.ops import (
    InferenceContext,
    KnownTensor,
    evaluate_node,
    evaluate_single,
    infer_single,
    known_content,
    single_node,
)
from snpc.types import AnyArray

CONTEXT = InferenceContext(17, (("", 17),), 8)
ROWS = np.arange(6).reshape(2, 3)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    single_node.EVALUATED.results.clear()
    single_node.INFERRED.results.clear()
    yield


def node_of(operator: str, inputs: int = 1, *attributes: ir.Attr, prefix: str = "a") -> ir.Node:
    names = [f"{prefix}{index}" for index in range(inputs)]
    node = ir.Node("", operator, [ir.Value(name=name) for name in names], attributes, num_outputs=1)
    node.outputs[0].name = f"{prefix}_out"
    return node


def transpose(*perm: int, prefix: str = "a") -> ir.Node:
    return node_of("Transpose", 1, ir.AttrInt64s("perm", perm), prefix=prefix)


def inferred(node: ir.Node, *inputs: KnownTensor | None, context: InferenceContext = CONTEXT) -> KnownTensor | None:
    schema = defs.get_schema(node.op_type, context.version, "")
    return infer_single(node, inputs, schema, context)[0]


def test_names_do_not_matter() -> None:
    for prefix in ("a", "b"):
        (result,) = evaluate_single(transpose(1, 0, prefix=prefix), [ROWS], 17)
        np.testing.assert_array_equal(result, ROWS.T)
        found = inferred(transpose(1, 0, prefix=prefix), KnownTensor(ir.DataType.FLOAT, (2, 3)))
        assert found == KnownTensor(ir.DataType.FLOAT, (3, 2))
    assert len(single_node.EVALUATED.results) == len(single_node.INFERRED.results) == 1


@pytest.mark.parametrize(
    ("node", "inputs", "version", "expected"),
    [
        (transpose(0, 1), [ROWS], 17, ROWS),
        (transpose(1, 0), [ROWS + 1], 17, ROWS.T + 1),
        (transpose(1, 0), [ROWS.astype(np.float32)], 17, ROWS.T.astype(np.float32)),
        (transpose(1, 0), [ROWS.reshape(3, 2)], 17, ROWS.reshape(3, 2).T),
        (node_of("Neg"), [ROWS], 17, -ROWS),
    ],
    ids=["attribute", "content", "type", "shape", "operator"],
)
def test_all_else_does(node: ir.Node, inputs: list[AnyArray], version: int, expected: AnyArray) -> None:
    evaluate_single(transpose(1, 0), [ROWS], 17)
    (result,) = evaluate_single(node, inputs, version)
    np.testing.assert_array_equal(result, expected, strict=True)


def test_the_opset_does() -> None:
    """From opset 13 on, Squeeze takes its axes as an input."""
    inputs = [np.ones((1, 3), np.float32), np.array([0])]
    (result,) = evaluate_single(node_of("Squeeze", 2), inputs, 13)
    assert result.shape == (3,)
    (result,) = evaluate_single(node_of("Squeeze", 1, ir.AttrInt64s("axes", [0])), inputs[:1], 11)
    assert result.shape == (3,)


def test_shapes_follow_from_contents() -> None:
    data = KnownTensor(ir.DataType.FLOAT, (2, 6))
    for sizes in ([3, 4], [12, 1]):
        array = np.array(sizes)
        shape = KnownTensor(ir.DataType.INT64, array.shape, known_content(array))
        assert inferred(node_of("Reshape", 2), data, shape) == KnownTensor(ir.DataType.FLOAT, tuple(sizes))
    unknown = inferred(node_of("Reshape", 2), data, KnownTensor(ir.DataType.INT64, (2,)))
    assert unknown is not None and unknown.shape is None


def test_what_is_done_to_a_result_changes_no_later_one() -> None:
    for _ in range(2):
        (result,) = evaluate_single(transpose(1, 0), [ROWS], 17)
        np.testing.assert_array_equal(result, ROWS.T)
        result += 1


def large_input() -> None:
    evaluate_single(node_of("Neg"), [np.arange(single_node.MOST_ENTRIES + 1)], 17)


def large_output() -> None:
    evaluate_single(node_of("Expand", 2), [np.array(1), np.array([single_node.MOST_ENTRIES + 1])], 17)


def tensor_attribute() -> None:
    value = ir.AttrTensor("value", ir.tensor(np.array([7])))
    (result,) = evaluate_single(node_of("ConstantOfShape", 1, value), [np.array([2])], 17)
    np.testing.assert_array_equal(result, [7, 7])


@pytest.mark.parametrize("run", [large_input, large_output, tensor_attribute])
def test_what_is_large_is_not_remembered(run: Callable[[], None]) -> None:
    run()
    assert not single_node.EVALUATED.results


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_node, "MOST_RESULTS", 3)
    for number in range(10):
        (result,) = evaluate_single(node_of("Neg"), [np.array(number)], 17)
        assert result == -number
        assert len(single_node.EVALUATED.results) <= 3


def test_what_fails_fails_again() -> None:
    wrong = [np.ones((2, 3)), np.ones((2, 3))]
    for _ in range(2):
        with pytest.raises(TypeError, match="MatMul"):
            evaluate_single(node_of("MatMul", 2), wrong, 17)


# -- opsets

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
