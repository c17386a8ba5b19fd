"""What each output of a model is, by what the graph does at its end: scores of classes, a KV cache, or plain values.

- *probabilities*, *log-probabilities*: a Softmax or LogSoftmax is behind the output, with nothing between them but
  movement, sums of two of them (a dual softmax), selection, scatter and concatenation. The class axis is its axis.
- *logits*: a product with a stored weight is behind the output [batch, classes] or [batch, tokens, classes], with
  nothing between them but a bias, a cast, a scale, a soft cap or movement. A sum of such products (two heads) counts
  too. An embedding or a regression may end in the same way, so one more thing must speak for classes: a name such as
  ``logits``, more outputs than inputs (a vocabulary), or a weight that also embeds tokens. A name such as ``embeds``
  speaks against them, and so do boxes beside them: a detector often has a sigmoid for every class, of which a softmax
  knows nothing.
- *linear*: as logits, with a bias, but nothing more than that speaks for classes. Values have to decide.
- *cache*: an input that is a KV cache reaches it through movement and concatenation, an attention node returns it as
  its keys or values, or it is called ``present``.

Normalizations, pooling, activations and residual sums make plain *values*: hidden states, embeddings, heat maps, boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, attribute_values, is_stored_constant, opset_version
from snpc.ops import LOG, Blocked, lookup, partly_written
from snpc.passes.propagation import varying_axes

OutputContent = Literal["probabilities", "log_probabilities", "logits", "linear", "cache", "values"]

CLASS_NAMES = re.compile(r"logit|class|(^|[^a-z])cls([^a-z]|$)|vocab|lm_head|prob", re.IGNORECASE)
OTHER_NAMES = re.compile(
    r"embed|feature|hidden|pool|project|box|coord|point|depth|mask|regress|pose|iou|value|offset|delta|state",
    re.IGNORECASE,
)
CACHE_NAMES = re.compile(r"^(present|past)([^a-z]|$)|past_key_values|key_cache|value_cache", re.IGNORECASE)
BOX_NAMES = re.compile(r"box", re.IGNORECASE)
BOX_SIZE = 4


@dataclass(frozen=True)
class OutputKind:
    """What an output holds. ``axis``: that of the classes, counted from the end (-1: the last one)."""

    name: str
    content: OutputContent
    axis: int = -1
    why: str = ""


def find_output_kinds(model: ir.Model, facts: ShapeFacts) -> dict[str, OutputKind]:
    """Output -> its kind, for every output of the model."""
    return {str(value.name): output_kind(model, facts, value) for value in model.graph.outputs}


def output_kind(model: ir.Model, facts: ShapeFacts, value: ir.Value) -> OutputKind:
    name = str(value.name)
    if CACHE_NAMES.search(name):
        return OutputKind(name, "cache", why="a KV cache, by its name")
    if holds_cache(model, value):
        return OutputKind(name, "cache", why="a KV cache")
    found = [(class_axis(model, facts, path, value), path) for path in paths_to_softmax(model, facts, value)]
    axes = [(axis, path) for axis, path in found if axis is not None]
    if axes:  # of a dual softmax the last axis
        axis, path = max(axes, key=lambda pair: pair[0])
        content: OutputContent = "log_probabilities" if path.logarithm else "probabilities"
        return OutputKind(name, content, axis, f"{path.node.op_type} behind it")
    return linear_kind(model, facts, value)


# -- caches ----------------------------------------------------------------------------------------------------------


def holds_cache(model: ir.Model, value: ir.Value) -> bool:
    """Does an input reach ``value`` through movement and one concatenation, or an attention node return it as its keys
    or values?"""
    joined, todo, seen = False, [value], set[ir.Value]()
    while todo:
        value = todo.pop()
        node = value.producer()
        if value in seen:
            continue
        seen.add(value)
        if node is None:
            if joined and value.is_graph_input() and not value.is_initializer():
                return True
            continue
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "attention":
            if value is not node.outputs[0]:
                return True
        elif spec.kind in ("concat", "scatter"):
            joined = True
            todo += [v for v in (node.inputs if spec.kind == "concat" else node.inputs[:1]) if v is not None]
        elif (spec.kind == "movement" or spec.effect == "same") and node.inputs[0] is not None:
            todo.append(node.inputs[0])
    return False


# -- softmax ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxPath:
    """A softmax ``node``, and the values between it and the output, upstream first. ``logarithm``: of its shares."""

    node: ir.Node
    values: tuple[ir.Value, ...]
    logarithm: bool


def paths_to_softmax(model: ir.Model, facts: ShapeFacts, value: ir.Value) -> Iterator[SoftmaxPath]:
    """Ways upstream from ``value`` to a softmax through nodes behind which shares are shares still."""
    todo: list[tuple[ir.Value, tuple[ir.Value, ...], bool]] = [(value, (), False)]
    seen: set[ir.Value] = set()
    while todo:
        value, behind, logarithm = todo.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        spec, path = lookup(node.domain, node.op_type), (value, *behind)
        if spec.makes_shares or spec.makes_log_shares:
            yield SoftmaxPath(node, path, logarithm or spec.makes_log_shares)
        elif node.op_type == LOG and not logarithm and node.inputs[0] is not None:
            todo.append((node.inputs[0], path, True))
        else:
            todo += [(source, path, logarithm) for source in shares_through(node, facts)]


def shares_through(node: ir.Node, facts: ShapeFacts) -> Iterator[ir.Value]:
    """Inputs of which the output holds the shares, or their sum."""
    spec = lookup(node.domain, node.op_type)
    data = [value for value in node.inputs if value is not None and not is_stored_constant(value)]
    if spec.kind in ("movement", "concat", "scatter") or spec.effect == "same":
        yield from (value for value in data if value.dtype is None or value.dtype.is_floating_point())
    elif spec.kind == "pointwise" and ((spec.effect == "add" and not spec.subtracts) or spec.chooses):
        shape = facts.shape.get(node.outputs[0])
        yield from (value for value in data if facts.shape.get(value) == shape and value.dtype != ir.DataType.BOOL)


def class_axis(model: ir.Model, facts: ShapeFacts, path: SoftmaxPath, output: ir.Value) -> int | None:
    """The axis of ``output`` that the softmax is over, counted from the end; None where that cannot be followed."""
    spec = lookup(path.node.domain, path.node.op_type)
    call = facts.call(path.node, opset_version(model, path.node.domain))
    shape = facts.shape.get(path.values[0])
    if shape is None or not call.has(0) or spec.axes is None:
        return None
    axes = [axis for axis in spec.axes(call) if shape[axis] > 1]
    if len(axes) != 1:
        return None
    labels = np.arange(shape[axes[0]], dtype=np.int32).reshape([n if k == axes[0] else 1 for k, n in enumerate(shape)])
    for source, value in zip(path.values, path.values[1:], strict=False):
        node = value.producer()
        assert node is not None
        step = lookup(node.domain, node.op_type)
        if step.kind == "movement" and step.move is not None:
            try:
                moved = step.move(facts.call(node, opset_version(model, node.domain)), labels)
            except (Blocked, AssertionError, ValueError):
                return None
            labels = moved[list(node.outputs).index(value)] if node.inputs[0] is source else labels
    varying = varying_axes(labels)
    return next(iter(varying)) - labels.ndim if len(varying) == 1 else None


# -- linear layers ---------------------------------------------------------------------------------------------------


def linear_kind(model: ir.Model, facts: ShapeFacts, value: ir.Value) -> OutputKind:
    """Logits where the output is a product with a stored weight and more than that speaks for classes."""
    name, shape = str(value.name), facts.shape.get(value)
    plain = OutputKind(name, "values")
    if shape is None or OTHER_NAMES.search(name) or returns_boxes(model, facts):
        return plain
    layers = last_linear_layers(facts, value)
    if not layers:
        return plain
    called = CLASS_NAMES.search(name) is not None
    if any(layer.windowed for layer in layers):  # a heat map, unless it is called otherwise
        is_class = called and len(shape) > 2 and shape[1] > 1
        return OutputKind(name, "logits", 1 - len(shape), "a convolution, called so") if is_class else plain
    if len(shape) not in (2, 3) or shape[-1] < 2:
        return plain
    if called:
        return OutputKind(name, "logits", why="a linear layer, called so")
    if any(layer.tied or shape[-1] > (layer.inputs or shape[-1]) for layer in layers):
        return OutputKind(name, "logits", why="a linear layer onto a vocabulary")
    return OutputKind(name, "linear") if any(layer.bias for layer in layers) else plain


def returns_boxes(model: ir.Model, facts: ShapeFacts) -> bool:
    """Is there an output of boxes? The scores of a detector are often those of a sigmoid for every class."""
    shapes = [facts.shape.get(value) for value in model.graph.outputs if BOX_NAMES.search(str(value.name))]
    return any(shape is not None and len(shape) == 3 and shape[-1] == BOX_SIZE for shape in shapes)


@dataclass(frozen=True)
class LastLayer:
    """The product behind an output. ``inputs``: how many entries it sums over, None for unknown; ``tied``: its weight
    is looked up elsewhere; ``windowed``: a convolution."""

    inputs: int | None
    bias: bool
    tied: bool
    windowed: bool


def last_linear_layers(facts: ShapeFacts, value: ir.Value) -> list[LastLayer]:
    """The products with stored weights that ``value`` is: one, or the sum of several, up to a bias, a scale, a cast,
    movement, and one nonlinear function between two scales (a soft cap). Empty for anything else."""
    bias, bounded = False, False
    while (node := value.producer()) is not None:
        spec = lookup(node.domain, node.op_type)
        data = [v for v in node.inputs if v is not None and facts.value.get(v) is None and not is_stored_constant(v)]
        if spec.kind == "contraction":
            return contraction_layer(facts, node, bias)
        if spec.effect == "add" and not spec.subtracts and len(data) > 1:
            parts = [last_linear_layers(facts, part) for part in data]
            return [layer for part in parts for layer in part] if all(parts) else []
        if len(data) != 1:
            return []
        if spec.effect == "nonlinear" and spec.kind == "pointwise":
            if not bounded or len(node.inputs) != 1:
                return []
            source = data[0].producer()
            if source is None or lookup(source.domain, source.op_type).effect != "scale":
                return []
            bounded = False
        elif not (spec.kind == "movement" or spec.effect in ("same", "scale", "add")):
            return []
        bounded = bounded or (spec.effect == "scale" and spec.kind == "pointwise")
        bias, value = bias or spec.effect == "add", data[0]
    return []


def contraction_layer(facts: ShapeFacts, node: ir.Node, bias: bool) -> list[LastLayer]:
    """The layer that this product is, if one of its factors is stored."""
    spec = lookup(node.domain, node.op_type)
    operands = [node.inputs[k] for k in spec.operands if k < len(node.inputs)]
    weights = [weight for v in operands if v is not None and (weight := weight_behind(v)) is not None]
    sources = [v for v in operands if v is not None and weight_behind(v) is None]
    if len(weights) != 1 or len(sources) != 1:
        return []
    shape = facts.shape.get(sources[0])
    tied = any(lookup(user.domain, user.op_type).tables for user in weights[0].consumers())
    with_bias = bias or (spec.bias is not None and spec.bias < len(node.inputs) and node.inputs[spec.bias] is not None)
    return [LastLayer(shape[-1] if shape else None, with_bias, tied, spec.windowed)]


def weight_behind(value: ir.Value) -> ir.Value | None:
    """The stored constant that ``value`` is, up to movement and casts."""
    while (node := value.producer()) is not None:
        spec = lookup(node.domain, node.op_type)
        if not node.inputs or node.inputs[0] is None or not (spec.kind == "movement" or spec.effect == "same"):
            return None
        value = node.inputs[0]
    return value if is_stored_constant(value) else None


def partly_written_outputs(model: ir.Model) -> frozenset[str]:
    """Outputs whose last rows hold whatever lay in memory: caches of sliding windows that are not full."""
    return frozenset(
        str(node.outputs[k].name)
        for node in model.graph
        for k in partly_written(node.domain, node.op_type, attribute_values(node))
        if k < len(node.outputs) and node.outputs[k].is_graph_output()
    )
