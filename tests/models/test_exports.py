"""The exports the rest of the suite relies on are sound: they run, on any batch where dynamic, and agree with torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.models import exports
from tests.models.exports import EXPORTS, export, load_feeds

NAMES = list(EXPORTS)


def _require(name: str) -> None:
    missing = EXPORTS[name].missing()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def _run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, feeds)[0]
    return output


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_its_feeds_and_agrees_with_torch(name: str) -> None:
    _require(name)
    import torch

    feeds = load_feeds(name)
    output = _run(export(name), feeds)
    assert np.isfinite(output).all()
    assert output.std() > 0.05

    module = EXPORTS[name].build().module
    with torch.no_grad():
        expected = module(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if EXPORTS[name].dynamic])
def test_dynamic_exports_take_any_batch(name: str) -> None:
    _require(name)
    feeds = load_feeds(name)
    path = export(name)
    whole = _run(path, feeds)
    for size in (1, 5):
        picked = [index % exports.FEED_BATCH for index in range(size)]
        output = _run(path, {key: value[picked] for key, value in feeds.items()})
        np.testing.assert_allclose(output, whole[picked], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_small(name: str) -> None:
    _require(name)
    path = export(name)
    assert path.stat().st_size < 1_500_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == EXPORTS[name].opset


@pytest.mark.parametrize("name", NAMES)
def test_feeds_fit_the_inputs(name: str) -> None:
    _require(name)
    feeds = load_feeds(name)
    inputs = onnx.load(export(name)).graph.input
    assert [value.name for value in inputs] == list(feeds)
    batch = EXPORTS[name].static_batch or exports.FEED_BATCH
    assert {value.shape[0] for value in feeds.values()} == {batch}
    for value in inputs:
        first = value.type.tensor_type.shape.dim[0]
        assert bool(first.dim_param) == EXPORTS[name].dynamic
        assert EXPORTS[name].dynamic or first.dim_value == batch


def test_equal_biases_are_shared_only_in_the_zero_bias_model() -> None:
    _require("bert__ts17")

    def consumers(name: str) -> int:
        graph = onnx.load(export(name)).graph
        floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
        uses = [value for node in graph.node for value in node.input if value in floats]
        return max(uses.count(value) for value in set(uses))

    assert consumers("bert__ts17") == 1
    assert consumers("bert_zero_bias__ts17") > 4


def test_a_build_is_the_same_every_time_and_across_exporters() -> None:
    _require("bert__ts17")
    first, second = (EXPORTS[name].build() for name in ("bert__ts17", "bert__ts17_sdpa"))
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert bool((one == other).all())
    assert all((first.feeds[key] == second.feeds[key]).all() for key in first.feeds)
