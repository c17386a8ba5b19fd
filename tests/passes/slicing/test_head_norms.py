"""Norms on the heads of queries and keys: what is found, and that slicing equals masking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.closed_forms import tensor_values
from tests.models.exports import export
from tests.models.head_norms import HEAD_NORMS, HEAD_WIDTH, KEY_HEADS, HeadNorms
from tests.oracle import (
    TOLERANCE,
    Array,
    analysis_at,
    analysis_of,
    cut,
    cuts_of,
    feeds_of,
    prunable,
    random_cuts,
    relative_error,
    require,
    run,
)


@pytest.mark.parametrize("form", HEAD_NORMS.values(), ids=HEAD_NORMS.keys())
@pytest.mark.parametrize("seed", range(2))
def test_slicing_equals_masking(form: HeadNorms, seed: int, tmp_path: Path) -> None:
    analysis, feeds = analysis_at(tmp_path / "m.onnx", form.model()), form.feeds(3)
    (group,) = prunable(analysis.groups, "qk")
    # one gain for all heads ties their channels, and a rotary table the channels of a pair
    blocks = 1 if form.over == "head" and form.gain else KEY_HEADS
    assert (group.blocks, group.size) == (blocks, HEAD_WIDTH // (2 if form.rotary else 1))
    assert group.normalized_inside
    assert "normalized" in group.freedom_reason
    pair = cut(analysis, random_cuts([group], seed))
    assert relative_error(run(tmp_path / "m.onnx", feeds), run(pair.masked, feeds)) > 1e-2
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3__ts17", "qwen3__dyn20_sdpa", "vit_timm_qknorm__ts17"])
def test_slicing_real_models_equals_masking(name: str) -> None:
    require(name)
    analysis, feeds = analysis_of(name), feeds_of(name)
    assert all(group.normalized_inside for group in prunable(analysis.groups, "qk"))
    pair = cut(analysis, random_cuts(prunable(analysis.groups, "qk", "vo", "ffn", "head"), 1))
    assert relative_error(run(export(name), feeds), run(pair.masked, feeds)) > 1e-2
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


@pytest.mark.parametrize("form", [HeadNorms(), HeadNorms("LayerNormalization")], ids=["root mean square", "centered"])
def test_heads_are_normalized_over_the_channels_that_stay(form: HeadNorms, tmp_path: Path) -> None:
    """By the definition, written out."""
    analysis, feeds = analysis_at(tmp_path / "m.onnx", form.model()), form.feeds(3)
    (group,) = prunable(analysis.groups, "qk")
    removed = np.array([[False, True, False, True]])
    kept = np.flatnonzero(~np.tile(removed[0], 2))
    sliced = cut(analysis, cuts_of([(group, removed)])).sliced
    (heads,) = tensor_values((tmp_path / "m.onnx").read_bytes(), ["qh"], feeds)
    (normed,) = tensor_values(sliced, ["q2"], feeds)
    weights = form.weights()
    rows, gain, bias = heads[..., kept].astype(np.float64), weights["q_gain"][kept], weights["q_bias"][kept]
    if form.form == "spelled":
        expected = rows / np.sqrt(np.mean(rows**2, -1, keepdims=True) + 1e-6) * gain
    else:
        expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5) * gain + bias
    shape = expected.shape[-1]
    scale = np.sqrt(shape / HEAD_WIDTH)  # folded into the queries where the scale of the scores is 1/sqrt(width)
    assert matches(normed, expected) or matches(normed, expected * scale)


def matches(found: Array, expected: Array) -> bool:
    return found.shape == expected.shape and bool(np.allclose(found, expected, atol=1e-5))


PER_HEAD = [form for form in HEAD_NORMS.values() if form.over == "head"]


@pytest.mark.parametrize("form", PER_HEAD, ids=[form.name for form in PER_HEAD])
@pytest.mark.parametrize("seed", range(2))
def test_whole_heads_go(form: HeadNorms, seed: int, tmp_path: Path) -> None:
    """Whether they share a gain or not; with their channels at the same time: a head of which nothing stays has no
    mean."""
    analysis, feeds = analysis_at(tmp_path / "m.onnx", form.model()), form.feeds(3)
    (heads,) = prunable(analysis.groups, "head")
    assert (heads.blocks, heads.size) == (1, KEY_HEADS)
    pair = cut(analysis, random_cuts(prunable(analysis.groups, "head", *(["qk", "vo"] if seed else [])), seed))
    assert relative_error(run(tmp_path / "m.onnx", feeds), run(pair.masked, feeds)) > 1e-2
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


def test_heads_that_are_normalized_together_stay(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", HeadNorms(over="all").model())
    assert not prunable(analysis.groups, "head")
    (group,) = [g for g in analysis.groups if g.role == "head"]
    assert any("mean" in pin.reason for pin in group.pins)


def test_a_mean_that_something_else_reads_holds_the_width(tmp_path: Path) -> None:
    model = HeadNorms().model()
    model.graph.output.append(helper.make_tensor_value_info("q_mean", onnx.TensorProto.FLOAT, None))
    analysis = analysis_at(tmp_path / "m.onnx", model)
    assert not prunable(analysis.groups, "qk")
    (group,) = [g for g in analysis.groups if g.role == "qk"]
    assert any("its mean is used outside the normalization" in pin.reason for pin in group.pins)
