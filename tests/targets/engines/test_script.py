"""What builds an engine elsewhere: a model, and a script whose commands are those of the tools."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.targets.base import BuildOptions


@pytest.mark.parametrize(("version", "typed"), [("10.13.0", True), ("11.0.1", False)])
def test_the_script_fits_the_installed_version(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, typed: bool
) -> None:
    real = importlib.import_module

    class Fake:
        __version__ = version

    monkeypatch.setattr(importlib, "import_module", lambda name: Fake if name == "tensorrt" else real(name))
    options = BuildOptions(emit_script=True, max_shapes={"image": (4, 1, 8, 8)}, workspace=512)
    built = snpc.build(digits / "half.onnx", "trt", tmp_path / "ready.onnx", precision="fp16", options=options)
    assert [file.name for file in built.files] == ["ready.onnx", "ready.sh"]
    words = shlex.split(line_of(tmp_path / "ready.sh", "trtexec"))
    assert ("--stronglyTyped" in words) == typed
    assert {
        "--onnx=ready.onnx",
        "--saveEngine=ready.engine",
        "--maxShapes=image:4x1x8x8",
        "--memPoolSize=workspace:512",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=ready.layers.json",
        "--exportProfile=ready.profile.json",
        "--timingCacheFile=ready.timing.cache",
    } < set(words)
    halves = [i for i in onnx.load(built.path).graph.initializer if i.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 10


def line_of(script: Path, command: str) -> str:
    (line,) = (
        text.strip() for text in script.read_text().splitlines() if f"{command} " in text and "[" not in text[:3]
    )
    return line


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_the_script_runs_the_tools_and_counts_kernels(digits: Path, tmp_path: Path) -> None:
    """Stand-ins for the tools, which need a GPU: one writes the layers that an engine with two such kernels has."""
    options = BuildOptions(emit_script=True, sm=(86, 89))
    built = snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / "m.onnx", precision="fp16", options=options)
    tools = tmp_path / "tools"
    tools.mkdir()
    layers = '{"Layers": [{"Name": "_gemm_mha_v2_0", "Metadata": "mha"}, {"Name": "x"}, {"Name": "_gemm_mha_v2_7"}]}'
    stand_in(tools, "tensorrt_rtx", f"echo \"$@\" > built.txt; echo '{layers}' > m.layers.json")
    stand_in(tools, "polygraphy", 'echo "$POLYGRAPHY_USE_TENSORRT_RTX $@" > compared.txt')
    run = subprocess.run(
        ["sh", str(built.files[1])], env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "attention: one kernel in 2 of 4 places\n"
    assert "--computeCapabilities=86,89" in (tmp_path / "built.txt").read_text()
    assert (tmp_path / "compared.txt").read_text().startswith("1 run m.onnx --trt --onnxrt ")


def test_polygraphy_takes_the_line_that_compares(digits: Path, tmp_path: Path) -> None:
    """Polygraphy reads the whole line, and writes the program that it stands for."""
    pytest.importorskip("polygraphy")
    options = BuildOptions(emit_script=True)
    snpc.build(digits / "half.onnx", "trt", tmp_path / "m.onnx", precision="fp16", options=options)
    line = next(text for text in (tmp_path / "m.sh").read_text().splitlines() if "polygraphy run" in text)
    program, words = "from polygraphy.tools import main; main()", shlex.split(line)[1:]
    subprocess.run([sys.executable, "-c", program, *words, "--gen-script", "compare.py"], cwd=tmp_path, check=True)
    written = (tmp_path / "compare.py").read_text()
    assert "strongly_typed=True" in written and "OnnxrtRunner" in written and "seed=42" in written
    assert "Profile().add('image', min=[1, 1, 8, 8], opt=[1, 1, 8, 8], max=[16, 1, 8, 8])" in written
    assert "check_error_stat={'': 'mean'}" in written and "atol={'': 0.01}" in written


@pytest.mark.parametrize("target", ["trt", "trt-rtx"])
def test_a_script_needs_no_runtime_and_only_its_own_files(
    target: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / "m.engine").mkdir()
    options = BuildOptions(emit_script=True)
    built = snpc.build(digits / "half.onnx", target, tmp_path / "m.onnx", options=options)
    assert "none is installed here" in built.notes[-2]
    with pytest.raises(UserError, match=r"name the \.onnx with -o"):
        snpc.build(digits / "half.onnx", target, tmp_path / "m.engine", options=options)
