"""MACs by role: every product counts once, and roles stay what they are where tokens get fewer."""

from __future__ import annotations

from pathlib import Path

import pytest

import snpc
from snpc.passes import Analysis, macs_by_role
from snpc.tokens import reduce_tokens
from tests.command_line import VIT


def layers(analysis: Analysis) -> dict[str, tuple[str, int, int, int]]:
    return {g.id: (g.role, g.layer, g.blocks, g.size) for g in analysis.groups}


@pytest.mark.parametrize("tokens", ["merge:2@1-3", "topk:0.7@1", "fuse:3@1-2", "guided:2@1-2"])
def test_roles_stay_where_tokens_get_fewer(tokens: str, tmp_path: Path) -> None:
    """In a merged model the residual stream is compared with itself, and multiplied by shares of tokens."""
    dense = snpc.analyze(snpc.load(VIT))
    reduced = reduce_tokens(dense, tokens)
    snpc.apply(snpc.plan(reduced, None), tmp_path / "fewer.onnx")
    written = snpc.analyze(snpc.load(tmp_path / "fewer.onnx"), dense.dim_sizes)
    assert layers(reduced) == layers(dense) == layers(written)
    before = macs_by_role(dense)
    for analysis in (reduced, written):
        after = macs_by_role(analysis)
        assert sum(after.values()) == analysis.cost.macs
        for role in ("qk", "vo", "ffn"):
            assert 0.2 * before[role] < after[role] < before[role], role
