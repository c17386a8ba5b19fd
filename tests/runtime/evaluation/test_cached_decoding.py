"""Decoding through caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import snpc
from snpc.errors import CheckFailed
from snpc.runtime.evaluation.cached_decoding import RunningDecoder, cache_interface, cached_decoding_error
from snpc.runtime.execution import file_session
from tests.command_line import invoke
from tests.oracle import analysis_of

DECODERS = ("llama_cached__dyn20", "gpt2_cached__ts14")


@pytest.mark.parametrize("name", DECODERS)
def test_an_export_decodes_step_by_step_as_at_once(name: str) -> None:
    model = analysis_of(name).model
    interface = cache_interface(model)
    assert interface is not None and len(interface.pasts) == 4
    with file_session(model.path) as run:
        decoder = RunningDecoder(interface, run)
        error = cached_decoding_error(decoder, decoder)
    assert error is not None and error < 1e-5


def test_a_cache_that_comes_back_wrong_is_found(tmp_path: Path) -> None:
    """Twice the values in a present output: one run does not show it."""
    path = tmp_path / "wrong.onnx"
    model = onnx.load(analysis_of(DECODERS[0]).model.path)
    present = next(value.name for value in model.graph.output if "present" in value.name)
    producer = next(node for node in model.graph.node if present in node.output)
    producer.output[list(producer.output).index(present)] = "right"
    for node in model.graph.node:
        node.input[:] = ["right" if name == present else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["right", "two"], [present]))
    onnx.save(model, path)
    interface = cache_interface(snpc.load(path))
    assert interface is not None
    with file_session(path) as run:
        decoder = RunningDecoder(interface, run)
        error = cached_decoding_error(decoder, decoder)
    assert error is not None and error > 1e-3
    with pytest.raises(CheckFailed, match="decoding step by step through the caches differs from decoding at once"):
        snpc.verify(analysis_of(DECODERS[0]).model.path, path)


def test_models_without_caches_have_no_such_interface() -> None:
    assert cache_interface(analysis_of("gpt2__dyn20").model) is None


@pytest.mark.parametrize("options", [(), ("--prune-kv-cache",)])
def test_the_verdict_says_it(options: tuple[str, ...], tmp_path: Path) -> None:
    path = analysis_of(DECODERS[0]).model.path
    words = ("--ratio", 0.5, "--method", "select", "--criterion", "magnitude", "-o", tmp_path / "half.onnx")
    result = invoke("prune", path, *words, *options)
    assert "decoding step by step through the caches equals decoding at once" in " ".join(result.stdout.split())
