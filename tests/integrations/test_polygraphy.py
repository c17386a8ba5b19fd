"""The loader of Polygraphy, in chains of its own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import snpc
from tests.command_line import CALIB, VIT

pytest.importorskip("polygraphy")

from polygraphy.backend.onnx import BytesFromOnnx, GsFromOnnx, OnnxFromPath, SaveOnnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, SimpleCompareFunc

from snpc.integrations import SnpcPrune


@pytest.fixture(scope="module")
def pruned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("polygraphy") / "half.onnx"
    snpc.prune(VIT, path, ratio=0.5, method="select", calibration=CALIB)
    return path


def feeds(count: int) -> list[dict[str, Any]]:
    with np.load(CALIB) as data:
        return [{name: data[name][i : i + 1] for name in data.files} for i in range(count)]


def test_it_chains_with_loaders_and_runners(pruned_file: Path, tmp_path: Path) -> None:
    """What Polygraphy saves and runs is the model that ``snpc.prune`` writes."""
    loader = SnpcPrune(OnnxFromPath(str(VIT)), CALIB, ratio=0.5, method="select")
    saved = tmp_path / "saved.onnx"
    session = SessionFromOnnx(BytesFromOnnx(SaveOnnx(loader, str(saved))))
    runners = [OnnxrtRunner(session), OnnxrtRunner(SessionFromOnnx(str(pruned_file)))]
    results = Comparator.run(runners, data_loader=feeds(3))
    assert len(results[0][1]) == 3
    assert bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=0, rtol=0)))
    assert onnx.load(saved).graph == onnx.load(pruned_file).graph


def test_a_loader_prunes_when_it_is_called(tmp_path: Path) -> None:
    """Each call gives the same model, of a model in memory too, which stays as it is; feeds are calibration data."""
    model = onnx.load(VIT)
    before = model.SerializeToString()
    loader = SnpcPrune(model, feeds(16), ratio=0.5)
    first, second = loader(), loader()
    assert first == second and model.SerializeToString() == before
    sizes = [sum(np.prod(t.dims) for t in m.graph.initializer) for m in (first, model)]
    assert sizes[0] < 0.6 * sizes[1]
    later = tmp_path / "later.onnx"
    of_file = SnpcPrune(lambda: later, ratio=0.5, method="select", criterion="magnitude")
    with pytest.raises(snpc.UserError, match="no such file"):
        of_file()
    onnx.save(model, later)
    assert isinstance(of_file(), onnx.ModelProto)


def test_other_graphs_are_refused() -> None:
    with pytest.raises(snpc.UserError, match=r"onnx\.ModelProto, or a loader"):
        SnpcPrune(GsFromOnnx(OnnxFromPath(str(VIT))), ratio=0.5)()
