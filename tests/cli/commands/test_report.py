"""``snpc report`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main

DATA = Path(snpc.__file__).parent / "data" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    snpc.write_example("digits", path)
    snpc.prune(path / "digits_vit.onnx", path / "half.onnx", ratio=0.5)
    return path


def report(folder: Path, *words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["report", str(folder / "digits_vit.onnx"), *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_page_and_a_table(folder: Path) -> None:
    labelled = ["--eval", str(folder / "eval.npz"), "--labels", "labels", "--metric", "top5"]
    code, out, err = report(
        folder, str(folder / "half.onnx"), "--data", str(folder / "calib.npz"), *labelled, "--iterations", "3"
    )
    assert code == 0, err
    page = folder / "half-report.html"
    assert f"written: {page}" in out and "speed-up" in out and "top-5 accuracy: " in out
    assert "What is left of each layer" in page.read_text()


def test_json_in_place_of_the_table(folder: Path) -> None:
    half = str(folder / "half.onnx")
    code, out, err = report(folder, half, half, "--no-timing", "--json", "-", "-o", str(folder / "page.html"))
    assert code == 0, err
    found = json.loads(out)
    assert found["snpc_comparison"] == 1
    assert [file["path"] for file in found["files"]] == [half, half]
    assert found["bench"] is None and all(file["grade"] == "unknown" for file in found["files"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["half.onnx", "-o", "half.onnx"], "half.onnx"),
        (["half.onnx", "--labels", "labels"], "give --eval DATA too"),
        (["half.onnx", "--metric", "top1"], "give --eval DATA --labels NAME"),
        (["eval.npz"], "eval.npz"),
    ],
)
def test_what_cannot_be_done_is_refused(words: list[str], complaint: str, folder: Path) -> None:
    placed = [str(folder / word) if Path(word).suffix else word for word in words]
    code, _, err = report(folder, *placed)
    assert code == 2 and complaint in err
