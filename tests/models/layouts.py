"""A Llama of any size, written node by node: graph in the .onnx, weights of half precision in one file beside it.

No exporter can write seven billion parameters on a small machine. The nodes are those of an export: normalisations in
single precision, rotary tables looked up by position, a causal mask, gated feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PAGE = 4096
PATTERN = 1 << 24  # numbers that repeat in the weights; odd sizes keep rows from being alike


@dataclass(frozen=True)
class Llama:
    """Sizes; the defaults are those of seven billion parameters."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    positions: int = 2048

    @property
    def head(self) -> int:
        return self.width // self.heads


@dataclass
class Writer:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    external: list[tuple[onnx.TensorProto, int]] = field(default_factory=list)
    size: int = 0

    def node(self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attrs: Any) -> str:
        outs = [name] if outputs == 1 else [f"{name}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), outs, name=f"/{name}/{op}", **attrs))
        return outs[0]

    def weight(self, name: str, *shape: int) -> str:
        """Numbers that lie in the data file."""
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = 2 * int(np.prod(shape))
        for key, value in (("location", "weights.bin"), ("offset", str(self.size)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.external.append((tensor, length))
        self.size += length + -length % PAGE
        return name

    def constant(self, name: str, array: Any, kind: Any = np.int64) -> str:
        if not any(t.name == name for t in self.tensors):
            self.tensors.append(numpy_helper.from_array(np.asarray(array, kind), name))
        return name


def write_llama(folder: Path, sizes: Llama, seed: int = 0) -> Path:
    """``folder``/model.onnx and weights.bin. Weights repeat one block of random numbers of the right spread."""
    w = Writer()
    hidden = beginning(w, sizes)
    for k in range(sizes.layers):
        hidden = layer(w, sizes, f"model.layers.{k}", hidden)
    hidden = norm(w, sizes, "model.norm", hidden)
    w.node("MatMul", [hidden, w.weight("lm_head.weight", sizes.width, sizes.vocabulary)], "logits")
    graph = helper.make_graph(
        w.nodes,
        "llama",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", sizes.vocabulary])],
        [*w.tensors, *(tensor for tensor, _ in w.external)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    write_numbers(folder / "weights.bin", w, sizes, seed)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def write_numbers(path: Path, w: Writer, sizes: Llama, seed: int) -> None:
    spread = sizes.width**-0.5
    count = min(PATTERN, w.size // 2) - 1
    block = (np.random.default_rng(seed).standard_normal(count, np.float32) * spread).astype(np.float16).tobytes()
    with path.open("wb") as file:
        while file.tell() < w.size:
            file.write(block[: w.size - file.tell()])


def beginning(w: Writer, sizes: Llama) -> str:
    """Embeddings, rotary tables and mask."""
    hidden = w.node(
        "Gather", [w.weight("model.embed_tokens.weight", sizes.vocabulary, sizes.width), "input_ids"], "embed"
    )
    shape = w.node("Shape", ["input_ids"], "ids_shape")
    length = w.node("Gather", [shape, w.constant("one", 1)], "length")
    places = w.node("Range", [w.constant("zero", 0), length, w.constant("one", 1)], "places")
    angles = np.outer(np.arange(sizes.positions), 10000.0 ** (-np.arange(0, sizes.head, 2) / sizes.head))
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        table = w.constant(f"{name}_table", function(np.concatenate([angles, angles], 1)), np.float16)
        w.node("Gather", [table, places], name)
    rows = w.node("Unsqueeze", [places, w.constant("axis_1", [1])], "rows")
    hides = w.node("Less", [rows, places], "hides")
    w.node("Where", [hides, w.constant("low", -60000.0, np.float16), w.constant("none", 0.0, np.float16)], "mask")
    return hidden


def layer(w: Writer, sizes: Llama, name: str, hidden: str) -> str:
    normed = norm(w, sizes, f"{name}.input_layernorm", hidden)
    mixed = attention(w, sizes, f"{name}.self_attn", normed)
    hidden = w.node("Add", [hidden, mixed], f"{name}.first")
    normed = norm(w, sizes, f"{name}.post_attention_layernorm", hidden)
    gate = w.node(
        "MatMul", [normed, w.weight(f"{name}.mlp.gate_proj.weight", sizes.width, sizes.hidden)], f"{name}.gate"
    )
    curved = w.node("Mul", [gate, w.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
    up = w.node("MatMul", [normed, w.weight(f"{name}.mlp.up_proj.weight", sizes.width, sizes.hidden)], f"{name}.up")
    inner = w.node("Mul", [curved, up], f"{name}.inner")
    down = w.node(
        "MatMul", [inner, w.weight(f"{name}.mlp.down_proj.weight", sizes.hidden, sizes.width)], f"{name}.down"
    )
    return w.node("Add", [hidden, down], f"{name}.second")


def norm(w: Writer, sizes: Llama, name: str, hidden: str) -> str:
    wide = w.node("Cast", [hidden], f"{name}.wide", to=TensorProto.FLOAT)
    square = w.node("Pow", [wide, w.constant("two", 2.0, np.float32)], f"{name}.square")
    mean = w.node("ReduceMean", [square], f"{name}.mean", axes=[-1], keepdims=1)
    shifted = w.node("Add", [mean, w.constant("epsilon", 1e-6, np.float32)], f"{name}.shifted")
    scaled = w.node("Div", [wide, w.node("Sqrt", [shifted], f"{name}.root")], f"{name}.scaled")
    narrow = w.node("Cast", [scaled], f"{name}.narrow", to=TensorProto.FLOAT16)
    gain = w.constant(f"{name}.weight", np.ones(sizes.width), np.float16)
    return w.node("Mul", [gain, narrow], f"{name}.out")


def attention(w: Writer, sizes: Llama, name: str, hidden: str) -> str:
    made = {}
    for part, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
        flat = w.node(
            "MatMul",
            [hidden, w.weight(f"{name}.{part}_proj.weight", sizes.width, heads * sizes.head)],
            f"{name}.{part}",
        )
        target = w.constant(f"heads_{heads}", [0, 0, heads, sizes.head])
        apart = w.node("Reshape", [flat, target], f"{name}.{part}_heads")
        made[part] = w.node("Transpose", [apart], f"{name}.{part}_turned", perm=[0, 2, 1, 3])
    q, k = (rotated(w, sizes, f"{name}.{part}_rotary", made[part]) for part in "qk")
    v = made["v"]
    if sizes.kv_heads < sizes.heads:
        k, v = (repeated(w, sizes, f"{name}.{part}_repeat", value) for part, value in (("k", k), ("v", v)))
    turned = w.node("Transpose", [k], f"{name}.k_t", perm=[0, 1, 3, 2])
    raw = w.node("MatMul", [q, turned], f"{name}.raw")
    scores = w.node("Mul", [raw, w.constant("scale", sizes.head**-0.5, np.float16)], f"{name}.scores")
    hidden_scores = w.node("Add", [scores, "mask"], f"{name}.masked")
    weights = w.node("Softmax", [hidden_scores], f"{name}.weights", axis=-1)
    context = w.node("MatMul", [weights, v], f"{name}.context")
    back = w.node("Transpose", [context], f"{name}.back", perm=[0, 2, 1, 3])
    flat = w.node("Reshape", [back, w.constant("merge", [0, 0, -1])], f"{name}.merged")
    return w.node("MatMul", [flat, w.weight(f"{name}.o_proj.weight", sizes.width, sizes.width)], f"{name}.o")


def rotated(w: Writer, sizes: Llama, name: str, value: str) -> str:
    half, last, end = w.constant("half", [sizes.head // 2]), w.constant("last", [-1]), w.constant("end", [1 << 62])
    first = w.node("Slice", [value, w.constant("start", [0]), half, last], f"{name}.first")
    second = w.node("Slice", [value, half, end, last], f"{name}.second")
    turned = w.node("Concat", [w.node("Neg", [second], f"{name}.neg"), first], f"{name}.half", axis=-1)
    straight = w.node("Mul", [value, "cos"], f"{name}.cos")
    return w.node("Add", [straight, w.node("Mul", [turned, "sin"], f"{name}.sin")], f"{name}.out")


def repeated(w: Writer, sizes: Llama, name: str, value: str) -> str:
    times = sizes.heads // sizes.kv_heads
    lifted = w.node("Unsqueeze", [value, w.constant("axis_2", [2])], f"{name}.lifted")
    wide = w.node("Expand", [lifted, w.constant(f"times_{times}", [1, 1, times, 1, 1])], f"{name}.wide")
    return w.node("Reshape", [wide, w.constant("joined", [0, sizes.heads, -1, sizes.head])], f"{name}.out")
