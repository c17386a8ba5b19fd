"""Heads among cells: what belongs to one, whatever ties the channels of several, and what keeps heads whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis, analyze
from snpc.passes.grouping.heads import assign_heads, whole_head_units
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import Cover
from snpc.runtime.io.load import load
from tests.models.rotary_decoders import RotaryDecoder
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts, relative_error, run

HEADS, WIDTH = 3, 4
CHANNELS = np.arange(HEADS * WIDTH).reshape(HEADS, WIDTH)
SCORES = 12 + np.arange(HEADS)
SCORED = Cover(SCORES, CHANNELS, "batch")


def heads_of(count: int, *covers: Cover) -> list[int]:
    return assign_heads(covers, np.arange(count)).tolist()


def test_channels_belong_to_the_scores_made_of_them() -> None:
    assert heads_of(15, SCORED) == [*np.repeat(SCORES, WIDTH), *SCORES]


def test_a_shared_gain_belongs_to_no_head() -> None:
    gain = Cover(15 + np.arange(WIDTH), CHANNELS.T.copy(), "aligned")
    assert heads_of(19, SCORED, gain) == [*heads_of(15, SCORED), *[-1] * WIDTH]


def test_a_gain_of_one_head_belongs_to_it() -> None:
    gains = Cover(15 + np.arange(HEADS), CHANNELS, "aligned")
    assert heads_of(18, SCORED, gains)[15:] == SCORES.tolist()


def test_a_label_that_covers_cells_of_two_heads_in_two_places_belongs_to_none() -> None:
    places = [Cover(np.array([15]), CHANNELS[[k], :2], "aligned") for k in (0, 1)]
    assert heads_of(16, SCORED, *places)[15] == -1


def test_rows_beneath_the_name_of_a_head_belong_to_it() -> None:
    """Of the output projection, where values are shared: the channels of the one value head cover rows of all heads."""
    rows = 15 + np.arange(HEADS * WIDTH).reshape(HEADS, WIDTH)
    values = 15 + HEADS * WIDTH + np.arange(WIDTH)
    covers = SCORED, Cover(SCORES, rows, "aligned"), Cover(values, rows.T.copy(), "aligned")
    assert heads_of(31, *covers)[15:] == [*np.repeat(SCORES, WIDTH), *[-1] * WIDTH]


def test_what_stands_for_a_head_is_no_channel() -> None:
    """A unit of one channel in every head stands for none."""
    unit = np.concatenate([np.tile(np.arange(WIDTH), HEADS), SCORES, np.arange(WIDTH)])
    gain = Cover(15 + np.arange(WIDTH), CHANNELS.T.copy(), "aligned")
    head = assign_heads([SCORED, gain], np.arange(19))
    assert whole_head_units([SCORED, gain], unit, head).tolist() == SCORES.tolist()


def test_no_heads_without_products_of_activations() -> None:
    assert heads_of(4, Cover(np.array([0]), np.array([[1, 2]]), "aligned")) == [-1] * 4


# -- one key head ----------------------------------------------------------------------------------------------------


def cached_analysis(folder: Path, form: RotaryDecoder) -> Analysis:
    onnx.save(form.model(), folder / "decoder.onnx")
    return analyze(load(folder / "decoder.onnx"))


def test_query_heads_of_one_key_head_go_while_caches_keep_their_shape(tmp_path: Path) -> None:
    form = RotaryDecoder(cached=True, kv_heads=1)
    analysis, feeds = cached_analysis(tmp_path, form), form.feeds(past=3)
    groups = prunable(analysis.groups)
    assert [(g.role, g.size, g.cached) for g in groups if g.role != "residual"] == [("head", form.heads, False)] * 2
    pair = cut(analysis, random_cuts(prunable(groups, "head"), 2))
    assert relative_error(run(tmp_path / "decoder.onnx", feeds)[:1], pair.expected(feeds)[:1]) > 1e-2
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


def test_key_heads_stay_where_caches_keep_their_shape(tmp_path: Path) -> None:
    analysis = cached_analysis(tmp_path, RotaryDecoder(cached=True))
    assert not prunable(analysis.groups, "head")
    assert all("--prune-kv-cache" in str(g.pins) for g in analysis.groups if g.role == "head")


ONE_KEY_HEAD = """
    <ir_version: 8, opset_import: ["" : 17]>
    attention (float[B, 5, 16] x{inputs}) => (float[B, 5, 16] y{outputs})
    <int64[4] heads = {{0, 0, 4, 8}}, int64[4] one = {{0, 0, 1, 8}}, int64[4] times = {{1, 4, 1, 1}},
     int64[3] merge = {{0, 0, 32}}> {{
        q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose <perm = [0, 2, 1, 3]> (q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, one) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        k4 = Expand(k2, times)
        {keys}
        v0 = MatMul(x, wv) v1 = Reshape(v0, one) v2 = Transpose <perm = [0, 2, 1, 3]> (v1) v = Expand(v2, times)
        s = MatMul(q, k) p = Softmax <axis = -1> (s) c0 = MatMul(p, v)
        c1 = Transpose <perm = [0, 2, 1, 3]> (c0) c = Reshape(c1, merge) y = MatMul(c, wo)
    }}"""


def one_key_head(keys: str, inputs: str = "", outputs: str = "") -> onnx.ModelProto:
    model = parser.parse_model(ONE_KEY_HEAD.format(keys=keys, inputs=inputs, outputs=outputs))
    rng = np.random.default_rng(0)
    for name, shape in {"wq": (16, 32), "wk": (16, 8), "wv": (16, 8), "wo": (32, 16)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) / 4, name))
    return model


def test_copies_of_the_key_head_go_with_the_query_heads(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", one_key_head("k = Identity(k4)"))
    (heads,) = prunable(analysis.groups, "head")
    assert heads.size == 4
    assert {site.tensor for site in heads.sites} == {"wq", "wo"}
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)}
    for roles in (("head",), ("head", "qk", "vo")):
        pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), 4))
        assert pair.error(feeds) < TOLERANCE


@pytest.mark.parametrize(
    ("keys", "inputs", "outputs"),
    [
        ("k = Add(k4, bias)", ", float[1, 4, 8, 1] bias", ""),
        ("k = Softmax <axis = 1> (k4)", "", ""),
        ("k = Identity(k4)", "", ", float[B, 4, 8, 5] k4"),
    ],
    ids=["added to", "normalized over", "put out"],
)
def test_copies_that_are_told_apart_stay(keys: str, inputs: str, outputs: str, tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", one_key_head(keys, inputs, outputs))
    assert not prunable(analysis.groups, "head")


def test_units_and_heads_go_together() -> None:
    """What a removed unit has in other heads goes, and what a removed head has of other units."""
    unit = np.tile(np.arange(WIDTH), HEADS)
    units = Units(unit, np.zeros(12, np.int64), np.arange(12), np.repeat([0, 4, 8], WIDTH), np.zeros(0, np.int64))
    gone_units, gone_heads = np.zeros(12, bool), np.zeros(12, bool)
    gone_units[1] = gone_heads[8] = True
    removed = units.removal(gone_units, gone_heads).removed.reshape(HEADS, WIDTH)
    assert removed.tolist() == [[False, True, False, False]] * 2 + [[True] * WIDTH]
    assert not replace(units, head_of_label=np.full(12, -1)).removal(gone_units & False, gone_heads).removed.any()
