"""Streams that work on single channels keep them, and the reason says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from snpc.passes.rotation.find import StreamKeepsChannels, find_stream
from tests.models.streams import KEPT_FORMS, write_stream
from tests.oracle import analysis_at, analysis_of


@pytest.mark.parametrize("form", KEPT_FORMS)
def test_what_keeps_channels(form: str, tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", write_stream(form))
    (group,) = (g for g in analysis.groups if g.role == "residual")
    with pytest.raises(StreamKeepsChannels, match=KEPT_FORMS[form][-1]):
        find_stream(analysis.traced_graph, group)


def test_what_is_found_of_an_export() -> None:
    """Two layers of a ViT: the norm and the weights behind it, two biases besides each weight that writes."""
    analysis = analysis_of("vit_timm__ts17")
    (group,) = (g for g in analysis.groups if g.role == "residual")
    stream = find_stream(analysis.traced_graph, group)
    assert stream.centered
    assert [reader.norm for reader in stream.readers] == [0, 1, 2, 3, 4]
    sites = {site.tensor for site in group.sites}
    norms = {name for norm in stream.normalizations for name in (norm.gain, norm.bias)}
    assert {place.tensor for place in stream.writers} | {r.weight.tensor for r in stream.readers} == sites - norms
