"""A run that is killed goes on from its finished stages, to the same bytes; runs with other inputs do not mix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.runtime.execution.execution import Execution
from snpc.runtime.io.work_folder import StoredStage, WorkFolder
from tests.command_line import invoke, process_environment
from tests.models.encoders import Encoder
from tests.recorded_progress import RecordedProgress

SAMPLES = 48
OPTIONS = ("--target", "macs=0.7", "--tokens", "none", "--calib-samples", "32")
STAGES = ("statistics", "trials", "layers")

# Runs a command and ends it, without a chance to clean up, when so many results of a stage are stored.
KILLED = """
import os, signal, sys
from snpc.cli import main
from snpc.runtime.io.work_folder import StoredStage

stage, number, put = sys.argv[1], int(sys.argv[2]), StoredStage.put

def put_and_die(self, *arguments, **named):
    put(self, *arguments, **named)
    if self.folder is not None and self.folder.name.startswith(stage) and self.count.made == number:
        os.kill(os.getpid(), signal.SIGKILL)

StoredStage.put = put_and_die
main(sys.argv[3:])
"""


class Stopped(BaseException):
    """What ends a run in this process as a signal would."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data for it, in a folder."""
    folder = tmp_path_factory.mktemp("work")
    encoder = Encoder(depth=2, exit="mean")
    onnx.save_model(encoder.model(), folder / "model.onnx")
    patches = np.random.default_rng(1).normal(size=(SAMPLES, encoder.patches, encoder.width))
    np.savez(folder / "calib.npz", x=patches.astype(np.float32))
    return folder


def prune_command(files: Path, output: Path, work: Path | None, *options: object) -> list[object]:
    where = ("--work", work) if work is not None else ()
    return ["prune", files / "model.onnx", "--calib", files / "calib.npz", "-o", output, *OPTIONS, *where, *options]


@pytest.fixture(scope="module")
def uninterrupted(files: Path) -> bytes:
    output = files / "uninterrupted.onnx"
    invoke(*prune_command(files, output, None))
    return output.read_bytes()


def test_a_folder_changes_no_byte(files: Path, uninterrupted: bytes, tmp_path: Path) -> None:
    """Neither when it is filled nor when everything is found in it."""
    for number, words in enumerate(("nothing to resume in", "resumed statistics, trials, layers")):
        output = tmp_path / f"{number}.onnx"
        result = invoke(*prune_command(files, output, tmp_path / "work"))
        assert f"work: {words}" in result.stderr
        assert output.read_bytes() == uninterrupted


@pytest.mark.parametrize("stage", STAGES)
def test_finished_stages_are_not_run_again(
    stage: str, files: Path, uninterrupted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 2 if stage == "trials" else 1
    stop_after(monkeypatch, stage, number, entry="all" if stage == "statistics" else "")
    with pytest.raises(Stopped):
        prune(files, tmp_path / "out.onnx", WorkFolder(tmp_path / "work"), RecordedProgress())
    monkeypatch.undo()
    work, progress = WorkFolder(tmp_path / "work"), RecordedProgress()
    prune(files, tmp_path / "out.onnx", work, progress)
    assert (tmp_path / "out.onnx").read_bytes() == uninterrupted
    assert "statistics" not in progress.begun
    assert work.counts["statistics"].made == 0
    if stage != "statistics":
        assert work.counts[stage].found == number and work.counts[stage].made
    if stage == "layers":
        assert work.counts["trials"].made == 0


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, number: int, entry: str = "") -> None:
    """End the run when so many results of a stage are stored, or the one that is called ``entry``."""
    put = StoredStage.put

    def put_and_stop(self: StoredStage, name: str, *arguments: object, **named: object) -> None:
        put(self, name, *arguments, **named)  # type: ignore[arg-type]
        reached = self.count.made == number if not entry else name == entry
        if self.folder is not None and self.folder.name.startswith(stage) and reached:
            raise Stopped

    monkeypatch.setattr(StoredStage, "put", put_and_stop)


def prune(files: Path, output: Path, work: WorkFolder, progress: RecordedProgress) -> None:
    model = snpc.load(files / "model.onnx")
    calibration = snpc.load_calibration(files / "calib.npz", model.inputs, samples=32)
    execution = Execution(work=work, progress=progress)
    snpc.prune(
        files / "model.onnx", output, calibration=calibration, target="macs=0.7", tokens="none", execution=execution
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize(("stage", "number"), [("statistics", 2), ("trials", 5), ("layers", 1)])
def test_a_killed_process_is_resumed(
    stage: str, number: int, files: Path, uninterrupted: bytes, tmp_path: Path
) -> None:
    command = prune_command(files, tmp_path / "out.onnx", tmp_path / "work")
    words = [sys.executable, "-c", KILLED, stage, str(number), *map(str, command)]
    killed = subprocess.run(words, capture_output=True, env=process_environment(), check=False)
    assert killed.returncode == -9 and not (tmp_path / "out.onnx").exists()
    result = invoke(*command)
    assert "work: resumed statistics" in result.stderr
    assert stage in result.stderr
    assert (tmp_path / "out.onnx").read_bytes() == uninterrupted


def test_other_inputs_share_a_folder(files: Path, tmp_path: Path) -> None:
    """Another model, other samples and another target find nothing that is not theirs; one target finds the trials of
    another."""
    work = tmp_path / "work"
    onnx.save_model(Encoder(depth=2, exit="mean", seed=1).model(), tmp_path / "model.onnx")
    (tmp_path / "calib.npz").write_bytes((files / "calib.npz").read_bytes())
    runs = [(files, ()), (tmp_path, ()), (files, ("--seed", 1)), (files, ("--criterion", "magnitude"))]
    for number, (folder, options) in enumerate(runs):
        alone, shared = tmp_path / f"alone{number}.onnx", tmp_path / f"shared{number}.onnx"
        invoke(*prune_command(folder, alone, None, *options))
        result = invoke(*prune_command(folder, shared, work, *options))
        assert "work: nothing to resume" in result.stderr
        assert alone.read_bytes() == shared.read_bytes()
    result = invoke(*prune_command(files, tmp_path / "more.onnx", work, "--target", "macs=0.6"))
    assert "work: resumed statistics" in result.stderr


def test_commands_that_keep_nothing_say_so(files: Path, tmp_path: Path) -> None:
    result = invoke(
        "prune", files / "model.onnx", "--ratio", 0.5, "--work", tmp_path / "work", "-o", tmp_path / "o.onnx"
    )
    assert "work: no stage ran that keeps anything" in result.stderr
    refused = invoke("inspect", files / "model.onnx", "--work", tmp_path / "work", code=2)
    assert "--work keeps what --curves measures" in refused.stderr


def test_tokens_are_chosen_from_what_was_tried(files: Path, tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        output = tmp_path / f"{number}.onnx"
        where = () if number == 0 else ("--work", tmp_path / "work")
        words = ("--calib", files / "calib.npz", "--calib-samples", 32, "--target", "macs=0.6", "--tokens", "auto")
        runs.append(invoke("prune", files / "model.onnx", *words, "-o", output, *where))
        assert output.read_bytes() == (tmp_path / "0.onnx").read_bytes()
    assert "work: nothing to resume" in runs[1].stderr and "token schedules" in runs[1].stderr
    assert "work: resumed token schedules" in runs[2].stderr
