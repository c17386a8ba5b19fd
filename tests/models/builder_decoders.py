"""Decoders in the form of onnxruntime-genai's builder: GroupQueryAttention, with caches of a width that has a name.

``input_ids`` and ``attention_mask`` beside ``past_key_values.N.key`` and ``.value``, ``logits`` beside ``present.N.*``;
one product for query, key and value; rotary tables that all layers share; SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

VOCABULARY, CONTEXT = 64, 64


@dataclass(frozen=True)
class BuilderDecoder:
    """Sizes of a decoder. ``rotary``: channels of each head that turn. ``window``: of sliding attention, -1 for none;
    ``rolling``: the caches are as long as the window. ``packed``: one product makes query, key and value.
    ``interleaved``: pairs are neighbors. ``head_norms``: each head of queries and keys is normalized, as in
    Qwen3, by nodes of their own or inside the fused node (which the CPU does not run)."""

    layers: int = 2
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    ffn: int = 40
    rotary: int = 32
    window: int = -1
    packed: bool = True
    interleaved: bool = False
    rolling: bool = False
    head_norms: Literal["", "nodes", "fused"] = ""

    def write(self, path: Path, seed: int = 0) -> Path:
        """Write the decoder with random weights."""
        model = parser.parse_model(self.text())
        rng = np.random.default_rng(seed)
        for name, shape in self.weights().items():
            array = rng.normal(size=shape) * shape[0] ** -0.5 if len(shape) > 1 else 1 + 0.2 * rng.normal(size=shape)
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        for name, table in self.tables().items():
            model.graph.initializer.append(numpy_helper.from_array(table.astype(np.float32), name))
        onnx.save(model, path)
        return path

    def weights(self) -> dict[str, tuple[int, ...]]:
        query, key = self.heads * self.width, self.kv_heads * self.width
        shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, self.hidden), "head": (self.hidden, VOCABULARY)}
        for n in range(self.layers):
            parts = {"qkv": query + 2 * key} if self.packed else {"q": query, "k": key, "v": key}
            shapes |= {f"l{n}.{part}": (self.hidden, columns) for part, columns in parts.items()}
            shapes |= {f"l{n}.gate": (self.hidden, self.ffn), f"l{n}.up": (self.hidden, self.ffn)}
            shapes |= {f"l{n}.o": (query, self.hidden), f"l{n}.down": (self.ffn, self.hidden)}
            shapes |= {f"l{n}.{part}_norm": (self.width,) for part in "qk" if self.head_norms}
            shapes |= {f"l{n}.norm1": (self.hidden,), f"l{n}.norm2": (self.hidden,)}
        return shapes

    def tables(self) -> dict[str, npt.NDArray[np.float64]]:
        if not self.rotary:
            return {}
        angles = np.arange(CONTEXT)[:, None] / 100.0 ** (np.arange(self.rotary // 2) * 2 / self.rotary)
        return {"cosine": np.cos(angles), "sine": np.sin(angles)}

    def text(self) -> str:
        length = "sliding" if self.rolling else "sequence"
        past = self.caches("past_key_values", f"past_{length}_length")
        present = self.caches("present", f"total_{length}_length")
        return f"""<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
        decoder (int64[batch_size, sequence_length] input_ids,
                 int64[batch_size, total_sequence_length] attention_mask{past})
            => (float[batch_size, sequence_length, {VOCABULARY}] logits{present})
        <int64[1] last = {{1}}, int64[1] one = {{1}}, int64 second = {{1}}> {{
            counted = ReduceSum (attention_mask, last)  less = Sub (counted, one)  lens = Cast <to = 6> (less)
            sizes = Shape (attention_mask)  long = Gather (sizes, second)  total = Cast <to = 6> (long)
            x0 = Gather (embedding, input_ids)
            {"".join(self.layer(n) for n in range(self.layers))}
            logits = MatMul (x{self.layers}, head)
        }}"""

    def head_norm(self, n: int, part: str, name: str, columns: int) -> str:
        """Heads on the axis of the tokens are normalized, each over its own width."""
        return f"""
            {name}w{n} = Constant <value_ints = [0, -1, {self.width}]> ()
            {name}c{n} = Constant <value_ints = [0, -1, {columns}]> ()
            {name}1{n} = Reshape ({name}0{n}, {name}w{n})
            {name}2{n} = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> ({name}1{n}, "l{n}.{part}_norm")
            {name}3{n} = Reshape ({name}2{n}, {name}c{n})"""

    def caches(self, name: str, length: str) -> str:
        """Declarations of the caches of all layers."""
        kind = f"float[batch_size, {self.kv_heads}, {length}, kv_cache_dim]"
        names = [f"{name}.{n}.{part}" for n in range(self.layers) for part in ("key", "value")]
        return "".join(f', {kind} "{cache}"' for cache in names)

    def layer(self, n: int) -> str:
        w = f"l{n}."
        kind = f"do_rotary = 1, rotary_interleaved = {int(self.interleaved)}, "
        rotary, tables = (kind, ", cosine, sine") if self.rotary else ("", "")
        products = (
            f'p{n} = MatMul (n{n}, "{w}qkv")'
            if self.packed
            else "  ".join(f'{part}{n} = MatMul (n{n}, "{w}{part}")' for part in "qkv")
        )
        operands = f"p{n}, , " if self.packed else f"q{n}, k{n}, v{n}"
        gains = f', , , , , , "{w}q_norm", "{w}k_norm"' if self.head_norms == "fused" else ""
        tables = tables or ", , " * bool(gains)
        rotary = rotary + "qk_norm_epsilon = 0.00001, " * bool(gains)
        if self.head_norms == "nodes":
            query, key = self.heads * self.width, self.kv_heads * self.width
            products = f"""p{n} = MatMul (n{n}, "{w}qkv")  parts{n} = Constant <value_ints = [{query}, {key}, {key}]> ()
                a0{n}, b0{n}, v{n} = Split <axis = -1> (p{n}, parts{n})
                {self.head_norm(n, "q", "a", query)}  {self.head_norm(n, "k", "b", key)}"""
            operands = f"a3{n}, b3{n}, v{n}"
        return f"""
            n{n} = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001, stash_type = 1> (x{n}, "{w}norm1")
            {products}
            a{n}, "present.{n}.key", "present.{n}.value" = com.microsoft.GroupQueryAttention
                <{rotary}num_heads = {self.heads}, kv_num_heads = {self.kv_heads}, local_window_size = {self.window},
                 sliding_window_cache = {int(self.rolling)}>
                ({operands}, "past_key_values.{n}.key", "past_key_values.{n}.value", lens, total{tables}{gains})
            c{n} = MatMul (a{n}, "{w}o")  y{n} = Add (x{n}, c{n})
            m{n} = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001, stash_type = 1> (y{n}, "{w}norm2")
            g{n} = MatMul (m{n}, "{w}gate")  s{n} = Sigmoid (g{n})  h{n} = Mul (g{n}, s{n})
            u{n} = MatMul (m{n}, "{w}up")  f{n} = Mul (h{n}, u{n})  d{n} = MatMul (f{n}, "{w}down")
            x{n + 1} = Add (y{n}, d{n})"""
