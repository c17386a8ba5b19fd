"""Small models of operators that no export has, or not in every form, with the groups that can be cut in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper, parser

from tests.oracle import Array


@dataclass(frozen=True)
class Case:
    """``text``: the graph; ``weights``: shapes by name (those of ``given`` come with their contents); ``groups``: what
    can be cut, as (role, blocks, size)."""

    text: str
    weights: Mapping[str, tuple[int, ...]]
    groups: Mapping[tuple[str, int, int], int]
    feeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (3, 5, 16)})
    given: Mapping[str, Array] = field(default_factory=dict)
    ints: Mapping[str, Array] = field(default_factory=dict)


def build(case: Case) -> onnx.ModelProto:
    model = parser.parse_model(case.text)
    rng = np.random.default_rng(0)
    for name, shape in case.weights.items():
        fan = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        array = rng.normal(size=shape) * (fan**-0.5 if len(shape) > 1 else 0.3) + (len(shape) == 1)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for name, array in case.given.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def feeds_for(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    feeds: dict[str, Array] = {name: rng.normal(size=shape).astype(np.float32) for name, shape in case.feeds.items()}
    return feeds | dict(case.ints)


def table_of(positions: int, width: int) -> dict[str, Array]:
    angles = np.arange(positions)[:, None] * 0.7 ** np.arange(width)[None]
    return {"cosine": np.cos(angles).astype(np.float32), "sine": np.sin(angles).astype(np.float32)}


CASES: dict[str, Case] = {}

POOLED = "p = Conv <strides = [2, 2]> (x, wp)  f = Reshape(p, flat)  t = Transpose <perm = [0, 2, 1]> (f)"
GRID = "gf = Reshape(g, flat)  gt = Transpose <perm = [0, 2, 1]> (gf)  s = Add(t, gt)"
HEAD = "a = MatMul(s, w1)  b = Relu(a)  y = MatMul(b, w2)"
GRID_WEIGHTS = {"wp": (12, 3, 2, 2), "pos": (1, 12, 5, 5), "w1": (12, 20), "w2": (20, 4)}
GRID_GROUPS = {("conv", 1, 12): 1, ("ffn", 1, 20): 1}


def _position_grid(opset: int, resized: str, constants: str) -> Case:
    """Learned positions on a grid of 5 x 5, brought to the 4 x 4 of the image's patches inside the graph."""
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[B, 3, 8, 8] x) => (float[B, 16, 4] y) <int64[3] flat = {{0, 12, -1}}, {constants}> {{
        {POOLED}  {resized}  {GRID}  {HEAD}
    }}"""
    return Case(text, GRID_WEIGHTS, GRID_GROUPS, {"x": (2, 3, 8, 8)})


CASES["position_grid_resized_to_sizes"] = _position_grid(
    17, 'g = Resize <mode = "cubic"> (pos, , , sizes)', "int64[4] sizes = {1, 12, 4, 4}"
)
CASES["position_grid_resized_along_axes"] = _position_grid(
    19, 'g = Resize <mode = "linear", axes = [2, 3]> (pos, , , sizes)', "int64[2] sizes = {4, 4}"
)
CASES["position_grid_scaled"] = _position_grid(
    13, 'g = Resize <mode = "linear"> (pos, , scales)', "float[4] scales = {1.0, 1.0, 0.8, 0.8}"
)
CASES["position_grid_pooled"] = _position_grid(
    17, "g = AveragePool <kernel_shape = [2, 2]> (pos)", "int64[1] unused = {0}"
)
CASES["position_grid_pooled_to_one"] = _position_grid(
    17, "g4 = GlobalAveragePool (pos)  g = Expand(g4, whole)", "int64[4] whole = {1, 12, 4, 4}"
)
CASES["upsampled_channels_last"] = Case(
    """<ir_version: 8, opset_import: ["": 9]>
    g (float[B, 3, 4, 16] x) => (float[B, 6, 8, 5] y) <float[4] scales = {1.0, 2.0, 2.0, 1.0}> {
        a = MatMul(x, w1)  b = Relu(a)  r = Upsample <mode = "nearest"> (b, scales)  y = MatMul(r, w2)
    }""",
    {"w1": (16, 24), "w2": (24, 5)},
    {("ffn", 1, 24): 1},
    {"x": (2, 3, 4, 16)},
)
CASES["conv_groups"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 7, 7] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)  r = Relu(a)
        b = Conv <group = 4> (r, wb, bb)  s = Relu(b)
        y = Conv(s, wc)
    }""",
    {"wa": (16, 3, 3, 3), "ba": (16,), "wb": (24, 4, 3, 3), "bb": (24,), "wc": (5, 24, 1, 1)},
    {("conv", 1, 4): 1, ("conv", 4, 6): 1},
    {"x": (2, 3, 9, 9)},
)
CASES["einsum_of_three_axes"] = Case(  # as Keras writes multi-head attention
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, N, 16] x) => (float[B, N, 5] y) <float scale = {0.37796447}> {
        q0 = Einsum <equation = "abc,cde->abde"> (x, wq)  q = Add(q0, bq)  qs = Mul(q, scale)
        k0 = Einsum <equation = "abc,cde->abde"> (x, wk)  k = Add(k0, bk)
        v0 = Einsum <equation = "abc,cde->abde"> (x, wv)  v = Add(v0, bv)
        s = Einsum <equation = "aecd,abcd->acbe"> (k, qs)
        p = Softmax(s)
        c = Einsum <equation = "acbe,aecd->abcd"> (p, v)
        y = Einsum <equation = "abcd,cde->abe"> (c, wo)
    }""",
    {"wq": (16, 3, 7), "wk": (16, 3, 7), "wv": (16, 3, 7), "wo": (3, 7, 5), "bq": (3, 7), "bk": (3, 7), "bv": (3, 7)},
    {("qk", 1, 7): 1, ("vo", 1, 7): 1, ("head", 1, 3): 1},  # all heads keep the same positions
)
CASES["heads_vary_fastest"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, N, 16] x) => (float[B, N, 5] y) <int64[4] split = {0, 0, 4, 3}, int64[3] merge = {0, 0, -1}> {
        q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose <perm = [0, 3, 1, 2]> (q1)
        k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose <perm = [0, 3, 2, 1]> (k1)
        v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose <perm = [0, 3, 1, 2]> (v1)
        s = MatMul(q, k)  p = Softmax(s)  c = MatMul(p, v)
        c1 = Transpose <perm = [0, 2, 3, 1]> (c)  c0 = Reshape(c1, merge)  y = MatMul(c0, wo)
    }""",
    {"wq": (16, 12), "wk": (16, 12), "wv": (16, 12), "wo": (12, 5)},
    {("qk", 1, 4): 1, ("vo", 1, 4): 1, ("head", 1, 3): 1},  # all heads keep the same positions
)
CASES["einsum_of_one"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, N, 16] x) => (float[B, 5] y) {
        a = MatMul(x, wa)  r = Relu(a)
        t = Einsum <equation = "bnc->cbn"> (r)
        s = Einsum <equation = "cbn->bc"> (t)
        y = MatMul(s, wb)
    }""",
    {"wa": (16, 12), "wb": (12, 5)},
    {("ffn", 1, 12): 1},
)
CASES["einsum_of_four"] = Case(
    """<ir_version: 10, opset_import: ["": 12]>
    g (float[B, N, 16] x) => (float[B, N, 5] y) { y = Einsum <equation = "bnc,cd,de,ef"> (x, wa, wb, wc) }""",
    {"wa": (16, 12), "wb": (12, 8), "wc": (8, 5)},
    {("ffn", 1, 12): 1, ("ffn", 1, 8): 1},
)
CASES["conv_depthwise_times"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 7, 7] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)  r = Relu(a)
        b = Conv <group = 8> (r, wb, bb)  s = Relu(b)
        y = Conv(s, wc)
    }""",
    {"wa": (8, 3, 3, 3), "ba": (8,), "wb": (24, 1, 3, 3), "bb": (24,), "wc": (5, 24, 1, 1)},
    {("conv", 1, 8): 1},
    {"x": (2, 3, 9, 9)},
)
CASES["conv_transpose"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 5, 5] x) => (float[B, 4, D, E] y) {
        a = ConvTranspose <strides = [2, 2]> (x, wa, ba)  r = Relu(a)
        b = ConvTranspose <group = 4> (r, wb, bb)  s = Relu(b)
        d = ConvTranspose <group = 24> (s, wd)  e = Relu(d)
        y = Conv(e, wc)
    }""",
    {"wa": (3, 16, 2, 2), "ba": (16,), "wb": (16, 6, 3, 3), "bb": (24,), "wd": (24, 1, 2, 2), "wc": (4, 24, 1, 1)},
    {("conv", 1, 6): 1, ("conv", 4, 4): 1},
    {"x": (2, 3, 5, 5)},
)
CASES["batch_norm"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 9, 9] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa)  n = BatchNormalization(a, s, b, m, v)  r = Relu(n)
        p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)
        q = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (p)
        y = Conv(q, wc)
    }""",
    {"wa": (12, 3, 3, 3), "s": (12,), "b": (12,), "m": (12,), "wc": (5, 12, 1, 1)},
    {("conv", 1, 12): 1},
    {"x": (2, 3, 9, 9)},
    {"v": np.linspace(0.5, 2, 12).astype(np.float32)},
)
CASES["group_norm"] = Case(
    """<ir_version: 10, opset_import: ["": 21]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 9, 9] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa)  n = GroupNormalization <num_groups = 6> (a, s, b)
        r = Relu(n)  y = Conv(r, wc)
    }""",
    {"wa": (12, 3, 3, 3), "s": (12,), "b": (12,), "wc": (5, 12, 1, 1)},
    {("conv", 1, 6): 1},
    {"x": (2, 3, 9, 9)},
)
CASES["group_norm_18"] = Case(
    CASES["group_norm"].text.replace('"": 21', '"": 18'),
    {**CASES["group_norm"].weights, "s": (6,), "b": (6,)},
    {("conv", 1, 6): 1},
    {"x": (2, 3, 9, 9)},
)
CASES["group_norm_as_instances"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 9, 9] y) <int64[3] in = {0, 6, -1}> {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa)
        f = Reshape(a, in)  i = InstanceNormalization(f, s, b)  t = Shape(a)  u = Reshape(i, t)
        g = Mul(u, gain)  n = Add(g, bias)
        r = Relu(n)  y = Conv(r, wc)
    }""",
    {"wa": (12, 3, 3, 3), "gain": (12, 1, 1), "bias": (12, 1, 1), "wc": (5, 12, 1, 1)},
    {("conv", 1, 6): 1},
    {"x": (2, 3, 9, 9)},
    {"s": np.ones(6, np.float32), "b": np.zeros(6, np.float32)},
)
CASES["rms_norm"] = Case(
    """<ir_version: 10, opset_import: ["": 24]>
    g (float[B, N, 16] x) => (float[B, N, 4] y) {
        a = MatMul(x, wa)  n = RMSNormalization(a, s)  h = MatMul(n, wb)  r = Swish(h)  y = MatMul(r, wc)
    }""",
    {"wa": (16, 12), "s": (12,), "wb": (12, 10), "wc": (10, 4)},
    {("ffn", 1, 10): 1, ("ffn", 1, 12): 1},
)
CASES["resize"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[B, 3, 6, 6] x) => (float[B, 5, 12, 12] y) <int64[4] sizes = {2, 10, 12, 12}> {
        a = Conv(x, wa)  r = Relu(a)  u = Resize <mode = "nearest"> (r, , , sizes)  y = Conv(u, wc)
    }""",
    {"wa": (10, 3, 1, 1), "wc": (5, 10, 1, 1)},
    {("ffn", 1, 10): 1},
    {"x": (2, 3, 6, 6)},
)
CASES["gather_nd"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[B, 5, 16] x, int64[M, 2] at) => (float[M, 4] y) {
        a = MatMul(x, wa)  r = Relu(a)  p = GatherND(r, at)
        k = Transpose <perm = [1, 0]> (p)  h = GatherND(k, which)  t = Transpose <perm = [1, 0]> (h)
        y = MatMul(t, wb)
    }""",
    {"wa": (16, 12), "wb": (6, 4)},
    {("ffn", 1, 6): 1, ("other", 1, 6): 1},
    given={"which": np.array([[1], [3], [5], [7], [9], [11]])},
    ints={"at": np.array([[0, 1], [2, 4], [1, 1]])},
)
CASES["gather_elements"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[3, 16] x) => (float[3, 4] y) {
        a = MatMul(x, wa)  r = Relu(a)  p = GatherElements <axis = 1> (r, which)  y = MatMul(p, wb)
    }""",
    {"wa": (16, 12), "wb": (6, 4)},
    {("ffn", 1, 6): 1, ("other", 1, 6): 1},
    {"x": (3, 16)},
    {"which": np.tile(np.array([2, 3, 5, 7, 8, 11]), (3, 1))},
)
CASES["scatter_nd"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[5, 16] x, int64[M, 1] at) => (float[5, 4] y) <int64[2] two = {0, 1}, int64 some = {2}> {
        a = MatMul(x, wa)  b = MatMul(x, wb)  c = Gather <axis = 0> (b, two)
        s = ScatterND(a, at, c)  r = Relu(s)  y = MatMul(r, wc)
    }""",
    {"wa": (16, 12), "wb": (16, 12), "wc": (12, 4)},
    {("ffn", 1, 12): 1},
    {"x": (5, 16)},
    ints={"at": np.array([[1], [3]])},
)
CASES["grid_sample_and_roi_align"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[2, 3, 8, 8] x, float[2, 4, 4, 2] grid, int64[2] images) => (float[2, 5, 4, 4] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa)  s = GridSample(a, grid)  b = Conv <pads = [1, 1, 1, 1]> (s, wb)
        r = RoiAlign <output_height = 4, output_width = 4> (b, regions, images)
        y = Conv <pads = [1, 1, 1, 1]> (r, wc)
    }""",
    {"wa": (8, 3, 3, 3), "wb": (6, 8, 3, 3), "wc": (5, 6, 3, 3)},
    {("conv", 1, 8): 1, ("conv", 1, 6): 1},
    {"x": (2, 3, 8, 8), "grid": (2, 4, 4, 2)},
    {"regions": np.array([[0, 0, 3, 3], [1, 0, 4, 2]], np.float32)},
    ints={"images": np.array([1, 0])},
)
CASES["trilu_where_cumsum"] = Case(
    """<ir_version: 10, opset_import: ["": 18]>
    g (float[B, 5, 16] x) => (float[B, 5, 4] y) <int64 zero = {0}, int64 one = {1}, float none = {0.0}> {
        q = MatMul(x, wq)  k = MatMul(x, wk)  kt = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul(q, kt)  t = Trilu <upper = 0> (s)  p = Softmax(t)
        v = MatMul(x, wv)  f = CumSum(v, one)  big = Greater(f, none)  w = Where(big, f, none)
        c = MatMul(p, w)  y = MatMul(c, wo)
    }""",
    {"wq": (16, 8), "wk": (16, 8), "wv": (16, 12), "wo": (12, 4)},
    {("qk", 1, 8): 1, ("vo", 1, 12): 1},
)

CASES["tile_by_a_quotient"] = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 5, 16] x) => (float[B, 5, 16] y) <int64[4] heads = {0, 0, 4, 6}, int64 four = {4}, int64[1] zero = {0},
        int64[3] flat = {-1, 5, 6}, int64[2] ones = {1, 1}, int64[4] apart = {-1, 4, 5, 6}, int64[3] merge = {0, 0, -1},
        int64[1] one = {1}> {
        q = MatMul(x, wq)  q4 = Reshape(q, heads)  qt = Transpose <perm = [0, 2, 1, 3]> (q4)  qf = Reshape(qt, flat)
        k = MatMul(places, wk)  k4 = Reshape(k, heads)
        kt = Transpose <perm = [0, 2, 1, 3]> (k4)  kf = Reshape(kt, flat)
        v = MatMul(x, wv)  v4 = Reshape(v, heads)  vt = Transpose <perm = [0, 2, 1, 3]> (v4)  vf = Reshape(vt, flat)
        sh = Shape(qf)  bh = Slice(sh, zero, one)  b = Div(bh, four)  r = Concat <axis = 0> (b, ones)
        kr = Tile(kf, r)  kk = Transpose <perm = [0, 2, 1]> (kr)
        s = MatMul(qf, kk)  p = Softmax(s)  c = MatMul(p, vf)
        ca = Reshape(c, apart)  ct = Transpose <perm = [0, 2, 1, 3]> (ca)  cm = Reshape(ct, merge)  y = MatMul(cm, wo)
    }""",
    {"wq": (16, 24), "wk": (16, 24), "wv": (16, 24), "wo": (24, 16), "places": (1, 5, 16)},
    {("ffn", 4, 6): 1, ("vo", 4, 6): 1, ("head", 1, 4): 1},
)

PROJECTED = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"


def attention(inner: str, opset: str, output: str = "y = MatMul(c, wo)") -> str:
    return f"""<ir_version: 10, opset_import: [{opset}]>
    g (float[B, N, 16] x) => (float[B, N, 16] y) {{ {PROJECTED}  {inner}  {output} }}"""


def widths(query: int, key: int, value: int, output: int | None = None) -> dict[str, tuple[int, ...]]:
    return {"wq": (16, query), "wk": (16, key), "wv": (16, value), "wo": (output or value, 16)}


ONNX23, BOTH = '"": 23', '"": 17, "com.microsoft": 1'
MHA = {("qk", 4, 6): 1, ("vo", 4, 8): 1, ("head", 1, 4): 1}

CASES["attention_3d"] = Case(
    attention("c = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)", ONNX23), widths(24, 24, 32), MHA
)
CASES["attention_3d_scale"] = Case(
    attention("c = Attention <q_num_heads = 4, kv_num_heads = 4, scale = 0.3, is_causal = 1> (q, k, v)", ONNX23),
    widths(24, 24, 32),
    MHA,
)
CASES["attention_grouped"] = Case(
    attention("c = Attention <q_num_heads = 6, kv_num_heads = 2, softcap = 3.0> (q, k, v)", '"": 24'),
    widths(36, 12, 16, 48),
    {("qk", 2, 6): 1, ("vo", 2, 8): 1, ("head", 1, 2): 1},
)
CASES["attention_one_key_head"] = Case(
    attention("c = Attention <q_num_heads = 4, kv_num_heads = 1> (q, k, v)", '"": 24'),
    widths(24, 6, 8, 32),
    {("qk", 1, 6): 1, ("vo", 1, 8): 1, ("head", 1, 4): 1},
)
CASES["multi_head_attention"] = Case(
    attention("c = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, b)", BOTH),
    {**widths(24, 24, 32), "b": (80,)},
    MHA,
)
CASES["multi_head_attention_4d"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, N, 16] x) => (float[B, N, 16] y) <int64[4] heads = {0, 0, 4, -1}> {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        k4 = Reshape(k, heads)  v4 = Reshape(v, heads)
        kh = Transpose <perm = [0, 2, 1, 3]> (k4)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        c = com.microsoft.MultiHeadAttention <num_heads = 4, scale = 0.25> (q, kh, vh)
        y = MatMul(c, wo)
    }""",
    widths(24, 24, 24),
    {("qk", 4, 6): 1, ("vo", 4, 6): 1, ("head", 1, 4): 1},
)
CASES["packed_weight_attention"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, N, 16] x) => (float[B, N, 16] y) {
        c = com.microsoft.Attention <num_heads = 4, qkv_hidden_sizes = [24, 24, 32]> (x, w, b)  y = MatMul(c, wo)
    }""",
    {"w": (16, 80), "b": (80,), "wo": (32, 16)},
    MHA,
)
LENGTHS = {"lens": np.array([4, 4, 4], np.int32), "total": np.array(5, np.int32)}
CASES["grouped_query_attention"] = Case(
    attention(
        "c, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, , , lens, total)",
        BOTH,
    ).replace("x) =>", "x, int32[B] lens, int32 total) =>"),
    widths(4 * 32, 2 * 32, 2 * 32, 4 * 32),
    {("qk", 2, 32): 1, ("vo", 2, 32): 1, ("head", 1, 2): 1},
    ints=LENGTHS,
)
CASES["grouped_query_attention_one_key_head"] = Case(
    attention(
        "c, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 1> (q, k, v, , , lens, total)",
        BOTH,
    ).replace("x) =>", "x, int32[B] lens, int32 total) =>"),
    widths(4 * 32, 32, 32, 4 * 32),
    {("qk", 1, 32): 1, ("vo", 1, 32): 1, ("head", 1, 4): 1},
    ints=LENGTHS,
)
CASES["grouped_query_attention_packed_rotary"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, N, 16] x, int32[B] lens, int32 total) => (float[B, N, 16] y) {
        p = MatMul(x, w)
        c, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>
            (p, , , , , lens, total, cosine, sine)
        y = MatMul(c, wo)
    }""",
    {"w": (16, 8 * 32), "wo": (4 * 32, 16)},
    {("qk", 1, 16): 1, ("vo", 2, 32): 1, ("head", 1, 2): 1},
    given=table_of(8, 16),
    ints=LENGTHS,
)
CASES["decoder_masked_attention"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, 1, 16] x) => (float[B, 1, 16] y) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c = com.microsoft.DecoderMaskedMultiHeadAttention <num_heads = 4> (q, k, v, , , , , , , , b)
        y = MatMul(c, wo)
    }""",
    {**widths(24, 24, 24), "b": (72,)},
    {("qk", 4, 6): 1, ("vo", 4, 6): 1, ("head", 1, 4): 1},
    {"x": (3, 1, 16)},
)
for interleaved in (0, 1):
    CASES[f"rotary_{interleaved}"] = Case(
        attention(
            f"""qr = RotaryEmbedding <num_heads = 4, interleaved = {interleaved}> (q, cosine, sine, at)
            kr = RotaryEmbedding <num_heads = 4, interleaved = {interleaved}> (k, cosine, sine, at)
            c = Attention <q_num_heads = 4, kv_num_heads = 4> (qr, kr, v)""",
            ONNX23,
        ).replace("x) =>", "x, int64[B, N] at) =>"),
        widths(32, 32, 32),
        {("qk", 1, 4): 1, ("vo", 4, 8): 1, ("head", 1, 4): 1},
        given=table_of(8, 4),
        ints={"at": np.tile(np.arange(5), (3, 1))},
    )
CASES["rotary_partial"] = Case(
    attention(
        """qr = com.microsoft.RotaryEmbedding <num_heads = 4, rotary_embedding_dim = 4> (q, at, cosine, sine)
        kr = com.microsoft.RotaryEmbedding <num_heads = 4, rotary_embedding_dim = 4> (k, at, cosine, sine)
        c = com.microsoft.MultiHeadAttention <num_heads = 4> (qr, kr, v)""",
        BOTH,
    ).replace("x) =>", "x, int64[1] at) =>"),
    widths(32, 32, 32),
    {("qk", 1, 2): 1, ("qk", 4, 4): 1, ("vo", 4, 8): 1, ("head", 1, 4): 1},
    given=table_of(8, 2),
    ints={"at": np.zeros(1, np.int64)},
)
CASES["rotary_4d"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, N, 16] x, int64[1] at) => (float[B, N, 16] y) <int64[4] heads = {0, 0, 4, 8}> {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        q4 = Reshape(q, heads)  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        k4 = Reshape(k, heads)  kh = Transpose <perm = [0, 2, 1, 3]> (k4)
        v4 = Reshape(v, heads)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        qr = com.microsoft.RotaryEmbedding (qh, at, cosine, sine)
        kr = com.microsoft.RotaryEmbedding (kh, at, cosine, sine)
        kt = Transpose <perm = [0, 1, 3, 2]> (kr)  s = MatMul(qr, kt)  p = Softmax(s)  c = MatMul(p, vh)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)  m = Reshape(ct, merge)  y = MatMul(m, wo)
    }""",
    widths(32, 32, 32),
    {("qk", 1, 4): 1, ("vo", 4, 8): 1, ("head", 1, 4): 1},
    given={**table_of(8, 4), "merge": np.array([0, 0, -1])},
    ints={"at": np.zeros(1, np.int64)},
)
CASES["embed_layer_norm"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (int32[B, N] ids) => (float[B, N, 4] y) {
        e, m, s = com.microsoft.EmbedLayerNormalization (ids, , words, places, , gain, bias)
        a = com.microsoft.SkipLayerNormalization (e, s, gain2, bias2)
        b = com.microsoft.SkipSimplifiedLayerNormalization (a, e, gain3)
        h = MatMul(b, wa)  r = com.microsoft.BiasGelu(h, ba)  f = com.microsoft.FastGelu(r)
        u = com.microsoft.QuickGelu(f)  y = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (u, wb)
    }""",
    {
        "words": (30, 12), "places": (8, 12), "gain": (12,), "bias": (12,), "gain2": (12,), "bias2": (12,),
        "gain3": (12,), "wa": (12, 10), "ba": (10,), "wb": (4, 10),
    },
    {("ffn", 1, 10): 1, ("residual", 1, 12): 1},
    {},
    ints={"ids": np.arange(10, dtype=np.int32).reshape(2, 5)},
)  # fmt: skip
CASES["fused_gemm"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, 16] x) => (float[B, 4] y) {
        h = com.microsoft.FusedGemm <activation = "Relu", transB = 1> (x, wa, ba)
        y = com.microsoft.FusedGemm <activation = "Sigmoid", alpha = 0.5> (h, wb, bb)
    }""",
    {"wa": (12, 16), "ba": (12,), "wb": (12, 4), "bb": (4,)},
    {("ffn", 1, 12): 1},
    {"x": (3, 16)},
)
CASES["fused_conv"] = Case(
    """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 9, 9] y) {
        a = com.microsoft.FusedConv <activation = "Relu", pads = [1, 1, 1, 1]> (x, wa, ba)
        b = com.microsoft.FusedConv <activation = "Relu", pads = [1, 1, 1, 1]> (a, wb, bb, a)
        y = Conv(b, wc)
    }""",
    {"wa": (12, 3, 3, 3), "ba": (12,), "wb": (12, 12, 3, 3), "bb": (12,), "wc": (5, 12, 1, 1)},
    {("residual", 1, 12): 1},
    {"x": (2, 3, 9, 9)},
)
