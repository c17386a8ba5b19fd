"""Decoders whose layers turn queries and keys by one rotary table, in nodes of their own, as exporters write it.

How a table comes about, how pairs lie in a head, and where the axis of heads is, differ from exporter to exporter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

Array = npt.NDArray[Any]

MODEL = 16  # width of the residual stream
LENGTH = 6  # tokens of a stored table; rows of one that is looked up are four times as many
CONSTANTS = """int64[1] a1 = {1}, int64[1] a2 = {2}, int64[1] last = {-1}, int64[2] places = {1, 3},
    int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {1000}, int64 from = {0},
    int64 step = {1}, float hidden = {-1e9}, int64[3] merge = {0, 0, -1}"""


@dataclass(frozen=True)
class RotaryDecoder:
    """``turned``: channels of each head that turn. ``pairs``: channel i with i + turned/2, by a table of all channels
    ("halves") or of half of them ("split"), or with its neighbor. ``heads_axis``: of what is turned. ``cached``: past
    keys and values go in, all go out."""

    table: Literal["computed", "looked_up", "stored"] = "computed"
    pairs: Literal["halves", "split", "neighbors"] = "halves"
    heads_axis: Literal[1, 2] = 1
    turned: int = 8
    cached: bool = False
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 8

    def model(self, seed: int = 0) -> onnx.ModelProto:
        model = parser.parse_model(self.text())
        for name, array in self.weights(seed).items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        onnx.checker.check_model(model)
        return model

    def weights(self, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        frequencies = (10.0 ** (-np.arange(self.turned // 2) / 2)).astype(np.float32)
        angles = self.spread(np.outer(np.arange(4 * LENGTH if self.table == "looked_up" else LENGTH), frequencies))
        tables = {"cosine": np.cos(angles), "sine": np.sin(angles)}
        found: dict[str, Array] = {"frequencies": frequencies} if self.table == "computed" else tables
        for layer in range(self.layers):
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                found[f"w{part}{layer}"] = rng.normal(size=(MODEL, heads * self.width)) / 3
            found[f"wo{layer}"] = rng.normal(size=(self.heads * self.width, MODEL)) / 6
        return {name: array.astype(np.float32) for name, array in found.items()}

    def spread(self, angles: Array) -> Array:
        """Angles of pairs to those of the columns of the table."""
        return {
            "halves": np.concatenate([angles, angles], 1), "split": angles, "neighbors": angles.repeat(2, 1)
        }[self.pairs]  # fmt: skip

    def feeds(self, samples: int = 2, past: int = 0, seed: int = 1) -> dict[str, Array]:
        """Tokens behind ``past`` others, whose keys and values are random."""
        rng = np.random.default_rng(seed)
        feeds: dict[str, Array] = {
            "x": rng.normal(size=(samples, LENGTH, MODEL)).astype(np.float32),
            "position_ids": np.tile(np.arange(past, past + LENGTH), (samples, 1)),
        }
        for name in self.caches("past") if self.cached else ():
            feeds[name] = rng.normal(size=(samples, self.kv_heads, past, self.width)).astype(np.float32)
        return feeds

    def caches(self, name: str) -> list[str]:
        return [f"{name}_{layer}_{part}" for layer in range(self.layers) for part in ("key", "value")]

    def text(self) -> str:
        tokens = str(LENGTH) if self.table == "stored" else "N"
        cache = f"float[B, {self.kv_heads}, {{}}, {self.width}] {{}}"
        pasts = "".join(f", {cache.format('P', name)}" for name in self.caches("past") if self.cached)
        presents = "".join(f", {cache.format('S', name)}" for name in self.caches("present") if self.cached)
        body = "\n".join(self.layer(k) for k in range(self.layers))
        return f"""<ir_version: 8, opset_import: ["" : 17]>
        decoder (float[B, {tokens}, {MODEL}] x, int64[B, {tokens}] position_ids{pasts}) =>
            (float[B, {tokens}, {MODEL}] y{presents})
        <{CONSTANTS}, int64[1] half = {{{self.turned // 2}}}, int64[1] turned = {{{self.turned}}},
         int64[4] queries = {{0, 0, {self.heads}, {self.width}}},
         int64[4] keys = {{0, 0, {self.kv_heads}, {self.width}}},
         int64[5] times = {{1, 1, {self.heads // self.kv_heads}, 1, 1}},
         int64[4] joined = {{0, {self.heads}, -1, {self.width}}}, int64[4] flat_pairs = {{0, 0, 0, -1}},
         int64[3] columns = {{0, 0, -1}}> {{
            {self.tables()}
            h0 = Identity(x)
            {body}
            y = Identity(h{self.layers})
        }}"""

    def tables(self) -> str:
        if self.table == "stored":
            move = "Identity({})" if self.heads_axis == 1 else "Unsqueeze({}, a1)"
            return f"cos = {move.format('cosine')} sin = {move.format('sine')}"
        computed = {
            "halves": "spread = Concat <axis = -1> (angles, angles)",
            "split": "spread = Identity(angles)",
            "neighbors": """apart = Unsqueeze(angles, last) twice = Concat <axis = -1> (apart, apart)
                spread = Reshape(twice, columns)""",
        }[self.pairs]
        made = {
            "computed": f"""places_f = Cast <to = 1> (position_ids) places_u = Unsqueeze(places_f, a2)
                angles = Mul(places_u, frequencies) {computed} cos3 = Cos(spread) sin3 = Sin(spread)""",
            "looked_up": "cos3 = Gather(cosine, position_ids) sin3 = Gather(sine, position_ids)",
        }[self.table]
        return f"{made} cos = Unsqueeze(cos3, a{self.heads_axis}) sin = Unsqueeze(sin3, a{self.heads_axis})"

    def layer(self, k: int) -> str:
        before, after = ("Transpose <perm = [0, 2, 1, 3]>", "Identity")[:: 1 if self.heads_axis == 1 else -1]
        query, key = (
            f"""{p}f{k} = MatMul(h{k}, w{p}{k}) {p}r{k} = Reshape({p}f{k}, {shape}) {p}t{k} = {before} ({p}r{k})
            {self.rotation(f"{p}t{k}", f"{p}o{k}")} {p}{k} = {after} ({p}o{k})"""
            for p, shape in (("q", "queries"), ("k", "keys"))
        )
        past = (
            f"""present_{k}_key = Concat <axis = 2> (past_{k}_key, k{k})
            present_{k}_value = Concat <axis = 2> (past_{k}_value, v{k})
            ka{k} = Identity(present_{k}_key) va{k} = Identity(present_{k}_value)"""
            if self.cached
            else f"ka{k} = Identity(k{k}) va{k} = Identity(v{k})"
        )
        repeat = " ".join(
            f"{p}u{k} = Unsqueeze({p}a{k}, a2) {p}e{k} = Expand({p}u{k}, times) {p}x{k} = Reshape({p}e{k}, joined)"
            for p in "kv"
        )
        return f"""{query} {key}
            vf{k} = MatMul(h{k}, wv{k}) vr{k} = Reshape(vf{k}, keys) v{k} = Transpose <perm = [0, 2, 1, 3]> (vr{k})
            {past} {repeat}
            kT{k} = Transpose <perm = [0, 1, 3, 2]> (kx{k}) s{k} = MatMul(q{k}, kT{k})
            n{k} = Shape <start = 2, end = 3> (kx{k}) ns{k} = Squeeze(n{k}) all{k} = Range(from, ns{k}, step)
            rows{k} = Unsqueeze(position_ids, places) seen{k} = LessOrEqual(all{k}, rows{k})
            m{k} = Where(seen{k}, s{k}, hidden) p{k} = Softmax <axis = -1> (m{k}) c{k} = MatMul(p{k}, vx{k})
            ct{k} = Transpose <perm = [0, 2, 1, 3]> (c{k}) cm{k} = Reshape(ct{k}, merge) o{k} = MatMul(cm{k}, wo{k})
            h{k + 1} = Add(o{k}, h{k})"""

    def rotation(self, x: str, out: str) -> str:
        if self.turned == self.width:
            return self.turn(x, out)
        return f"""{x}_in = Slice({x}, zero, turned, last) {x}_rest = Slice({x}, turned, end, last)
            {self.turn(f"{x}_in", f"{x}_out")} {out} = Concat <axis = -1> ({x}_out, {x}_rest)"""

    def turn(self, x: str, out: str) -> str:
        halves = f"{x}_a = Slice({x}, zero, half, last) {x}_b = Slice({x}, half, end, last)"
        if self.pairs == "split":
            return f"""{halves} {x}_ac = Mul({x}_a, cos) {x}_bs = Mul({x}_b, sin) {x}_first = Sub({x}_ac, {x}_bs)
                {x}_bc = Mul({x}_b, cos) {x}_as = Mul({x}_a, sin) {x}_second = Add({x}_bc, {x}_as)
                {out} = Concat <axis = -1> ({x}_first, {x}_second)"""
        if self.pairs == "halves":
            other = f"{halves} {x}_n = Neg({x}_b) {x}_t = Concat <axis = -1> ({x}_n, {x}_a)"
        else:
            other = f"""{x}_a = Slice({x}, zero, end, last, two) {x}_b = Slice({x}, one, end, last, two)
                {x}_n = Neg({x}_b) {x}_nu = Unsqueeze({x}_n, last) {x}_au = Unsqueeze({x}_a, last)
                {x}_s = Concat <axis = -1> ({x}_nu, {x}_au) {x}_t = Reshape({x}_s, flat_pairs)"""
        return f"""{other} {x}_c = Mul({x}, cos) {x}_ts = Mul({x}_t, sin) {out} = Add({x}_c, {x}_ts)"""
