"""A size that runs is found: by solving for it, and by trying."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.errors import UserError
from snpc.graph import DimSizes
from snpc.passes.analyze import analyze
from snpc.runtime.execution.random_data import random_calibration
from snpc.runtime.execution.size_trial import find_running_sizes, told_numbers
from snpc.runtime.execution.temporary_session import file_session
from snpc.runtime.io.load import load
from tests.command_line import invoke, reported
from tests.models.dynamic_sizes import CONSTRAINED, DECODERS
from tests.models.exports import export, load_feeds
from tests.oracle import require
from tests.passes.text_graphs import text_model

Shapes = dict[str, list[int]]


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_caches_are_cut_without_data(name: str, tmp_path: Path) -> None:
    require(name)
    out = tmp_path / "out.onnx"
    words = ("--ratio", 0.5, "--method", "select", "--prune-kv-cache")
    result = reported("prune", export(name), *words, "-o", out)
    assert {group["role"] for group in result["groups"]} >= {"qk", "vo", "ffn"}
    before, after = (input_shapes(path)["past_key_values.0.value"] for path in (export(name), out))
    assert after[3] < before[3]


@pytest.mark.parametrize("name", CONSTRAINED)
def test_lengths_that_the_graph_fixes_are_found(name: str, tmp_path: Path) -> None:
    require(name)
    sizes = running_sizes(export(name))
    assert sizes.get("length") == 8 or name not in ("torch_encoder__ts17", "added_positions__ts17")
    invoke("prune", export(name), "--ratio", 0.5, "--method", "select", "-o", tmp_path / "out.onnx")


def test_a_batch_that_a_kernel_demands_is_found_by_trying() -> None:
    """onnxruntime's RotaryEmbedding takes the tables of one sample for one sample only; no shape inference says so."""
    name = "llama_cached__dyn23"
    require(name)
    assert running_sizes(export(name))["batch"] == 1


def test_random_data_have_the_batch_that_runs(tmp_path: Path) -> None:
    name = "llama_cached__dyn23"
    require(name)
    calibration = random_calibration(analyze(load(export(name))), samples=4)
    assert {len(feeds["input_ids"]) for feeds in calibration.batches()} == {1}
    flags = ("--ratio", 0.5, "--calib", "random", "--calib-samples", 4, "--roles", "ffn", "-o", tmp_path / "out.onnx")
    invoke("prune", export(name), *flags)


def test_data_in_batches_that_a_kernel_refuses(tmp_path: Path) -> None:
    name = "llama_cached__dyn23"
    require(name)
    data = tmp_path / "calib.npz"
    np.savez(data, allow_pickle=False, **load_feeds(name))
    flags = ("--ratio", 0.5, "--calib", data, "--roles", "ffn", "-o", tmp_path / "out.onnx")
    output = invoke("prune", export(name), *flags, code=2).output
    assert f"{name}.onnx: calibration: onnxruntime does not run it" in output and "give --calib-batch 1" in output
    invoke("prune", export(name), *flags, "--calib-batch", 1)


def test_where_nothing_runs_the_message_says_what_was_tried(tmp_path: Path) -> None:
    """A Reshape to 3 x 5, of an input of 4 columns: no number of rows fits."""
    text = """
        never (float[n, 4] x) => (float[n, 5] y) {
            s = Add(x, x)
            r = Reshape(s, shape)
            y = MatMul(r, w)
        }"""
    path = tmp_path / "never.onnx"
    weights = {"shape": np.array([3, 5]), "w": np.ones((5, 5), np.float32)}
    onnx.save(text_model(text, weights), path)
    with pytest.raises(UserError, match=r"sizes .* were tried \(n=\d+; n=1; .*--dim-param NAME=N or --input-shapes"):
        running_sizes(path)


def test_sizes_that_the_user_gives_are_used(tmp_path: Path) -> None:
    text = "given (float[n, m, 4] x) => (float[n, m, 4] y) { y = MatMul(x, w) }"
    path = tmp_path / "given.onnx"
    onnx.save(text_model(text, {"w": np.ones((4, 4), np.float32)}), path)
    assert running_sizes(path, m=33) == {"n": 2, "m": 33}


def test_numbers_of_an_error_are_sizes_and_no_names() -> None:
    message = (
        "model.onnx: onnxruntime does not run it on these inputs: [ONNXRuntimeError] : 1 : FAIL : Non-zero status code "
        "returned while running Add node. Name:'/layers.12/Add_3' Status Message: Attempting to broadcast an axis by a "
        "dimension other than 1. 11 by 20"
    )
    assert {11, 20} <= set(told_numbers(message)) and not {12, 3} & set(told_numbers(message))


def running_sizes(path: Path, **given: int) -> DimSizes:
    with file_session(path) as run:
        return find_running_sizes(analyze(load(path), given), run)


def input_shapes(path: Path) -> Shapes:
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
