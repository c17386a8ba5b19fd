"""Damaged models, made from a seed: small whole ones with one to three things wrong, in about seventy ways."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.checker import ValidationError

from tests.models.encoders import Encoder
from tests.models.operators import CASES, build

Mutation = Callable[[onnx.ModelProto, random.Random], None]
ATTENTION = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x) => (float[B, N, 12] y)
    <int64[4] split = {0, 0, 2, 8}, int64[3] merge = {0, 0, -1}, int64[1] last = {-1}, int64[1] end = {1000},
     int64[1] zero = {0}, int64[1] half = {4}, float root = {2.8284271}>
    {
        qf = MatMul(x, wq) kf = MatMul(x, wk) vf = MatMul(x, wv)
        qs = Reshape(qf, split) ks = Reshape(kf, split) vs = Reshape(vf, split)
        q = Transpose <perm = [0, 2, 1, 3]> (qs)
        kt = Transpose <perm = [0, 2, 3, 1]> (ks)
        v = Transpose <perm = [0, 2, 1, 3]> (vs)
        raw = MatMul(q, kt)
        scores = Div(raw, root)
        p = Softmax <axis = -1> (scores)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        o = MatMul(cm, wo)
        r = Add(o, x)
        n = LayerNormalization <axis = -1> (r, gain, shift)
        a = Slice(n, zero, half, last)
        b = Slice(n, half, end, last)
        ab = Concat <axis = -1> (b, a)
        h = MatMul(ab, w1)
        g = Relu(h)
        y = MatMul(g, w2)
    }"""
ATTENTION_SHAPES = {"wq": (12, 16), "wk": (12, 16), "wv": (12, 16), "wo": (16, 12), "gain": (12,), "shift": (12,),
                    "w1": (12, 24), "w2": (24, 12)}  # fmt: skip

CONVOLUTIONS = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 3, 8, 8] x) => (float[B, 5] y)
    <int64[2] pads_to = {0, -1}, float[4] scales = {1.0, 1.0, 2.0, 2.0}>
    {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
        b = BatchNormalization (a, gain, shift, mean, variance)
        c = Relu(b)
        d = Conv <kernel_shape = [3, 3], group = 6> (c, w2)
        e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
        f = Resize <mode = "nearest"> (e, , scales)
        g = GlobalAveragePool(f)
        h = Reshape(g, pads_to)
        i = Gemm <transB = 1> (h, w3, b3)
        j = Sigmoid(i)
        y = MatMul(j, w4)
    }"""
CONVOLUTION_SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "gain": (6,), "shift": (6,), "mean": (6,), "variance": (6,),
                      "w2": (6, 1, 3, 3), "w3": (9, 6), "b3": (9,), "w4": (9, 5)}  # fmt: skip

BRANCHES = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 8] x, bool which) => (float[B, 16] y)
    {
        c = MatMul(x, w2)
        d = Relu(c)
        a = MatMul(d, w3)
        y = If (which) <
            then_branch = yes () => (float[B, 16] t) { t = Relu(a) },
            else_branch = no () => (float[B, 16] e) { e = Add(a, v) }
        >
    }"""
BRANCH_SHAPES = {"v": (16,), "w2": (8, 40), "w3": (40, 16)}


def whole(text: str, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = np.abs(rng.normal(size=shape)).astype(np.float32) * 0.3
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


CACHED = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x, float[B, 2, P, 4] past_k, float[B, 2, P, 4] past_v)
        => (float[B, N, 12] y, float[B, 2, T, 4] k, float[B, 2, T, 4] v)
    <int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 0, -1}>
    {
        qf = MatMul(x, wq) kf = MatMul(x, wk) vf = MatMul(x, wv)
        qs = Reshape(qf, split) ks = Reshape(kf, split) vs = Reshape(vf, split)
        q = Transpose <perm = [0, 2, 1, 3]> (qs)
        kn = Transpose <perm = [0, 2, 1, 3]> (ks)
        vn = Transpose <perm = [0, 2, 1, 3]> (vs)
        k = Concat <axis = 2> (past_k, kn)
        v = Concat <axis = 2> (past_v, vn)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul(q, kt)
        p = Softmax <axis = -1> (s)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        o = MatMul(cm, wo)
        r = Add(o, x)
        h = MatMul(r, w1)
        g = Sigmoid(h)
        y = MatMul(g, w2)
    }"""
CACHED_SHAPES = {"wq": (12, 8), "wk": (12, 8), "wv": (12, 8), "wo": (8, 12), "w1": (12, 24), "w2": (24, 12)}

LOOP = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 8] x) => (float[B, 4] y)
    <int64 count = {3}, bool go = {1}>
    {
        a = MatMul(x, w1)
        b = Relu(a)
        c = MatMul(b, w2)
        d = Loop (count, go, c) <
            body = turn (int64 i, bool before, float[B, 8] state) => (bool after, float[B, 8] next)
            { after = Identity(before) e = Mul(state, gain) next = Add(e, c) }
        >
        y = MatMul(d, w3)
    }"""
LOOP_SHAPES = {"w1": (8, 20), "w2": (20, 8), "gain": (8,), "w3": (8, 4)}

FUNCTIONS = """
    <ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    block (float[B, 8] x) => (float[B, 4] y)
    {
        a = mine.Layer <slope = 0.1> (x, w1, b1)
        b = mine.Layer (a, w2, b2)
        y = MatMul(b, w3)
    }
    <domain: "mine", opset_import: ["" : 17, "mine" : 1]>
    Layer <slope: float = 0.2> (v, w, b) => (r)
    {
        h = MatMul(v, w)
        i = Add(h, b)
        r = LeakyRelu <alpha: float = @slope> (i)
    }
    """
FUNCTION_SHAPES = {"w1": (8, 20), "b1": (20,), "w2": (20, 12), "b2": (12,), "w3": (12, 4)}

OPERATOR_CASES = (
    "position_grid_resized_to_sizes", "position_grid_pooled", "conv_groups", "einsum_of_three_axes", "einsum_of_four",
    "heads_vary_fastest", "conv_transpose", "group_norm", "rms_norm", "gather_nd", "scatter_nd", "trilu_where_cumsum",
    "attention_3d", "attention_grouped", "multi_head_attention", "packed_weight_attention", "rotary_partial",
)  # fmt: skip

BASES = [
    whole(ATTENTION, ATTENTION_SHAPES),
    whole(CONVOLUTIONS, CONVOLUTION_SHAPES),
    whole(BRANCHES, BRANCH_SHAPES),
    whole(CACHED, CACHED_SHAPES),
    whole(LOOP, LOOP_SHAPES),
    whole(FUNCTIONS, FUNCTION_SHAPES),
    Encoder(depth=2).model(),
    Encoder(depth=2, opset=13, half=True, exit="mean").model(),
    *(build(CASES[name]) for name in OPERATOR_CASES),
]

SECRET = b"\x00\x00\x9d?secret\x9d?" * 2  # in the file that no model may read

NUMBERS = [0, 1, -1, -2, 2, 3, 7, 8, 255, 1 << 31, (1 << 31) - 1, 1 << 33, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)]


# -- damage to the message -------------------------------------------------------------------------------------------


def values(model: onnx.ModelProto) -> list[str]:
    return [*(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer),
            *(o for n in model.graph.node for o in n.output)]  # fmt: skip


def dangling(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    node.input[rng.randrange(len(node.input))] = rng.choice(["nowhere", "", " ", "x\n", "é" * 100])


def rewired(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another value of the graph: of another shape or type, or one that comes later (a cycle)."""
    node = rng.choice(model.graph.node)
    node.input[rng.randrange(len(node.input))] = rng.choice(values(model))


def reordered(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [copy.deepcopy(n) for n in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    field = rng.choice([graph.node, graph.initializer, graph.input, graph.output])
    if len(field):
        del field[rng.randrange(len(field))]


def doubled(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    field = rng.choice([graph.node, graph.initializer, graph.input, graph.output, model.opset_import])
    if len(field):
        field.append(rng.choice(field))


def renamed(model: onnx.ModelProto, rng: random.Random) -> None:
    """Two values of one name."""
    name = rng.choice(values(model))
    thing = rng.choice([*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output])
    if isinstance(thing, onnx.NodeProto):
        thing.output[0] = name
    else:
        thing.name = rng.choice([name, ""])


def retyped(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.choice([*range(27), -1, 1000])
    if rng.random() < 0.5:
        rng.choice(model.graph.initializer).data_type = kind
    else:
        rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.elem_type = kind


def resized(model: onnx.ModelProto, rng: random.Random) -> None:
    """Negative, huge, more, fewer or other dimensions of a weight, an input or an output."""
    number = rng.choice(NUMBERS)
    if rng.random() < 0.5:
        dims: Any = rng.choice(model.graph.initializer).dims
        how = rng.randrange(4)
        if how == 0:
            dims.append(number)
        elif how == 1 and len(dims):
            del dims[rng.randrange(len(dims))]
        elif len(dims):
            dims[rng.randrange(len(dims))] = number
        return
    shape = rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if rng.random() < 0.2 or not len(shape.dim):
        shape.dim.add().dim_value = number
    elif rng.random() < 0.2:
        del shape.dim[0]
    elif rng.random() < 0.3:
        rng.choice(shape.dim).dim_param = rng.choice(["", "a+", "9**9**9**9", "batch-1", "a" * 5000, "((((", "B*0"])
    else:
        rng.choice(shape.dim).dim_value = number


def untyped(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    how = rng.randrange(4)
    if how == 0:
        value.ClearField("type")
    elif how == 1:
        value.type.tensor_type.ClearField("shape")
    elif how == 2:
        inner = helper.make_tensor_type_proto(1, [2])
        value.type.CopyFrom(
            rng.choice([helper.make_sequence_type_proto(inner), helper.make_optional_type_proto(inner)])
        )
    else:
        value.type.CopyFrom(helper.make_sparse_tensor_type_proto(1, [2, 3]))


def miscounted(model: onnx.ModelProto, rng: random.Random) -> None:
    """Bytes that are more or fewer than the shape needs, or in the wrong field."""
    tensor = rng.choice(model.graph.initializer)
    how = rng.randrange(5)
    if how == 0:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif how == 1:
        tensor.raw_data = tensor.raw_data + bytes(rng.randrange(1, 5000))
    elif how == 2:
        tensor.ClearField("raw_data")
    elif how == 3:
        tensor.float_data.extend([1.0] * rng.randrange(1, 50))
    else:
        tensor.string_data.append(b"what")


def renumbered(model: onnx.ModelProto, rng: random.Random) -> None:
    """Other numbers in shapes, bounds and sizes, or in a weight (not a number, infinity)."""
    tensor = rng.choice(model.graph.initializer)
    try:
        array = numpy_helper.to_array(tensor).copy()
    except (ValueError, TypeError, KeyError):
        return
    if not array.size:
        return
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        if array.dtype.kind == "f":
            flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0])
        elif array.dtype == np.int64:
            flat[rng.randrange(flat.size)] = rng.choice(NUMBERS)
    if rng.random() < 0.2:
        array = flat[: rng.randrange(flat.size + 1)]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


LOCATIONS = ["weights.bin", "weights.bin", "weights.bin", "", ".", "..", "../secret", "a/../../secret", "/etc/passwd",
             "none.bin", "weights.bin\0", "sub", "link.bin", "w" * 300, "model.onnx"]  # fmt: skip


def readdressed(model: onnx.ModelProto, rng: random.Random) -> None:
    """External data that are elsewhere, outside, too few, or badly described."""
    tensor = rng.choice(model.graph.initializer)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = rng.choice(LOCATIONS)
    entries = {"location": location}
    if rng.random() < 0.7:
        entries["offset"] = rng.choice(["0", "4096", "-1", "-4096", "1e3", "", "99999999999", str(1 << 70), "0x10"])
    if rng.random() < 0.7:
        entries["length"] = rng.choice([str(size), str(size), "0", "-1", "nine", "", str(1 << 40), str(1 << 70)])
    if rng.random() < 0.1:
        del entries["location"]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    if rng.random() < 0.1:
        tensor.external_data.add(key="location", value="../secret")


def opsets(model: onnx.ModelProto, rng: random.Random) -> None:
    how = rng.randrange(5)
    if how == 0:
        del model.opset_import[:]
    elif how == 1:
        model.opset_import[0].version = rng.choice([0, -1, 1, 6, 9, 11, 12, 13, 99, 1 << 40])
    elif how == 2:
        model.opset_import[0].domain = rng.choice(["ai.onnx", "com.microsoft", "nobody"])
    elif how == 3:
        model.ir_version = rng.choice([0, -1, 1, 2, 3, 4, 99, 1 << 40])
    else:
        rng.choice(model.graph.node).domain = rng.choice(["com.microsoft", "ai.onnx", "ai.onnx.ml", "nobody"])


OPERATORS = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain in ("", "com.microsoft")})


def reoperated(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice([*OPERATORS, "Rilu", "", "é"])


def reattributed(model: onnx.ModelProto, rng: random.Random) -> None:
    """Attributes with other numbers, of other types, too many, too few."""
    node = rng.choice(model.graph.node)
    how = rng.randrange(4)
    if how == 0 or not len(node.attribute):
        name = rng.choice(["axis", "perm", "group", "transB", "pads", "strides", "kernel_shape", "axes", "value", "to",
                           "equation", "scale", "num_heads", "allowzero", "then_branch"])  # fmt: skip
        content: Any = rng.choice([rng.choice(NUMBERS), [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 6))],
                                   0.5, "text", [0.5, 1.5], ["a", "b"], model.graph.initializer[0] if
                                   len(model.graph.initializer) else 1])  # fmt: skip
        node.attribute.append(helper.make_attribute(name, content))
        return
    attribute = rng.choice(node.attribute)
    if how == 1:
        attribute.type = rng.randrange(15)
    elif how == 2 and len(attribute.ints):
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif how == 2:
        attribute.i = rng.choice(NUMBERS)
    else:
        node.attribute.remove(attribute)


def miswired(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    how = rng.randrange(4)
    if how == 0:
        node.input.append(rng.choice(values(model)))
    elif how == 1 and len(node.input):
        del node.input[rng.randrange(len(node.input))]
    elif how == 2:
        node.output.append(rng.choice(["more", "", rng.choice(values(model))]))
    else:
        del node.output[:]


def bodies(model: onnx.ModelProto, rng: random.Random) -> None:
    """Subgraphs that read nothing there is, declare what exists, hold themselves, or are empty."""
    held = [a for n in model.graph.node for a in n.attribute if a.HasField("g")]
    if not held:
        node = rng.choice(model.graph.node)
        body = onnx.GraphProto(name="body")
        body.node.extend([rng.choice(model.graph.node)])
        node.attribute.append(helper.make_attribute(rng.choice(["body", "then_branch"]), body))
        return
    body = rng.choice(held).g
    how = rng.randrange(6)
    if how == 0:
        body.node[0].input[0] = rng.choice(["nowhere", "y", "t", "e", "d"])
    elif how == 1:
        del body.output[:]
    elif how == 2:
        del body.node[:]
    elif how == 3:
        body.node.append(helper.make_node("If", ["which"], ["deep"], then_branch=copy.deepcopy(body)))
    elif how == 4:
        body.initializer.append(rng.choice(model.graph.initializer))
    else:
        body.node[0].output[0] = rng.choice(values(model))


def functions(model: onnx.ModelProto, rng: random.Random) -> None:
    """A model-local function: whole, calling itself, or of the wrong arity."""
    names = ["a"] if rng.random() < 0.6 else ["a", "b"]
    op, domain = rng.choice([("Relu", ""), ("F", "mine"), ("Nothing", "mine")])
    function = helper.make_function(
        "mine", "F", names, ["z"], [helper.make_node(op, ["a"], ["z"], domain=domain)], [helper.make_opsetid("", 17)]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    node = rng.choice(model.graph.node)
    node.op_type, node.domain = "F", "mine"


def tensors(model: onnx.ModelProto) -> list[TensorProto]:
    """Weights, and tensors in attributes of the main graph."""
    held = [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return [*model.graph.initializer, *held]


def emptied(model: onnx.ModelProto, rng: random.Random) -> None:
    """A weight of no entries, or of sizes whose product is none: [2^33, 0] needs no bytes."""
    tensor = rng.choice(tensors(model))
    if rng.random() < 0.5 and len(tensor.dims):
        tensor.dims[rng.randrange(len(tensor.dims))] = 0
    else:
        sizes = [rng.choice(NUMBERS[4:]) for _ in range(rng.randrange(1, 4))]
        tensor.dims[:] = rng.sample([*map(abs, sizes), 0], len(sizes) + 1)
    for field in ("raw_data", "float_data", "int64_data"):
        tensor.ClearField(field)


def multiplied(model: onnx.ModelProto, rng: random.Random) -> None:
    """A weight that claims more bytes than there are numbers for: sizes of many digits."""
    tensor = model.graph.initializer.add(name="big", data_type=rng.choice([1, 7, 10, 21, 22]))
    tensor.dims.extend([rng.choice([2, 1 << 31, 1 << 62])] * rng.choice([1, 3, 40, 400]))
    model.graph.node.append(helper.make_node("Identity", ["big"], ["copied"]))
    model.graph.output.append(helper.make_tensor_value_info("copied", 1, None))


NAMES = ["[/x]", "[bold]", "\x1b]0;title\x07", "\r\n", "a\tb", "x__cut", "w1__cut", "__1", "\u202e", "<script>", "nan",
         "/" * 300, "..", "a/b", "C:\\x", "%s%n", "{0}", "\x00", "\ud7ff", "x" * 3000, "snpc.origin",]  # fmt: skip


def named(model: onnx.ModelProto, rng: random.Random) -> None:
    """A value called something hostile, everywhere; often an input, an output or a weight."""
    old, new = rng.choice(values(model)), rng.choice(NAMES)
    if rng.random() < 0.5:
        new = old + new
    graph = model.graph
    for thing in (*graph.input, *graph.output, *graph.initializer):
        thing.name = new if thing.name == old else thing.name
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def cut_names(model: onnx.ModelProto, rng: random.Random) -> None:
    """Values that are called what snpc would call its own."""
    for tensor in list(model.graph.initializer):
        suffix = rng.choice(["__cut", "__1", "__masked", "_1", "__refit", "__0"])
        model.graph.node.append(helper.make_node("Identity", [tensor.name], [f"{tensor.name}{suffix}"]))


def dimension_names(model: onnx.ModelProto, rng: random.Random) -> None:
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if rng.random() < 0.5:
                dim.dim_param = rng.choice([*NAMES, "past + seq", "-1", "0", "B", "2*B", "N//0", "__import__('os')"])


def stated(model: onnx.ModelProto, rng: random.Random) -> None:
    """Shapes and types of values that are not true."""
    for name in rng.sample(values(model), min(3, len(values(model)))):
        sizes: list[Any] = [rng.choice([*NUMBERS[:8], 1 << 40, "B", None]) for _ in range(rng.randrange(6))]
        model.graph.value_info.append(helper.make_tensor_value_info(name, rng.choice([0, 1, 7, 9, 10, 16]), sizes))


def shown(model: onnx.ModelProto, rng: random.Random) -> None:
    """More outputs: values of the middle, weights, inputs, one twice."""
    for _ in range(rng.randrange(1, 4)):
        model.graph.output.append(helper.make_tensor_value_info(rng.choice(values(model)), 1, None))


def entered(model: onnx.ModelProto, rng: random.Random) -> None:
    """Weights that are inputs as well, as files of old versions have them, or are inputs alone."""
    tensor = rng.choice(model.graph.initializer)
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    if rng.random() < 0.3:
        model.graph.initializer.remove(tensor)


def tied(model: onnx.ModelProto, rng: random.Random) -> None:
    """One weight in two places."""
    places = [(n, k) for n in model.graph.node for k, name in enumerate(n.input)
              if any(t.name == name for t in model.graph.initializer)]  # fmt: skip
    (a, i), (b, j) = rng.choice(places), rng.choice(places)
    a.input[i] = b.input[j]


def unread(model: onnx.ModelProto, rng: random.Random) -> None:
    """A branch that no output reads."""
    source = rng.choice(values(model))
    weight = numpy_helper.from_array(np.ones((rng.choice([4, 8, 12]), 6), np.float32), "unread_w")
    model.graph.initializer.append(weight)
    chain = [("MatMul", [source, "unread_w"]), ("Relu", ["unread_0"]), ("Transpose", ["unread_1"])]
    for k, (operator, inputs) in enumerate(chain):
        model.graph.node.append(helper.make_node(operator, inputs, [f"unread_{k}"]))


def interposed(model: onnx.ModelProto, rng: random.Random) -> None:
    """A node between a value and one of its readers: of a shape, a type or a meaning that does not go there."""
    graph = model.graph
    index = rng.randrange(len(graph.node))
    node = graph.node[index]
    at = rng.randrange(len(node.input))
    choices: list[tuple[str, dict[str, Any]]]
    choices = [("Transpose", {}), ("Transpose", {"perm": [0, 1]}), ("Transpose", {"perm": [1, 1, 0]}), ("Flatten", {}),
               ("Cast", {"to": rng.choice([0, 1, 7, 9, 10, 11, 16, 8])}), ("Softmax", {"axis": rng.choice(NUMBERS)}),
               ("Squeeze", {}), ("Shape", {}), ("NonZero", {}), ("Relu", {}), ("Identity", {}), ("Dropout", {}),
               ("ReduceMean", {}), ("Concat", {"axis": rng.choice(NUMBERS)}), ("Unique", {}), ("Hardmax", {}),
               ("Erf", {}), ("Size", {}), ("LayerNormalization", {"axis": rng.choice(NUMBERS)}),
               ("RandomNormalLike", {}), ("Split", {"axis": rng.choice(NUMBERS)}), ("Einsum", {"equation": "ab->ba"}),
               ("Einsum", {"equation": rng.choice(["...a,...b->", "aa->a", "->", "a b", "ij,jk", ",", "é->é"])}),
               ("Foo", {}), ("Sin", {})]  # fmt: skip
    operator, attributes = rng.choice(choices)
    inputs = [node.input[at]] * (2 if operator == "LayerNormalization" or rng.random() < 0.2 else 1)
    domain = rng.choice(["mine", ""]) if operator == "Foo" else ""
    graph.node.insert(index, helper.make_node(operator, inputs, ["between"], domain=domain, **attributes))
    graph.node[index + 1].input[at] = "between"


def referring(model: onnx.ModelProto, rng: random.Random) -> None:
    """An attribute that refers to one of a function, outside of any."""
    node = rng.choice(model.graph.node)
    name = rng.choice([a.name for a in node.attribute] or ["axis"])
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    node.attribute.add(name=name, type=rng.choice([1, 2, 3, 4, 6, 7]), ref_attr_name="outer")


def floated(model: onnx.ModelProto, rng: random.Random) -> None:
    """An attribute of another type under its own name."""
    node = rng.choice([n for n in model.graph.node if n.attribute] or list(model.graph.node))
    if node.attribute:
        attribute = rng.choice(node.attribute)
        content: Any = rng.choice(
            [1.5, [1.5], "axis", ["a"], [], [1 << 62] * 3, -1, numpy_helper.from_array(np.ones(2))]
        )
        if content == []:
            attribute.CopyFrom(onnx.AttributeProto(name=attribute.name, type=onnx.AttributeProto.INTS))
        else:
            attribute.CopyFrom(helper.make_attribute(attribute.name, content))


def permuted(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another order, too few, too many or repeated axes."""
    lists = [a for n in model.graph.node for a in n.attribute if a.ints]
    if lists:
        ints = list(rng.choice(lists).ints)
        how = rng.randrange(4)
        if how == 0:
            rng.shuffle(ints)
        elif how == 1:
            ints = ints[:-1]
        elif how == 2:
            ints += [rng.choice([len(ints), 0, -1])]
        else:
            ints = [ints[0]] * len(ints)
        chosen = rng.choice(lists)
        chosen.ints[:] = ints


def constants(model: onnx.ModelProto, rng: random.Random) -> None:
    """A weight becomes a Constant node, in one of the many ways to write one; some make no sense."""
    tensor = rng.choice(model.graph.initializer)
    node = helper.make_node("Constant", [], [tensor.name])
    how = rng.randrange(6)
    if how < 3:
        node.attribute.append(helper.make_attribute("value", tensor))
    elif how == 3:
        node.attribute.append(helper.make_attribute("value_floats", [1.0, float("nan")]))
    elif how == 4:
        node.attribute.append(helper.make_attribute("value_strings", ["a"]))
    else:
        values_ = helper.make_tensor("v", 1, [1], [1.0])
        indices = helper.make_tensor("i", 7, [1], [rng.choice(NUMBERS)])
        sparse = helper.make_sparse_tensor(values_, indices, [rng.choice([9, 1 << 40])])
        node.attribute.append(helper.make_attribute("sparse_value", sparse))
    if rng.random() < 0.9:
        model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, node)


def transposed(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice([t for t in model.graph.initializer if len(t.dims) > 1] or list(model.graph.initializer))
    tensor.dims[:] = list(tensor.dims)[::-1]


def swapped(model: onnx.ModelProto, rng: random.Random) -> None:
    """The inputs of a node in another order, or those of two nodes."""
    a, b = rng.choice(model.graph.node), rng.choice(model.graph.node)
    if rng.random() < 0.5:
        inputs = list(a.input)
        rng.shuffle(inputs)
        a.input[:] = inputs
    else:
        first, second = list(a.input), list(b.input)
        a.input[:], b.input[:] = second, first


def extreme(model: onnx.ModelProto, rng: random.Random) -> None:
    """All of a weight is not a number, huge, tiny or nothing."""
    tensor = rng.choice(model.graph.initializer)
    if tensor.data_type in (1, 10) and tensor.raw_data:
        array = numpy_helper.to_array(tensor).copy()
        with np.errstate(all="ignore"):
            array[...] = rng.choice([np.nan, np.inf, -np.inf, 3.3e38, -3.3e38, 1e-45, 0.0, 1e19])
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def in_half(model: onnx.ModelProto, rng: random.Random) -> None:
    """Some weights in another precision than the rest, or all of them."""
    some = rng.random() < 0.5
    dtype = rng.choice([np.float16, np.float64, np.int8, np.int64, np.uint8, np.bool_])
    for tensor in model.graph.initializer:
        if tensor.data_type == 1 and tensor.raw_data and (not some or rng.random() < 0.3):
            with np.errstate(invalid="ignore", over="ignore"):
                cast: Any = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(cast, tensor.name))


def beside(model: onnx.ModelProto, rng: random.Random) -> None:
    """Weights as external data that are whole, at their place in a file beside the model."""
    for tensor in tensors(model):
        if tensor.data_type == 1 and 0 < len(tensor.raw_data) <= 8192 and rng.random() < 0.5:
            length = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(length))):
                tensor.external_data.add(key=key, value=value)


def defaults(model: onnx.ModelProto, rng: random.Random) -> None:
    """A function whose default tensor is external data, somewhere."""
    tensor = TensorProto(name="s", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=rng.choice([*LOCATIONS, "up/secret", "secret"]))
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="v")
    body = [
        constant,
        helper.make_node("ReduceMean", ["c"], ["m"], keepdims=0),
        helper.make_node("Add", ["a", "m"], ["z"]),
    ]
    function = helper.make_function("mine", "D", ["a"], ["z"], body, [helper.make_opsetid("", 17)])
    function.attribute_proto.append(onnx.AttributeProto(name="v", type=onnx.AttributeProto.TENSOR, t=tensor))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    node = rng.choice(model.graph.node)
    source, node.input[0] = node.input[0], "defaulted"
    model.graph.node.insert(0, helper.make_node("D", [source], ["defaulted"], domain="mine"))


def nested(model: onnx.ModelProto, rng: random.Random) -> None:
    """Functions that call the one before, twice: 2^depth nodes when inlined; or in a ring."""
    depth = rng.choice([2, 4, 12, 60, 200])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    inner = helper.make_node(f"F{depth}", ["a"], ["z"], domain="mine") if rng.random() < 0.2 else None
    model.functions.append(
        helper.make_function("mine", "F0", ["a"], ["z"], [inner or helper.make_node("Relu", ["a"], ["z"])], opsets)
    )
    for k in range(1, depth + 1):
        calls = [helper.make_node(f"F{k - 1}", ["a"], ["b"], domain="mine"),
                 helper.make_node(f"F{k - 1}", ["b"], ["z"], domain="mine")]  # fmt: skip
        model.functions.append(helper.make_function("mine", f"F{k}", ["a"], ["z"], calls, opsets))
    model.opset_import.append(opsets[1])
    node = rng.choice(model.graph.node)
    source, node.input[0] = node.input[0], "called"
    model.graph.node.insert(0, helper.make_node(f"F{depth}", [source], ["called"], domain="mine"))


def shadowing(model: onnx.ModelProto, rng: random.Random) -> None:
    """A function that is called like an operator of ONNX, or the same function twice."""
    name = rng.choice(["Relu", "MatMul", "Add", "Softmax"])
    body = [helper.make_node("Neg", ["a"], ["z"])]
    function = helper.make_function("", name, ["a", "b"], ["z"], body, [helper.make_opsetid("", 17)])
    model.functions.extend([function] * rng.choice([1, 2]))


def crowded(model: onnx.ModelProto, rng: random.Random) -> None:
    """One node with thousands of inputs or outputs."""
    count, source = rng.choice([100, 1000, 3000]), rng.choice(values(model))
    operator = rng.choice(["Concat", "Sum", "Max", "Einsum", "Split"])
    if operator == "Split":
        model.graph.node.append(helper.make_node("Split", [source], [f"crowd_{k}" for k in range(count)]))
        return
    given: dict[str, dict[str, Any]] = {"Concat": {"axis": 0}, "Einsum": {"equation": "ab"}}
    attributes = given.get(operator, {})
    model.graph.node.append(helper.make_node(operator, [source] * count, ["crowd"], **attributes))
    model.graph.output.append(helper.make_tensor_value_info("crowd", 1, None))


def deep(model: onnx.ModelProto, rng: random.Random) -> None:
    """A long chain of nodes, or of attributes within attributes."""
    node = rng.choice(model.graph.node)
    if rng.random() < 0.6:
        source = node.input[0]
        chain = []
        for k in range(rng.choice([50, 400])):
            chain.append(helper.make_node(rng.choice(["Relu", "Identity", "Neg"]), [source], [f"deep_{k}"]))
            source = f"deep_{k}"
        node.input[0] = source
        for k, link in enumerate(chain):
            model.graph.node.insert(k, link)
        return
    body = onnx.GraphProto(name="innermost")
    for _ in range(rng.choice([5, 12, 20])):
        outer = onnx.GraphProto(name="outer")
        outer.node.append(helper.make_node("If", ["which"], ["deep"], then_branch=body, else_branch=onnx.GraphProto()))
        body = outer
    node.attribute.append(helper.make_attribute("body", body))


def trained(model: onnx.ModelProto, rng: random.Random) -> None:
    """Graphs for training, metadata, annotations and texts: what nothing reads, full of nonsense."""
    info = model.training_info.add()
    info.algorithm.CopyFrom(model.graph)
    if rng.random() < 0.5:
        outside = info.initialization.initializer.add(name="o", data_type=1, dims=[4])
        outside.data_location = TensorProto.EXTERNAL
        outside.external_data.add(key="location", value=rng.choice(LOCATIONS))
    model.metadata_props.add(key=rng.choice(NAMES), value="x" * rng.choice([1, 100_000]))
    model.doc_string = rng.choice(NAMES)
    annotation = model.graph.quantization_annotation.add(tensor_name=rng.choice(values(model)))
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="nowhere")
    model.producer_name = rng.choice(NAMES)


def sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    """A weight that is stored sparse, with places that do not exist."""
    numbers = helper.make_tensor("thin", 1, [2], [1.0, 2.0])
    indices = helper.make_tensor("places", 7, [2], [rng.choice(NUMBERS), 3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(numbers, indices, [rng.choice([9, 0, 1 << 40])]))


def static(model: onnx.ModelProto, rng: random.Random) -> None:
    """Inputs of fixed sizes: one, none, many, or those that do not go together."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and rng.random() < 0.7:
                dim.dim_value = rng.choice([0, 1, 2, 3, 5, 64, 1 << 31])


def renamed_dimensions(model: onnx.ModelProto, rng: random.Random) -> None:
    """All dynamic axes of one name, or each of its own."""
    same = rng.random() < 0.5
    for k, value in enumerate((*model.graph.input, *model.graph.output)):
        for j, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = "same" if same else f"d{k}_{j}"


def typed(model: onnx.ModelProto, rng: random.Random) -> None:
    """The numbers of a weight in a typed field instead of bytes, or in both."""
    tensor = rng.choice([t for t in model.graph.initializer if t.data_type == 1 and t.raw_data] or [TensorProto()])
    if tensor.raw_data:
        tensor.float_data.extend(numpy_helper.to_array(tensor).reshape(-1).tolist())
        if rng.random() < 0.8:
            tensor.ClearField("raw_data")


MUTATIONS: list[Mutation] = [
    dangling, rewired, reordered, dropped, doubled, renamed, retyped, resized, untyped, miscounted, renumbered,
    readdressed, opsets, reoperated, reattributed, miswired, bodies, functions, emptied, multiplied, named, cut_names,
    dimension_names, stated, shown, entered, tied, unread, interposed, referring, floated, permuted, constants,
    transposed, swapped, extreme, in_half, beside, defaults, nested, shadowing, crowded, deep, trained, sparse, static,
    renamed_dimensions, typed,
]  # fmt: skip


# -- damage to the bytes ---------------------------------------------------------------------------------------------


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bits, mostly of what is not the numbers of a weight."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        changed[graph_byte(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def lengthened(data: bytes, rng: random.Random) -> bytes:
    """A number in more bytes than it needs."""
    at = rng.randrange(len(data))
    if data[at] < 0x80:
        return data[:at] + bytes([data[at] | 0x80]) + b"\x80" * rng.choice([0, 1, 4, 8, 20]) + b"\x00" + data[at + 1 :]
    return data


def graph_byte(data: bytes, rng: random.Random) -> int:
    while True:
        at = rng.randrange(len(data))
        if rng.random() < 0.05 or any(32 <= b < 127 for b in data[max(0, at - 3) : at + 3] if chr(b).isalnum()):
            return at


def spliced(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + rng.choice([1, 2, 8, 64, 4096]))
    return rng.choice([data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(b - a) + data[b:]])


def mutant(seed: int, folder: Path) -> tuple[Path, str]:
    """Write the damaged model of this number into ``folder`` (with the files it may refer to); say what was done."""
    rng = random.Random(seed)
    base = copy.deepcopy(BASES[seed % len(BASES)])
    model = copy.deepcopy(base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(np.ones(2048, np.float32).tobytes())
    (folder / "sub").mkdir(exist_ok=True)
    (folder.parent / "secret").write_bytes(SECRET * 400)
    link = folder / "link.bin"
    if not link.is_symlink():
        link.symlink_to(folder.parent / "secret")
        (folder / "up").symlink_to("..")
    bytes_too = seed % 7 == 0
    done = []
    for _ in range(0 if bytes_too and rng.random() < 0.7 else rng.choice([1, 1, 1, 2, 3])):
        change = rng.choice(MUTATIONS)
        try:
            change(model, rng)
        except (LookupError, TypeError, ValueError, DecodeError, ValidationError):  # an earlier one took what it needs
            continue
        done.append(change.__name__)
    try:
        data = model.SerializeToString()
    except Exception:  # names that are not text
        data = base.SerializeToString()
    if bytes_too:
        damage = rng.choice([truncated, flipped, flipped, flipped, spliced, lengthened])
        data = damage(data, rng)
        done.append(damage.__name__)
    path = folder / "model.onnx"
    path.write_bytes(data)
    return path, ", ".join(done)
