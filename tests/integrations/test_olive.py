"""The surgeon of Olive, in workflows that Olive runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import snpc
from tests.command_line import CALIB, VIT

pytest.importorskip("olive")

import olive

from snpc.integrations import SnpcSurgeon

pytestmark = pytest.mark.slow  # Olive imports torch and transformers

SURGERY = {"surgeon": SnpcSurgeon.__name__, "calibration": str(CALIB)}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")


def run_workflow(folder: Path, *surgeries: dict[str, Any]) -> Path:
    """The file that Olive writes of the example."""
    olive.run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(VIT)},
            "passes": {"prune": {"type": "GraphSurgeries", "surgeries": list(surgeries)}},
            "output_dir": str(folder / "out"),
            "cache_dir": str(folder / "cache"),
        }
    )
    return folder / "out" / "model.onnx"


def matrices(model: onnx.ModelProto) -> dict[str, bytes]:
    """Olive stores equal constants once, which are those of shapes here."""
    tensors = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in tensors}


def test_a_workflow_prunes_as_snpc_does(tmp_path: Path) -> None:
    """The weights are those that ``snpc.prune`` gives, provenance stays, and surgeries of Olive follow."""
    options = {"ratio": 0.5, "method": "select", "roles": ["ffn", "qk"]}
    rename = {"surgeon": "RenameOutputs", "old_names": ["logits"], "new_names": ["scores"]}
    found = onnx.load(run_workflow(tmp_path, {**SURGERY, "options": options}, rename))
    snpc.prune(VIT, tmp_path / "half.onnx", calibration=CALIB, ratio=0.5, method="select", roles=("ffn", "qk"))
    assert matrices(found) == matrices(onnx.load(tmp_path / "half.onnx"))
    assert [output.name for output in found.graph.output] == ["scores"]
    assert {entry.key: entry.value for entry in found.metadata_props}["snpc.target"] == "ratio=0.5"
    onnx.checker.check_model(found)


@pytest.mark.parametrize(
    ("surgery", "said"),
    [
        ({**SURGERY, "options": {"ration": 0.5}}, "SnpcSurgeon: no option ration; there are .*, ratio,"),
        ({**SURGERY, "options": {}}, "SnpcSurgeon: .*ratio"),
        ({**SURGERY, "ratio": 0.5}, "Missing parameters .*options"),
    ],
)
def test_a_wrong_request_ends_the_run(surgery: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run_workflow(tmp_path, surgery)
