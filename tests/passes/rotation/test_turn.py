"""A turned stream gives the same outputs, whoever wrote the graph and however its normalizations are spelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snpc.passes import Analysis
from snpc.passes.analyze import turn_streams
from snpc.passes.rotation.find import find_stream
from snpc.passes.rotation.turn import first_basis
from snpc.types import FloatArray, Group
from tests.models.experts import EXPERTS
from tests.models.exports import export
from tests.models.streams import STREAM_FORMS, TOKENS, write_stream
from tests.oracle import TOLERANCE, analysis_at, analysis_of, cut, cuts_of, feeds_of, relative_error, run, written

EXPORTS = ["vit_timm__ts17", "vit_timm_layerscale__ts17", "vit_hf__dyn20", "gpt2__ts17", "llama__ts17", "t5__ts17"]
# a class token beside the mean of the others; experts that a router chooses
SLOW_EXPORTS = ["dinov2__dyn20_sdpa", *(name for name in EXPERTS if name == "olmoe__ts17")]


def stream_group(analysis: Analysis) -> Group:
    (group,) = (g for g in analysis.groups if g.role == "residual" and g.prunable)
    return group


def random_basis(size: int, centered: bool) -> FloatArray:
    free = size - int(centered)
    basis = np.eye(size)
    basis[:free, :free] = np.linalg.qr(np.random.default_rng(0).normal(size=(free, free)))[0]
    return basis


def turned_at_random(analysis: Analysis) -> Analysis:
    stream = find_stream(analysis.traced_graph, stream_group(analysis))
    basis = first_basis(stream) @ random_basis(stream.group.size, stream.centered)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    return turn_streams(analysis, [(stream, basis)])


def check_slices(turned: Analysis, feeds: dict[str, np.ndarray]) -> None:
    """Sliced equals masked in the turned basis."""
    group = stream_group(turned)
    removed = np.arange(group.size)[None] >= group.size // 2
    assert cut(turned, cuts_of([(group, removed)])).error(feeds) < TOLERANCE


@pytest.mark.parametrize("name", [*EXPORTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_EXPORTS)])
def test_exports(name: str) -> None:
    turned = turned_at_random(analysis_of(name))
    feeds = feeds_of(name)
    before = run(export(name), feeds)
    assert relative_error(before, run(written(turned.traced_graph.model.clone()), feeds)) < TOLERANCE
    assert turned.dead_macs == analysis_of(name).dead_macs
    check_slices(turned, feeds)


@pytest.mark.parametrize("form", STREAM_FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    """Spelled out, in one node, tied to the embeddings, with scales per channel."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream(form))
    turned = turned_at_random(analysis)
    after = run(written(turned.traced_graph.model.clone()), TOKENS)
    assert relative_error(run(analysis.model.path, TOKENS), after) < TOLERANCE
    check_slices(turned, TOKENS)
