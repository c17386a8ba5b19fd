"""A parameter that spells a size takes its new value with the least change, and still follows the input's sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from snpc.errors import CheckFailed
from snpc.graph import choose_dim_sizes, infer_graph
from snpc.graph.binding import alternative_dim_sizes
from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from tests.passes.text_graphs import op_types, text_model

WEIGHTS = {
    "zero": np.array(0),
    "one": np.array(1),
    "four": np.array([4]),
    "two": np.array([2]),
    "minus": np.array([-1]),
    "target": np.array([0, 0, 2, 4]),
    "axis": np.array([0]),
}
TEXT = "edit (float[B, N, 8] x) => (float[A, B, C, D] y) {{ {target} y = Reshape(x, {name}) }}"
TARGETS = {
    "constant": ("", "target"),
    "concat": ("s = Shape(x) b = Gather(s, zero) bb = Unsqueeze(b, axis) n = Gather(s, one) nn = Unsqueeze(n, axis) "
               "t = Concat <axis = 0> (bb, nn, two, four)", "t"),
    "product": ("s = Shape(x) b = Gather(s, zero) bb = Unsqueeze(b, axis) m = Mul(bb, two) "
                "t = Concat <axis = 0> (m, minus, four, one1)", "t"),
}  # fmt: skip


class Edit:
    """One graph, its copy, and an editor between them."""

    def __init__(self, kind: str) -> None:
        prefix, name = TARGETS[kind]
        text = TEXT.format(target=prefix, name=name)
        proto = text_model(text, WEIGHTS | {"one1": np.array([1])})
        self.model = canonicalize(ir.from_proto(proto))
        self.dim_sizes, self.facts = choose_dim_sizes(self.model)
        self.copy = self.model.clone()
        self.after = infer_graph(self.copy, self.dim_sizes)
        self.editor = ShapeParameterEditor(self.copy, self.model, self.facts, self.after, self.dim_sizes)
        self.old, self.new = (next(n for n in m.graph if n.op_type == "Reshape") for m in (self.model, self.copy))

    def target(self, model: ir.Model, dim_sizes: dict[str, int]) -> list[int]:
        node = next(n for n in model.graph if n.op_type == "Reshape")
        return infer_graph(model, dim_sizes).value[node.inputs[1]].tolist()  # type: ignore[index]

    def set(self, change: dict[int, int]) -> list[int]:
        """Set entries of the target; the whole target at the sizes that the facts were made for."""
        wanted = np.array(self.target(self.model, self.dim_sizes))
        for index, size in change.items():
            wanted[index] = size
        self.editor.set_input(self.old, self.new, 1, wanted)
        assert self.target(self.copy, self.dim_sizes) == wanted.tolist()
        return wanted.tolist()


def test_a_constant_target_is_replaced_and_the_old_one_left() -> None:
    edit = Edit("constant")
    edit.set({3: 3})
    assert edit.copy.graph.initializers["target"].const_value.numpy().tolist() == [0, 0, 2, 4]  # type: ignore[union-attr]
    assert op_types(edit.copy) == ["Reshape"]


def test_equal_constants_are_shared() -> None:
    edit = Edit("constant")
    first, second = (edit.editor.constant(np.array([1, 2]), name) for name in ("a", "b"))
    assert first is second and edit.editor.constant(np.array([1, 3]), "a") is not first


def test_a_concat_keeps_its_computed_entries() -> None:
    edit = Edit("concat")
    edit.set({3: 3})
    assert op_types(edit.copy).count("Concat") == 2  # the old one has no consumer any more
    other = alternative_dim_sizes(edit.dim_sizes)
    before = edit.target(edit.model, other)
    assert edit.target(edit.copy, other) == [*before[:3], 3]


def test_an_entry_that_is_right_already_is_left_alone() -> None:
    edit = Edit("concat")
    nodes = op_types(edit.copy)
    edit.set({})
    assert op_types(edit.copy) == nodes


def test_an_entry_that_mixes_a_size_with_a_batch_is_rescaled() -> None:
    """batch x heads, of which half the heads stay: the ratio is applied at every batch size."""
    edit = Edit("product")
    old = edit.target(edit.model, edit.dim_sizes)
    edit.set({0: old[0] // 2})
    assert op_types(edit.copy).count("Mul") == 2 and "Div" in op_types(edit.copy)
    other = alternative_dim_sizes(edit.dim_sizes)
    before = edit.target(edit.model, other)
    assert edit.target(edit.copy, other) == [before[0] // 2, *before[1:]]


def test_another_length_of_a_computed_target_is_refused() -> None:
    edit = Edit("concat")
    with pytest.raises(CheckFailed, match="depends on a dynamic axis"):
        edit.editor.set_input(edit.old, edit.new, 1, np.array([1, 2, 3]))


def test_a_missing_input_is_added() -> None:
    edit = Edit("constant")
    node = ir.node("Unsqueeze", [edit.copy.graph.inputs[0]], name="late")
    edit.copy.graph.append(node)
    edit.editor.set_input(edit.old, node, 1, np.array([0]))
    assert len(node.inputs) == 2 and node.inputs[1] is not None
