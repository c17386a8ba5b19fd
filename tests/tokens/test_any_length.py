"""Tokens that are merged and come back, for inputs of any length: as many as a share of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, self_deciding_model
from snpc.pipeline.token_request import apply_token_request
from snpc.runtime.io.save import save
from snpc.tokens.reduction import reduce_tokens
from tests.models.encoders import Encoder
from tests.oracle import run

DENSE = Encoder(exit="all", depth=3, longest=40)
FORMS = {
    "plain": (DENSE, "merge:0.8@1-2/2"),
    "fused": (replace(DENSE, fused=True, opset=23), "guided:0.5@1/3:copy"),
    "learned tokens in front and behind": (replace(DENSE, learned=(1, 0, 2)), "guided:0.8@1-2/3"),
    "a mean over tokens": (replace(DENSE, exit="mean"), "merge:0.8@1-2"),
}
LENGTHS = (7, 21)


def analysis(model: onnx.ModelProto, path: Path) -> Analysis:
    onnx.save(model, path)
    return snpc.analyze(snpc.load(path))


def written(reduced: Analysis, path: Path) -> Path:
    save(finalize(self_deciding_model(reduced)), path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_share_of_any_number_is_merged_and_comes_back(form: str, tmp_path: Path) -> None:
    encoder, spec = FORMS[form]
    found = analysis(encoder.model(), tmp_path / "encoder.onnx")
    assert not any(p.fixed_length for p in found.tokens.points)
    batches = [replace(encoder, patches=length).feeds(2) for length in LENGTHS]
    reduced = reduce_tokens(found, spec)
    path = written(reduced, tmp_path / "fewer.onnx")
    check_token_reduction(reduced, path, [*batches, replace(encoder, patches=3).feeds(2)], 1e-5)
    for feeds in batches:
        whole, fewer = run(found.model.path, feeds)[0], run(path, feeds)[0]
        assert fewer.shape == whole.shape
        assert np.abs(whole - fewer).max() > 1e-3, "nothing was merged"
        model = encoder.model()  # the same for one length: numbers of tokens are constants
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = feeds["x"].shape[1]
        same = written(reduce_tokens(analysis(model, tmp_path / "one.onnx"), spec), tmp_path / "fixed.onnx")
        assert np.abs(run(same, feeds)[0] - fewer).max() < 1e-5 * np.abs(whole).max()


def test_auto_chooses_shares_whose_macs_are_those_of_the_file(tmp_path: Path) -> None:
    encoder = replace(DENSE, depth=2)
    found = analysis(encoder.model(), tmp_path / "encoder.onnx")
    data = snpc.load_calibration({"x": encoder.feeds(4)["x"]}, found.model.inputs, batch=2)
    reduced = apply_token_request(found, data, "auto", target=snpc.parse_target("macs=0.8"))
    assert reduced.reduction is not None and all(step["any_length"] for step in reduced.reduction.to_json()["steps"])
    result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
    assert result.after.macs == reduced.cost.macs - reduced.dead_macs <= 0.8 * found.cost.macs


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("merge:2", "give merge and a share"),
        ("energy:0.8", "give merge and a share"),
        ("merge:0.4", "at most half of the tokens"),
        ("topk:0.8", "cannot give them back"),
    ],
)
def test_refusals(spec: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        reduce_tokens(analysis(DENSE.model(), tmp_path / "encoder.onnx"), spec)
