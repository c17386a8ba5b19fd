"""What one node makes of inputs that are known: contents by onnx's reference implementation, types by its inference.

Layers of a model are alike, and a graph is inferred anew after every change. So results are remembered by all that they
depend on: the operator with its attributes, and what is known of its inputs. Names are no part of that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, helper, shape_inference
from onnx.reference import ReferenceEvaluator

from snpc.types import AnyArray, Shape

Remembered = TypeVar("Remembered")

MOST_ENTRIES = 64  # of an array that is remembered, or handed to shape inference
MOST_RESULTS = 1 << 14
PLAIN_ATTRIBUTES = frozenset(ir.AttributeType[kind] for kind in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS"))


class KnownContent(NamedTuple):
    """An array of few numbers, as a value that can be compared."""

    dtype: str
    shape: Shape
    data: bytes


class KnownTensor(NamedTuple):
    """What is known of an input or an output."""

    dtype: ir.DataType | None
    shape: Shape | None
    content: KnownContent | None = None


class InferenceContext(NamedTuple):
    """What shape inference takes from around a node: the opset of its domain, and of the model."""

    version: int
    opset_imports: tuple[tuple[str, int], ...]
    ir_version: int


class ResultMemory(Generic[Remembered]):
    """Results by what they depend on. Where there are ``MOST_RESULTS``, all are forgotten."""

    def __init__(self) -> None:
        self.results: dict[Hashable, Remembered] = {}

    def find(self, key: Hashable | None) -> Remembered | None:
        return None if key is None else self.results.get(key)

    def store(self, key: Hashable | None, result: Remembered) -> None:
        """Remember a result; nothing is remembered for None."""
        if len(self.results) >= MOST_RESULTS:
            self.results.clear()
        if key is not None:
            self.results[key] = result


EVALUATED: ResultMemory[list[AnyArray]] = ResultMemory()
INFERRED: ResultMemory[list[KnownTensor | None]] = ResultMemory()


def known_content(array: object) -> KnownContent | None:
    """The content of an array of few numbers; None of anything else."""
    if not isinstance(array, np.ndarray) or array.size > MOST_ENTRIES or array.dtype.kind not in "iubf":
        return None
    return KnownContent(array.dtype.str, array.shape, array.tobytes())


def node_signature(node: ir.Node) -> Hashable | None:
    """What tells this node from others, without names; None where an attribute is more than numbers and words."""
    attributes = node.attributes.values()
    if any(attribute.type not in PLAIN_ATTRIBUTES or attribute.is_ref() for attribute in attributes):
        return None
    given = tuple((attribute.name, attribute.type, attribute.value) for attribute in attributes)
    return node.domain, node.op_type, given, tuple(bool(value.name) for value in node.outputs)


def evaluate_node(node: onnx.NodeProto, feeds: Mapping[str, AnyArray], version: int) -> list[Any]:
    """The outputs of ``node`` at opset ``version`` of the default domain, for its inputs by name.

    The evaluator takes a lone node for one of its newest opset, whatever opset it is given, and misses the attributes
    of older ones (the axes of a Squeeze). It respects the opset of a graph. Raises what the evaluator raises.
    """
    inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names if n] for names in (feeds, node.output))
    graph = helper.make_graph([node], "node", inputs, outputs)
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(graph, opsets={"": version}).run(None, dict(feeds)))


def evaluate_single(node: ir.Node, inputs: Sequence[AnyArray | None], version: int) -> list[AnyArray]:
    """The outputs of a node at opset ``version`` of the default domain, for its inputs in their order. Raises what the
    reference implementation raises."""
    contents = [known_content(array) for array in inputs]
    whole = all((array is None) == (content is None) for array, content in zip(inputs, contents, strict=True))
    signature = node_signature(node) if whole else None
    key = None if signature is None else (signature, *contents, version)
    found = EVALUATED.find(key)
    if found is None:
        named = zip(node.inputs, inputs, strict=True)
        feeds = {str(value.name): array for value, array in named if value is not None and array is not None}
        found = evaluate_node(ir.serde.serialize_node(node), feeds, version)
        small = all(known_content(result) is not None for result in found)
        EVALUATED.store(key if small else None, found)
    return [result.copy() if isinstance(result, np.ndarray) else result for result in found]


def infer_single(
    node: ir.Node, inputs: Sequence[KnownTensor | None], schema: defs.OpSchema, context: InferenceContext
) -> list[KnownTensor | None]:
    """The types and shapes of a node's outputs, None where nothing is said, from what is known of its inputs in their
    order. Raises what onnx's inference raises."""
    signature = node_signature(node)
    key = None if signature is None else (signature, *inputs, context)
    found = INFERRED.find(key)
    if found is None:
        found = run_inference(node, inputs, schema, context)
        INFERRED.store(key, found)
    return found


def run_inference(
    node: ir.Node, inputs: Sequence[KnownTensor | None], schema: defs.OpSchema, context: InferenceContext
) -> list[KnownTensor | None]:
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value, known in zip(node.inputs, inputs, strict=True):
        if value is None or not value.name or known is None or known.dtype is None:
            continue
        types[value.name] = helper.make_tensor_type_proto(int(known.dtype), known.shape)
        if known.content is not None:
            dtype, shape, content = known.content
            array = np.frombuffer(content, dtype).reshape(shape)
            data[value.name] = onnx.numpy_helper.from_array(array, value.name)
    inferred = shape_inference.infer_node_outputs(
        schema,
        ir.serde.serialize_node(node),
        types,
        data,
        opset_imports=[helper.make_opsetid(*entry) for entry in context.opset_imports],
        ir_version=context.ir_version,
    )
    return [inferred_tensor(inferred.get(value.name or "")) for value in node.outputs]


def inferred_tensor(info: onnx.TypeProto | None) -> KnownTensor | None:
    """What onnx's inference says of an output; the shape is known where every size is."""
    if info is None or not info.HasField("tensor_type"):
        return None
    dtype = ir.DataType(info.tensor_type.elem_type) if info.tensor_type.elem_type else None
    if not info.tensor_type.HasField("shape"):
        return KnownTensor(dtype, None)
    dims = info.tensor_type.shape.dim
    return KnownTensor(dtype, tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None)
