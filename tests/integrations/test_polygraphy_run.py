"""The runner for ``polygraphy run``, by the command itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import snpc
from tests.command_line import CALIB, VIT

pytest.importorskip("polygraphy")
pytestmark = pytest.mark.slow  # each test starts Polygraphy

ROOT = Path(snpc.__file__).parents[1]
PROGRAM = "import sys; from polygraphy.tools import main; sys.exit(main())"
PRUNE = ("--snpc-target", "macs=0.5", "--snpc-calib", str(CALIB))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which snpc is installed as pyproject.toml has it, whatever is installed here."""
    group = '[project.entry-points."polygraphy.run.plugins"]'
    entry = (ROOT / "pyproject.toml").read_text().partition(group)[2].split("\n\n")[0].replace('"', "")
    installed = tmp_path / "site" / "snpc_plugin-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: snpc-plugin\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[polygraphy.run.plugins]{entry}\n")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed.parent}"}


def polygraphy(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "run", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_pruned_model_is_compared_with_the_original(environment: dict[str, str], tmp_path: Path) -> None:
    saved, expected = tmp_path / "saved.onnx", tmp_path / "half.onnx"
    snpc.prune(VIT, expected, target="macs=0.5", calibration=CALIB)
    common = (VIT, "--onnxrt", "--snpc", *PRUNE, "--snpc-save", saved)
    loose = polygraphy(environment, *common, "--atol", "100", "--check-error-stat", "max")
    assert loose.returncode == 0, loose.stdout + loose.stderr
    assert "snpc: 451" in loose.stdout and "sliced equals masked" in loose.stdout
    assert onnx.load(saved).graph == onnx.load(expected).graph
    strict = polygraphy(environment, *common, "--atol", "1e-6")
    assert strict.returncode == 1 and "FAILED" in strict.stdout


def test_requests_that_make_no_sense_are_refused(environment: dict[str, str]) -> None:
    assert "give --snpc-target macs=0.5" in polygraphy(environment, VIT, "--snpc").stderr
    wrong = polygraphy(environment, VIT, "--snpc", "--snpc-target", "half")
    assert wrong.returncode == 1 and "must look like macs=0.6" in wrong.stderr and "Traceback" not in wrong.stderr
    nowhere = polygraphy(environment, VIT, "--snpc", "--snpc-target", "macs=0.5", "--snpc-calib", "nowhere")
    assert nowhere.returncode == 1 and "nowhere does not exist" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr
