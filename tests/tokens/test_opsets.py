"""Token reduction writes what is valid in every opset from 13 on, and it says the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import version_converter

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, self_deciding_model
from snpc.runtime.io.save import save
from snpc.tokens.reduction import reduce_tokens
from tests.models.encoders import Encoder
from tests.models.exports import export
from tests.oracle import feeds_of, require, run

THOROUGH = (13, 17, 18, 24)  # opsets at which operators that methods use change, and the last
SPECS = ["topk:0.7@1+merge:2@2+fuse:0.8@3", "guided:3@1,3", "adaptive:0.8@1,3"]
SHARES = {1: (0.6,), 3: (0.5,)}


def valid(reduced: Analysis, folder: Path) -> Path:
    path = folder / "reduced.onnx"
    save(finalize(self_deciding_model(reduced)), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


@pytest.mark.parametrize(
    ("opset", "half"),
    [*((opset, False) for opset in range(13, 25)), *((opset, True) for opset in THOROUGH)],
)
def test_every_opset(opset: int, half: bool, tmp_path: Path) -> None:
    encoder = Encoder(opset=opset, half=half)
    onnx.save(encoder.model(), tmp_path / "encoder.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx"))
    onnx.save(replace(encoder, half=False).model(), tmp_path / "single.onnx")
    single = snpc.analyze(snpc.load(tmp_path / "single.onnx"))
    for spec in SPECS if opset in THOROUGH else SPECS[-1:]:
        reduced = reduce_tokens(found, spec, SHARES)
        path = valid(reduced, tmp_path)
        feeds = encoder.feeds(3)
        check_token_reduction(reduced, path, [feeds], 2e-2 if half else 1e-5)
        (tmp_path / "single").mkdir(exist_ok=True)
        same = valid(reduce_tokens(single, spec, SHARES), tmp_path / "single")
        (wanted,) = run(same, {"x": feeds["x"].astype(np.float32)})
        assert np.abs(run(path, feeds)[0] - wanted).max() < (0.2 if half else 1e-4)


@pytest.mark.parametrize(
    ("opset", "spec"),
    [(17, "topk:0.6"), (19, "merge:5"), (20, "adaptive:0.8@1"), (22, "topk:0.6"), (22, "merge:5")],
)
def test_exports_in_newer_opsets(opset: int, spec: str, tmp_path: Path) -> None:
    name = "vit_timm__ts17"
    require(name)
    onnx.save(version_converter.convert_version(onnx.load(export(name)), opset), tmp_path / "model.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "model.onnx"))
    reduced = reduce_tokens(found, spec, SHARES)
    path, feeds = valid(reduced, tmp_path), feeds_of(name)
    check_token_reduction(reduced, path, [feeds], 1e-4)
    first = reduce_tokens(snpc.analyze(snpc.load(export(name))), spec, SHARES)
    (tmp_path / "first").mkdir()
    assert np.abs(run(path, feeds)[0] - run(valid(first, tmp_path / "first"), feeds)[0]).max() < 1e-4
