"""Transformers as older exporters and onnxruntime's transformer optimizer write them: fused operators in old opsets.

Operators that onnxruntime has in opsets where the standard does not have them yet (``LayerNormalization`` below opset
17), operators of com.microsoft, past keys and values in one tensor [2, batch, heads, length, width], packed projections
of Megatron, and the shape arithmetic of TensorFlow exporters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.oracle import Array

WIDTH, HEADS, HIDDEN, VOCABULARY, POSITIONS = 32, 4, 48, 40, 24
HEAD = WIDTH // HEADS
BATCH, LENGTH, PAST = 2, 7, 5
MICROSOFT = "com.microsoft"
LAST_INDEX = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """A model with inputs that it runs on."""

    model: onnx.ModelProto
    feeds: Mapping[str, Array]


@dataclass
class Writer:
    """Writes nodes in one opset; axes are attributes below opset 13, and inputs from there on."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """Add a node; returns the names of its outputs, or the one name. ``kind``: type, behind its domain and "."."""
        domain, _, kind = kind.rpartition("::")
        at = len(self.nodes)
        names = [name] if name else [f"{kind.lower()}_{at}" + (f"_{k}" if k else "") for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}_{at}", domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def weight(self, *shape: int, positive: bool = False) -> str:
        rng = np.random.default_rng(len(self.constants))
        array = rng.normal(size=shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.3) + (1.0 if positive else 0.0)
        return self.constant(array.astype(np.float32))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.asarray(numbers, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, np.float32))

    def constant(self, array: Array) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = array
        return name

    def along(self, kind: str, value: str, *axes: int) -> Any:
        """Squeeze or Unsqueeze."""
        return self.op(kind, value, axes=list(axes)) if self.opset < 13 else self.op(kind, value, self.ints(*axes))

    def split(self, value: str, sizes: tuple[int, ...], axis: int) -> Any:
        if self.opset < 13:
            return self.op("Split", value, outputs=len(sizes), axis=axis, split=list(sizes))
        return self.op("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis)

    def slice(self, value: str, starts: str, ends: str, axis: int) -> str:
        return str(self.op("Slice", value, starts, ends, self.ints(axis), self.ints(1)))

    def layer_norm(self, value: str, name: str = "") -> str:
        scale, bias = self.weight(WIDTH, positive=True), self.weight(WIDTH)
        return str(self.op("LayerNormalization", value, scale, bias, name=name, axis=-1, epsilon=1e-5))

    def linear(self, value: str, fan_in: int, fan_out: int) -> str:
        return str(self.op("Add", self.op("MatMul", value, self.weight(fan_in, fan_out)), self.weight(fan_out)))

    def heads(self, value: str) -> str:
        """[batch, length, width] -> [batch, heads, length, head width]."""
        return str(self.op("Transpose", self.op("Reshape", value, self.ints(0, 0, HEADS, HEAD)), perm=[0, 2, 1, 3]))

    def merged_heads(self, value: str) -> str:
        return str(self.op("Reshape", self.op("Transpose", value, perm=[0, 2, 1, 3]), self.ints(0, 0, WIDTH)))

    def model(
        self,
        inputs: Mapping[str, tuple[int, list[Any]]],
        outputs: Mapping[str, tuple[int, list[Any]]],
        domains: Mapping[str, int] | None = None,
    ) -> onnx.ModelProto:
        """``inputs``, ``outputs``: element type and shape by name. ``domains``: opset imports."""
        imports = {"": self.opset, MICROSOFT: 1} if domains is None else domains
        graph = helper.make_graph(
            self.nodes,
            "form",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in imports.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=6)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def hidden_states(length: int = LENGTH) -> Array:
    return rng().normal(size=(BATCH, length, WIDTH)).astype(np.float32)


HIDDEN_STATES = (TensorProto.FLOAT, ["batch", "sequence", WIDTH])


# -- encoders --------------------------------------------------------------------------------------------------------


def encoder(opset: int, domains: Mapping[str, int] | None = None) -> Form:
    """A BERT layer with decomposed attention; its normalizations are fused, in the default domain."""
    w = Writer(opset)
    normed = w.layer_norm("x")
    q, k, v = (w.heads(w.linear(normed, WIDTH, WIDTH)) for _ in range(3))
    scores = w.op("Div", w.op("MatMul", q, w.op("Transpose", k, perm=[0, 1, 3, 2])), w.number(HEAD**0.5))
    kept = w.op("Cast", w.along("Unsqueeze", "mask", 1, 2), to=TensorProto.FLOAT)
    masked = w.op("Add", scores, w.op("Mul", w.op("Sub", w.number(1.0), kept), w.number(-10000.0)))
    context = w.merged_heads(w.op("MatMul", w.op("Softmax", masked, axis=3), v))
    first = w.layer_norm(w.op("Add", w.linear(context, WIDTH, WIDTH), normed))
    hidden = w.op(f"{MICROSOFT}::FastGelu", w.op("MatMul", first, w.weight(WIDTH, HIDDEN)), w.weight(HIDDEN))
    w.layer_norm(w.op("Add", w.linear(hidden, HIDDEN, WIDTH), first), name="y")
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 5:] = 0
    model = w.model(
        {"x": HIDDEN_STATES, "mask": (TensorProto.INT64, ["batch", "sequence"])}, {"y": HIDDEN_STATES}, domains
    )
    return Form(model, {"x": hidden_states(), "mask": mask})


def spelled_default_domain() -> Form:
    """Opset import and nodes with the default domain's long name."""
    form = encoder(12, {"ai.onnx": 12, MICROSOFT: 1})
    for node in form.model.graph.node:
        node.domain = node.domain or "ai.onnx"
    return form


def fused_encoder(opset: int, imported: bool = True) -> Form:
    """The optimizer's output for BERT: embeddings, attention and residual normalizations in one node each."""
    w = Writer(opset)
    tables = [w.weight(rows, WIDTH) for rows in (VOCABULARY, POSITIONS, 2)]
    affine = [w.weight(WIDTH, positive=True), w.weight(WIDTH)]
    embedded, lengths = w.op(
        f"{MICROSOFT}::EmbedLayerNormalization", "ids", "segments", *tables, *affine, "mask", outputs=2, epsilon=1e-12
    )
    value = embedded
    for layer in range(2):
        attended = w.op(
            f"{MICROSOFT}::Attention", value, w.weight(WIDTH, 3 * WIDTH), w.weight(3 * WIDTH), lengths, num_heads=HEADS
        )
        projected = w.op("MatMul", attended, w.weight(WIDTH, WIDTH))
        first = skip_norm(w, projected, value)
        hidden = w.op(
            f"{MICROSOFT}::{('BiasGelu', 'FastGelu')[layer]}",
            w.op("MatMul", first, w.weight(WIDTH, HIDDEN)),
            w.weight(HIDDEN),
        )
        value = skip_norm(w, w.op("MatMul", hidden, w.weight(HIDDEN, WIDTH)), first, name="y" if layer else "")
    ids = (TensorProto.INT32, ["batch", "sequence"])
    model = w.model({"ids": ids, "segments": ids, "mask": ids}, {"y": HIDDEN_STATES}, None if imported else {"": opset})
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[1, 5:] = 0
    numbers = rng().integers(0, VOCABULARY, (BATCH, LENGTH), dtype=np.int32)
    return Form(model, {"ids": numbers, "segments": numbers % 2, "mask": mask})


def skip_norm(w: Writer, value: str, skip: str, name: str = "") -> str:
    affine = [w.weight(WIDTH, positive=True), w.weight(WIDTH), w.weight(WIDTH)]
    return str(w.op(f"{MICROSOFT}::SkipLayerNormalization", value, skip, *affine, name=name, epsilon=1e-12))


# -- decoders whose past is one tensor -------------------------------------------------------------------------------

PAST_STATES = (TensorProto.FLOAT, [2, "batch", HEADS, "past_sequence", HEAD])
PRESENT_STATES = (TensorProto.FLOAT, [2, "batch", HEADS, "total_sequence", HEAD])


def past_states() -> Array:
    return rng().normal(size=(2, BATCH, HEADS, PAST, HEAD)).astype(np.float32)


def with_past(w: Writer, k: str, v: str) -> tuple[str, str]:
    """Keys and values behind those of the past; both are returned in one tensor, too."""
    parts = [w.along("Squeeze", part, 0) for part in w.split("past", (1, 1), 0)]
    keys, values = (w.op("Concat", old, new, axis=-2) for old, new in zip(parts, (k, v), strict=True))
    w.op("Concat", w.along("Unsqueeze", keys, 0), w.along("Unsqueeze", values, 0), name="present", axis=0)
    return keys, values


def length_of(w: Writer, value: str) -> str:
    """The last but one size of a tensor, as a tensor of one entry."""
    shape = w.op("Shape", value)
    return str(w.op("Slice", shape, w.ints(-2), w.ints(-1), w.ints(0)))


def decoder(opset: int) -> Form:
    """A GPT-2 layer: packed projection, a stored causal mask that is cut to the lengths, and the past in one tensor."""
    w = Writer(opset)
    normed = w.layer_norm("x")
    packed = w.linear(normed, WIDTH, 3 * WIDTH)
    q, k, v = (w.heads(part) for part in w.split(packed, (WIDTH,) * 3, 2))
    keys, values = with_past(w, k, v)
    total, length = length_of(w, keys), length_of(w, q)
    causal = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.uint8))
    rows = w.slice(w.constant(causal), w.op("Sub", total, length), total, 2)
    mask = w.op("Cast", w.slice(rows, w.ints(0), total, 3), to=TensorProto.BOOL)
    scores = w.op("Div", w.op("MatMul", q, w.op("Transpose", keys, perm=[0, 1, 3, 2])), w.number(HEAD**0.5))
    masked = w.op("Where", mask, scores, w.number(-10000.0))
    context = w.merged_heads(w.op("MatMul", w.op("Softmax", masked, axis=3), values))
    flat = w.op("Reshape", context, w.op("Concat", w.ints(-1), w.op(
        "Slice", w.op("Shape", context), w.ints(-1), w.ints(LAST_INDEX), w.ints(0)), axis=0))  # fmt: skip
    projected = w.op("Gemm", flat, w.weight(WIDTH, WIDTH), w.weight(WIDTH), alpha=1.0, beta=1.0)
    sizes = w.op("Slice", w.op("Shape", context), w.ints(0), w.ints(2), w.ints(0))
    unflat = w.op("Reshape", projected, w.op("Concat", sizes, w.ints(WIDTH), axis=0))
    feed_forward(w, w.op("Add", unflat, "x"))
    return decoder_form(w)


def feed_forward(w: Writer, value: str) -> None:
    hidden = w.op(f"{MICROSOFT}::FastGelu", w.op("MatMul", w.layer_norm(value), w.weight(WIDTH, HIDDEN)))
    w.op("Add", w.linear(hidden, HIDDEN, WIDTH), value, name="y")


def decoder_form(w: Writer) -> Form:
    model = w.model({"x": HIDDEN_STATES, "past": PAST_STATES}, {"y": HIDDEN_STATES, "present": PRESENT_STATES})
    return Form(model, {"x": hidden_states(), "past": past_states()})


def fused_decoder(opset: int) -> Form:
    """The optimizer's output for GPT-2: the past enters the fused node, and leaves it, as one tensor."""
    w = Writer(opset)
    normed = w.layer_norm("x")
    attended, _ = w.op(
        f"{MICROSOFT}::Attention", normed, w.weight(WIDTH, 3 * WIDTH), w.weight(3 * WIDTH), "", "past", outputs=2,
        num_heads=HEADS, unidirectional=1,
    )  # fmt: skip
    w.nodes[-1].output[1] = "present"
    feed_forward(w, w.op("Add", w.linear(attended, WIDTH, WIDTH), "x"))
    return decoder_form(w)


def megatron(opset: int) -> Form:
    """Megatron's GPT-2: heads in front of q, k and v in the packed projection, queries and keys divided by the fourth
    root of their width, and the past in one tensor. The mask is an input that is cut to the lengths."""
    w = Writer(opset)
    normed = w.layer_norm("x")
    packed = w.op("Reshape", w.linear(normed, WIDTH, 3 * WIDTH), w.ints(0, 0, HEADS, 3 * HEAD))
    q, k, v = (w.op("Transpose", part, perm=[0, 2, 1, 3]) for part in w.split(packed, (HEAD,) * 3, 3))
    keys, values = with_past(w, k, v)
    root = HEAD**0.25
    scaled_keys = w.op("Div", w.op("Transpose", keys, perm=[0, 1, 3, 2]), w.number(root))
    scores = w.op("MatMul", w.op("Div", q, w.number(root)), scaled_keys)
    shape = w.op("Shape", scores)
    total = w.along("Unsqueeze", w.op("Gather", shape, w.constant(np.asarray(3, np.int64)), axis=0), 0)
    length = w.op("Gather", w.op("Shape", normed), w.constant(np.asarray(1, np.int64)), axis=0)
    start = w.op("Sub", w.op("Gather", shape, w.constant(np.asarray(3, np.int64)), axis=0), length)
    rows = w.slice("mask", w.along("Unsqueeze", start, 0), total, 2)
    kept = w.slice(rows, w.ints(0), total, 3)
    dropped = w.op("Mul", w.op("Sub", w.number(1.0), kept), w.number(10000.0))
    masked = w.op("Sub", w.op("Mul", scores, kept), dropped)
    context = w.merged_heads(w.op("MatMul", w.op("Softmax", masked, axis=3), values))
    feed_forward(w, w.op("Add", "x", w.linear(context, WIDTH, WIDTH)))
    mask = (TensorProto.FLOAT, [1, 1, POSITIONS, POSITIONS])
    model = w.model(
        {"x": HIDDEN_STATES, "mask": mask, "past": PAST_STATES}, {"y": HIDDEN_STATES, "present": PRESENT_STATES}
    )
    causal = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.float32))
    return Form(model, {"x": hidden_states(), "mask": causal, "past": past_states()})


# -- TensorFlow ------------------------------------------------------------------------------------------------------


def tensorflow_encoder(opset: int) -> Form:
    """BERT of TensorFlow: every product on two axes, behind a Reshape, and sizes that pass through int32 and float."""
    w = Writer(opset)
    ids = w.op("Cast", "ids", to=TensorProto.INT32)
    shape = w.op("Cast", w.op("Shape", ids), to=TensorProto.INT32)
    batch, length = (w.along("Squeeze", w.op("Cast", w.op(
        "Slice", w.op("Cast", shape, to=TensorProto.FLOAT), w.ints(k), w.ints(k + 1), w.ints(0)
    ), to=TensorProto.INT32), 0) for k in range(2))  # fmt: skip
    rows = w.op("Reshape", ids, w.ints(-1))
    words = w.op("Gather", w.weight(VOCABULARY, WIDTH), rows, axis=0)

    def sizes(*parts: str | int) -> str:
        """A target of Reshape, from scalars in int32 and numbers."""
        whole = [
            w.constant(np.asarray([part], np.int32)) if isinstance(part, int) else w.along("Unsqueeze", part, 0)
            for part in parts
        ]
        return str(w.op("Cast", w.op("Concat", *whole, axis=0), to=TensorProto.INT64))

    spread = w.op("Reshape", words, sizes(batch, length, WIDTH))
    end = w.op("Cast", w.along("Unsqueeze", length, 0), to=TensorProto.INT64)
    positions = w.op("Slice", w.weight(POSITIONS, WIDTH), w.ints(0), end, w.ints(0))
    embedded = w.layer_norm(w.op("Add", spread, w.op("Reshape", positions, sizes(1, length, WIDTH))))
    flat = w.op("Reshape", embedded, w.ints(-1, WIDTH))

    def heads(value: str) -> str:
        return str(w.op("Transpose", w.op("Reshape", value, sizes(batch, length, HEADS, HEAD)), perm=[0, 2, 1, 3]))

    q, k, v = (heads(w.linear(flat, WIDTH, WIDTH)) for _ in range(3))
    scores = w.op("Mul", w.op("MatMul", q, w.op("Transpose", k, perm=[0, 1, 3, 2])), w.number(HEAD**-0.5))
    ones = w.op("ConstantOfShape", sizes(batch, length, 1), value=numpy_helper.from_array(np.ones(1, np.float32)))
    mask = w.op("Reshape", w.op("Cast", "mask", to=TensorProto.FLOAT), sizes(batch, 1, length))
    kept = w.along("Unsqueeze", w.op("Mul", ones, mask), 1)
    masked = w.op("Add", scores, w.op("Mul", w.op("Sub", w.number(1.0), kept), w.number(-10000.0)))
    context = w.op("Transpose", w.op("MatMul", w.op("Softmax", masked, axis=3), v), perm=[0, 2, 1, 3])
    merged = w.op("Reshape", context, sizes(w.op("Mul", batch, length), WIDTH))
    first = w.layer_norm(w.op("Add", w.linear(merged, WIDTH, WIDTH), flat))
    hidden = w.linear(first, WIDTH, HIDDEN)
    cubed = w.op("Mul", w.op("Pow", hidden, w.number(3.0)), w.number(0.044715))
    gate = w.op("Tanh", w.op("Mul", w.op("Add", hidden, cubed), w.number(0.7978845608)))
    gelu = w.op("Mul", w.op("Mul", w.op("Add", gate, w.number(1.0)), w.number(0.5)), hidden)
    last = w.layer_norm(w.op("Add", w.linear(gelu, HIDDEN, WIDTH), first))
    w.op("Reshape", last, sizes(batch, length, WIDTH), name="y")
    ids_type = (TensorProto.INT64, ["unk__1", "unk__2"])
    mask_type = (TensorProto.INT64, ["unk__3", "unk__4"])
    model = w.model({"ids": ids_type, "mask": mask_type}, {"y": (TensorProto.FLOAT, [None, None, WIDTH])})
    numbers = rng().integers(0, VOCABULARY, (BATCH, LENGTH))
    mask_feed = np.ones((BATCH, LENGTH), np.int64)
    mask_feed[1, 4:] = 0
    return Form(model, {"ids": numbers, "mask": mask_feed})


def deep_encoder(layers: int) -> onnx.ModelProto:
    """Layers of attention and feed-forward that compute their sizes as exporters do; all tokens reach the output."""
    w = Writer(13)
    value = w.op("Identity", "x")
    for _ in range(layers):
        shape = w.op("Shape", value)
        sizes = [w.op("Slice", shape, w.ints(k), w.ints(k + 1), w.ints(0)) for k in range(2)]
        split, merged = (w.op("Concat", *sizes, w.ints(*rest), axis=0) for rest in ((HEADS, HEAD), (WIDTH,)))
        q, k, v = (
            w.op("Transpose", w.op("Reshape", w.linear(value, WIDTH, WIDTH), split), perm=[0, 2, 1, 3])
            for _ in range(3)
        )
        scores = w.op("MatMul", q, w.op("Transpose", k, perm=[0, 1, 3, 2]))
        context = w.op("Transpose", w.op("MatMul", w.op("Softmax", scores, axis=3), v), perm=[0, 2, 1, 3])
        value = w.op("Add", w.linear(w.op("Reshape", context, merged), WIDTH, WIDTH), value)
        hidden = w.op("Tanh", w.linear(w.layer_norm(value), WIDTH, HIDDEN))
        value = w.op("Add", w.linear(hidden, HIDDEN, WIDTH), value)
    w.op("Identity", value, name="y")
    return w.model({"x": HIDDEN_STATES}, {"y": HIDDEN_STATES})


OPTIMIZER_FORMS: dict[str, Callable[[], Form]] = {
    "spelled_default_domain": spelled_default_domain,
    "fused_encoder_without_import": lambda: fused_encoder(11, imported=False),
    **{f"encoder_{n}": functools.partial(encoder, n) for n in (7, 9, 11, 12, 13, 16)},
    **{f"fused_encoder_{n}": functools.partial(fused_encoder, n) for n in (9, 11, 12, 13)},
    **{f"decoder_{n}": functools.partial(decoder, n) for n in (11, 13)},
    **{f"fused_decoder_{n}": functools.partial(fused_decoder, n) for n in (11, 12)},
    **{f"megatron_{n}": functools.partial(megatron, n) for n in (11, 13)},
    **{f"tensorflow_encoder_{n}": functools.partial(tensorflow_encoder, n) for n in (11, 13)},
}
