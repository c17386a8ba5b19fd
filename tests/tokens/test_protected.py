"""Learned tokens anywhere in the sequence: they always stay, each by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.pipeline.token_decisions import check_token_reduction, file_decisions, self_deciding_model
from snpc.runtime.io.save import save
from snpc.tokens.inplace_oracle import token_membership
from snpc.tokens.reduction import TokenReductionPlan, reduce_tokens
from tests.command_line import invoke
from tests.models.encoders import Encoder

DENSE = Encoder(exit="all", depth=3, patches=10, learned=(1, 2, 3))
POOLED = replace(DENSE, exit="mean")
STAY = [0, 6, 7, 13, 14, 15]  # the patches are 1 to 5 and 8 to 12
SPECS = (
    (DENSE, "merge:2@1-2/3"),
    (DENSE, "guided:3@1/2:copy+merge:2@3"),
    (DENSE, "energy:2@1-3"),
    (POOLED, "merge:3@1-2"),
    (POOLED, "topk:0.6@1-2"),
    (POOLED, "star:0.6@1-2"),
    (POOLED, "adaptive:0.7@1,2"),
    (replace(DENSE, learned=(0, 0, 3)), "merge:2@1-2"),
)


@pytest.mark.parametrize(("encoder", "spec"), SPECS)
def test_learned_tokens_stay(encoder: Encoder, spec: str, tmp_path: Path) -> None:
    onnx.save(encoder.model(), tmp_path / "encoder.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx"))
    point, stay = found.tokens.points[0], STAY if all(encoder.learned) else [10, 11, 12]
    first, behind = (1, ((6, 8), (-3, 0))) if all(encoder.learned) else (0, ((-3, 0),))
    assert (point.leading, point.protected, point.staying) == (first, behind, len(stay))
    rng = np.random.default_rng(0)
    offline = {k: (0.7,) if "adaptive" in spec else rng.uniform(1, 2, encoder.tokens) for k in (1, 2)}
    reduced = reduce_tokens(found, spec, {k: tuple(map(float, scores)) for k, scores in offline.items()})
    path = tmp_path / "fewer.onnx"
    save(self_deciding_model(reduced), path)
    check_token_reduction(reduced, path, [encoder.feeds()], 1e-5)
    plan = reduced.reduction
    assert isinstance(plan, TokenReductionPlan)
    (decided,) = file_decisions(path, plan.decisions, [encoder.feeds()])
    for members in token_membership(plan.steps, decided, encoder.tokens):
        of_learned = members[:, members[:, :, stay].any((0, 2))]
        assert (of_learned.sum((1, 2)) == len(stay)).all() and (members[:, :, stay].sum(1) == 1).all()
        assert members.shape[1] < encoder.tokens
    assert reduce_tokens(found, plan.spec, {s.point.block: s.offline for s in plan.steps}).reduction == plan


def test_inspect_says_which_tokens_stay(tmp_path: Path) -> None:
    onnx.save(DENSE.model(), tmp_path / "encoder.onnx")
    text = invoke("inspect", str(tmp_path / "encoder.onnx")).output
    assert "the first always stays; 5 learned ones behind stay too" in text
