"""Random graphs for the fuzz test: a stack of values, and steps that each add operators from the table on top.

Every choice is drawn by hypothesis, so that a failing graph shrinks. Shapes are small, all sizes but the batch are
fixed, and numbers stay near one: what is tested is where positions go, not rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]
BATCH = 2
LARGEST = 4096  # entries of a value


@dataclass
class Graph:
    """``values``: name and shape of everything made so far, in order; [0] is the input."""

    draw: Draw
    values: list[tuple[str, Shape]] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def size(self, most: int = 6) -> int:
        return int(self.draw(st.integers(2, most)))

    def weight(self, *shape: int, positive: bool = False) -> str:
        rng = np.random.default_rng(len(self.constants))
        array = rng.normal(size=shape) / np.sqrt(max(shape[0] if shape else 1, 1))
        return self.constant((np.abs(array) + 0.5 if positive else array).astype(np.float32))

    def integers(self, *numbers: int) -> str:
        return self.constant(np.asarray(numbers, np.int64))

    def constant(self, array: npt.ArrayLike) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], shape: Shape | None, outputs: int = 1, **attrs: Any) -> str:
        names = [f"v{len(self.nodes)}" + ("" if not k else f"_{k}") for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        if shape is not None:
            self.values.append((names[0], shape))
        return names[0]

    def some(self, *ranks: int) -> tuple[str, Shape] | None:
        """One of the values of these ranks, mostly a late one."""
        fitting = [v for v in self.values if not ranks or len(v[1]) in ranks]
        if not fitting:
            return None
        return self.pick([*fitting[-4:], fitting[-1], fitting[-1], fitting[-1]])  # type: ignore[no-any-return]

    def model(self, opset: int) -> onnx.ModelProto:
        name, shape = self.values[0]
        out, sizes = self.values[-1]
        outputs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * len(sizes))]
        if self.flag() and self.flag():  # a second output pins what it is made of
            other, sizes = self.pick(self.values[1:])
            if other != out:
                outputs.append(helper.make_tensor_value_info(other, TensorProto.FLOAT, [None] * len(sizes)))
        begin = helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
        needed = {v.name for v in outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.insert(0, node)
                needed |= set(node.input)
        constants = [c for c in self.constants if c.name in needed]
        graph = helper.make_graph(kept, "fuzz", [begin], outputs, constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# -- contractions ----------------------------------------------------------------------------------------------------


def matmul(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    width = g.size(8)
    out = (*shape[:-1], width)
    value = g.node("MatMul", [name, g.weight(shape[-1], width)], out)
    if g.flag():
        pair = [value, g.weight(width)]
        g.node("Add", pair if g.flag() else pair[::-1], out)


def per_head_matmul(g: Graph) -> None:
    """One matrix per head: a batch axis of the weight."""
    operand = g.some(4)
    if operand:
        name, shape = operand
        width = g.size()
        g.node("MatMul", [name, g.weight(shape[1], shape[3], width)], (*shape[:3], width))


def gemm(g: Graph) -> None:
    operand = g.some(2)
    if operand is None:
        return
    name, (rows, width) = operand
    size = g.size(8)
    attrs: dict[str, Any] = {"transB": int(g.flag())}
    weight = g.weight(*((size, width) if attrs["transB"] else (width, size)))
    if g.flag():
        attrs["alpha"] = 0.5
    inputs = [name, weight]
    if g.flag():
        inputs.append(g.weight(*g.pick([(size,), (1, size), (1,), (rows, size), (rows, 1)])))
        attrs["beta"] = g.pick([1.0, 0.25])
    if g.flag():
        inputs[0] = g.node("Transpose", [name], (width, rows), perm=[1, 0])
        attrs["transA"] = 1
    g.node("Gemm", inputs, (rows, size), **attrs)


def einsum(g: Graph) -> None:
    """A weight with heads of its own, in and out, and the ellipsis."""
    operand = g.some(3)
    if operand is None:
        return
    name, (batch, length, width) = operand
    heads, size = g.size(3), g.size()
    form = g.pick(["bnc,chd->bhnd", "bnc,chd->bnhd", "...c,cd->...d", "bnc,dc->bnd", "bnc,hcd->bhnd", "both"])
    if form == "...c,cd->...d":
        g.node("Einsum", [name, g.weight(width, size)], (batch, length, size), equation=form)
    elif form == "bnc,dc->bnd":
        g.node("Einsum", [name, g.weight(size, width)], (batch, length, size), equation=form)
    elif form == "bnc,hcd->bhnd":
        g.node("Einsum", [name, g.weight(heads, width, size)], (batch, heads, length, size), equation=form)
    elif form == "both":
        value = g.node("Einsum", [name, g.weight(width, heads, size)], (batch, length, heads, size),
                      equation="bnc,chd->bnhd")  # fmt: skip
        if g.flag():
            value = g.node("Add", [value, g.weight(heads, size)], (batch, length, heads, size))
        g.node("Einsum", [value, g.weight(heads, size, width)], (batch, length, width), equation="bnhd,hdc->bnc")
    else:
        shape = (batch, heads, length, size) if form.endswith("bhnd") else (batch, length, heads, size)
        g.node("Einsum", [name, g.weight(width, heads, size)], shape, equation=form)


def product(g: Graph) -> None:
    """Two activations, or one with itself: scores without a softmax."""
    operand = g.some(3, 4)
    if operand is None:
        return
    name, shape = operand
    partners = [v for v in g.values if v[1] == shape]
    other = g.pick(partners)[0]
    rank = len(shape)
    if g.flag():
        perm = [*range(rank - 2), rank - 1, rank - 2]
        turned = g.node("Transpose", [other], (*shape[:-2], shape[-1], shape[-2]), perm=perm)
        g.node("MatMul", [name, turned], (*shape[:-1], shape[-2]))
    else:
        letters = "abcd"[:rank]
        equation = f"{letters},{letters[:-2]}e{letters[-1]}->{letters[:-1]}e"
        g.node("Einsum", [name, other], (*shape[:-1], shape[-2]), equation=equation)


def conv(g: Graph) -> None:
    operand = g.some(3, 4)
    if operand is None:
        return
    name, shape = operand
    channels, spatial = shape[1], shape[2:]
    kernel = g.pick([1, 3])
    attrs: dict[str, Any] = {"kernel_shape": [kernel] * len(spatial)}
    if kernel == 3:
        attrs["pads"] = [1] * (2 * len(spatial))
    groups = g.pick([1, 1, channels] + [n for n in (2, 3) if channels % n == 0])
    out = g.pick([1, 2]) * channels if groups == channels > 1 else groups * g.size(4)
    inputs = [name, g.weight(out, channels // groups, *[kernel] * len(spatial))]
    if g.flag():
        inputs.append(g.weight(out))
    op = "Conv"
    if groups == 1 and g.flag() and g.flag():
        op, inputs[1] = "ConvTranspose", g.weight(channels, out, *[kernel] * len(spatial))
    g.node(op, inputs, (shape[0], out, *spatial), group=groups, **attrs)


# -- movement --------------------------------------------------------------------------------------------------------


def split_axis(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(1, len(shape)))
    parts = [k for k in (2, 3, 4) if shape[axis] % k == 0 and shape[axis] > k]
    if not parts or len(shape) > 4:
        return
    part = g.pick(parts)
    pair = (part, shape[axis] // part)
    out = (*shape[:axis], *pair, *shape[axis + 1 :])
    target = list(out)
    style = g.pick(["plain", "zeros", "minus"])
    if style == "zeros":
        target[:axis] = [0] * axis
    elif style == "minus":
        target[g.pick([axis, axis + 1])] = -1
    g.node("Reshape", [name, g.integers(*target)], out)


def merge_axes(g: Graph) -> None:
    operand = g.some(3, 4, 5)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(len(shape) - 1))
    out = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    target = list(out)
    if g.flag():
        target[axis] = -1
    g.node("Reshape", [name, g.integers(*target)], out)


def flatten(g: Graph) -> None:
    operand = g.some(3, 4)
    if operand:
        name, shape = operand
        axis = g.pick(range(1, len(shape)))
        rows = int(np.prod(shape[:axis]))
        g.node("Flatten", [name], (rows, int(np.prod(shape[axis:]))), axis=axis)


def transpose(g: Graph) -> None:
    operand = g.some(2, 3, 4, 5)
    if operand:
        name, shape = operand
        perm = g.draw(st.permutations(range(len(shape))))
        g.node("Transpose", [name], tuple(shape[k] for k in perm), perm=list(perm))


def split(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(1, len(shape)))
    if shape[axis] < 4:
        return
    first = g.pick([shape[axis] // 2, 1, shape[axis] - 2])
    sizes = [first, shape[axis] - first]
    at = len(g.nodes)
    written = axis - g.pick([0, len(shape)])
    g.node("Split", [name, g.integers(*sizes)], None, outputs=2, axis=written)
    for k, size in enumerate(sizes):
        g.values.append((f"v{at}" + ("" if not k else f"_{k}"), (*shape[:axis], size, *shape[axis + 1 :])))


def slice_(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(len(shape)))
    start, end, step = g.pick([(0, 1000, 2), (1, 1 << 40, 2), (0, max(1, shape[axis] // 2), 1), (-2, 1000, 1),
                               (1000, -1000, -1), (shape[axis] // 2, 1 << 62, 1), (0, -1, 1)])  # fmt: skip
    size = len(range(*slice(start, end, step).indices(shape[axis])))
    if size:
        inputs = [name, *(g.integers(n) for n in (start, end, axis, step))]
        g.node("Slice", inputs, (*shape[:axis], size, *shape[axis + 1 :]))


def gather(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(len(shape)))
    inner: Shape = ()
    if g.flag():
        array = np.asarray(g.pick([0, -1, shape[axis] - 1]), np.int64)
    else:
        count = g.size(8)
        array = np.asarray(g.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=count, max_size=count)), np.int64)
        inner = (count,)
    g.node("Gather", [name, g.constant(array)], (*shape[:axis], *inner, *shape[axis + 1 :]), axis=axis)


def concat(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis = g.pick(range(len(shape)))
    partners = [v for v in g.values if len(v[1]) == len(shape)
                and all(a == b for k, (a, b) in enumerate(zip(v[1], shape, strict=True)) if k != axis)]  # fmt: skip
    other, other_shape = g.pick(partners)
    if g.flag() and g.flag():
        other_shape = (*shape[:axis], g.size(3), *shape[axis + 1 :])
        other = g.weight(*other_shape)
    pair = [name, other]
    out = (*shape[:axis], shape[axis] + other_shape[axis], *shape[axis + 1 :])
    g.node("Concat", pair if g.flag() else pair[::-1], out, axis=axis)


def pad(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand:
        name, shape = operand
        axis = g.pick(range(1, len(shape)))
        before, after = g.pick([(0, 1), (1, 0), (1, 2)])
        pads = [0] * (2 * len(shape))
        pads[axis], pads[axis + len(shape)] = before, after
        g.node("Pad", [name, g.integers(*pads)], (*shape[:axis], shape[axis] + before + after, *shape[axis + 1 :]))


def expand(g: Graph) -> None:
    operand = g.some(2, 3)
    if operand:
        name, shape = operand
        axis = g.pick(range(1, len(shape) + 1))
        lifted = (*shape[:axis], 1, *shape[axis:])
        value = g.node("Unsqueeze", [name, g.integers(axis)], lifted)
        out = (*lifted[:axis], g.size(3), *lifted[axis + 1 :])
        target = [1 if g.flag() and n == m else n for n, m in zip(out, lifted, strict=True)]
        g.node("Expand", [value, g.integers(*target)], out)


def tile(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand:
        name, shape = operand
        axis = g.pick(range(1, len(shape)))
        repeats = [2 if k == axis else 1 for k in range(len(shape))]
        g.node("Tile", [name, g.integers(*repeats)], tuple(n * r for n, r in zip(shape, repeats, strict=True)))


def squeeze(g: Graph) -> None:
    operand = g.some(2, 3, 4, 5)
    if operand and 1 in operand[1]:
        name, shape = operand
        axis = shape.index(1)
        g.node("Squeeze", [name, g.integers(axis)], (*shape[:axis], *shape[axis + 1 :]))


# -- one position at a time, and over several ------------------------------------------------------------------------


def unary(g: Graph) -> None:
    operand = g.some()
    if operand:
        op = g.pick(["Relu", "Sigmoid", "Tanh", "Erf", "Neg", "Softplus", "LeakyRelu", "Elu", "Abs", "Identity"])
        g.node(op, [operand[0]], operand[1])


def with_constant(g: Graph) -> None:
    """A constant over some of the axes, on either side."""
    operand = g.some()
    if operand is None:
        return
    name, shape = operand
    kept = [n if g.flag() else 1 for n in shape]
    while kept and kept[0] == 1 and g.flag():
        kept.pop(0)
    op = g.pick(["Add", "Mul", "Sub", "Div", "Max", "Min"])
    pair = [name, g.weight(*kept, positive=op == "Div")]
    g.node(op, pair if op == "Div" or g.flag() else pair[::-1], shape)


def binary(g: Graph) -> None:
    """Two activations that broadcast."""
    operand = g.some()
    if operand is None:
        return
    name, shape = operand

    def broadcasts(other: Shape) -> bool:
        if len(other) > len(shape):
            return False
        return all(a == b or a == 1 for a, b in zip(other[::-1], shape[::-1], strict=False))

    other, _ = g.pick([v for v in g.values if broadcasts(v[1])])
    op = g.pick(["Add", "Mul", "Sub", "Max", "Where"])
    if op == "Where":
        condition = g.constant(np.random.default_rng(len(g.nodes)).random(shape[-1:]) < 0.5)
        g.node("Where", [condition, name, other], shape)
    else:
        g.node(op, [name, other] if g.flag() else [other, name], shape)


def reduction(g: Graph) -> None:
    operand = g.some(2, 3, 4)
    if operand is None:
        return
    name, shape = operand
    axis, keep = g.pick(range(len(shape))), int(g.flag())
    out = (*shape[:axis], *([1] if keep else []), *shape[axis + 1 :])
    op = g.pick(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"])
    if op == "ReduceSum":
        g.node(op, [name, g.integers(axis)], out, keepdims=keep)
    else:
        g.node(op, [name], out, keepdims=keep, axes=[axis])


def normalisation(g: Graph) -> None:
    operand = g.some(3, 4)
    if operand is None:
        return
    name, shape = operand
    op = g.pick(["LayerNormalization", "BatchNormalization", "InstanceNormalization", "Softmax", "LogSoftmax", "L2"])
    if op == "LayerNormalization":
        axis = g.pick([-1, -1, len(shape) - 2])
        over = shape[axis:]
        inputs = [name, g.weight(*over, positive=True)] + ([g.weight(*over)] if g.flag() else [])
        g.node(op, inputs, shape, axis=axis)
    elif op == "BatchNormalization":
        channel = [g.weight(shape[1], positive=k in (0, 3)) for k in range(4)]
        g.node(op, [name, *channel], shape)
    elif op == "InstanceNormalization":
        g.node(op, [name, g.weight(shape[1], positive=True), g.weight(shape[1])], shape)
    elif op == "L2":
        length = g.node("ReduceL2", [name], (*shape[:-1], 1), axes=[-1], keepdims=1)
        bounded = g.node("Add", [length, g.constant(np.float32(0.1))], (*shape[:-1], 1))
        g.node("Div", [name, bounded], shape)
    else:
        g.node(op, [name], shape, axis=g.pick(range(1, len(shape))))


# -- attention, spelled out ------------------------------------------------------------------------------------------


def attention(g: Graph) -> None:
    """Of [batch, length, width]: packed or not, fewer key heads, rotary or scaled or masked or not."""
    operand = g.some(3)
    if operand is None:
        return
    name, (batch, length, width) = operand
    heads, size, value = g.pick([1, 2, 4]), g.pick([2, 4, 6]), g.pick([2, 3, 4])
    shared = g.pick([1, 2]) if heads > 1 else 1
    packed = g.flag() and shared == 1 and value == size
    if packed:
        q, k, v = packed_heads(g, name, (batch, length, width), heads, size)
    else:
        q = heads_of(g, name, (batch, length, width), heads, size)
        k = heads_of(g, name, (batch, length, width), heads // shared, size)
        v = heads_of(g, name, (batch, length, width), heads // shared, value)
    if shared > 1:
        k, v = (
            repeated(g, k, (batch, heads // shared, length, size), shared),
            repeated(g, v, (batch, heads // shared, length, value), shared),
        )
    if g.flag() and g.flag():
        q, k = (rotated(g, x, (batch, heads, length, size)) for x in (q, k))
    if g.flag():
        q = g.node("Mul", [q, scale(g, q, size)], None)
        g.values.append((q, (batch, heads, length, size)))
    turned = g.node("Transpose", [k], (batch, heads, size, length), perm=[0, 1, 3, 2])
    scores = g.node("MatMul", [q, turned], (batch, heads, length, length))
    if g.flag():
        scores = g.node("Div", [scores, g.constant(np.float32(size**0.5))], (batch, heads, length, length))
    if g.flag():
        bias = g.weight(*g.pick([(length, length), (heads, length, length), (1, heads, 1, 1)]))
        scores = g.node("Add", [scores, bias], (batch, heads, length, length))
    weights = g.node("Softmax", [scores], (batch, heads, length, length), axis=-1)
    context = g.node("MatMul", [weights, v], (batch, heads, length, value))
    back = g.node("Transpose", [context], (batch, length, heads, value), perm=[0, 2, 1, 3])
    target = g.pick([(0, 0, -1), (0, 0, heads * value), (batch, length, heads * value)])
    merged = g.node("Reshape", [back, g.integers(*target)], (batch, length, heads * value))
    out = g.node("MatMul", [merged, g.weight(heads * value, width)], (batch, length, width))
    if g.flag():
        g.node("Add", [out, name], (batch, length, width))


def heads_of(g: Graph, name: str, shape: Shape, heads: int, size: int) -> str:
    batch, length, width = shape
    value = g.node("MatMul", [name, g.weight(width, heads * size)], (batch, length, heads * size))
    if g.flag():
        value = g.node("Add", [g.weight(heads * size), value], (batch, length, heads * size))
    target = g.pick([(0, 0, heads, size), (0, 0, -1, size), (0, 0, heads, -1), (batch, length, heads, size)])
    split_heads = g.node("Reshape", [value, g.integers(*target)], (batch, length, heads, size))
    return g.node("Transpose", [split_heads], (batch, heads, length, size), perm=[0, 2, 1, 3])


def packed_heads(g: Graph, name: str, shape: Shape, heads: int, size: int) -> tuple[str, str, str]:
    batch, length, width = shape
    value = g.node("MatMul", [name, g.weight(width, 3 * heads * size)], (batch, length, 3 * heads * size))
    if g.flag():
        value = g.node("Add", [value, g.weight(3 * heads * size)], (batch, length, 3 * heads * size))
    order = g.pick(["3hd", "h3d"])
    parts = (3, heads) if order == "3hd" else (heads, 3)
    split_heads = g.node("Reshape", [value, g.integers(0, 0, *parts, size)], (batch, length, *parts, size))
    perm = [2, 0, 3, 1, 4] if order == "3hd" else [3, 0, 2, 1, 4]
    turned = g.node("Transpose", [split_heads], (3, batch, heads, length, size), perm=perm)
    style = g.pick(["gather", "split"])
    if style == "gather":
        q, k, v = (g.node("Gather", [turned, g.constant(np.int64(i))], (batch, heads, length, size), axis=0)
                   for i in range(3))  # fmt: skip
        return q, k, v
    at = len(g.nodes)
    g.node("Split", [turned, g.integers(1, 1, 1)], None, outputs=3, axis=0)
    names = [f"v{at}" + ("" if not i else f"_{i}") for i in range(3)]
    q, k, v = (g.node("Squeeze", [n, g.integers(0)], (batch, heads, length, size)) for n in names)
    return q, k, v


def repeated(g: Graph, name: str, shape: Shape, times: int) -> str:
    batch, heads, length, size = shape
    lifted = g.node("Unsqueeze", [name, g.integers(2)], (batch, heads, 1, length, size))
    wide = g.node("Expand", [lifted, g.integers(1, 1, times, 1, 1)], (batch, heads, times, length, size))
    return g.node("Reshape", [wide, g.integers(0, heads * times, length, size)], (batch, heads * times, length, size))


def rotated(g: Graph, name: str, shape: Shape) -> str:
    half = shape[-1] // 2
    first = g.node("Slice", [name, g.integers(0), g.integers(half), g.integers(-1)], (*shape[:-1], half))
    second = g.node("Slice", [name, g.integers(half), g.integers(1 << 40), g.integers(-1)], (*shape[:-1], half))
    turned = g.node("Concat", [g.node("Neg", [second], (*shape[:-1], half)), first], shape, axis=-1)
    tables = [g.weight(shape[2], shape[3]) for _ in range(2)]
    return g.node("Add", [g.node("Mul", [name, tables[0]], shape), g.node("Mul", [turned, tables[1]], shape)], shape)


def scale(g: Graph, name: str, size: int) -> str:
    """A number, or the root of the width that the graph itself holds."""
    if g.flag():
        return g.constant(np.float32(size**-0.5))
    shape = g.node("Shape", [name], None)
    last = g.node("Gather", [shape, g.constant(np.int64(-1))], None)
    number = g.node("Sqrt", [g.node("Cast", [last], None, to=TensorProto.FLOAT)], None)
    return g.node("Reciprocal", [number], None)


STEPS = [matmul, matmul, matmul, per_head_matmul, gemm, einsum, product, conv, conv, split_axis, merge_axes, flatten,
         transpose, transpose, split, slice_, gather, concat, pad, expand, tile, squeeze, unary, unary, with_constant,
         with_constant, binary, binary, reduction, normalisation, attention, attention]  # fmt: skip


def layer(g: Graph) -> None:
    """Of the latest value, so that a model begins and ends with weights and its middle can be cut."""
    name, shape = g.values[-1]
    if len(shape) == 4 and g.flag():
        g.node("Conv", [name, g.weight(g.size(8), shape[1], 1, 1)], None)
        g.values.append((f"v{len(g.nodes) - 1}", (shape[0], len_of(g), *shape[2:])))
    elif shape:
        width = g.size(8)
        g.node("MatMul", [name, g.weight(shape[-1], width)], (*shape[:-1], width))


def len_of(g: Graph) -> int:
    return int(g.constants[-1].dims[0])


@st.composite
def graphs(draw: Draw, most: int = 10) -> onnx.ModelProto:
    """A model of ``x``, [2, ...] of rank 2 to 4."""
    g = Graph(draw)
    rank = draw(st.integers(2, 4))
    g.values.append(("x", (BATCH, *(draw(st.integers(2, 6)) for _ in range(rank - 1)))))
    layer(g)
    for _ in range(draw(st.integers(1, most))):
        g.pick(STEPS)(g)
        if any(np.prod(shape) > LARGEST for _, shape in g.values):
            break
    layer(g)
    return g.model(17)
