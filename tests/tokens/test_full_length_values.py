"""What weights are fitted to where tokens are gone: the dense model's values, at the tokens that are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import file_decisions, self_deciding_model
from snpc.runtime.closed_form import residual_error_values
from snpc.runtime.io.save import save
from snpc.tokens.full_length_values import full_length_values
from snpc.tokens.reduction import TokenReductionPlan, reduce_tokens
from tests.models.encoders import Array, Encoder

ENCODER = Encoder(exit="both")


def relative_error(path: Path, dense: Path, feeds: dict[str, Array]) -> float:
    got, expected = (ort.InferenceSession(p).run(None, feeds)[0] for p in (path, dense))
    return float(np.square(got - expected).sum() / np.square(expected).sum())


@pytest.mark.parametrize("spec", ["merge:3@1+topk:0.6@2", "guided:3@1,3", "fuse:0.6@2"])
def test_values_are_those_of_the_dense_model_at_the_tokens_left(spec: str, tmp_path: Path) -> None:
    onnx.save(ENCODER.model(), tmp_path / "dense.onnx")
    reduced = reduce_tokens(snpc.analyze(snpc.load(tmp_path / "dense.onnx")), spec)
    plan = reduced.reduction
    assert isinstance(plan, TokenReductionPlan) and plan.source is not None
    save(finalize(self_deciding_model(reduced)), tmp_path / "reduced.onnx")
    (decided,) = file_decisions(tmp_path / "reduced.onnx", plan.decisions, [ENCODER.feeds()])

    names = residual_error_values(reduced, reduced.groups)
    full, shown = full_length_values(plan.source.model, plan.source.facts, plan.steps, names)
    values = {str(value.name): value for node in full.graph for value in node.outputs}
    full.graph.outputs.clear()
    full.graph.outputs.extend(values[name] for name in dict.fromkeys([*names, *shown.values()]))
    save(finalize(full), tmp_path / "full.onnx")
    session = ort.InferenceSession(tmp_path / "full.onnx")
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {**ENCODER.feeds(), **decided}), strict=True))

    lengths = set()
    for name in names:
        left, sizes = found[name], np.ones(found[name].shape[:2])
        for step in plan.steps:
            if left.shape[1] > found[shown[name]].shape[1]:
                matrix, sizes = step.method.matrix(step.settings, [decided[n] for n in step.names], sizes)
                left = matrix @ left
        np.testing.assert_allclose(found[shown[name]], left, atol=1e-4)
        lengths.add(left.shape[1])
    assert len(lengths) > 1  # in front of steps and behind them


@pytest.mark.parametrize("spec", ["merge:4", "topk:0.5@1,2"])
def test_refitted_weights_make_up_for_tokens(spec: str, tmp_path: Path) -> None:
    dense, feeds = tmp_path / "dense.onnx", ENCODER.feeds(64)
    onnx.save(ENCODER.model(), dense)
    losses = {}
    for method in ("auto", "select"):
        path = tmp_path / f"{method}.onnx"
        snpc.prune(dense, path, tokens=spec, calibration=feeds, method=method)
        losses[method] = [relative_error(path, dense, data) for data in (feeds, ENCODER.feeds(64, seed=2))]
    assert all(refitted < 0.9 * sliced for refitted, sliced in zip(losses["auto"], losses["select"], strict=True))
