"""What the analysis finds: the groups that follow from each model's configuration, and a reason for all the rest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from snpc.passes.analyze import Analysis, analyze
from snpc.passes.grouping.groups import CellIndex
from snpc.runtime.io.load import load
from tests.models.exports import EXPORTS, export
from tests.models.group_kinds import Kinds, attention, ffn, kinds_in, without
from tests.oracle import analysis_at, analysis_of, prunable

NAMES = list(EXPORTS)


def expected(name: str) -> Kinds:
    """What can be cut in an export, from the numbers its builder in `exports.py` configures the model with."""
    model, _, variant = name.partition("__")
    sdpa = "sdpa" in variant
    if model.startswith("vit_timm"):  # 48 wide, 3 heads, MLP ratio 4
        kinds = attention(3, 16, 2) + ffn(4 * 48, 2)
        # One gain for all heads behind a norm over the head's width ties their channels to each other.
        return without(kinds, "qk") + Counter({("qk", 1, 16): 2}) if model.endswith("qknorm") else kinds
    if model == "swin_timm":
        kinds = attention(2, 12, 2) + ffn(4 * 24, 2) + attention(4, 12, 2) + ffn(4 * 48, 2)
        # Bias and mask are summed before they are added to the scores, with windows and heads on axes of their own. The
        # bias may lose heads; the mask of the shifted block, which no weight produces, may not.
        return kinds - Counter({("head", 1, 2): 1}) if sdpa else kinds
    if model == "convnet":  # no norm but folded statistics: the residual stream can be cut
        return Counter({("residual", 1, 16): 1, ("conv", 1, 24): 1})
    if model == "convchain":
        sizes = (12, 20, 16, 48)
        return Counter({("conv", 1, channels): 1 for channels in sizes}) + ffn(14, 1)  # the last is pointwise
    if model == "mlp":
        return Counter({("residual", 1, 48): 1}) + ffn(96, 1)
    if model == "linear_attention":  # the normalizer sums q * k over the width, which pins it
        return without(attention(4, 12, 2), "qk") + ffn(96, 2)
    if model == "albert":  # TorchScript keeps the one weight of all layers, dynamo transposes it once per layer
        layers = 1 if variant.startswith("ts") else 3
        return attention(4, 12, layers) + ffn(96, layers)
    if model == "gpt2":
        return attention(4, 12, 2) + ffn(4 * 48, 2)
    if model == "llama":
        # All query heads share one rotary table, of which each key head selects 12 / 2 pairs with its query heads.
        return Counter({("qk", 2, 6): 2, ("vo", 2, 12): 2, ("head", 1, 2): 2}) + ffn(96, 2)
    if model == "qwen3":  # all heads share the gain of a norm, and so their pairs
        return Counter({("qk", 1, 6): 2, ("vo", 2, 12): 2, ("head", 1, 2): 2}) + ffn(96, 2)
    blocks = 2
    if model.startswith("t5"):
        # Self attention shares one bias table per stack, so its heads go in all layers at once; the bias of cross
        # attention is zeros made at run time, which keep the heads where they are more than a term of a sum.
        widths = without(attention(4, 12, 3 * blocks), "head")
        free = blocks if variant == "ts17" else 0
        return widths + Counter({("head", 1, 4): 2 + free}) + ffn(96, 2 * blocks)
    if model == "bart":
        return attention(4, 12, 3 * blocks) + ffn(96, 2 * blocks)
    if model == "encdec":  # a padding mask reshaped to batch x heads keeps the heads, the causal one does not
        widths = without(attention(4, 12, 3 * blocks), "head")
        return widths + Counter({("head", 1, 4): blocks}) + ffn(96, 2 * blocks)
    assert model in ("vit_hf", "bert", "bert_zero_bias"), f"say what can be cut in {model}"
    return attention(4, 12, 2) + ffn(96, 2)


def residual(name: str) -> Kinds:
    """Widths that nothing but normalisations keep."""
    model = name.partition("__")[0]
    if model in ("convnet", "convchain", "mlp", "bert", "bert_zero_bias"):  # no statistics over it; a graph output
        return Counter()
    widths = {"swin_timm": (24, 48), "albert": (24,)}.get(model, (48,))  # ALBERT's embeddings, before they are widened
    return Counter(("residual", 1, width) for width in widths)


@pytest.mark.parametrize("name", NAMES)
def test_groups_follow_from_the_configuration(name: str) -> None:
    assert kinds_in(analysis_of(name)) == expected(name) + residual(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_has_one_place(name: str) -> None:
    """Sites lie within their constants, and no two width groups claim the same position."""
    analysis = analysis_of(name)
    constants = analysis.traced_graph.model.graph.initializers
    taken: dict[tuple[str, int], np.ndarray] = {}
    for group in analysis.groups:
        assert group.blocks * group.size > 0
        for site in group.sites:
            assert constants[site.tensor].shape[site.axis] == len(site.units)
            assert site.units.min() >= -1
            assert site.units.max() < group.blocks * group.size
            if group.role == "head" or name.startswith("t5"):
                continue
            mine = site.units >= 0
            others = taken.setdefault((site.tensor, site.axis), np.zeros(len(mine), bool))
            assert not (mine & others).any(), f"{group.id}: {site.tensor}"
            others |= mine
        if group.prunable:
            every = {int(u) for site in group.sites for u in site.units if u >= 0}
            assert every == set(range(group.blocks * group.size)), group.id
            kinds = {site.kind for site in group.sites}
            assert "produce" in kinds, group.id
            assert group.params > 0


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_name_the_layer(name: str) -> None:
    analysis = analysis_of(name)
    ids = [g.id for g in analysis.groups]
    assert len(set(ids)) == len(ids)
    assert all(analysis.group(g.id) is g for g in analysis.groups)
    named = names_in(export(name))
    for group in prunable(analysis.groups, "qk", "vo", "ffn", "head") if not name.startswith("convchain") else ():
        if name.startswith("t5") and group.role == "vo" and group.blocks == 1:
            continue  # see test_groups_follow_from_the_configuration
        path, _, last = group.id.partition("#")[0].rpartition(".")
        assert last == group.role
        assert f".{path}." in named, f"{group.id} is no module of the model"


def names_in(path: Path) -> str:
    """Every dotted module path that the exporter left somewhere in the file."""
    graph = onnx.load(path).graph
    parameters = [v.name for v in graph.initializer]
    nodes = [n.name.replace("/", ".") for n in graph.node]
    scopes = [name for n in graph.node for p in n.metadata_props for name in re.findall(r"[\w.]+", p.value)]
    return " ".join(f".{name}." for name in {*parameters, *nodes, *scopes})


def shape_of(analysis: Analysis) -> dict[str, tuple[object, ...]]:
    return {g.id: (g.role, g.blocks, g.size, g.freedom) for g in prunable(analysis.groups)}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("__ts17")])
def test_two_loads_agree(name: str) -> None:
    first, second = analysis_of(name), analyze(load(export(name)))
    assert [g.id for g in first.groups] == [g.id for g in second.groups]
    for a, b in zip(first.groups, second.groups, strict=True):
        assert (a.role, a.blocks, a.size, a.macs, a.params, a.pins) == (
            b.role,
            b.blocks,
            b.size,
            b.macs,
            b.params,
            b.pins,
        )
        assert [(s.tensor, s.axis, s.kind) for s in a.sites] == [(s.tensor, s.axis, s.kind) for s in b.sites]
        for one, other in zip(a.sites, b.sites, strict=True):
            np.testing.assert_array_equal(one.units, other.units)


@pytest.mark.parametrize("name", ["convnet__ts17", "bert_zero_bias__ts17"])
def test_a_weight_counts_once(name: str) -> None:
    """One has a weight [D, D] that reads and writes the stream, the other many biases that are one in the file."""
    analysis = analysis_of(name)
    (group,) = [g for g in analysis.groups if g.role == "residual"]
    constants = analysis.traced_graph.model.graph.initializers
    expected: dict[int, int] = {}
    for tensor in {site.tensor for site in group.sites}:
        array = constants[tensor].const_value
        assert array is not None
        inside = np.zeros(array.shape, bool)
        for site in group.sites:
            if site.tensor == tensor:
                inside |= np.expand_dims(site.units >= 0, tuple(k for k in range(inside.ndim) if k != site.axis))
        expected[id(array)] = int(inside.sum())
    assert group.params == sum(expected.values()) <= analysis.cost.params


@pytest.mark.parametrize("name", [name for name in NAMES if not EXPORTS[name].dynamic])
def test_static_and_dynamic_exports_agree(name: str) -> None:
    dynamic = name.rpartition("_static")[0]
    if dynamic not in EXPORTS:
        pytest.skip("there is no dynamic export of this one")
    assert shape_of(analysis_of(name)) == shape_of(analysis_of(dynamic))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("vit_timm__ts17", "vit_timm__dyn20"),
        ("bert__ts17", "bert__dyn20_sdpa"),
        ("bart__ts17", "bart__dyn20"),
        ("gpt2__ts17", "gpt2__dyn23_sdpa"),
    ],
)
def test_exporters_agree(name: str, other: str) -> None:
    assert shape_of(analysis_of(name)) == shape_of(analysis_of(other))


@pytest.mark.parametrize("name", NAMES)
def test_what_stays_says_why(name: str) -> None:
    analysis = analysis_of(name)
    said = [*analysis.pins, *(pin for group in analysis.groups for pin in group.pins)]
    assert said
    for pin in said:
        assert pin.reason
        assert pin.operator
        assert pin.tensor
        assert pin.axis >= 0
        assert pin.size > 1
    # What reaches a graph output can never be cut, and what keeps a width is in the list of all pins.
    (output,) = analysis.model.outputs
    ends = [p for p in analysis.pins if p.tensor == output.name]
    assert ends
    assert {p.size for p in ends} <= {int(d) for d in output.shape if isinstance(d, int)}
    listed = {(p.tensor, p.axis, p.reason) for p in analysis.pins}
    assert {(p.tensor, p.axis, p.reason) for g in analysis.groups for p in g.pins} <= listed


# -- what cannot be followed -----------------------------------------------------------------------------------------


def reasons(analysis: Analysis, group_id: str) -> str:
    return " ".join(f"{p.reason} ({p.operator})" for p in analysis.group(group_id).pins)


def with_unknown_operator(name: str, path: Path, *, shape: bool) -> Analysis:
    """The export with a node of an unknown domain in front of the first layer's second MLP weight."""
    model = onnx.load(export(name))
    (target,) = (n for n in model.graph.node if n.name == "/blocks/blocks.0/mlp/fc2/MatMul")
    source = target.input[0]
    target.input[0] = "wobbled"
    node = helper.make_node("Wobble", [source], ["wobbled"], name="wobble", domain="acme")
    model.graph.node.insert(list(model.graph.node).index(target), node)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    if shape:
        model.graph.value_info.append(helper.make_tensor_value_info("wobbled", onnx.TensorProto.FLOAT, [2, 17, 192]))
    return analysis_at(path / "unknown.onnx", model)


def test_an_unknown_operator_is_pinned(tmp_path: Path) -> None:
    analysis = with_unknown_operator("vit_timm__ts17_static", tmp_path, shape=True)
    plain = analysis_of("vit_timm__ts17_static")
    said = [p for p in analysis.pins if "acme.Wobble" in p.reason]
    assert said
    assert {p.operator for p in said} == {"Wobble wobble"}
    assert {(p.axis, p.size) for p in said} == {(2, 192)}
    lost = {g.id for g in prunable(plain.groups)} - {g.id for g in prunable(analysis.groups)}
    assert lost == {"blocks.0.mlp.ffn"}


def test_an_unknown_operator_without_a_shape_is_no_error(tmp_path: Path) -> None:
    analysis = with_unknown_operator("vit_timm__ts17", tmp_path, shape=False)
    ids = {g.id for g in prunable(analysis.groups)}
    assert {"blocks.0.attn.qk", "blocks.0.attn.vo", "blocks.0.attn.head"} <= ids
    assert "blocks.0.mlp.ffn" not in ids
    assert any("acme.Wobble" in p.reason for p in analysis.pins)


def weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def test_what_a_branch_captures_is_pinned(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        captured (float[N, 8] x, bool c) => (float[N, 4] y) {
            h = MatMul(x, a)
            g = MatMul(h, b)
            k = If (c) <then_branch = yes () => (float[N, 4] t) { t = MatMul(g, d) },
                        else_branch = no () => (float[N, 4] e) { e = MatMul(x, f) }>
            y = Identity(k)
        }""")
    analysis = analysis_at(tmp_path / "if.onnx", weights(model, a=(8, 12), b=(12, 6), d=(6, 4), f=(8, 4)))
    assert [(g.blocks, g.size) for g in prunable(analysis.groups)] == [(1, 12)]
    (pin,) = (p for p in analysis.pins if p.tensor == "g")
    assert (pin.axis, pin.size) == (1, 6)
    assert pin.operator.startswith("If ")
    assert "control flow" in pin.reason


def test_what_a_loop_captures_is_pinned(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        looped (float[N, 8] x, int64 n, bool go) => (float[N, 6] y) {
            h = MatMul(x, a)
            g = MatMul(h, b)
            s = MatMul(x, d)
            y = Loop (n, go, s) <body = step (int64 i, bool c, float[N, 6] old) => (bool on, float[N, 6] new) {
                on = Identity(c)
                new = Add(old, g)
            }>
        }""")
    analysis = analysis_at(tmp_path / "loop.onnx", weights(model, a=(8, 12), b=(12, 6), d=(8, 6)))
    assert [(g.blocks, g.size) for g in prunable(analysis.groups)] == [(1, 12)]
    pins = {p.tensor: p for p in analysis.pins if p.operator.startswith("Loop ")}
    assert set(pins) == {"g", "s"}
    assert all((p.axis, p.size) == (1, 6) and p.reason for p in pins.values())


def test_an_index_beyond_the_sizes_that_are_tried_is_no_error(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        far (float[N, T, 8] x) => (float[N, 4] y) <int64 at = {500}> {
            h = MatMul(x, a)
            g = Gather <axis = 1> (h, at)
            y = MatMul(g, b)
        }""")
    analysis = analysis_at(tmp_path / "far.onnx", weights(model, a=(8, 12), b=(12, 4)))
    assert [g.size for g in prunable(analysis.groups)] == [12]


def test_units_of_quantised_weights_are_those_of_their_float_values(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        quantised (float[N, 8] x) => (float[N, 4] y) {
            f = MatMul(x, free)
            r = Relu(f)
            h = MatMul(r, into)
            d = DequantizeLinear <axis: int = 0> (packed, scale, zero)
            y = MatMul(h, d)
        }""")
    rng = np.random.default_rng(0)
    weights(model, free=(8, 12), into=(12, 6))
    packed = rng.integers(-127, 127, (6, 4), np.int8)
    scale = rng.uniform(0.5, 1.0, 6).astype(np.float32)
    for name, array in (("packed", packed), ("scale", scale), ("zero", np.zeros(6, np.int8))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    analysis = analysis_at(tmp_path / "qdq.onnx", model)
    assert sorted((g.blocks, g.size) for g in prunable(analysis.groups)) == [(1, 6), (1, 12)]


def test_a_weight_from_a_graph_input_is_pinned(tmp_path: Path) -> None:
    """A float axis that is combined with a tensor without labels may not be cut."""
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        outside (float[N, 8] x, float[12] gain) => (float[N, 4] y) {
            h = MatMul(x, a)
            g = Mul(h, gain)
            y = MatMul(g, b)
        }""")
    analysis = analysis_at(tmp_path / "outside.onnx", weights(model, a=(8, 12), b=(12, 4)))
    assert not prunable(analysis.groups)
    assert any("gain" in p.reason and p.size == 12 for p in analysis.pins)


def test_places_of_units_are_those_of_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    places = [rng.integers(0, 30, size) for size in (0, 1, 5, 40)]
    index = CellIndex(places)
    for units in ([], [3], [3, 3, 29], list(range(30)), [31, 99]):
        assert index.places_of(units) == [k for k, part in enumerate(places) if set(units) & set(part.tolist())]
    assert not CellIndex([]).places_of([1])
