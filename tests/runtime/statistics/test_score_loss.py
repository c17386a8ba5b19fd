"""The error of attention scores inside fused nodes, against its definition in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.types import FloatArray
from tests.models.builder_decoders import VOCABULARY, BuilderDecoder
from tests.oracle import Array, prunable, run

FORMS = {
    "packed": BuilderDecoder(heads=4, kv_heads=2),
    "unpacked": BuilderDecoder(packed=False),
    "interleaved": BuilderDecoder(interleaved=True),
}
TOKENS = 9


def turned(form: BuilderDecoder, flat: Array, heads: int) -> FloatArray:
    """[batch, heads, tokens, width] of [batch, tokens, heads * width], each token turned by its position."""
    x = flat.astype(np.float64).reshape(*flat.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    tables = form.tables()
    c, s = (np.asarray(tables[name][: x.shape[2]]) for name in ("cosine", "sine"))
    first, second = (x[..., ::2], x[..., 1::2]) if form.interleaved else np.split(x, 2, -1)
    parts = first * c - second * s, second * c + first * s
    return np.stack(parts, -1).reshape(x.shape) if form.interleaved else np.concatenate(parts, -1)


def pair_of_channel(form: BuilderDecoder) -> Array:
    channels = np.arange(form.width)
    return channels // 2 if form.interleaved else channels % (form.width // 2)


def defined_loss(form: BuilderDecoder, query: Array, key: Array) -> FloatArray:
    """[pairs, pairs]: M of ``snpc.runtime.statistics.score_loss``, summed over samples and heads."""
    pairs = np.eye(form.width // 2)[pair_of_channel(form)]
    q, k = turned(form, query, form.heads), turned(form, key, form.kv_heads)
    k = np.repeat(k - k.mean(2, keepdims=True), form.heads // form.kv_heads, 1)
    grams = np.einsum("bhta,bhtc->bhac", q, q) * np.einsum("bhta,bhtc->bhac", k, k)
    loss: FloatArray = pairs.T @ grams.sum((0, 1)) @ pairs
    return loss


def operands_of(form: BuilderDecoder, path: Path, feeds: dict[str, Array]) -> list[tuple[Array, Array]]:
    """Queries and keys [batch, tokens, heads * width] of every layer, as the node is given them."""
    model = onnx.load(path)
    names = [f"p{n}" if form.packed else f"{part}{n}" for n in range(form.layers) for part in ("q", "k")]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    values = dict(zip([o.name for o in model.graph.output], run(model.SerializeToString(), feeds), strict=True))
    ends = [form.heads * form.width, (form.heads + form.kv_heads) * form.width]
    split = [(np.split(values[name], ends, -1)[k % 2] if form.packed else values[name]) for k, name in enumerate(names)]
    return list(zip(split[::2], split[1::2], strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_scores_inside_a_node_are_those_of_turned_heads(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    path = form.write(tmp_path / "decoder.onnx")
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, TOKENS))
    empty = np.zeros((3, form.kv_heads, 0, form.width), np.float32)
    caches = {spec.name: empty for spec in analysis.model.inputs if spec.name.startswith("past")}
    feeds = {"input_ids": ids, "attention_mask": np.ones((3, TOKENS), np.int64), **caches}
    data = snpc.load_calibration(feeds, analysis.model.inputs, batch=3, held_out=0)
    groups = prunable(analysis.groups, "qk")
    found = snpc.solve_closed_forms(analysis, snpc.measure_statistics(analysis, data, groups), groups)
    for group, operands in zip(groups, operands_of(form, path, feeds), strict=True):
        assert found.kinds[group.id] == "score_selection"
        ((measured,),) = np.asarray(found.moments[group.id].score_losses)
        expected = defined_loss(form, *operands)
        np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=1e-4 * expected.max())
