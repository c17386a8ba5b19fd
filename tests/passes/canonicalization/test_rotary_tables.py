"""A rotary table outside nodes that all layers share: each key head, with its query heads, keeps pairs of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from snpc.passes.analyze import Analysis, analyze
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.canonicalization.rotary_tables import ForkRotaryTables
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.runtime.evaluation.compare import narrow_caches
from snpc.runtime.io.load import load
from tests.models.group_kinds import attention, kinds_in, without
from tests.models.rotary_decoders import LENGTH, RotaryDecoder
from tests.oracle import (
    TOLERANCE,
    Cuts,
    analysis_at,
    cut,
    cuts_of,
    prunable,
    random_cuts,
    relative_error,
    run,
    written,
)

FORMS = {
    "computed": RotaryDecoder(),
    "looked_up": RotaryDecoder(table="looked_up", pairs="neighbors"),
    "stored": RotaryDecoder(table="stored"),
    "tokens_first": RotaryDecoder(pairs="split", heads_axis=2),
    "stored_tokens_first": RotaryDecoder(table="stored", heads_axis=2),
    "partly_turned": RotaryDecoder(turned=4),
    "partly_turned_neighbors": RotaryDecoder(turned=4, pairs="neighbors"),
    "own_keys": RotaryDecoder(kv_heads=4),
    "one_key": RotaryDecoder(kv_heads=1),
}


def analysis_in(folder: Path, form: RotaryDecoder) -> Analysis:
    return analysis_at(folder / "decoder.onnx", form.model())


@pytest.mark.parametrize("name", FORMS)
def test_each_key_head_keeps_pairs_of_its_own(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    analysis = analysis_in(tmp_path, form)
    beside = Counter({("qk", form.kv_heads, form.width - form.turned): 2} if form.turned < form.width else {})
    expected = attention(form.kv_heads, form.turned // 2, 2) - Counter({("vo", form.kv_heads, form.turned // 2): 2})
    heads = Counter({("head", 1, form.kv_heads if form.kv_heads > 1 else form.heads): 2})
    expected = without(expected, "head") + heads + beside + Counter({("vo", form.kv_heads, form.width): 2})
    kinds = kinds_in(analysis)
    for kind in expected:
        assert kinds[kind] == expected[kind], kind
    whole = run(form.model().SerializeToString(), form.feeds())
    for roles in (("qk", "vo"), ("head",), ("qk", "vo", "head")):
        pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), 3))
        assert pair.error(form.feeds()) < TOLERANCE
        assert pair.error(form.feeds(), "all") < TOLERANCE
        assert relative_error(whole, run(pair.sliced, form.feeds())) > 1e-3
        if form.table != "stored":
            longer = {name: np.concatenate([a, a], 1) for name, a in form.feeds(3, seed=2).items()}
            assert pair.error(longer) < TOLERANCE


@pytest.mark.parametrize("turned", [8, 4])
def test_caches_of_pairs_of_each_head(turned: int, tmp_path: Path) -> None:
    """Sliced equals masked behind a random past, and a prefill with steps behind it equals one run."""
    form = RotaryDecoder(cached=True, turned=turned)
    path = tmp_path / "decoder.onnx"
    onnx.save(form.model(), path)
    analysis = analyze(load(path), prune_kv_cache=True)
    cuts = random_cuts(prunable(analysis.groups, "qk", "vo"), 5)
    rewritten = rewrite_model(analysis.traced_graph, cuts)
    narrowed = rewritten.sliced_interface()
    feeds = form.feeds(past=3)
    masked = run(written(mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)), feeds)
    names = [str(o.name) for o in rewritten.model.graph.outputs]
    expected = narrow_caches(dict(zip(names, masked, strict=True)), narrowed)
    sliced = written(finalize(rewritten.model))
    assert relative_error(list(expected.values()), run(sliced, narrow_caches(feeds, narrowed), "all")) < TOLERANCE
    feeds = narrow_caches(form.feeds(), narrowed)
    at_once, caches, rows = run(sliced, feeds)[0], {name: feeds[name] for name in form.caches("past")}, []
    for tokens in (range(4), *(range(k, k + 1) for k in range(4, LENGTH))):
        y, *present = run(sliced, {name: feeds[name][:, tokens] for name in ("x", "position_ids")} | caches)
        rows.append(y)
        caches = dict(zip(caches, present, strict=True))
    assert relative_error([at_once], [np.concatenate(rows, 1)]) < TOLERANCE


# -- what is written -------------------------------------------------------------------------------------------------


def kept(analysis: Analysis, rows: list[list[list[int]]]) -> Cuts:
    """Pairs that stay, per layer and key head."""
    groups = prunable(analysis.groups, "qk")
    masks = [[~np.isin(np.arange(g.size), row) for row in pairs] for g, pairs in zip(groups, rows, strict=True)]
    return cuts_of((group, np.array(mask)) for group, mask in zip(groups, masks, strict=True))


def selections(model: bytes) -> tuple[int, int]:
    """(selections of columns, those of them that differ between heads) in a written model."""
    graph = onnx.load_from_string(model).graph
    gathers = [node for node in graph.node if node.op_type == "Gather" and "columns" in node.input[1]]
    reshaped = [
        node for node in graph.node if node.op_type == "Reshape" and node.input[0] in {g.output[0] for g in gathers}
    ]
    return len(gathers), len(reshaped)


@pytest.mark.parametrize(
    ("pairs", "written_selections"),
    [
        ([[[0, 2], [0, 2]]] * 2, (2, 0)),  # of cosine and sine, for both layers
        ([[[0, 2], [0, 2]], [[1, 2], [1, 2]]], (4, 0)),
        ([[[0, 2], [0, 2]], [[1, 2], [0, 3]]], (6, 4)),  # heads of queries and of keys
        ([[[0, 2], [1, 2]]] * 2, (4, 4)),
    ],
)
def test_selections_that_agree_are_one(
    pairs: list[list[list[int]]], written_selections: tuple[int, int], tmp_path: Path
) -> None:
    form = RotaryDecoder()
    analysis = analysis_in(tmp_path, form)
    pair = cut(analysis, kept(analysis, pairs))
    assert selections(pair.sliced) == written_selections
    assert pair.error(form.feeds()) < TOLERANCE


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_selected_where_nothing_is_cut(name: str, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(FORMS[name].model(), path)
    loaded = load(path)
    assert any(node.name.endswith("_columns") for node in loaded.graph.graph)
    before, after = onnx.load(path).graph, onnx.load_from_string(written(loaded.graph.clone())).graph
    identities = {"Identity"}  # those of constants are removed
    nodes, found = ([n.op_type for n in g.node if n.op_type not in identities] for g in (before, after))
    assert nodes == found
    assert {t.name for t in after.initializer} <= {t.name for t in before.initializer}
    feeds = FORMS[name].feeds()
    for a, b in zip(run(path, feeds), run(written(loaded.graph.clone()), feeds), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_was_cut_is_cut_again(name: str, tmp_path: Path) -> None:
    """Selections that are in a file become those of the next cut: none is read through another."""
    form, path = FORMS[name], tmp_path / "cut.onnx"
    once = cut(analysis_in(tmp_path, form), random_cuts(prunable(analysis_in(tmp_path, form).groups, "qk"), 1, 0.25))
    path.write_bytes(once.sliced)
    analysis = analyze(load(path))
    groups = prunable(analysis.groups, "qk")
    assert {group.blocks for group in groups} == {form.kv_heads}
    again = cut(analysis, random_cuts(groups, 2, 0.25))
    assert again.error(form.feeds()) < TOLERANCE
    assert relative_error(run(path, form.feeds()), run(again.sliced, form.feeds())) > 1e-3
    assert selections(again.sliced)[0] <= 4 * form.layers
    tables = {node.output[0] for node in onnx.load_from_string(again.sliced).graph.node if node.op_type == "Gather"}
    nodes = [node for node in onnx.load_from_string(again.sliced).graph.node if node.name.endswith("_read")]
    assert nodes
    assert not any(node.input[0] in tables and form.table != "looked_up" for node in nodes)
    assert same_as_loaded(path, form)


def same_as_loaded(path: Path, form: RotaryDecoder) -> bool:
    """Whether a file that is loaded and written says the same, in as many nodes."""
    after = written(load(path).graph.clone())
    operators = [sorted(n.op_type for n in g.graph.node) for g in (onnx.load(path), onnx.load_from_string(after))]
    outputs = run(path, form.feeds()), run(after, form.feeds())
    return operators[0] == operators[1] and all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_second_run_of_the_pass_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(RotaryDecoder().model(), path)
    assert not ForkRotaryTables()(load(path).graph).modified


def test_an_axis_of_any_size_is_none_of_heads(tmp_path: Path) -> None:
    """Rows of a picture, say: each has the same columns, and the model still takes any number of them."""
    model = parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    rows (float[B, R, 5, 8] x) => (float[B, R, 5, 3] y)
    <int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {8}, int64[1] last = {-1}> {
        h = MatMul(x, up)
        a = Slice(h, zero, half, last)  b = Slice(h, half, end, last)  n = Neg(b)  t = Concat <axis = -1> (n, a)
        hc = Mul(h, cosine)  ts = Mul(t, sine)  turned = Add(hc, ts)
        y = MatMul(turned, down)
    }""")
    rng = np.random.default_rng(0)
    for name, shape in {"up": (8, 8), "down": (8, 3), "cosine": (5, 8), "sine": (5, 8)}.items():
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    analysis = analysis_at(tmp_path / "rows.onnx", model)
    pair = cut(analysis, random_cuts(prunable(analysis.groups), 0))
    assert selections(pair.sliced) == (2, 0)
    for rows in (2, 7):
        assert pair.error({"x": rng.normal(size=(2, rows, 5, 8)).astype(np.float32)}) < TOLERANCE
