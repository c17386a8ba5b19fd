"""Dequantization: nodes on quantized values become the float nodes that they stand for.

Weights are dequantized as runtimes do it, activations are no longer rounded. A node that no rule knows stays as it is,
with the quantized values that it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import (
    GraphPass,
    add_constant,
    attribute_values,
    make_node,
    replace_value,
    run_library_pass,
    static_shape,
)
from snpc.ops import (
    ADD,
    CAST,
    DYNAMIC_QUANTIZERS,
    IDENTITY,
    MUL,
    FloatForm,
    Operand,
    Packed,
    Plain,
    Quantized,
    QuantizedBias,
    float_form,
    is_quantized_operator,
)
from snpc.passes.quantization.float_values import FloatValues, NoFloatForm, Scaling, same_contents, stored
from snpc.passes.quantization.moved_constants import fold_moved_constants
from snpc.passes.quantization.record import ConstantRecord, Place
from snpc.types import AnyArray

ROW_GROUPS = 4  # inputs of MatMulNBits in front of the group of each row


class Dequantize(ir.passes.InPlacePass):
    """Make every node on quantized values that a rule knows a float node; drop what nobody reads then."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fold_moved_constants(model)
        values = FloatValues(model.graph)
        return ir.passes.PassResult(model, make_float(model, values, has_float_form))


def make_float(model: ir.Model, values: FloatValues, wanted: Callable[[ir.Node], bool]) -> bool:
    """Make the nodes that are ``wanted`` float, in place; whether any was. ``values``: of its graph."""
    modified = False
    for node in list(model.graph):
        if not wanted(node):
            continue
        try:
            modified = rewrite_node(values, node) or modified
        except NoFloatForm:
            continue
    if modified:
        run_library_pass(common.RemoveUnusedNodesPass(), model)
    return modified


def has_float_form(node: ir.Node) -> bool:
    """Whether a rule knows the float node that a node on quantized values stands for."""
    if (node.domain, node.op_type) in DYNAMIC_QUANTIZERS:
        return True
    form = float_form(node.domain, node.op_type)
    if form is None or form.condition is None:
        return form is not None
    return form.condition(attribute_values(node), [type_name(value) for value in node.inputs])


def type_name(value: ir.Value | None) -> str:
    """ "" of an input that is left out."""
    dtype = None if value is None else value.dtype if value.const_value is None else value.const_value.dtype
    return "" if value is None else "UNKNOWN" if dtype is None else dtype.name


def is_written_back(node: ir.Node) -> bool:
    """Whether a node that became float can be written quantized again when its constants were cut: not where one weight
    of queries, keys and values makes their widths equal, where rows have groups of their own, or codes are floats."""
    form = float_form(node.domain, node.op_type)
    if not has_float_form(node) or (form is not None and not form.written_back):
        return False
    tensors = [stored(value) for value in node.inputs]
    operands = () if form is None else form.operands
    is_product = any(isinstance(operand, Packed) and operand.layout == "product" for operand in operands)
    has_groups = is_product and len(tensors) > ROW_GROUPS and tensors[ROW_GROUPS] is not None
    return not has_groups and not any(t is not None and t.dtype.name.startswith("FLOAT8") for t in tensors)


DEQUANTIZATION_PASSES = (
    GraphPass(
        "dequantize",
        "dequantize",
        Dequantize,
        "makes nodes on quantized values the float nodes that they stand for",
        "on the canonical form, in which weights are initializers",
    ),
)


def quantized_operators(model: ir.Model) -> Mapping[str, int]:
    """Operator -> how many nodes on quantized values there are, in subgraphs too."""
    counts = Counter(n.op_type for n in model.graph.all_nodes() if is_quantized_operator(n.domain, n.op_type))
    return dict(counts)


def rewrite_node(values: FloatValues, node: ir.Node) -> bool:
    """Give the graph the float form of ``node``, which has one; whether anything stands for it. Raises NoFloatForm
    where its operands have none."""
    if (node.domain, node.op_type) in DYNAMIC_QUANTIZERS:
        quantized, scale, zero_point = node.outputs
        values.quantize(quantized, required_input(node, 0), Scaling(scale, zero_point), node)
        return True
    form = float_form(node.domain, node.op_type)
    assert form is not None
    if form.sums:
        return rewrite_sum(values, node, form)
    operands = [operand_value(values, node, operand) for operand in form.operands_of(len(node.inputs))]
    bias = None if form.bias is None else operand_value(values, node, form.bias)
    outputs = add_float_node(values, node, form, operands, bias)
    if form.output is not None:
        output_scale, output_zero = (given_input(node, index) for index in form.output)
        if output_scale is not None:
            values.quantize(node.outputs[0], outputs[0], Scaling(output_scale, output_zero), node)
            return True
    for old, new in zip(node.outputs, outputs, strict=True):
        take_place(values, node, old, new)
    return True


def add_float_node(
    values: FloatValues,
    node: ir.Node,
    form: FloatForm,
    operands: list[ir.Value | None],
    bias: ir.Value | None,
) -> list[ir.Value]:
    """The outputs of the float node, which is put before ``node``."""
    if form.op is None:
        return [operand for operand in operands if operand is not None]
    if bias is not None and not form.adds_bias:
        operands.append(bias)
    while operands and operands[-1] is None:
        operands.pop()
    attributes = form.attributes(attribute_values(node))
    names = [values.name(out.name) for out in node.outputs]
    made = make_node(form.op, operands, attributes, name=values.node_name(node), outputs=names, domain=form.domain)
    values.graph.insert_before(node, made)
    values.record.stand_ins[node] = made
    if bias is None or not form.adds_bias:
        return list(made.outputs)
    name = values.name(f"{node.name}_bias")
    added = make_node(ADD, [made.outputs[0], bias], name=name, outputs=[name])
    values.graph.insert_before(node, added)
    return [added.outputs[0], *made.outputs[1:]]


def take_place(values: FloatValues, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """``new`` is read where ``old`` was. An output of the graph stays one, under its name."""
    values.record.note_reader(new, node)
    if not old.is_graph_output():
        values.record.note_value(old, new)
        new.type, new.shape = new.type or old.type, new.shape or old.shape
        old.replace_all_uses_with(new)
        return
    if new.producer() is None or new.is_graph_output():
        same = make_node(IDENTITY, [new], name=values.name(f"{node.name}_out"), outputs=[values.name(old.name)])
        values.graph.insert_before(node, same)
        new = same.outputs[0]
    values.record.note_value(old, new)
    replace_value(old, new)
    old.name = values.name(f"{new.name}_old")


def required_input(node: ir.Node, index: int) -> ir.Value:
    value = given_input(node, index)
    if value is None:
        raise NoFloatForm(f"{node.op_type} {node.name} lacks input {index}")
    return value


def given_input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def operand_value(values: FloatValues, node: ir.Node, operand: Operand) -> ir.Value | None:
    """The float value of an operand; None where an optional one is left out. Raises NoFloatForm."""
    match operand:
        case Plain(data):
            return given_input(node, data)
        case Quantized(data, _, _) if given_input(node, data) is None:
            return None
        case Quantized(data, scale, zero_point):
            attributes = attribute_values(node)
            block = int(attributes.get(operand.block, 0))
            zero = given_input(node, zero_point)
            places: tuple[Place, ...] = (("scale", node, scale or 0), ("zero", node, zero_point))
            scaling = Scaling(required_input(node, scale or 0), zero, operand.axis_of(attributes), block, places)
            return values.float_of(required_input(node, data), scaling, node, (node, data))
        case QuantizedBias(data, scales):
            return None if given_input(node, data) is None else dequantized_bias(values, node, data, scales)
        case Packed():
            return unpacked_constant(values, node, operand)


def dequantized_bias(values: FloatValues, node: ir.Node, data: int, scales: tuple[int, int]) -> ir.Value:
    """A bias of int32 as floats."""
    tensors = [stored(required_input(node, index)) for index in (data, *scales)]
    arrays = [t.numpy() for t in tensors if t is not None]
    if len(arrays) != 3:
        raise NoFloatForm(f"the bias of {node.name} is computed")
    bias, left, right = arrays
    alpha = float(attribute_values(node).get("alpha", 1))
    scale = (left.astype(np.float32) * right.astype(np.float32) * np.float32(alpha)).reshape(-1)
    contents: AnyArray = (bias.astype(np.float32) * scale).astype(left.dtype)
    made = add_constant(values.graph, contents, values.name(required_input(node, data).name))
    names = zip(("codes", "input_scale", "scale"), (data, *scales), strict=True)
    parts = {part: required_input(node, index) for part, index in names}
    record = ConstantRecord("bias", parts, attribute_values(node))
    values.record.note_constant(made, record, [("codes", node, data)])
    return made


def unpacked_constant(values: FloatValues, node: ir.Node, operand: Packed) -> ir.Value | None:
    """The constant that several stored inputs are, as a packed weight with its scales; None where none is given."""
    inputs = [given_input(node, index) for index in operand.inputs]
    if all(value is None for value in inputs):
        return None
    tensors = [stored(value) for value in inputs]
    if any(value is not None and tensor is None for value, tensor in zip(inputs, tensors, strict=True)):
        raise NoFloatForm(f"the weight of {node.name} is computed")
    weight, packed, scales = inputs[0], tensors[0], tensors[1]
    if weight is None or packed is None or scales is None:
        raise NoFloatForm(f"{node.op_type} {node.name} lacks its weight or its scales")
    attributes = operand.attributes_of(attribute_values(node))

    def contents() -> AnyArray:
        return operand.unpack(attributes, tuple(None if t is None else t.numpy() for t in tensors))

    shape = ir.Shape(operand.shape(attributes, static_shape(packed), packed.dtype.bitwidth))
    key = (node.op_type, str(attributes), *tensors)
    made = values.constant(key, contents, weight, ir.TensorType(scales.dtype), shape)
    places = list(zip(("codes", "scale", "zero"), [node] * 3, operand.inputs[:3], strict=True))
    parts = {part: value for (part, _, _), value in zip(places, inputs, strict=False) if value is not None}
    values.record.note_constant(made, ConstantRecord(operand.layout, parts, attributes), places)
    return made


# -- integer sums ----------------------------------------------------------------------------------------------------


def rewrite_sum(values: FloatValues, node: ir.Node, form: FloatForm) -> bool:
    """A product of integers whose output is cast to float and multiplied by both scales: a product of floats."""
    readers = list(scaled_readers(node.outputs[0]))
    if not readers:
        raise NoFloatForm(f"what reads {node.op_type} {node.name} is not the product with its scales")
    left, right = form.operands
    assert isinstance(left, Quantized) and isinstance(right, Quantized)
    for product, scale in readers:
        source = values.sources.get(required_input(node, left.data))
        if source is None or source.scaling.scale is None:
            raise NoFloatForm(f"the activation of {node.name} was not quantized in this graph")
        factor = other_factor(scale, source.scaling.scale)
        operands: list[ir.Value | None] = []
        for operand, own, place in ((left, source.scaling.scale, ()), (right, factor.value, (factor.place,))):
            places: tuple[Place, ...] = (("zero", node, operand.zero_point), *place)
            scaling = Scaling(own, given_input(node, operand.zero_point), operand.axis_of({}), places=places)
            operands.append(values.float_of(required_input(node, operand.data), scaling, node, (node, operand.data)))
        (out,) = add_float_node(values, node, form, operands, None)
        take_place(values, product, product.outputs[0], out)
    return True


def scaled_readers(total: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(product, scale) of every reader of an integer sum: a cast, and the product of that with the scale.

    Raises NoFloatForm where it is read by anything else.
    """
    for cast in total.consumers():
        for product in cast.outputs[0].consumers() if cast.op_type == CAST else ():
            factors = [v for v in product.inputs if v is not None and v is not cast.outputs[0]]
            if product.op_type != MUL or len(factors) != 1:
                raise NoFloatForm(f"{total.name} is read by {product.op_type}")
            yield product, factors[0]


@dataclass(frozen=True)
class ScaleFactor:
    """One of two scales whose product is read, and where that product reads it."""

    value: ir.Value
    place: Place


def other_factor(scale: ir.Value, known: ir.Value) -> ScaleFactor:
    """The second factor of a product of two scales, of which one is known. Raises NoFloatForm."""
    node = scale.producer()
    if node is not None and node.op_type == MUL and len(node.inputs) == 2:
        for index in (1, 0):
            one, other = node.inputs[1 - index], node.inputs[index]
            if one is not None and other is not None and same_contents(one, known):
                return ScaleFactor(other, ("scale", node, index))
    raise NoFloatForm(f"{scale.name} is not the product of two scales")
