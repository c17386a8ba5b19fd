"""Attention whose queries and keys are normalized, written by hand: one layer, four query heads on two key heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

Array = npt.NDArray[Any]
Form = Literal["spelled", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"]

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, TOKENS = 16, 4, 2, 8, 6

GRAPH = """
    <ir_version: 10, opset_import: ["" : {opset}]>
    attention (float[B, 6, 16] x) => (float[B, 6, 16] y)
    <int64[4] heads = {{0, 0, 4, 8}}, int64[4] key_heads = {{0, 0, 2, 8}}, int64[3] merge = {{0, 0, 32}},
     int64[5] spread = {{1, 1, 2, 1, 1}}, int64[4] joined = {{0, 4, 6, 8}}, int64[1] two = {{2}},
     float epsilon = {{1e-6}}, float scale = {{0.35355339}}, int64[2] halves = {{4, 4}}>
    {{
        q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
        {over_all}
        qh = Reshape(q1, heads) kh = Reshape(k1, key_heads) vh = Reshape(v0, key_heads)
        {per_head}
        q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
        k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
        v3 = Transpose <perm = [0, 2, 1, 3]> (vh)
        {rotary}
        ku = Unsqueeze(k4, two) vu = Unsqueeze(v3, two)
        kx = Expand(ku, spread) vx = Expand(vu, spread)
        kr = Reshape(kx, joined) vr = Reshape(vx, joined)
        kt = Transpose <perm = [0, 1, 3, 2]> (kr)
        s0 = MatMul(q4, kt)
        s = Mul(s0, scale)
        p = Softmax <axis = -1> (s)
        c = MatMul(p, vr)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        o = MatMul(cm, wo)
        y = Add(o, x)
    }}"""

SPELLED = """
        {n}_square = Mul({x}, {x})
        {n}_mean = ReduceMean <axes = [-1]> ({n}_square)
        {n}_shifted = Add({n}_mean, epsilon)
        {n}_root = Sqrt({n}_shifted)
        {n}_normal = Div({x}, {n}_root)"""
ROTARY = """
        {n}_first, {n}_second = Split <axis = -1> ({n}3, halves)
        {n}_minus = Neg({n}_second)
        {n}_turned = Concat <axis = -1> ({n}_minus, {n}_first)
        {n}_cos = Mul({n}3, cos)
        {n}_sin = Mul({n}_turned, sin)
        {n}4 = Add({n}_cos, {n}_sin)"""


@dataclass(frozen=True)
class HeadNorms:
    """``form``: how the norm is written; all but LayerNormalization are of root mean squares. ``over``: each head with
    one gain for all of them, or all heads with a gain for each. ``gain``: is there one? Of LayerNormalization always.
    """

    form: Form = "spelled"
    over: Literal["head", "all"] = "head"
    rotary: bool = True
    gain: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join([self.form, self.over, *["rotary"] * self.rotary, *["plain"] * (not self.gain)])

    def model(self) -> onnx.ModelProto:
        norms = {n: self.norm(n) for n in "qk"}
        same = "q1 = Identity(q0) k1 = Identity(k0)", "q2 = Identity(qh) k2 = Identity(kh)"
        between = "".join(norms.values())
        text = GRAPH.format(
            opset=23 if self.form == "RMSNormalization" else 17,
            over_all=between if self.over == "all" else same[0],
            per_head=between if self.over == "head" else same[1],
            rotary="".join(ROTARY.format(n=n) for n in "qk") if self.rotary else "q4 = Identity(q3) k4 = Identity(k3)",
        )
        model = parser.parse_model(text)
        used = {name for node in model.graph.node for name in node.input}
        for name, array in self.weights().items():
            if name in used:
                model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        return model

    def norm(self, n: str) -> str:
        """From the projection of queries (``n`` "q") or keys, or from its heads."""
        source, target = (f"{n}0", f"{n}1") if self.over == "all" else (f"{n}h", f"{n}2")
        if self.form == "LayerNormalization":
            return f"\n{target} = LayerNormalization <axis = -1> ({source}, {n}_gain, {n}_bias)"
        if self.form != "spelled":
            return f"\n{target} = {self.form} <axis = -1, epsilon = 1e-6> ({source}, {n}_gain)"
        applied = f"Mul({n}_normal, {n}_gain)" if self.gain else f"Identity({n}_normal)"
        return SPELLED.format(n=n, x=source) + f"\n{target} = {applied}"

    def weights(self) -> dict[str, Array]:
        """Queries and keys whose channels differ in size, so that it matters which go, and say much the same, so that
        those that stay can make up for them."""
        rng = np.random.default_rng(self.seed)
        weights: dict[str, Array] = {}
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            sizes = np.tile(rng.uniform(0.3, 2.0, HEAD_WIDTH), heads) if name != "v" else 1.0
            common = rng.normal(size=(WIDTH, 2)) @ np.abs(rng.normal(size=(2, heads * HEAD_WIDTH)))
            own = rng.normal(size=(WIDTH, heads * HEAD_WIDTH)) / 2
            weights[f"w{name}"] = (common + own) * sizes / 4
            shape = heads * HEAD_WIDTH if self.over == "all" else HEAD_WIDTH
            weights[f"{name}_gain"], weights[f"{name}_bias"] = rng.uniform(0.5, 2.0, shape), rng.normal(size=shape) / 4
        weights["wo"] = rng.normal(size=(HEADS * HEAD_WIDTH, WIDTH)) / 4
        angles = np.arange(TOKENS)[:, None] * 0.5 ** np.arange(HEAD_WIDTH // 2)
        weights["cos"], weights["sin"] = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
        return weights

    def feeds(self, samples: int, seed: int = 1) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        mixed = rng.normal(size=(samples, TOKENS, WIDTH)) @ (np.eye(WIDTH) + rng.normal(size=(WIDTH, WIDTH)) / 4)
        return {"x": mixed.astype(np.float32)}


HEAD_NORMS = {
    form.name: form
    for form in (
        HeadNorms(),
        HeadNorms(rotary=False),
        HeadNorms("LayerNormalization", rotary=False),
        HeadNorms("LayerNormalization"),
        HeadNorms("RMSNormalization"),
        HeadNorms("SimplifiedLayerNormalization"),
        HeadNorms(over="all"),
        HeadNorms(over="all", rotary=False),
        HeadNorms("SimplifiedLayerNormalization", over="all"),
        HeadNorms(rotary=False, gain=False),
    )
}
