"""Concrete shapes: bind dynamic axes to small sizes and evaluate, node by node, shapes and shape arithmetic.

Shapes come from onnx's own inference, values (integers and small floats, which is what shape arithmetic is made of)
from its reference implementation. Nothing here runs a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx import defs

from snpc.graph.measured_shapes import MeasuredValue, measure_shapes
from snpc.ops import (
    InferenceContext,
    KnownTensor,
    OpCall,
    OpSpec,
    evaluate_single,
    infer_single,
    known_content,
    lookup,
)
from snpc.types import AnyArray, IntArray, Shape

SizeSequence = TypeVar("SizeSequence", Shape, IntArray)

MAX_INTEGERS = 1 << 22
MAX_FLOATS = 64
ROUTING_STEPS = 8  # movement between one-hot rows of experts and the tokens of one of them
FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass
class ShapeFacts:
    """What is known of every value at given sizes of the dynamic dimensions.

    ``shape`` (None: unknown), ``dtype``; ``value``: contents of small constants and of shape arithmetic; ``problems``:
    why a node could not be evaluated; ``measured``: values whose shapes inference does not know and a run showed.
    """

    shape: dict[ir.Value, Shape | None] = field(default_factory=dict)
    dtype: dict[ir.Value, ir.DataType | None] = field(default_factory=dict)
    value: dict[ir.Value, AnyArray] = field(default_factory=dict)
    problems: dict[ir.Node, str] = field(default_factory=dict)
    measured: dict[ir.Value, MeasuredValue] = field(default_factory=dict)

    @property
    def types_by_name(self) -> dict[str, ir.DataType]:
        """Name of a value -> its type, where that is known."""
        return {str(value.name): dtype for value, dtype in self.dtype.items() if dtype is not None}

    @property
    def shapes_by_name(self) -> dict[str, Shape]:
        """Name of a value -> its shape, where that is known."""
        return {str(value.name): shape for value, shape in self.shape.items() if shape is not None}

    def call(self, node: ir.Node, version: int) -> OpCall:
        shapes = tuple(None if v is None else self.shape.get(v) for v in node.inputs)
        values = tuple(None if v is None else self.value.get(v) for v in node.inputs)
        outs = tuple(self.shape.get(v) or () for v in node.outputs)
        stored = tuple(v is not None and v.producer() is None for v in node.inputs)
        bits = tuple(0 if v is None else entry_bits(self.dtype.get(v)) for v in node.inputs)
        return OpCall(node.op_type, version, attribute_values(node), shapes, values, outs, stored, bits)

    def known_inputs(self, node: ir.Node) -> list[KnownTensor | None]:
        """What is known of the inputs of ``node``, in their order: contents where they have one axis at most, which is
        what sizes are made of."""
        return [None if value is None or not value.name else self.known_tensor(value) for value in node.inputs]

    def known_tensor(self, value: ir.Value) -> KnownTensor:
        array = self.value.get(value)
        content = known_content(array) if array is not None and array.ndim <= 1 else None
        return KnownTensor(self.dtype.get(value), self.shape.get(value), content)


def entry_bits(dtype: ir.DataType | None) -> int:
    """Bits of an entry; 0 for an unknown type and for strings, which have no size."""
    return 0 if dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING) else dtype.bitwidth


def attribute_values(node: ir.Node) -> dict[str, Any]:
    return {
        name: attr.value
        for name, attr in node.attributes.items()
        if isinstance(attr, ir.Attr) and attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    }


def opset_version(model: ir.Model, domain: str = "") -> int:
    imports = model.graph.opset_imports
    return imports.get(domain, imports.get("ai.onnx", 1) if domain == "" else 1)


def is_float(dtype: ir.DataType | None) -> bool:
    return dtype in FLOAT_TYPES


# -- evaluation ------------------------------------------------------------------------------------------------------


def initial_facts(model: ir.Model, dim_sizes: Mapping[str, int]) -> ShapeFacts:
    """Facts of graph inputs and initializers alone."""
    facts = ShapeFacts()
    for value in model.graph.inputs:
        facts.dtype[value] = value.dtype
        facts.shape[value] = None if value.shape is None else bind_shape(value.shape, str(value.name), dim_sizes)
    for value in model.graph.initializers.values():
        record_constant(facts, value)
    return facts


def bind_shape(shape: ir.Shape, name: str, dim_sizes: Mapping[str, int]) -> Shape:
    return tuple(
        dim if isinstance(dim, int) else dim_sizes.get(str(dim.value or f"{name}.{axis}"), 8)
        for axis, dim in enumerate(shape)
    )


def record_constant(facts: ShapeFacts, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    shape = static_shape(tensor)
    facts.shape[value] = shape
    facts.dtype[value] = tensor.dtype
    limit = MAX_FLOATS if is_float(tensor.dtype) else MAX_INTEGERS
    if tensor.dtype != ir.DataType.STRING and int(np.prod(shape, dtype=np.int64)) <= limit:
        facts.value[value] = np.asarray(tensor.numpy())


def static_shape(tensor: ir.TensorProtocol) -> Shape:
    """The shape of a constant, which has no symbolic dimensions."""
    return tuple(int(n) for n in tensor.shape if isinstance(n, int))


def weight_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of a constant; strings, which have no size per entry, count as nothing."""
    return 0 if tensor.dtype == ir.DataType.STRING else int(tensor.nbytes)


def infer_graph(model: ir.Model, dim_sizes: Mapping[str, int], *, measure: bool = True) -> ShapeFacts:
    """Shapes, types and known contents of every value of the main graph, at these sizes of dynamic dimensions.

    ``measure``: the graph is run once where the shape of a float value is unknown otherwise.
    """
    facts = infer_nodes(model, initial_facts(model, dim_sizes), dim_sizes)
    unknown = values_of_unknown_shape(model, facts) if measure else []
    untyped = {v for v in unknown if facts.dtype.get(v) is None}
    if not untyped and not any(is_float(facts.dtype[v]) for v in unknown):
        return facts
    inputs = {str(v.name): facts.shape.get(v) for v in model.graph.inputs if not v.is_initializer()}
    known = {name: shape for name, shape in inputs.items() if shape is not None}
    measured = measure_shapes(model, unknown, untyped, known) if len(known) == len(inputs) else {}
    if not measured:
        return facts
    informed = initial_facts(model, dim_sizes)
    informed.measured = dict(measured)
    return infer_nodes(model, informed, dim_sizes)


def infer_nodes(model: ir.Model, facts: ShapeFacts, dim_sizes: Mapping[str, int]) -> ShapeFacts:
    """Add every node of the main graph to ``facts``, in their order."""
    for node in model.graph:
        infer_node(facts, node, model, dim_sizes)
    return facts


def values_of_unknown_shape(model: ir.Model, facts: ShapeFacts) -> list[ir.Value]:
    return [v for node in model.graph for v in node.outputs if v.name and facts.shape.get(v) is None]


def unknown_shape_reason(facts: ShapeFacts, value: ir.Value) -> str:
    """Why the shape of ``value`` is unknown: the operator that made the first unknown shape in front of it."""
    node = value.producer()
    while node is not None:
        unknown = next((v for v in node.inputs if v is not None and facts.shape.get(v) is None), None)
        if unknown is None:
            break
        value, node = unknown, unknown.producer()
    if node is None:
        return f"the shape of {value.name} is unknown: the file does not say it"
    problem = facts.problems.get(node, "")
    return f"the shape of {value.name} is unknown: {node.op_type} {node.name} makes it" + (
        f" ({problem})" if problem else ""
    )


def infer_node(facts: ShapeFacts, node: ir.Node, model: ir.Model, dim_sizes: Mapping[str, int]) -> None:
    """Add the outputs of ``node`` to ``facts``. A node that cannot be evaluated leaves their shapes unknown."""
    version = opset_version(model, node.domain)
    if infer_taken_branch(facts, node, model, dim_sizes):
        return
    computed = compute_outputs(facts, node, version) if has_computable_outputs(facts, node) else None
    if computed is not None:
        for value, array in zip(node.outputs, computed, strict=False):
            facts.shape[value] = array.shape
            facts.dtype[value] = ir.DataType.from_numpy(array.dtype)
            limit = MAX_FLOATS if is_float(facts.dtype[value]) else MAX_INTEGERS
            if array.size <= limit:
                facts.value[value] = array
        return
    contradicted = False
    try:
        infer_outputs(facts, node, model, version)
    except Exception as error:  # onnx raises several unrelated types; whatever it is, the shape stays unknown
        facts.problems[node] = str(error).splitlines()[0] if str(error) else type(error).__name__
        unknown = isinstance(error, defs.SchemaError) or any(
            facts.shape.get(v) is None for v in node.inputs if v is not None
        )
        contradicted = not unknown  # the inputs themselves do not fit: what the file says of the output counts nothing
    for value in node.outputs:
        if facts.shape.get(value) is None:
            hint = None if contradicted else value.shape
            static = hint is not None and all(isinstance(d, int) or str(d.value) in dim_sizes for d in hint)
            facts.shape[value] = bind_shape(hint, "", dim_sizes) if static and hint is not None else None
            facts.dtype.setdefault(value, value.dtype)
            seen = facts.measured.get(value)
            if seen is not None:
                facts.shape[value] = facts.shape[value] or seen.shape
                facts.dtype[value] = facts.dtype[value] or seen.dtype


def infer_taken_branch(facts: ShapeFacts, node: ir.Node, model: ir.Model, dim_sizes: Mapping[str, int]) -> bool:
    """Infer the outputs of a branch whose condition is known; False for any other node."""
    names = lookup(node.domain, node.op_type).branches
    condition = facts.value.get(node.inputs[0]) if names and node.inputs[0] is not None else None
    if condition is None or not names:
        return False
    graph = node.attributes[names[0 if bool(condition.reshape(-1)[0]) else 1]].as_graph()
    for value in graph.initializers.values():
        record_constant(facts, value)
    for inner in graph:
        constant = inner.attributes.get("value") if not inner.inputs else None
        if constant is not None and constant.type == ir.AttributeType.TENSOR:
            inner.outputs[0].const_value = constant.as_tensor()
            record_constant(facts, inner.outputs[0])
        else:
            infer_node(facts, inner, model, dim_sizes)
    for inside, outside in zip(graph.outputs, node.outputs, strict=True):
        facts.shape[outside], facts.dtype[outside] = facts.shape.get(inside), facts.dtype.get(inside)
        if inside in facts.value:
            facts.value[outside] = facts.value[inside]
    return True


def has_computable_outputs(facts: ShapeFacts, node: ir.Node) -> bool:
    """Is it shape arithmetic: are the contents of every input known, and the outputs small?"""
    if node.domain or lookup("", node.op_type).is_random or has_subgraphs(node):
        return False
    if node.op_type in ("Shape", "Size"):
        return node.inputs[0] is not None and facts.shape.get(node.inputs[0]) is not None
    if not node.inputs:
        return False
    present = [v for v in node.inputs if v is not None]
    if not all(v in facts.value for v in present):
        return False
    total = sum(facts.value[v].size for v in present)
    return total <= MAX_INTEGERS and not (
        node.op_type == "ConstantOfShape" and requested_elements(facts, present) > MAX_INTEGERS
    )


def requested_elements(facts: ShapeFacts, values: Sequence[ir.Value]) -> int:
    return int(np.prod(facts.value[values[0]], dtype=np.int64))


def has_subgraphs(node: ir.Node) -> bool:
    return any(
        isinstance(attr, ir.Attr) and attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attr in node.attributes.values()
    )


def compute_outputs(facts: ShapeFacts, node: ir.Node, version: int) -> list[AnyArray] | None:
    if node.op_type == "Shape":
        shape = facts.shape[node.inputs[0]]  # type: ignore[index]
        assert shape is not None
        return [np.asarray(select_dimensions(node, shape), np.int64)]
    if node.op_type == "Size":
        return [np.asarray(np.prod(facts.shape[node.inputs[0]], dtype=np.int64))]  # type: ignore[index, arg-type]
    try:
        results = run_reference(node, facts.value, version)
    except Exception as error:  # an operator the reference does not have: shape inference may still know it
        facts.problems[node] = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None
    return [np.asarray(r) for r in results] if all(isinstance(r, np.ndarray | np.generic) for r in results) else None


def select_dimensions(node: ir.Node, sizes: SizeSequence) -> SizeSequence:
    """The sizes that a Shape node returns of those of its input: all, or those between its attributes start and end."""
    attrs = attribute_values(node)
    return sizes[attrs.get("start", 0) : attrs.get("end", len(sizes))]


def run_reference(node: ir.Node, known: Mapping[ir.Value, AnyArray], version: int) -> list[Any]:
    """The outputs by onnx's reference implementation, from known inputs. Raises what that raises."""
    return evaluate_single(node, [None if v is None else known[v] for v in node.inputs], version)


def shape_source(value: ir.Value | None) -> ir.Value | None:
    """The tensor whose whole shape ``value`` is; None for any other value."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "Shape" or node.attributes:
        return None
    return node.inputs[0]


def dtype_source(node: ir.Node, spec: OpSpec) -> ir.Value:
    """The input whose element type the outputs have."""
    source = node.inputs[spec.dtype_input]
    assert source is not None
    return source


@functools.cache
def operator_schema(name: str, version: int, domain: str) -> defs.OpSchema:
    """The schema of an operator at an opset. An operator that the opset does not have yet gets its first one:
    onnxruntime has fused operators, such as LayerNormalization, in opsets before the standard."""
    try:
        return defs.get_schema(name, version, domain)
    except defs.SchemaError:
        later = [s for s in defs.get_all_schemas_with_history() if (s.name, s.domain) == (name, domain)]
        first = min((s for s in later if s.since_version > version), key=lambda s: s.since_version, default=None)
        if first is None:
            raise
        return first


def infer_outputs(facts: ShapeFacts, node: ir.Node, model: ir.Model, version: int) -> None:
    spec = lookup(node.domain, node.op_type)
    if spec.out_shapes is not None:
        kind = facts.dtype.get(dtype_source(node, spec))
        for index, out in enumerate(node.outputs):
            facts.dtype[out] = ir.DataType.INT32 if index in spec.int32_outputs else kind
            facts.shape[out] = None
        for out, sizes in zip(node.outputs, spec.out_shapes(facts.call(node, version)), strict=False):
            facts.shape[out] = tuple(sizes)
        return
    schema = operator_schema(node.op_type, version, node.domain)
    context = InferenceContext(version, tuple(model.graph.opset_imports.items()), model.ir_version)
    for value, known in zip(node.outputs, infer_single(node, facts.known_inputs(node), schema, context), strict=True):
        if known is not None:
            facts.dtype[value], facts.shape[value] = known.dtype, known.shape
    if spec.counts_data:
        bind_routed_count(facts, node)


def bind_routed_count(facts: ShapeFacts, node: ir.Node) -> None:
    """Give the positions that NonZero finds among the tokens of one expert the count of an even routing.

    The number is a size that data decide, as a dynamic dimension is one that the inputs decide; what a cut model finds
    is ``measured`` of the original. Nothing else is bound: what other NonZero nodes find is measured by a run.
    """
    seen = facts.measured.get(node.outputs[0])
    if seen is not None:
        facts.shape[node.outputs[0]] = seen.shape
        return
    source, steps = node.inputs[0], 0
    while source is not None and (producer := source.producer()) is not None and steps < ROUTING_STEPS:
        spec = lookup(producer.domain, producer.op_type)
        if spec.kind == "one_hot":
            depth = facts.value.get(producer.inputs[1])  # type: ignore[arg-type]
            shape = facts.shape.get(node.inputs[0])  # type: ignore[arg-type]
            if depth is not None and shape is not None:
                even = int(np.prod(shape, dtype=np.int64)) // max(int(depth.reshape(-1)[0]), 1)
                found = (len(shape), max(even, 2))
                facts.shape[node.outputs[0]] = found
                facts.measured[node.outputs[0]] = MeasuredValue(found, facts.dtype.get(node.outputs[0]))
            return
        if spec.kind != "movement" and not (spec.kind == "pointwise" and spec.effect == "same"):
            return
        source, steps = producer.inputs[0], steps + 1
