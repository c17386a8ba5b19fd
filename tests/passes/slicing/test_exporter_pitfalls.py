"""Facts about real exports that break a naive rewrite, one test each.

Every test first shows that the fact is there (otherwise it would prove nothing), then that a cut survives it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis
from tests.models.exports import export
from tests.oracle import (
    TOLERANCE,
    Pair,
    analysis_at,
    analysis_of,
    cut,
    feeds_of,
    prunable,
    random_cuts,
    relative_error,
    run,
)

HEADS, SIZE, WIDTH = 2, 8, 12

# One attention block; {scale} makes `scores` from `raw`, {rotate} makes `q` and `k` from `q0` and `k0`.
ATTENTION = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x) => (float[B, N, 12] y)
    <int64[4] split = {{0, 0, 2, 8}}, int64[3] merge = {{0, 0, -1}}, int64[1] last = {{-1}}, int64[1] end = {{1000}},
     int64[1] zero = {{0}}, int64[1] half = {{4}}, float one = {{1.0}}, float two = {{0.5}}>
    {{
        qf = MatMul(x, wq)
        kf = MatMul(x, wk)
        vf = MatMul(x, wv)
        qs = Reshape(qf, split)
        ks = Reshape(kf, split)
        vs = Reshape(vf, split)
        q0 = Transpose <perm = [0, 2, 1, 3]> (qs)
        k0 = Transpose <perm = [0, 2, 1, 3]> (ks)
        v = Transpose <perm = [0, 2, 1, 3]> (vs)
        {rotate}
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        {scale}
        p = Softmax <axis = -1> (scores)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        y = MatMul(cm, wo)
    }}"""

PLAIN = "q = Identity(q0) k = Identity(k0)"
FROM_SHAPE = """
    shape = Shape({of})
    size = Slice(shape, last, end)
    float_size = Cast <to = 1> (size)
    root = Sqrt(float_size)
    raw = MatMul(q, kt)
    scores = Div(raw, root)"""
CONSTANT = "raw = MatMul(q, kt) number = Constant <value_float = {value}> () scores = Mul(raw, number)"
HALVES = """
    a{t} = Slice({t}0, zero, half, last)
    b{t} = Slice({t}0, half, end, last)
    n{t} = Neg(b{t})
    r{t} = Concat <axis = -1> (n{t}, a{t})
    c{t} = Mul({t}0, cosine)
    s{t} = Mul(r{t}, sine)
    {t} = Add(c{t}, s{t})"""


def block(
    path: Path, scale: str, rotate: str = PLAIN, split: str = "0, 0, 2, 8"
) -> tuple[Analysis, dict[str, np.ndarray]]:
    text = ATTENTION.replace("0, 0, 2, 8", split)
    model = parser.parse_model(text.format(scale=scale, rotate=rotate))
    rng = np.random.default_rng(0)
    inner = HEADS * SIZE
    shapes = {"wq": (WIDTH, inner), "wk": (WIDTH, inner), "wv": (WIDTH, inner), "wo": (inner, WIDTH)}
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32) * 0.5
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for name in ("cosine", "sine"):  # over two equal halves, as rotary tables are
        array = np.tile(rng.uniform(-1, 1, (1, 1, 1, SIZE // 2)), 2).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    feeds = {"x": rng.normal(size=(3, 5, WIDTH)).astype(np.float32)}
    return analysis_at(path / "block.onnx", model), feeds


def cut_roles(analysis: Analysis, *roles: str, ratio: float = 0.5) -> Pair:
    groups = prunable(analysis.groups, *roles)
    assert {g.role for g in groups} == set(roles)
    return cut(analysis, random_cuts(groups, 7, ratio))


def parse(pair: Pair) -> onnx.ModelProto:
    return onnx.load_from_string(pair.sliced)


def ancestors(model: onnx.ModelProto, value: str) -> Counter[str]:
    """How often each operator occurs in what ``value`` is computed from."""
    made = {out: node for node in model.graph.node for out in node.output}
    seen: set[str] = set()
    todo = [value]
    found: Counter[str] = Counter()
    while todo:
        node = made.get(todo.pop())
        if node is not None and node.output[0] not in seen:
            seen.add(node.output[0])
            found[node.op_type] += 1
            todo += node.input
    return found


# -- F1, F2, F3: where the scale hides -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_timm__ts17_sdpa", "encdec__ts17"])
def test_f1_scale_from_the_shape_of_q(name: str) -> None:
    """TorchScript SDPA takes the square root of a size that it reads from the graph's own tensors."""
    model = onnx.load(export(name))
    scales = [n for n in model.graph.node if n.op_type == "Sqrt" and ancestors(model, n.input[0])["Shape"]]
    assert scales
    pair = cut_roles(analysis_of(name), "qk")
    assert pair.error(feeds_of(name), "off") < TOLERANCE
    assert pair.error(feeds_of(name), "all") < TOLERANCE


def test_f1_a_shape_scale_in_the_open(tmp_path: Path) -> None:
    analysis, feeds = block(tmp_path, FROM_SHAPE.format(of="q"))
    assert cut_roles(analysis, "qk").error(feeds) < TOLERANCE


def test_f2_attention_without_a_scale() -> None:
    """ai.onnx Attention without the attribute divides by the root of whatever width it is given."""
    name = "vit_timm__dyn23_sdpa"
    nodes = [n for n in onnx.load(export(name)).graph.node if n.op_type == "Attention"]
    assert nodes
    assert not any(a.name == "scale" for n in nodes for a in n.attribute)
    pair = cut_roles(analysis_of(name), "qk")
    assert pair.error(feeds_of(name), "all") < TOLERANCE


def test_f2_attention_with_a_scale_keeps_the_standard_one() -> None:
    """Where the attribute is 1/sqrt(d) it follows d, so that whoever drops it later changes nothing."""
    name = "gpt2__dyn23_sdpa"
    before = [n for n in onnx.load(export(name)).graph.node if n.op_type == "Attention"]
    assert all(scale_of(n) == pytest.approx(12**-0.5) for n in before)
    pair = cut_roles(analysis_of(name), "qk")
    after = [n for n in parse(pair).graph.node if n.op_type == "Attention"]
    assert len(after) == len(before)
    assert all(scale_of(n) == pytest.approx(6**-0.5) for n in after)
    assert pair.error(feeds_of(name), "all") < TOLERANCE


def scale_of(node: onnx.NodeProto) -> float:
    return next(float(a.f) for a in node.attribute if a.name == "scale")


@pytest.mark.parametrize("roles", [("vo",), ("qk",), ("qk", "vo")])
def test_f3_scale_from_the_shape_of_v(tmp_path: Path, roles: tuple[str, ...]) -> None:
    """transformers 4 writes GPT-2 so: cutting the values, not the queries, would change the temperature."""
    analysis, feeds = block(tmp_path, FROM_SHAPE.format(of="v"))
    for ratio in (0.5, 0.25):
        pair = cut_roles(analysis, *roles, ratio=ratio)
        assert pair.error(feeds, "off") < TOLERANCE
        assert pair.error(feeds, "all") < TOLERANCE


@pytest.mark.parametrize("value", [SIZE**-0.5, 0.2, 1.0])
def test_a_constant_scale_keeps_its_meaning(tmp_path: Path, value: float) -> None:
    """Standard or not (T5 has none at all), the scores stay as they were."""
    analysis, feeds = block(tmp_path, CONSTANT.format(value=value))
    assert cut_roles(analysis, "qk").error(feeds) < TOLERANCE


# -- F4, F5: what several share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert__dyn20", "bert__dyn20_sdpa", "llama__dyn20"])
@pytest.mark.parametrize("role", ["qk", "vo"])
def test_f4_one_shape_for_q_k_and_v(name: str, role: str) -> None:
    """dynamo computes one target for the head splits of Q, K and V of all layers: only some of them shrink."""
    model = onnx.load(export(name))
    users = Counter(n.input[1] for n in model.graph.node if n.op_type == "Reshape")
    assert max(users.values()) >= 6
    pair = cut_roles(analysis_of(name), role)
    assert pair.error(feeds_of(name), "off") < TOLERANCE
    assert pair.error(feeds_of(name), "all") < TOLERANCE


@pytest.mark.parametrize("role", ["qk", "vo"])
def test_f4_a_shared_constant_is_not_edited(tmp_path: Path, role: str) -> None:
    analysis, feeds = block(tmp_path, CONSTANT.format(value=0.5))
    pair = cut_roles(analysis, role)
    model = parse(pair)
    constants = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    targets = Counter(constants[n.input[1]][-1] for n in model.graph.node if n.op_type == "Reshape")
    assert targets == Counter({SIZE // 2: 2, SIZE: 1, -1: 1} if role == "qk" else {SIZE // 2: 1, SIZE: 2, -1: 1})
    assert pair.error(feeds) < TOLERANCE


def consumers(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes read each initializer, directly or through an Identity."""
    alias = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity"}
    return Counter(alias.get(i, i) for n in model.graph.node if n.op_type != "Identity" for i in n.input)


@pytest.mark.parametrize("name", ["bert_zero_bias__ts17", "bert_zero_bias__dyn20"])
@pytest.mark.parametrize("role", ["qk", "vo", "head"])
def test_f5_one_zero_bias_for_unrelated_layers(name: str, role: str) -> None:
    """A fresh BERT has one zero vector for queries, keys, values, outputs and norms: cutting one cuts no other."""
    model = onnx.load(export(name))
    vectors = {t.name for t in model.graph.initializer if list(t.dims) == [48]}
    assert max(count for value, count in consumers(model).items() if value in vectors) >= 15
    analysis = analysis_of(name)
    group = prunable(analysis.groups, role)[0]  # the first layer only
    pair = cut(analysis, random_cuts([group], 3))
    assert pair.error(feeds_of(name), "all") < TOLERANCE
    # Its users are told apart only as far as they have to be.
    kept = [t for t in parse(pair).graph.initializer if not numpy_helper.to_array(t).any() and t.data_type == 1]
    assert len([t for t in kept if list(t.dims) == [48]]) == 1


@pytest.mark.parametrize("role", ["qk", "vo", "ffn", "head"])
def test_f5_one_weight_for_all_layers(role: str) -> None:
    """ALBERT's layers are one: what is cut goes from all of them, and they stay one."""
    name = "albert__ts17"
    before = onnx.load(export(name))
    shared = [t.name for t in before.graph.initializer if len(t.dims) == 2 and consumers(before)[t.name] == 3]
    assert len(shared) >= 6
    pair = cut_roles(analysis_of(name), role)
    assert pair.error(feeds_of(name), "all") < TOLERANCE
    after = parse(pair)
    assert sum(len(t.dims) == 2 and consumers(after)[t.name] == 3 for t in after.graph.initializer) == len(shared)
    assert matrices(after) == matrices(before)


def matrices(model: onnx.ModelProto) -> int:
    return sum(len(t.dims) == 2 and min(t.dims) > 1 for t in model.graph.initializer)


# -- F6, F8: what goes stale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert__dyn20", "bert__dyn23_sdpa"])
def test_f6_shapes_of_intermediate_values(name: str) -> None:
    """dynamo writes the shape of every value; onnxruntime trusts them when it plans its buffers."""
    before = onnx.load(export(name))
    old = {v.name: dims(v) for v in before.graph.value_info}
    assert any(12 in shape for shape in old.values())
    pair = cut_roles(analysis_of(name), "qk", "vo")
    after = parse(pair)
    claimed = {v.name: dims(v) for v in after.graph.value_info}
    stripped = onnx.ModelProto()
    stripped.CopyFrom(after)
    del stripped.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(stripped, strict_mode=True, data_prop=True)
    truth = {v.name: dims(v) for v in inferred.graph.value_info}
    for value, shape in claimed.items():
        assert all(a == b for a, b in zip(shape, truth.get(value, shape), strict=True) if isinstance(a + b, int)), value
    assert relative_error(run(pair.masked, feeds_of(name)), run(pair.sliced, feeds_of(name), "all")) < TOLERANCE


def dims(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", ["llama__dyn20", "llama__dyn20_sdpa"])
def test_f8_constant_halves_of_a_rotary_head(name: str) -> None:
    """[0:6] and [6:] of 12 would become 6 + 0 of 6, still 6 wide: no error, another answer."""
    before = halves(onnx.load(export(name)))
    assert before
    assert set(before) == {6}
    pair = cut_roles(analysis_of(name), "qk")
    after = halves(parse(pair))
    assert len(after) == len(before)
    assert set(after) == {3}
    assert pair.error(feeds_of(name), "all") < TOLERANCE


def halves(model: onnx.ModelProto) -> list[int]:
    """Where the last axis of 4-D values is cut in two by constants: the ends of Slices that start at 0."""
    constants = {t.name: numpy_helper.to_array(t).reshape(-1).tolist() for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Slice" and len(node.input) > 3 and all(i in constants for i in node.input[1:4]):
            start, end, axis = (constants[i] for i in node.input[1:4])
            if axis in ([3], [-1]) and start == [0] and end[0] < 1000:
                found.append(end[0])
    return found


def test_f8_halves_in_the_open(tmp_path: Path) -> None:
    rotate = HALVES.format(t="q") + HALVES.format(t="k")
    analysis, feeds = block(tmp_path, CONSTANT.format(value=0.3), rotate)
    (group,) = prunable(analysis.groups, "qk")
    assert (group.blocks, group.size) == (1, SIZE // 2)  # pairs, the same in every head
    assert group.freedom == "pairs"
    for ratio in (0.25, 0.5, 0.75):
        pair = cut(analysis, random_cuts([group], 1, ratio))
        assert pair.error(feeds) < TOLERANCE, f"ratio {ratio}"
        assert set(halves(parse(pair))) == {round(SIZE // 2 * (1 - ratio))}


# -- F7, F9, F10, F11: what a rewrite of weights alone, or by position, gets wrong ------------------------------------


def test_f7_weights_alone_can_run_and_be_wrong(tmp_path: Path) -> None:
    """[batch, tokens, -1, width]: half of two heads of 8 passes as one head of 8."""
    analysis, feeds = block(tmp_path, CONSTANT.format(value=SIZE**-0.5), split="0, 0, -1, 8")
    removed = random_cuts(prunable(analysis.groups, "qk", "vo"), 7, 0.5)
    naive = onnx.load(tmp_path / "block.onnx")
    for tensor in naive.graph.initializer:
        array = numpy_helper.to_array(tensor)
        for axis in range(array.ndim):
            if (tensor.name, axis) in removed:
                array = np.compress(~removed[tensor.name, axis], array, axis)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    pair = cut(analysis, removed)
    masked = run(pair.masked, feeds)
    assert relative_error(masked, run(naive.SerializeToString(), feeds)) > 0.1
    assert relative_error(masked, run(pair.sliced, feeds)) < TOLERANCE


PACKED = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x) => (float[B, N, 12] y)
    <int64[{rank}] split = {{{split}}}, int64[3] merge = {{0, 0, -1}}, float scale = {{0.35355338}}>
    {{
        p = MatMul(x, w)
        {parts}
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        raw = MatMul(q, kt)
        scores = Mul(raw, scale)
        a = Softmax <axis = -1> (scores)
        c = MatMul(a, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        y = MatMul(cm, wo)
    }}"""
SPLIT = "{0}2 = Reshape({0}1, split) {0} = Transpose <perm = [0, 2, 1, 3]> ({0}2)"
PICK = "{0}0 = Constant <value_int = {1}> () {0}1 = Gather <axis = {axis}> (r, {0}0) {move}"
TURN = "{0} = Transpose <perm = [0, 2, 1, 3]> ({0}1)"
ORDERS = {  # how query, key and value lie in one weight: (split, what makes q, k and v, the columns of each)
    "queries, values, keys": (
        "0, 0, 2, 8",
        "q1, v1, k1 = Split <axis = -1> (p)" + "".join(SPLIT.format(t) for t in "qkv"),
        {"q": range(16), "v": range(16, 32), "k": range(32, 48)},
    ),
    "head by head": (
        "0, 0, 2, 3, 8",
        "r = Reshape(p, split)"
        + "".join(PICK.format(t, i, axis=3, move=TURN.format(t)) for i, t in enumerate("kvq")),
        {t: [*range(8 * i, 8 * i + 8), *range(24 + 8 * i, 32 + 8 * i)] for i, t in enumerate("kvq")},
    ),
    "five axes": (
        "0, 0, 3, 2, 8",
        "r0 = Reshape(p, split) r = Transpose <perm = [2, 0, 3, 1, 4]> (r0)"
        + "".join(PICK.format(t, i, axis=0, move="") .replace(f"{t}1", t) for i, t in enumerate("vqk")),
        {t: range(16 * i, 16 * i + 16) for i, t in enumerate("vqk")},
    ),
}  # fmt: skip


def packed(path: Path, order: str) -> tuple[Analysis, dict[str, np.ndarray]]:
    split, parts, _ = ORDERS[order]
    model = parser.parse_model(PACKED.format(rank=split.count(",") + 1, split=split, parts=parts))
    rng = np.random.default_rng(0)
    for name, shape in {"w": (WIDTH, 48), "wo": (16, WIDTH)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.5, name))
    onnx.checker.check_model(model)
    return analysis_at(path / "block.onnx", model), {"x": rng.normal(size=(3, 5, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("order", ORDERS)
def test_f9_roles_do_not_follow_from_positions(tmp_path: Path, order: str) -> None:
    analysis, feeds = packed(tmp_path, order)
    columns = ORDERS[order][2]
    for role, parts in (("qk", "qk"), ("vo", "v")):
        (group,) = prunable(analysis.groups, role)
        (site,) = (s for s in group.sites if s.tensor == "w")
        assert np.flatnonzero(site.units >= 0).tolist() == sorted(k for part in parts for k in columns[part])
        assert cut_roles(analysis, role).error(feeds) < TOLERANCE


@pytest.mark.parametrize("role", ["qk", "vo"])
@pytest.mark.parametrize("order", ORDERS)
def test_f10_widths_of_a_packed_projection_come_apart(tmp_path: Path, order: str, role: str) -> None:
    """A box, or a split into equal parts, has one width for all three; cut alone, the others keep theirs."""
    analysis, feeds = packed(tmp_path, order)
    pair = cut_roles(analysis, role)
    assert pair.error(feeds, "all") < TOLERANCE
    (weight,) = (t for t in parse(pair).graph.initializer if t.name == "w")
    assert list(weight.dims) == [WIDTH, 48 - 16 if role == "qk" else 48 - 8]


@pytest.mark.parametrize(("name", "step"), [("grouped_query_attention", 8), ("..._packed_rotary", 16)])
def test_f11_grouped_query_attention_takes_multiples(tmp_path: Path, name: str, step: int) -> None:
    """onnxruntime's kernel refuses other widths: keys and values lose other units, as many channels in such steps."""
    from tests.models.operators import CASES, build, feeds_for

    case = CASES[name.replace("...", "grouped_query_attention")]
    analysis, feeds = analysis_at(tmp_path / "model.onnx", build(case)), feeds_for(case)
    keys, values = prunable(analysis.groups, "qk", "vo")
    assert keys.tie == values.tie != ""
    assert [g.step * g.channels for g in (keys, values)] == [step, step]
    pair = cut(analysis, random_cuts([keys, values], 1, 0.25 if step == 8 else 0.5))
    assert relative_error(run(pair.masked, feeds), run(pair.sliced, feeds)) < TOLERANCE
    assert cut_width(tmp_path, case, 4)


def cut_width(folder: Path, case: object, lost: int) -> bool:
    """Does onnxruntime refuse the node where every head is narrower by ``lost``?"""
    from tests.models.operators import Case, build, feeds_for

    assert isinstance(case, Case)
    narrow = {
        name: tuple(n // 32 * (32 - lost) if n % 32 == 0 else n for n in shape) for name, shape in case.weights.items()
    }
    tables = {k: v[:, : (32 - lost) // 2] for k, v in case.given.items()}
    model = build(Case(case.text, narrow, {}, case.feeds, tables, case.ints))
    try:
        run(model.SerializeToString(), feeds_for(case))
    except Exception as error:
        return "multiple" in str(error)
    return False
