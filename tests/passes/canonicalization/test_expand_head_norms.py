"""Norms inside fused attention become nodes, which say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.passes.analyze import analyze
from snpc.passes.canonicalization.expand_head_norms import ExpandHeadNorms
from snpc.runtime.io.load import load
from tests.models.builder_decoders import BuilderDecoder
from tests.oracle import Array, cut, prunable, random_cuts, relative_error, run, written


def feeds(form: BuilderDecoder, batch: int = 2, tokens: int = 7) -> dict[str, Array]:
    ids = np.random.default_rng(1).integers(0, 64, (batch, tokens))
    empty = np.zeros((batch, form.kv_heads, 0, form.width), np.float32)
    caches = {f"past_key_values.{n}.{part}": empty for n in range(form.layers) for part in ("key", "value")}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **caches}


@pytest.mark.parametrize("packed", [True, False])
def test_the_nodes_say_what_the_fused_node_says(packed: bool, tmp_path: Path) -> None:
    """As written by hand, with the same weights; the fused form itself does not run here."""
    fused = BuilderDecoder(head_norms="fused", packed=packed)
    expanded = load(fused.write(tmp_path / "fused.onnx")).graph
    assert not any(
        node.op_type == "GroupQueryAttention" and len(node.inputs) > 14 and node.inputs[14] for node in expanded.graph
    )
    if packed:  # the form by hand is packed
        by_hand = BuilderDecoder(head_norms="nodes").write(tmp_path / "nodes.onnx")
        assert relative_error(run(by_hand, feeds(fused)), run(written(expanded.clone()), feeds(fused))) < 1e-6
    assert not ExpandHeadNorms()(expanded).modified


@pytest.mark.parametrize("packed", [True, False])
def test_they_are_cut_like_any_norm_on_heads(packed: bool, tmp_path: Path) -> None:
    fused = BuilderDecoder(head_norms="fused", packed=packed)
    analysis = analyze(load(fused.write(tmp_path / "fused.onnx")), prune_kv_cache=True)
    groups = prunable(analysis.groups, "qk")
    assert [(g.size, g.channels, g.normalized_inside) for g in groups] == [(16, 2, True)] * fused.layers
    pair = cut(analysis, random_cuts(prunable(analysis.groups, "qk", "vo"), 0))
    graph = onnx.load_from_string(pair.sliced).graph
    gains = [t for t in graph.initializer if t.name.endswith(("q_norm", "k_norm"))]
    assert [list(gain.dims) for gain in gains] == [[16]] * 2 * fused.layers


def test_gains_of_a_damaged_file_stay_and_hold_the_heads(tmp_path: Path) -> None:
    path = BuilderDecoder(head_norms="fused").write(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "l0.k_norm":
            tensor.dims[:] = [2, 16]
    onnx.save(model, path)
    analysis = analyze(load(path), prune_kv_cache=True)
    assert {g.id for g in prunable(analysis.groups, "qk", "vo")} == {"l1.qk", "l1.vo"}


def test_a_gain_that_is_computed_holds_the_heads(tmp_path: Path) -> None:
    path = BuilderDecoder(head_norms="fused").write(tmp_path / "m.onnx")
    model = onnx.load(path)
    for node in list(model.graph.node):
        if node.op_type == "GroupQueryAttention":
            model.graph.node.insert(0, onnx.helper.make_node("Abs", [node.input[14]], [f"{node.input[14]}_abs"]))
            node.input[14] += "_abs"
    onnx.save(model, path)
    analysis = analyze(load(path), prune_kv_cache=True)
    assert not prunable(analysis.groups, "qk", "vo")
