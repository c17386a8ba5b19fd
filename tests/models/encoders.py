"""Small encoders written by hand, in every form that token reduction has to tell apart, and the same in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Exit = Literal["class", "mean", "both", "all", "last", "real", "sum", "max"]


@dataclass(frozen=True)
class Encoder:
    """Patches [batch, 12, width] enter; a class token is laid before them where ``exit`` reads one."""

    depth: int = 4
    patches: int = 12
    width: int = 16
    heads: int = 2
    exit: Exit = "class"
    opset: int = 17
    half: bool = False
    fused: bool = False
    literal: bool = False  # sizes of tokens are numbers in the reshapes
    merged: bool = False  # batch and heads share an axis
    bias: bool = False  # scores get a table over pairs of positions
    masked: bool = False  # an input says which tokens are none
    mixing: bool = False  # a weight over tokens in the last block
    again: bool = False  # positions are added to the input of every block
    skip: bool = False  # what the first block gives is added to what the last but one gives
    apart: Literal["", "sliced", "gathered"] = ""  # a product per head, of slices or gathered heads
    linear: bool = False  # no softmax in the last block: keys and values are summed over tokens first
    learned: tuple[int, int, int] = (0, 0, 0)  # learned tokens: in front, amid the patches (without positions), behind
    longest: int = 0  # inputs of any number of patches: the first rows of a table of so many positions are added
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.patches + (self.exit in ("class", "both")) + sum(self.learned)

    @property
    def kind(self) -> type[np.generic]:
        return np.float16 if self.half else np.float32

    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        d = self.width

        def draw(*shape: int, scale: float = 1.0) -> Array:
            return np.asarray(rng.standard_normal(shape) * scale / np.sqrt(shape[0]), self.kind)

        stored = self.longest or self.tokens - self.learned[1]
        weights = {"class": draw(1, 1, d), "positions": draw(1, stored, d), "head": draw(d, 5)}
        for k in range(self.depth):
            weights |= {f"{name}{k}": draw(d, d, scale=1.5) for name in ("q", "k", "v", "o")}
            weights |= {f"up{k}": draw(d, 2 * d), f"down{k}": draw(2 * d, d)}
            weights |= {f"gain{k}{n}": 1 + draw(d, scale=0.3) for n in "ab"}
            weights |= {f"shift{k}{n}": draw(d, scale=0.3) for n in "ab"}
        weights["table"] = draw(1, self.heads, self.tokens, self.tokens)
        weights["mix"] = draw(self.tokens, self.tokens)
        weights |= {f"learned{k}": draw(1, count, d) for k, count in enumerate(self.learned) if count}
        return weights

    def model(self) -> onnx.ModelProto:
        return Writing(self).model()

    def feeds(self, batch: int = 3, seed: int = 1) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        feeds = {"x": rng.standard_normal((batch, self.patches, self.width)).astype(self.kind)}
        if self.masked:
            lengths = rng.integers(self.tokens // 2, self.tokens, batch)
            feeds["mask"] = (np.arange(self.tokens) < lengths[:, None]).astype(self.kind)
        return feeds


class Writing:
    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.nodes: list[onnx.NodeProto] = []
        self.constants = dict(encoder.weights())

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def ints(self, *numbers: int) -> str:
        name = "ints_" + "_".join(map(str, numbers)).replace("-", "m")
        self.constants[name] = np.asarray(numbers, np.int64)
        return name

    def number(self, value: float) -> str:
        self.constants[f"number_{value}"] = np.asarray(value, self.encoder.kind)
        return f"number_{value}"

    def norm(self, x: str, tag: str) -> str:
        e = self.encoder
        if e.opset >= 17:
            return self.op("LayerNormalization", x, f"gain{tag}", f"shift{tag}", axis=-1, epsilon=1e-5)
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1], keepdims=1))
        square = self.op("ReduceMean", self.op("Mul", centred, centred), axes=[-1], keepdims=1)
        unit = self.op("Div", centred, self.op("Sqrt", self.op("Add", square, self.number(1e-5))))
        return self.op("Add", self.op("Mul", unit, f"gain{tag}"), f"shift{tag}")

    def attention(self, x: str, k: int) -> str:
        e = self.encoder
        d, h, w = e.width, e.heads, e.width // e.heads
        q, key, v = (self.op("MatMul", x, f"{name}{k}") for name in ("q", "k", "v"))
        if e.fused:
            context = self.op("Attention", q, key, v, q_num_heads=h, kv_num_heads=h)
            return self.op("MatMul", context, f"o{k}")
        if e.linear and k == e.depth - 1:
            state = self.op("MatMul", self.op("Transpose", self.op("Relu", key), perm=[0, 2, 1]), v)
            total = self.op("ReduceSum", self.op("Relu", key), self.ints(1), keepdims=1)
            over = self.op("ReduceSum", self.op("Mul", self.op("Relu", q), total), self.ints(2), keepdims=1)
            above = self.op("MatMul", self.op("Relu", q), state)
            return self.op("MatMul", self.op("Div", above, self.op("Add", over, self.number(1.0))), f"o{k}")
        if e.apart:
            pieces = zip(*(self.heads_apart(y) for y in (q, key, v)), strict=True)
            parts = [self.head_context(*piece) for piece in pieces]
            return self.op("MatMul", self.op("Concat", *parts, axis=-1), f"o{k}")
        split = self.ints(-1, e.tokens if e.literal else 0, h, w) if e.literal else self.ints(0, 0, h, w)
        q, key, v = (
            self.op("Transpose", self.op("Reshape", y, split), perm=perm)
            for y, perm in ((q, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
        )
        if e.merged:
            flat = [self.ints(-1, e.tokens, w), self.ints(-1, w, e.tokens), self.ints(-1, e.tokens, w)]
            q, key, v = (self.op("Reshape", y, to) for y, to in zip((q, key, v), flat, strict=True))
        scores = self.op("Mul", self.op("MatMul", q, key), self.number(w**-0.5))
        if e.masked:
            hidden = self.op("Mul", self.op("Sub", "mask", self.number(1.0)), self.number(1e4))
            scores = self.op("Add", scores, self.op("Unsqueeze", hidden, self.ints(1, 2)))
        if e.bias:
            scores = self.op("Add", scores, "table")
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        if e.merged:
            context = self.op("Reshape", context, self.ints(-1, h, e.tokens, w))
        back = self.ints(-1, e.tokens, d) if e.literal else self.ints(0, 0, d)
        flat_context = self.op("Reshape", self.op("Transpose", context, perm=[0, 2, 1, 3]), back)
        return self.op("MatMul", flat_context, f"o{k}")

    def heads_apart(self, value: str) -> list[str]:
        """[batch, tokens, head width] of each head."""
        e = self.encoder
        h, w = e.heads, e.width // e.heads
        if e.apart == "sliced":
            return [self.op("Slice", value, self.ints(k * w), self.ints(k * w + w), self.ints(2)) for k in range(h)]
        split = self.op("Reshape", value, self.ints(0, 0, h, w))
        return [self.op("Squeeze", self.op("Gather", split, self.ints(k), axis=2), self.ints(2)) for k in range(h)]

    def head_context(self, query: str, key: str, value: str) -> str:
        """What one head reads, from its queries, keys and values."""
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 1]))
        scaled = self.op("Mul", scores, self.number((self.encoder.width // self.encoder.heads) ** -0.5))
        return self.op("MatMul", self.op("Softmax", scaled, axis=-1), value)

    def body(self) -> str:
        e = self.encoder
        x = "x"
        if e.tokens > e.patches + sum(e.learned):
            x = self.op("Concat", self.for_batch("class"), "x", axis=1)
        if any(e.learned):
            front, _, behind = (self.for_batch(f"learned{k}") if count else "" for k, count in enumerate(e.learned))
            x = self.op("Concat", *filter(None, (front, x, behind)), axis=1)
        positions = "positions"
        if e.longest:
            length = self.op("Gather", self.op("Shape", x), self.ints(1), axis=0)
            positions = self.op("Slice", positions, self.ints(0), length, self.ints(1))
        x = self.op("Add", x, positions)
        if e.learned[1]:
            at = e.learned[0] + e.patches // 2
            parts = (
                self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(1))
                for start, stop in ((0, at), (at, 1 << 40))
            )
            x = self.op("Concat", next(parts), self.for_batch("learned1"), next(parts), axis=1)
        first = x
        for k in range(e.depth):
            first = x if k == 1 else first
            x = self.op("Add", x, "positions") if e.again else x
            x = self.op("Add", x, first) if e.skip and k == e.depth - 1 else x
            x = self.op("Add", x, self.attention(self.norm(x, f"{k}a"), k))
            if e.mixing and k == e.depth - 1:
                x = self.op("Add", x, self.op("MatMul", "mix", x))
            hidden = self.op("Relu", self.op("MatMul", self.norm(x, f"{k}b"), f"up{k}"))
            x = self.op("Add", x, self.op("MatMul", hidden, f"down{k}"))
        return x

    def for_batch(self, name: str) -> str:
        """A constant [1, tokens, width], for every sample."""
        batch = self.op("Gather", self.op("Shape", "x"), self.ints(0), axis=0)
        return self.op("Expand", name, self.op("Concat", batch, self.ints(1, 1), axis=0))

    def mean(self, x: str) -> str:
        if self.encoder.opset >= 18:
            return self.op("ReduceMean", x, self.ints(1), keepdims=0)
        return self.op("ReduceMean", x, axes=[1], keepdims=0)

    def model(self) -> onnx.ModelProto:
        e = self.encoder
        x = self.body()
        if e.exit == "mean":
            y = self.mean(x)
        elif e.exit == "sum":
            y = self.op("ReduceSum", x, self.ints(1), keepdims=0)
        elif e.exit == "max":
            y = self.op("ReduceMax", x, axes=[1], keepdims=0)
        elif e.exit == "real":
            weights = self.op("Unsqueeze", "mask", self.ints(2))
            total, count = (
                self.op("ReduceSum", v, self.ints(1), keepdims=0) for v in (self.op("Mul", x, weights), weights)
            )
            y = self.op("Div", total, count)
        elif e.exit == "both":
            rest = self.op("Slice", x, self.ints(1), self.ints(1 << 40), self.ints(1))
            self.constants["first"] = np.asarray(0)
            y = self.op("Add", self.op("Gather", x, "first", axis=1), self.mean(rest))
        else:
            self.constants["at"] = np.asarray(e.tokens - 1 if e.exit == "last" else 0)
            y = x if e.exit == "all" else self.op("Gather", x, "at", axis=1)
        y = self.op("MatMul", y, "head")
        self.nodes[-1].output[0] = "y"
        kind = TensorProto.FLOAT16 if e.half else TensorProto.FLOAT
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "encoder",
            [
                helper.make_tensor_value_info("x", kind, ["n", "length" if e.longest else e.patches, e.width]),
                *([helper.make_tensor_value_info("mask", kind, ["n", e.tokens])] if e.masked else []),
            ],
            [helper.make_tensor_value_info("y", kind, ["n", *(("tokens",) if e.exit == "all" else ()), 5])],
            [numpy_helper.from_array(a, name) for name, a in self.constants.items() if name in used],
        )
        ir_version = 8 if e.opset < 19 else 11 if e.opset < 24 else 12
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", e.opset)], ir_version=ir_version)


# -- the same in numpy -----------------------------------------------------------------------------------------------


def forward(
    encoder: Encoder,
    x: Array,
    drop: dict[int, int],
    offline: dict[int, Array] | None = None,
    online: float = 1.0,
    shares: dict[int, float] | None = None,
) -> Array:
    """The outputs in float64, ``drop[block]`` tokens dropped behind that attention by class attention (``exit``
    "class") or received attention ("mean"), to the power ``online``, times ``offline[block]`` of the position that the
    token had at first, to the power of the rest. Behind ``shares[block]``, of one sample, those stay that together
    have this share of the scores."""
    w = {name: a.astype(np.float64) for name, a in encoder.weights().items()}
    values = x.astype(np.float64)
    if encoder.tokens > encoder.patches:
        values = np.concatenate([np.broadcast_to(w["class"], (len(values), 1, encoder.width)), values], 1)
    values = values + w["positions"]
    lead = encoder.tokens - encoder.patches
    where = np.tile(np.arange(encoder.tokens), (len(values), 1))
    for k in range(encoder.depth):
        probabilities, context = attend(encoder, w, norm(values, w, f"{k}a"), k)
        values = values + context @ w[f"o{k}"]
        gone = drop.get(k + 1, 0)
        score = probabilities[:, :, 0].sum(1) if lead else probabilities.sum((1, 2))
        if shares is not None and k + 1 in shares:
            ranked = -np.sort(-score[0, lead:])
            gone = int((np.cumsum(ranked) - ranked >= shares[k + 1] * ranked.sum()).sum())
        if gone:
            if offline is not None:
                score = score**online * offline[k + 1][where] ** (1 - online)
            keep = [[*range(lead), *(lead + np.argsort(-row[lead:])[: len(row) - lead - gone])] for row in score]
            values = np.stack([v[rows] for v, rows in zip(values, keep, strict=True)])
            where = np.stack([w0[rows] for w0, rows in zip(where, keep, strict=True)])
        hidden = np.maximum(norm(values, w, f"{k}b") @ w[f"up{k}"], 0)
        values = values + hidden @ w[f"down{k}"]
    out: Array = (values[:, 0] if lead else values.mean(1)) @ w["head"]
    return out


def norm(x: Array, w: dict[str, Array], tag: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    unit: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit * w[f"gain{tag}"] + w[f"shift{tag}"]


def attend(encoder: Encoder, w: dict[str, Array], x: Array, k: int) -> tuple[Array, Array]:
    """(weights [B, H, N, N], context [B, N, D])."""
    batch, count, width = x.shape
    shape = (batch, count, encoder.heads, width // encoder.heads)
    q, key, v = ((x @ w[f"{name}{k}"]).reshape(shape).transpose(0, 2, 1, 3) for name in ("q", "k", "v"))
    scores = q @ key.transpose(0, 1, 3, 2) * shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights, (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
