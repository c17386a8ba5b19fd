"""What a model costs, from shapes and the operator table, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, attribute_values, opset_version, static_shape, weight_bytes
from snpc.ops import (
    EXPERTS_FORM,
    Blocked,
    Letters,
    OpCall,
    attention_form,
    attention_geometry,
    experts_geometry,
    letter_sizes,
    letters_of,
    lookup,
)
from snpc.types import Cost, QuantizedWeights

LetterSizes = dict[str, int]


def cost_of(model: ir.Model, facts: ShapeFacts) -> Cost:
    """Parameters (weights of any type that are used), MACs at the sizes of ``facts``, bytes of the weights, nodes."""
    constants = {
        id(v.const_value): v for v in model.graph.initializers.values() if v.const_value is not None and v.uses()
    }
    macs, not_counted = 0, Counter[str]()
    for node in model.graph:
        count = node_macs(facts.call(node, opset_version(model, node.domain)), node.domain)
        if count is None or (not count and multiplies_unseen(node)):
            not_counted[node.op_type] += 1
        macs += count or 0
    return Cost(
        sum(map(parameter_count, constants.values())),
        macs,
        sum(weight_bytes(v.const_value) for v in constants.values() if v.const_value is not None),
        model.graph.num_nodes(),
        tuple(f"{number} {name}" for name, number in not_counted.items()),
        quantized_weights(constants.values()),
    )


def quantized_weights(constants: Iterable[ir.Value]) -> tuple[QuantizedWeights, ...]:
    """The parameters that are stored in other types than floats of 16 bits and more, by form."""
    forms = Counter[str]()
    for value in constants:
        tensor, count = value.const_value, parameter_count(value)
        if count and tensor is not None and (not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8):
            forms[quantized_form(value)] += count
    return tuple(QuantizedWeights(form, count) for form, count in forms.items())


def quantized_form(value: ir.Value) -> str:
    """How a weight is quantized: the operator that reads it, its type, and the size of blocks that share a scale."""
    tensor = value.const_value
    assert tensor is not None
    node = next(use.node for use in value.uses() if held_weights(use.node, use.idx, tensor))
    attributes, dtype = attribute_values(node), tensor.dtype.name.lower()
    if lookup(node.domain, node.op_type).weight_count is not None:
        dtype = f"int{attributes.get('bits', attributes.get('expert_weight_bits', 4))}"
    block = attributes.get("block_size", 0)
    return f"{node.op_type} {dtype}" + (f", blocks of {block}" if block else "")


def parameter_count(value: ir.Value) -> int:
    """How many weights a constant holds. Scales, zero points, indices and shapes are none."""
    tensor = value.const_value
    assert tensor is not None
    return max((held_weights(use.node, use.idx, tensor) for use in value.uses()), default=0)


def held_weights(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    """How many weights a constant is to the node that reads it as input ``index``."""
    spec = lookup(node.domain, node.op_type)
    if spec.weights:
        if index in spec.weights and spec.weight_count is not None:
            return spec.weight_count(attribute_values(node), static_shape(tensor), tensor.dtype.bitwidth)
        return int(tensor.size) if index in (*spec.weights, spec.bias) else 0
    if multiplies_scale(node):
        return 0
    return int(tensor.size) if tensor.dtype.is_floating_point() or is_quantized(tensor) else 0


def multiplies_scale(node: ir.Node) -> bool:
    """Whether a product has the scale of quantized activations as a factor: the other one is the scale of a weight."""
    if lookup(node.domain, node.op_type).effect != "scale":
        return False
    sources = [(v.index(), v.producer()) for v in node.inputs if v is not None]
    return any(n is not None and lookup(n.domain, n.op_type).scale_output == index for index, n in sources)


def is_quantized(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant that no node on quantized values reads holds weights of few bits: small integers along two
    axes or more. Wider ones are indices and shapes."""
    return tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 8 and len(tensor.shape) >= 2


def multiplies_unseen(node: ir.Node) -> bool:
    """Whether an operator that snpc cannot count takes a weight of two axes or more."""
    spec = lookup(node.domain, node.op_type)
    if spec.kind != "opaque" or spec.macs is not None:
        return False
    tensors = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
    return any(len(t.shape) >= 2 and (t.dtype.is_floating_point() or is_quantized(t)) for t in tensors)


def contraction_sizes(call: OpCall, domain: str) -> Iterator[tuple[str, Letters, LetterSizes]]:
    """(part, letters, size of each letter) of every contraction in a node; the product of the sizes is its MACs."""
    spec = lookup(domain, call.op)
    if spec.kind == "attention":
        yield from attention_contractions(call, domain)
    elif spec.kind == "contraction" and spec.letters is not None:
        left, right = spec.operands
        if not (call.has(left) and call.has(right)):
            return
        try:
            letters = letters_of(spec, call)
        except Blocked:
            return
        sizes = letter_sizes(letters, call.shape(left), call.shape(right))
        if letters.windowed:
            if len(call.out_shapes[0]) != len(letters.out):
                return  # its shape is not known
            sizes |= dict(zip(letters.out, call.out_shapes[0], strict=True))
            sizes["I"] = call.shape(right)[letters.right.index("I")]
        yield "", letters, sizes
    elif spec.kind == "experts":
        yield from experts_contractions(call)


def experts_contractions(call: OpCall) -> Iterator[tuple[str, Letters, LetterSizes]]:
    """The layers of a node with all experts; each token goes through those that are chosen for it."""
    try:
        sizes = experts_geometry(call)
    except Blocked:
        return
    rows, letters = sizes.tokens * sizes.chosen, Letters("MK", "ENK", "MN")
    yield "inner", letters, {"M": rows, "K": sizes.width, "N": sizes.hidden * sizes.fused}
    yield "outer", letters, {"M": rows, "K": sizes.hidden, "N": sizes.width}
    if call.has(EXPERTS_FORM.inner[1][0]):
        yield "gate", letters, {"M": rows, "K": sizes.width, "N": sizes.hidden}


def node_macs(call: OpCall, domain: str) -> int | None:
    """Multiply-accumulates of a node; None where a node that multiplies cannot be counted."""
    spec = lookup(domain, call.op)
    if spec.macs is not None:
        needed = [k for k in (0, *spec.weights[:2]) if k < len(call.shapes)]  # further ones may be left out
        return spec.macs(call) if all(call.has(k) for k in needed) and call.out_shapes[0] else None
    sizes = [count_macs(sizes) for _, _, sizes in contraction_sizes(call, domain)]
    return sum(sizes) if sizes or spec.kind not in ("contraction", "attention", "experts") else None


def attention_contractions(call: OpCall, domain: str) -> Iterator[tuple[str, Letters, LetterSizes]]:
    shape = attention_geometry(call, domain)
    if shape is None:
        return
    if attention_form(call, domain).packed == "weight":
        width, columns = call.shape(1)
        yield (
            "projection",
            Letters("aMK", "KN", "aMN"),
            {"a": shape.batch, "M": shape.length, "K": width, "N": columns},
        )
    sizes = {"a": shape.batch, "b": shape.heads, "M": shape.length, "N": shape.kv_length, "K": shape.width}
    yield "scores", Letters("abMK", "abNK", "abMN"), dict(sizes)
    yield "context", Letters("abMK", "abKN", "abMN"), {**sizes, "K": shape.kv_length, "N": shape.value_width}


def count_macs(sizes: Mapping[str, int]) -> int:
    return int(np.prod(list(sizes.values()), dtype=np.float64))
