"""Graphs with fewer tokens are taken by the other runtimes, which say what onnxruntime says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.runtime.execution.runners import open_runner
from snpc.targets.base import BuildOptions
from tests.command_line import CALIB, VIT, invoke

WAYS = ["topk:0.7@1,2", "fuse:0.7@1,2", "merge:4@1,2", "guided:4@1,2", "star:0.7@1,2", "adaptive:0.8@1,2"]


@pytest.fixture(scope="module", params=WAYS)
def reduced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokens") / "fewer.onnx"
    invoke("prune", VIT, "--roles", "none", "--tokens", request.param, "--calib", CALIB, "-o", target)
    return target


@pytest.mark.slow
def test_openvino_says_what_onnxruntime_says(reduced: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'snpc[openvino]'")
    built = snpc.build(reduced, "openvino", tmp_path / "out.xml")
    with np.load(CALIB) as data:
        pictures = {name: array[:24] for name, array in data.items()}
    expected, outputs = (open_runner(path).run(pictures)["logits"] for path in (reduced, built.path))
    # near ties between tokens may fall the other way in another runtime, for a few pictures
    apart = np.abs(outputs - expected).max(axis=1) / np.abs(expected).max()
    assert np.sort(apart)[:20].max() < 1e-3


@pytest.mark.slow
def test_an_engine_is_built(reduced: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'snpc[trt-rtx]'")
    built = snpc.build(reduced, "trt-rtx", tmp_path / "out.engine", options=BuildOptions(sm=(86,)))
    assert built.weight_bytes
    assert built.path.stat().st_size > built.weight_bytes
