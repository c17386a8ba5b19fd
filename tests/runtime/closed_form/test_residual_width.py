"""The residual width: cut only when asked for, exactly as masked, and with its normalisations fitted to what stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

import snpc
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.slicing.mask import mask_constants
from snpc.passes.slicing.slice import find_removed_units
from snpc.passes.weights.normalizations import Normalization, affected_normalizations, normalization_consumers
from snpc.runtime.closed_form.refit_normalizations import (
    ChannelAffine,
    NormalizationSums,
    measure_normalizations,
    solve_affine,
    solve_consumer_refit,
)
from snpc.types import Group
from tests.closed_forms import calibration_of, random_feeds, relative_change
from tests.command_line import CALIB, VIT, invoke, reported
from tests.models.exports import EXPORTS, export
from tests.models.streams import LAYER, LAYER_SPELLED
from tests.oracle import (
    TOLERANCE,
    Array,
    Cuts,
    Feeds,
    analysis_at,
    analysis_of,
    cut,
    cuts_of,
    feeds_of,
    prunable,
    random_cuts,
    random_removal,
    relative_error,
    run,
    written,
)

NAMES = [name for name in EXPORTS if not name.startswith(("bert", "conv", "mlp"))]
DECODERS = ["gpt2__dyn20_sdpa", "llama__ts17", "qwen3__dyn20", "t5__ts17"]


def residual(analysis: Analysis) -> list[Group]:
    return prunable(analysis.groups, "residual")


# -- what the analysis says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_free_but_said_to_be_approximate(name: str) -> None:
    analysis = analysis_of(name)
    groups = residual(analysis)
    assert groups
    for group in groups:
        assert (group.freedom, group.approximate) == ("select", True)
        made = {site.tensor for site in group.sites}
        assert not [pin for pin in analysis.pins if pin.tensor in made]


def test_nothing_cuts_it_by_default() -> None:
    analysis = analysis_of("vit_timm__ts17")
    plan = snpc.make_slice_plan(snpc.score(analysis), snpc.Budget(0.5))
    assert not {g.id for g in residual(analysis)} & set(plan.keep)
    assert "--roles residual" in invoke("inspect", VIT).stdout


def test_a_graph_output_keeps_it() -> None:
    """An encoder's last hidden state is as wide as the stream."""
    (group,) = (g for g in analysis_of("bert__ts17").groups if g.role == "residual")
    assert {"it is a graph output"} == {pin.reason for pin in group.pins if pin.kind == "hard"}
    with pytest.raises(UserError, match=r"nothing to prune in the roles residual, .* it is a graph output"):
        snpc.make_slice_plan(
            snpc.score(analysis_of("bert__ts17"), roles=("residual",)), snpc.Budget(0.5, ("residual",))
        )


# -- models that exports do not have ---------------------------------------------------------------------------------

D, H, V, O = 8, 12, 20, 5  # noqa: E741
HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
STREAM = (
    HEAD
    + """
    stream (int64[B, N] ids) => (float[B, N, 5] y)
    <float two = {{2.0}}, float small = {{0.00001}}, float share = {{0.125}}, int64[1] last = {{-1}}, int64 at = {{3}}>
    {{
        x = Gather(table, ids)
        {first}
        u = MatMul(n, up)
        r = Relu(u)
        d = MatMul(r, down)
        {second}
        y = MatMul(m, out)
    }}"""
)
MEANS_TWICE = LAYER_SPELLED.replace(
    "{y}7 = Div({y}2", "{y}0 = ReduceMean <axes = [-1]> ({x}) {y}9 = Sub({x}, {y}0) {y}7 = Div({y}9"
)
ROOT = """
    {y}1 = Mul({x}, {x})
    {y}2 = ReduceMean <axes = [-1], keepdims = 0> ({y}1)
    {y}3 = Unsqueeze({y}2, last)
    {y}4 = Add({y}3, small)
    {y}5 = Sqrt({y}4)
    {y}6 = Reciprocal({y}5)
    {y}7 = Mul({x}, {y}6)
    {y} = Mul({g}, {y}7)"""
FOLDED = """
    {y}1 = ReduceMean <axes = [-1]> ({x})
    {y}2 = Sub({x}, {y}1)
    {y}3 = Mul({y}2, {y}2)
    {y}4 = ReduceMean <axes = [-1]> ({y}3)
    {y}5 = Add({y}4, small)
    {y}6 = Sqrt({y}5)
    {y}7 = Reciprocal({y}6)
    {y}8 = Mul({y}7, {g})
    {y}9 = Mul({x}, {y}8)
    {y}10 = Mul({y}1, {y}8)
    {y}11 = Sub({b}, {y}10)
    {y} = Add({y}9, {y}11)"""
ONE_NODE = {
    "simplified": (17, "{y} = SimplifiedLayerNormalization <axis = -1> ({x}, {g})"),
    "root mean square": (23, "{y} = RMSNormalization <axis = -1> ({x}, {g})"),
    "layer": (17, LAYER),
    "layer without a bias": (17, "{y} = LayerNormalization <axis = -1> ({x}, {g})"),
    "spelled out": (17, LAYER_SPELLED),
    "mean taken twice": (17, MEANS_TWICE),
    "root mean square spelled out": (17, ROOT),
    "gain and bias folded": (17, FOLDED),
}
SKIPPED = {
    "skip": "m, , , s = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (x, d, g2, b2, b1)",
    "skip, simplified": "m, , , s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, d, g2, b1)",
}
FITTED = [kind for kind in ONE_NODE if kind != "gain and bias folded"]


def weights(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"table": (V, D), "up": (D, H), "down": (H, D), "out": (D, O)}
    shapes |= {"g1": (D,), "b1": (D,), "g2": (D,), "b2": (D,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def stream(path: Path, first: str, second: str, given: Mapping[str, Array] | None = None, opset: int = 17) -> Analysis:
    model = parser.parse_model(STREAM.format(opset=opset, first=first, second=second))
    used = {name for node in model.graph.node for name in node.input}
    for name, array in (given or weights()).items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return analysis_at(path / "stream.onnx", model)


def normed(path: Path, kind: str, given: Mapping[str, Array] | None = None) -> Analysis:
    opset, text = ONE_NODE[kind]
    first = text.format(x="x", y="n", g="g1", b="b1")
    second = "s = Add(x, d) " + text.format(x="s", y="m", g="g2", b="b2")
    return stream(path, first, second, given, opset)


IDS: Feeds = {"ids": np.random.default_rng(1).integers(0, V, (6, 7))}


def halved(analysis: Analysis, seed: int = 0) -> Cuts:
    return random_cuts(residual(analysis), seed, 0.5)


@pytest.mark.parametrize("kind", ONE_NODE)
def test_normalisations_however_they_are_spelled(kind: str, tmp_path: Path) -> None:
    analysis = normed(tmp_path, kind)
    (group,) = residual(analysis)
    assert (group.size, group.approximate) == (D, True)
    pair = cut(analysis, halved(analysis))
    assert relative_error(run(analysis.model.path, IDS), run(pair.masked, IDS)) > 1e-3
    for level in ("off", "all"):
        assert pair.error(IDS, level) < TOLERANCE


@pytest.mark.parametrize("kind", SKIPPED)
def test_sums_that_a_normalisation_hands_on(kind: str, tmp_path: Path) -> None:
    """The sum is an output of the normalisation, and goes on as the stream."""
    first = LAYER.format(x="x", y="n", g="g1", b="b1")
    second = SKIPPED[kind].replace("m,", "k,") + " t = Add(s, k) " + LAYER.format(x="t", y="m", g="g2", b="b2")
    analysis = stream(tmp_path, first, second)
    assert [g.size for g in residual(analysis)] == [D]
    assert cut(analysis, halved(analysis)).error(IDS) < TOLERANCE


def test_spelled_out_and_in_one_node_are_cut_alike(tmp_path: Path) -> None:
    rows = []
    for kind in ("layer", "spelled out", "mean taken twice", "gain and bias folded"):
        analysis = normed(tmp_path, kind)
        (group,) = residual(analysis)
        removed = np.arange(D)[None] % 2 == 0
        rows.append(run(cut(analysis, cuts_of([(group, removed)])).sliced, IDS))
    for other in rows[1:]:
        assert relative_error(rows[0], other) < 1e-4


PINNED = {
    "a sum with its size in a constant": (
        "t = ReduceSum <keepdims = 1> (x, last) k = Mul(t, share) n = Sub(x, k)", "it is reduced over"
    ),
    "a length": ("t = ReduceL2 <axes = [-1]> (x) n = Div(x, t)", "it is reduced over"),
    "a length in one node": ("n = LpNormalization <axis = -1> (x)", "its length is taken over this axis"),
    "a maximum": ("t = ReduceMax <axes = [-1]> (x) n = Sub(x, t)", "it is reduced over"),
    "a mean that is data": (
        "t = ReduceMean <axes = [-1]> (x) k = MatMul(t, wide) n = Add(x, k)",
        "its mean is used outside the normalization, by MatMul",
    ),
    "a softmax": ("n = Softmax <axis = -1> (x)", "it is summed over"),
    "a channel of its own": ("t = Gather <axis = -1> (x, at) k = Unsqueeze(t, last) n = Add(x, k)", "a single index"),
}  # fmt: skip


@pytest.mark.parametrize("case", PINNED)
def test_what_fewer_channels_cannot_estimate_is_pinned(case: str, tmp_path: Path) -> None:
    first, reason = PINNED[case]
    given = weights() | {"wide": np.ones((1, D), np.float32)}
    analysis = stream(tmp_path, first, "s = Add(x, d) m = Identity(s)", given)
    pins = [pin for g in analysis.groups if g.role in ("residual", "other") for pin in g.pins]
    assert any(reason in pin.reason for pin in pins)
    assert sum(g.size for g in residual(analysis)) == (D - 1 if "single index" in reason else 0)


def test_a_mean_that_is_an_output_keeps_what_it_is_of(tmp_path: Path) -> None:
    model = parser.parse_model(
        STREAM.format(opset=17, first=LAYER_SPELLED.format(x="x", y="n", g="g1", b="b1"), second="m = Add(n, d)")
    )
    model.graph.output.append(helper.make_tensor_value_info("n1", onnx.TensorProto.FLOAT, ["B", "N", 1]))
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights().items())
    analysis = analysis_at(tmp_path / "m.onnx", model)
    assert not residual(analysis)
    assert any(
        pin.reason == "its mean is used outside the normalization, by the graph output n1" for pin in analysis.pins
    )


def test_statistics_over_several_heads_keep_the_heads(tmp_path: Path) -> None:
    """A norm within each head lets whole heads go, one over all of them does not."""
    text = """
        <ir_version: 10, opset_import: ["" : 17]>
        heads (float[B, N, 8] x) => (float[B, N, 5] y)
        <int64[4] split = {0, 0, 4, 2}, int64[3] merge = {0, 0, -1}>
        {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
            qh = Transpose <perm = [0, 2, 1, 3]> (q4)
            kh = Transpose <perm = [0, 2, 3, 1]> (k4)
            vh = Transpose <perm = [0, 2, 1, 3]> (v4)
            s = MatMul(qh, kh)
            p = Softmax <axis = -1> (s)
            c = MatMul(p, vh)
            ct = Transpose <perm = [0, 2, 1, 3]> (c)
            %s
            y = MatMul(n, wo)
        }"""
    within = "i = LayerNormalization <axis = -1> (ct, g2) n = Reshape(i, merge)"
    across = "m = Reshape(ct, merge) n = LayerNormalization <axis = -1> (m, g8)"
    rng = np.random.default_rng(0)
    shapes = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 5), "g2": (2,), "g8": (8,)}
    free = {}
    for name, norm in (("within", within), ("across", across)):
        model = parser.parse_model(text % norm)
        used = {i for node in model.graph.node for i in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in shapes.items() if n in used
        )
        free[name] = {g.role for g in prunable(analysis_at(tmp_path / f"{name}.onnx", model).groups)}
    assert "head" not in free["across"]
    assert not {"vo", "residual"} & (free["across"] | free["within"])


# -- sliced equals masked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_half_of_it(name: str) -> None:
    """Alone, and together with every other width; with onnxruntime's fusions and without."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    for groups in (residual(analysis), prunable(analysis.groups, "qk", "vo", "ffn", "residual")):
        pair = cut(analysis, random_cuts(groups, 3, 0.5))
        assert relative_error(run(export(name), feeds), run(pair.masked, feeds)) > 1e-3
        for level in ("off", "all"):
            assert pair.error(feeds, level) < TOLERANCE
        assert len(pair.sliced) < len(pair.masked)


@pytest.mark.parametrize("name", ["bert__ts17", "bert__dyn20_sdpa", "bert__dyn23_sdpa", "albert__ts17"])
def test_an_encoder_with_a_head(name: str, tmp_path: Path) -> None:
    """With a classifier behind it the stream is no output any more."""
    model = onnx.load(export(name))
    (output,) = model.graph.output
    wide = np.random.default_rng(0).normal(size=(48, 7)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(wide, "classifier"))
    model.graph.node.append(helper.make_node("MatMul", [output.name, "classifier"], ["classes"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("classes", onnx.TensorProto.FLOAT, None))
    analysis, feeds = analysis_at(tmp_path / "m.onnx", model), feeds_of(name)
    assert 48 in {g.size for g in residual(analysis)}
    for level in ("off", "all"):
        assert cut(analysis, halved(analysis)).error(feeds, level) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__dyn20"])
def test_zeros_alone_are_not_the_same(name: str) -> None:
    """The oracle would notice: with statistics over the silenced channels too, it says something else."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    pair = cut(analysis, halved(analysis))
    naive = pair.rewritten.source.model.clone()
    for tensor, array in mask_constants(pair.rewritten.source.trace, pair.rewritten.removed).items():
        naive.graph.initializers[tensor].const_value = onnx_tensor(array, tensor)
    assert relative_error(run(written(naive), feeds), run(pair.sliced, feeds)) > 1e-2


def onnx_tensor(array: npt.NDArray[Any], name: str) -> Any:
    import onnx_ir as ir

    return ir.Tensor(array, name=name)


# -- fitting -----------------------------------------------------------------------------------------------------------


def sums_of(z: Array, y: Array) -> NormalizationSums:
    return NormalizationSums(z.T @ z, z.T @ y, z.sum(0), y.sum(0), float(len(z)))


def bare(stays: Array, gain: str | None, bias: str | None) -> Normalization:
    return Normalization((), (), None, -1, stays, gain, bias)  # type: ignore[arg-type]


def rows(seed: int, size: int, count: int = 60) -> tuple[Array, Array, Array]:
    """(which channels stay, z [rows, kept], y [rows, channels])."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    stays = np.arange(size) % 2 == 0
    return stays, y[:, stays] * rng.uniform(0.5, 2, stays.sum()) + 0.3 * rng.normal(size=(count, stays.sum())), y


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(2, 9))
def test_gain_and_bias_are_least_squares_per_channel(seed: int, size: int) -> None:
    stays, z, y = rows(seed, size)
    both = solve_affine(sums_of(z, y), bare(stays, "g", "b"))
    gain = solve_affine(sums_of(z, y), bare(stays, "g", None))
    for k, channel in enumerate(np.flatnonzero(stays)):
        columns = np.stack([z[:, k], np.ones(len(z))], 1)
        expected = np.linalg.lstsq(columns, y[:, channel], rcond=None)[0]
        np.testing.assert_allclose([both.scale[k], both.shift[k]], expected, rtol=1e-6, atol=1e-8)
        (only,) = np.linalg.lstsq(columns[:, :1], y[:, channel], rcond=None)[0]
        np.testing.assert_allclose([gain.scale[k], gain.shift[k]], [only, 0.0], rtol=1e-6)
    none = solve_affine(sums_of(z, y), bare(stays, None, None))
    assert (none.scale == 1).all()
    assert not none.shift.any()


def test_a_channel_that_never_changes_is_only_shifted() -> None:
    stays, z, y = rows(0, 6)
    z[:, 0] = 2.0
    found = solve_affine(sums_of(z, y), bare(stays, "g", "b"))
    assert found.scale[0] == 1
    assert found.shift[0] == pytest.approx(y[:, 0].mean() - 2.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(2, 9), st.booleans())
def test_readers_are_ridge_least_squares_towards_what_they_were(seed: int, size: int, centred: bool) -> None:
    """As stacked least squares on the rows themselves, with as many more rows that ask for the old weights."""
    stays, z, y = rows(seed, size)
    rng = np.random.default_rng(seed)
    weight, affine = (
        rng.normal(size=(size, 3)),
        ChannelAffine(rng.uniform(0.5, 2, z.shape[1]), rng.normal(size=z.shape[1])),
    )
    found, bias = solve_consumer_refit(sums_of(z, y), affine, weight, bare(stays, "g", "b"), centred)
    new = z * affine.scale + affine.shift
    target = y @ weight
    a, b = (new - new.mean(0), target - target.mean(0)) if centred else (new, target)
    ridge = np.sqrt(np.trace(a.T @ a) / len(z)) * np.eye(a.shape[1])
    expected = np.linalg.lstsq(np.concatenate([a, ridge]), np.concatenate([b, ridge @ weight[stays]]), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(bias, (target - new @ found).mean(0) if centred else 0 * bias, atol=1e-7)


def normalise(x: Array, kind: str, gain: Array, bias: Array) -> Array:
    """What the norm of ``ONE_NODE`` computes, written down once more."""
    x = x.astype(np.float64)
    centred = x if "root" in kind or kind == "simplified" else x - x.mean(-1, keepdims=True)
    root = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    shifts = "root" not in kind and kind not in ("simplified", "layer without a bias")
    return np.asarray(centred / root * gain + (bias if shifts else 0))


@pytest.mark.parametrize("kind", FITTED)
def test_both_outputs_are_watched_on_the_dense_stream(kind: str, tmp_path: Path) -> None:
    analysis, given = normed(tmp_path, kind), weights()
    (group,) = residual(analysis)
    removed = random_removal(group, np.random.default_rng(5))
    dead = find_removed_units(analysis.traced_graph.trace, analysis.traced_graph.units, cuts_of([(group, removed)]))
    norms = affected_normalizations(analysis.traced_graph, dead)
    stays = ~removed[0]
    assert [norm.stays.tolist() for norm in norms] == [stays.tolist()] * 2
    assert [len(normalization_consumers(analysis.traced_graph, norm, [group])) for norm in norms] == [1, 1]
    x = given["table"][IDS["ids"]].reshape(-1, D)
    first = normalise(x, kind, given["g1"], given["b1"])
    second = x + np.maximum(first @ given["up"], 0) @ given["down"]
    batches = [{"ids": IDS["ids"][:4]}, {"ids": IDS["ids"][4:]}]
    for sums, value, number in zip(
        measure_normalizations(analysis.traced_graph, norms, dead, batches), (x, second), "12", strict=True
    ):
        gain, bias = given[f"g{number}"], given[f"b{number}"]
        y, z = normalise(value, kind, gain, bias), normalise(value[:, stays], kind, gain[stays], bias[stays])
        for found, expected in zip(
            (sums.zz, sums.zy, sums.z, sums.y, sums.count), (z.T @ z, z.T @ y, z.sum(0), y.sum(0), len(y)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def decided(
    analysis: Analysis, feeds: Feeds, samples: int, ratio: float, roles: Any = ("residual",)
) -> snpc.PruningPlan:
    return snpc.plan(analysis, snpc.Budget(ratio, roles), calibration=calibration_of(analysis, feeds, samples))


@pytest.mark.parametrize("kind", FITTED)
def test_what_the_others_know_already_is_made_up_for(kind: str, tmp_path: Path) -> None:
    """Every channel is there twice: half of them say it all, and the statistics are the same."""
    given = weights()
    for name in ("table", "down", "g1", "b1", "g2", "b2"):
        array = given[name]
        array[..., D // 2 :] = array[..., : D // 2]
    analysis = normed(tmp_path, kind, given)
    feeds = {"ids": np.random.default_rng(2).integers(0, V, (64, 16))}
    made = decided(analysis, feeds, 64, 0.5)
    keep = {residual(analysis)[0].id: (tuple(range(D // 2)),)}
    plan = snpc.SlicePlan(analysis, "", {}, keep, "auto")
    data = calibration_of(analysis, feeds, 64)
    fitted = snpc.apply(snpc.PruningPlan(plan, made.closed_forms, calibration=data), tmp_path / "a.onnx")
    plain = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, keep), calibration=data), tmp_path / "s.onnx")
    dense = run(analysis.model.path, IDS)
    assert relative_change(dense, run(plain.path, IDS)) > 0.2
    assert relative_change(dense, run(fitted.path, IDS)) < 0.02
    assert fitted.closed_forms == {residual(analysis)[0].id: "refit"}


@pytest.mark.parametrize("name", ["vit_timm__ts17", "vit_hf__dyn20", "swin_timm__ts17", "bart__ts17", *DECODERS])
@pytest.mark.slow
def test_fitting_moves_the_outputs_less(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data, others = calibration_of(analysis, random_feeds(name, 48), 48), random_feeds(name, 32, 7)
    moves = {}
    for method in ("auto", "select"):
        made = snpc.plan(
            analysis, snpc.Budget(0.25, ("residual",)), calibration=data, method=method, criterion="activation"
        )
        result = snpc.apply(made, tmp_path / "p.onnx")
        moves[method] = relative_change(run(export(name), others), run(result.path, others))
    assert moves["auto"] < 0.9 * moves["select"]


def test_a_table_that_is_the_last_layer_too_is_not_refitted(tmp_path: Path) -> None:
    """It would change the embeddings."""
    text = STREAM.replace("y = MatMul(m, out)", "w = Transpose <perm = [1, 0]> (table) y = MatMul(m, w)")
    norm = LAYER.format(x="x", y="n", g="g1", b="b1")
    second = "s = Add(x, d) " + LAYER.format(x="s", y="m", g="g2", b="b2")
    model = parser.parse_model(text.replace("[B, N, 5] y", "[B, N, 20] y").format(opset=17, first=norm, second=second))
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights().items() if n in used)
    analysis = analysis_at(tmp_path / "tied.onnx", model)
    (group,) = residual(analysis)
    dead = find_removed_units(analysis.traced_graph.trace, analysis.traced_graph.units, halved(analysis))
    norms = affected_normalizations(analysis.traced_graph, dead)
    assert [
        [r.weight_slice.tensor for r in normalization_consumers(analysis.traced_graph, norm, [group])] for norm in norms
    ] == [
        ["up"],
        [],
    ]
    made = decided(analysis, IDS, 6, 0.5)
    result = snpc.apply(made, tmp_path / "p.onnx")
    tables = [numpy_helper.to_array(t) for t in onnx.load(result.path).graph.initializer if t.name == "table"]
    kept = list(made.slices.keep[group.id][0])
    np.testing.assert_array_equal(tables[0], weights()["table"][:, kept])


# -- the way there ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prune_apply_and_verify(tmp_path: Path) -> None:
    plan, out, again = tmp_path / "p.json", tmp_path / "a.onnx", tmp_path / "b.onnx"
    flags = ("--roles", "qk,vo,ffn,residual", "--ratio", 0.1, "--calib", CALIB, "--calib-samples", 32)
    report = reported("prune", VIT, *flags, "-o", out, "--plan", plan)
    (group,) = (g for g in report["groups"] if g["role"] == "residual")
    assert (group["size"], group["kept"], group["form"]) == (96, 87, "refit")
    assert {g["role"] for g in report["groups"] if g["kept"] < g["size"]} == {"qk", "vo", "ffn", "residual"}
    assert report["verify"]["max_abs_diff"] < 1e-4
    assert report["verify"]["quality"]["differences"][0]["relative"] < 0.2
    data = ("--calib-samples", 32)
    reported("apply", VIT, plan, "--calib", CALIB, *data, "-o", again)
    for a, b in zip(onnx.load(out).graph.initializer, onnx.load(again).graph.initializer, strict=True):
        np.testing.assert_allclose(numpy_helper.to_array(a), numpy_helper.to_array(b), rtol=1e-4, atol=1e-5)
    model = snpc.load(VIT)
    calibration = snpc.load_calibration(str(CALIB), model.inputs, samples=32)
    slices = snpc.plan_from_json(plan.read_text(), snpc.analyze(model), "p.json")
    snpc.verify(VIT, out, plan=snpc.complete_plan(slices, calibration))


def test_without_data_nothing_but_slices_changes(tmp_path: Path) -> None:
    report = reported("prune", VIT, "--roles", "residual", "--ratio", 0.1, "-o", tmp_path / "out.onnx")
    (group,) = (g for g in report["groups"] if g["role"] == "residual")
    assert group["form"] is None
    dense = {t.name: numpy_helper.to_array(t) for t in onnx.load(VIT).graph.initializer}
    cut_ = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for site in group["sites"]:
        np.testing.assert_array_equal(
            cut_[site["tensor"]], np.take(dense[site["tensor"]], site["keep"], site["axis"]), site["tensor"]
        )


def test_a_target_is_refused_in_words_without_data(tmp_path: Path) -> None:
    flags = ("--roles", "residual,ffn", "--target", "macs=0.8", "-o", tmp_path / "out.onnx")
    said = invoke("prune", VIT, *flags, code=2).stderr
    assert "--target and --max-drift cannot rank the residual width" in said
    assert "--calib" in said
    assert "--ratio" in said
