"""The command line as tests call it: in this process or in one of its own, on the example that ships with snpc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

import snpc
from snpc.cli import COMMAND_PLACES, command_named, main

Array = npt.NDArray[Any]
Report = dict[str, Any]

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB = DATA / "digits_vit.onnx", DATA / "calib.npz"
COMMANDS = {name: command_named(name) for name in COMMAND_PLACES}


def invoke(*arguments: object, code: int | None = 0) -> Result:
    """Run the command line in this process. A bug's traceback is a failure, not an exit code."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it as a process of its own."""
    words = [sys.executable, "-m", "snpc.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=process_environment(), check=False)


def process_environment() -> dict[str, str]:
    """The environment of a process that imports this snpc."""
    return {**os.environ, "PYTHONPATH": str(Path(snpc.__file__).parents[1])}


def reported(*arguments: object) -> Report:
    """What ``--json -`` prints; nothing else may be on stdout."""
    result: Report = json.loads(invoke(*arguments, "--json", "-").stdout)
    return result


def arrays(path: Path) -> dict[str, Array]:
    """The weights of a model file by name."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def write_tiny(path: Path, **options: Any) -> Path:
    """x [n, 8] -> 32 hidden units -> y [n, 8], in milliseconds."""
    rng = np.random.default_rng(0)
    weights = {"fc1.weight": (8, 32), "fc1.bias": (32,), "fc2.weight": (32, 8), "fc2.bias": (8,)}
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["a"], "/fc1/MatMul"),
        helper.make_node("Add", ["a", "fc1.bias"], ["b"], "/fc1/Add"),
        helper.make_node("Relu", ["b"], ["c"], "/act/Relu"),
        helper.make_node("MatMul", ["c", "fc2.weight"], ["d"], "/fc2/MatMul"),
        helper.make_node("Add", ["d", "fc2.bias"], ["y"], "/fc2/Add"),
    ]
    held = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path, **options)
    return path
