"""A model that runs segment by segment gives what it gives in one session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.graph import infer_graph
from snpc.runtime.batches.streamed_model import StreamedModel, must_stream, open_file, open_graph, run_each
from snpc.runtime.execution import Execution
from snpc.runtime.execution.temporary_session import file_session
from snpc.runtime.io import read_model
from tests.models.layouts import Llama, write_llama
from tests.recorded_progress import RecordedProgress

LLAMA = Llama(layers=3, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=50, positions=64)
STREAMED = Execution(memory_limit=300_000)
TIGHT = Execution(memory_limit=10)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), LLAMA)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, 50, (2, 5 + k))} for k in range(count)]


def test_outputs_of_every_batch_are_those_of_one_session(llama: Path) -> None:
    with open_file(llama, STREAMED) as run, file_session(llama) as whole:
        assert isinstance(run, StreamedModel)
        assert len(run.segments) > 3
        for feeds, outputs in zip(batches(3), run_each(run, batches(3), STREAMED), strict=True):
            (logits,) = whole(feeds).values()
            np.testing.assert_allclose(outputs["logits"].astype(np.float32), logits.astype(np.float32), atol=2e-2)
            assert np.array_equal(run(feeds)["logits"], outputs["logits"])


def test_progress_counts_segments(llama: Path) -> None:
    progress = RecordedProgress()
    with open_file(llama, STREAMED) as run:
        assert isinstance(run, StreamedModel)
        list(run_each(run, batches(2), Execution(memory_limit=300_000, progress=progress), "verification"))
        assert progress.finished == [("verification", len(run.segments), len(run.segments))]


def test_a_model_within_the_limit_is_one_session(llama: Path) -> None:
    model = read_model(llama)
    assert must_stream(model, STREAMED)
    assert not must_stream(model, Execution(memory_limit=1 << 30))
    assert not must_stream(model, Execution(provider="cuda", memory_limit=300_000))
    with open_graph(model, infer_graph(model, {}), Execution(memory_limit=1 << 30)) as run:
        assert not isinstance(run, StreamedModel)


def test_an_output_that_is_an_input_needs_one_session(tmp_path: Path) -> None:
    """Nothing computes it, so no segment hands it on."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y, float[2] x)
              <float[2] w = {1, 2}, float[2] v = {3, 4}> { a = Add(x, w) y = Mul(a, v) }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    assert must_stream(read_model(path), TIGHT)
    with open_file(path, TIGHT) as run:
        assert not isinstance(run, StreamedModel)
        assert set(run({"x": np.ones(2, np.float32)})) == {"y", "x"}


def test_functions_are_inlined(tmp_path: Path) -> None:
    """A segment would lack them."""
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g (float[2] x) => (float[2] y)
              <float[2] w = {1, 2}, float[2] v = {3, 4}> { a = my.Twice(x) b = Add(a, w) y = Mul(b, v) }
              <domain: "my", opset_import: ["" : 17]> Twice (x) => (y) { y = Add(x, x) }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with open_file(path, TIGHT) as run:
        assert isinstance(run, StreamedModel)
        assert run({"x": np.ones(2, np.float32)})["y"].tolist() == [9.0, 16.0]
