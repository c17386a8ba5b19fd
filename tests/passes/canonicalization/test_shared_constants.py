"""A rotary table that layers share: each keeps columns of its own, and the file holds it once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.runtime.evaluation.compare import narrow_caches
from tests.models.builder_decoders import CONTEXT, VOCABULARY, BuilderDecoder
from tests.oracle import TOLERANCE, Cuts, cuts_of, prunable, relative_error, run, written

FORM = BuilderDecoder(layers=3)


def cuts(analysis: snpc.Analysis, kept_pairs: list[range]) -> Cuts:
    """Each layer keeps these pairs, and the first values."""
    keys, values = prunable(analysis.groups, "qk"), prunable(analysis.groups, "vo")
    removed = [(g, ~np.isin(np.arange(g.size), kept)[None]) for g, kept in zip(keys, kept_pairs, strict=True)]
    return cuts_of([*removed, *((g, np.arange(g.size)[None].repeat(g.blocks, 0) >= g.size // 2) for g in values)])


@pytest.mark.parametrize(
    ("kept", "columns"),
    [([range(8), range(8, 16), range(0, 16, 2)], 16), ([range(8), range(8), range(4, 12)], 12), ([range(8)] * 3, 8)],
)
def test_layers_keep_pairs_of_their_own_of_one_table(kept: list[range], columns: int, tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(FORM.write(tmp_path / "decoder.onnx")), prune_kv_cache=True)
    rewritten = rewrite_model(analysis.traced_graph, cuts(analysis, kept))
    narrowed = rewritten.sliced_interface()
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(0, VOCABULARY, (1, 5)), "attention_mask": np.ones((1, 8), np.int64)}
    pasts = [spec.name for spec in analysis.model.inputs if spec.name.startswith("past")]
    feeds |= {name: rng.normal(size=(1, FORM.kv_heads, 3, FORM.width)).astype(np.float32) for name in pasts}
    masked = run(written(mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)), feeds)
    sliced = written(finalize(rewritten.model))
    initializers = onnx.load_from_string(sliced).graph.initializer
    tables = [list(t.dims) for t in initializers if t.name.startswith(("cosine", "sine")) and len(t.dims) == 2]
    assert tables == [[CONTEXT, columns]] * 2
    names = [str(o.name) for o in rewritten.model.graph.outputs]
    expected = narrow_caches(dict(zip(names, masked, strict=True)), narrowed)
    assert relative_error(list(expected.values()), run(sliced, narrow_caches(feeds, narrowed), "all")) < TOLERANCE


def test_a_table_that_is_not_cut_is_written_as_it_was(tmp_path: Path) -> None:
    path = FORM.write(tmp_path / "decoder.onnx")
    before, after = onnx.load(path), onnx.load_from_string(written(finalize(snpc.load(path).graph.clone())))
    assert {t.name for t in after.graph.initializer} == {t.name for t in before.graph.initializer}
