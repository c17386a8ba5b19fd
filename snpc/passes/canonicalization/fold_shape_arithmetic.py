"""Constant folding of shape arithmetic: sizes that are the same for every input are stored, not computed at every run.

Exporters compute the target of a Reshape from the shape of its input, in ten small nodes each. What onnx's own shape
inference proves to be fixed becomes a constant. Of the symbolic entries that are left in a target, those that the input
has at the same position become 0, and a last one -1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import (
    GraphPass,
    attribute_values,
    opset_version,
    run_reference,
    select_dimensions,
    share_int64_constant,
)
from snpc.ops import RESHAPE, SHAPE, lookup
from snpc.types import IntArray

MAX_FOLD_ROUNDS = 4  # a size that is folded lets more be inferred behind it
MAX_SIZE_ENTRIES = 64  # values with more entries are not taken for sizes
SYMBOLIC_BOUND = -(1 << 40)  # entries at or below it stand for dimensions without a fixed size, one number for each

KnownSizes = dict[ir.Value, IntArray]


@dataclass
class SymbolicDims:
    """A number for each dimension without a fixed size; dimensions of one name have one size, and one number."""

    numbers: dict[str, int] = field(default_factory=dict)

    def sizes(self, value: ir.Value | None) -> IntArray | None:
        shape = value.shape if value is not None else None
        return None if shape is None else np.asarray([self.size(dim) for dim in shape], np.int64)

    def size(self, dim: int | ir.SymbolicDim) -> int:
        if isinstance(dim, int):
            return dim
        name = str(dim.value) if dim.value is not None else f" {len(self.numbers)}"
        return SYMBOLIC_BOUND - self.numbers.setdefault(name, len(self.numbers))


class FoldShapeArithmetic(ir.passes.InPlacePass):
    """Replace arithmetic on shapes by its result where no input of the model changes it; outputs stay as they were."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for _ in range(MAX_FOLD_ROUNDS):
            infer_shapes(model)
            dims = SymbolicDims()
            known = find_known_sizes(model, dims)
            if not sum([replace_known_inputs(node, known, dims, model.graph) for node in list(model.graph)]):
                break
            modified = True
        removed = common.RemoveUnusedNodesPass()(model).modified
        return ir.passes.PassResult(model, modified or removed)


FOLD_SHAPE_ARITHMETIC = GraphPass(
    "fold-shape-arithmetic",
    "fuse",
    FoldShapeArithmetic,
    "replaces arithmetic on shapes by its result",
    "before fusion, which needs fixed sizes; also after tokens are reduced to a fixed number",
)


def infer_shapes(model: ir.Model) -> None:
    """Infer the shapes of all values between inputs and outputs, in place.

    Shapes that the file or an earlier pass has left are dropped first, as inference would believe stale ones. Those of
    inputs and outputs are restored, as inference would give names to dimensions without one.
    """
    interface = [(value, value.shape.copy() if value.shape is not None else None) for value in interface_values(model)]
    for value in (value for node in model.graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for value, shape in interface:
        value.shape = shape


def interface_values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.outputs]


def find_known_sizes(model: ir.Model, dims: SymbolicDims) -> KnownSizes:
    """Contents of small integer tensors, with symbolic entries where they depend on the input."""
    known: KnownSizes = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input() or tensor is None:
            continue
        if tensor.dtype == ir.DataType.INT64 and tensor.size <= MAX_SIZE_ENTRIES:
            known[value] = tensor.numpy()
    for node in model.graph:
        if not node.domain and len(node.outputs) == 1:
            sizes = computed_sizes(node, known, dims, opset_version(model))
            if sizes is not None and sizes.dtype == np.int64 and sizes.size <= MAX_SIZE_ENTRIES:
                known[node.outputs[0]] = sizes
    return known


def computed_sizes(node: ir.Node, known: KnownSizes, dims: SymbolicDims, version: int) -> IntArray | None:
    if node.op_type == SHAPE:
        sizes = dims.sizes(node.inputs[0])
        return None if sizes is None else select_dimensions(node, sizes)
    inputs = [v for v in node.inputs if v is not None]
    if not inputs or not all(v in known for v in inputs):
        return None
    kind = lookup("", node.op_type).kind
    movable = inputs if kind == "concat" else inputs[:1] if kind == "movement" else []  # whose entries may be symbolic
    if any(is_symbolic(known[v]).any() for v in inputs if v not in movable):
        return None
    try:
        (result,) = run_reference(node, known, version)
    except Exception:  # what the reference cannot compute stays in the graph
        return None
    return np.asarray(result)


def is_symbolic(sizes: IntArray) -> npt.NDArray[np.bool_]:
    return sizes <= SYMBOLIC_BOUND


def replace_known_inputs(node: ir.Node, known: KnownSizes, dims: SymbolicDims, graph: ir.Graph) -> int:
    """Replace computed inputs of ``node`` that are known by constants. Returns how many."""
    if all(out in known and not is_symbolic(known[out]).any() for out in node.outputs):
        return 0  # its outputs are known too: it will be unused
    count = 0
    for index, value in enumerate(node.inputs):
        if value is None or value not in known or value.producer() is None:
            continue
        sizes = known[value]
        if index == 1 and node.op_type == RESHAPE and not node.domain:
            sizes = reshape_target(node, sizes, dims)
        if not is_symbolic(sizes).any():
            node.replace_input_with(index, share_int64_constant(graph, sizes, f"{value.name}__settled"))
            count += 1
    return count


def reshape_target(node: ir.Node, sizes: IntArray, dims: SymbolicDims) -> IntArray:
    """The target of a Reshape, with 0 where a symbolic entry is the input's at this position, and -1 for a last one."""
    if attribute_values(node).get("allowzero", 0):
        return sizes
    if is_symbolic(sizes).sum() > 1 or (sizes == -1).any():
        before = dims.sizes(node.inputs[0])
        width = min(len(sizes), len(before)) if before is not None else 0
        unchanged = np.zeros(len(sizes), bool)
        unchanged[:width] = before[:width] == sizes[:width] if before is not None else False
        sizes = np.where(is_symbolic(sizes) & unchanged, 0, sizes)
    single = is_symbolic(sizes).sum() == 1 and not (sizes == -1).any()
    return np.where(is_symbolic(sizes), -1, sizes) if single else sizes
