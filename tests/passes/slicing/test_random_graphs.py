"""Graphs that nobody wrote: whatever their operators and whatever is cut, slicing is masking.

SNPC_FUZZ=5000 tries as many graphs, other ones every time; by default it is a few hundred, always the same.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from snpc.errors import CheckFailed
from snpc.passes.analyze import Analysis
from tests.models.graphs import graphs
from tests.oracle import Cuts, analysis_at, cut, cuts_of, random_removal, run

EXAMPLES = int(os.environ.get("SNPC_FUZZ", "0"))
TOLERANCE = 1e-3  # of the largest entry: sums of a few hundred float32 numbers, normalised more than once


def feeds_for(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(0).standard_normal(dims).astype(np.float32)}


def some_cuts(analysis: Analysis, data: st.DataObject) -> Cuts:
    """Of some of the groups, each by a share of its own."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    free = [g for g in analysis.groups if g.prunable and g.size > 1]
    chosen = free if data.draw(st.booleans(), "all") else [g for g in free if data.draw(st.booleans(), g.id)]
    ratio = data.draw(st.sampled_from([0.2, 0.5, 0.8]), "ratio")
    return cuts_of((g, random_removal(g, rng, ratio)) for g in chosen)


@settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(model=graphs(), data=st.data())
@pytest.mark.slow
def test_slicing_is_masking(model: onnx.ModelProto, data: st.DataObject) -> None:
    assume(model.graph.node)
    onnx.checker.check_model(model)
    feeds = feeds_for(model)
    try:
        expected = run(model.SerializeToString(), feeds)
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        assume(False)
    assume(all(np.isfinite(a).all() and a.size for a in expected))
    with tempfile.TemporaryDirectory(prefix="snpc-fuzz-") as folder:
        analysis = analysis_at(Path(folder) / "m.onnx", model)
        cuts = some_cuts(analysis, data)
        try:
            pair = cut(analysis, cuts)
        except CheckFailed as refusal:  # other numbers per block, where they lie too mixed to be told apart
            assert "--uniform" in str(refusal)
            return
        assert pair.error(feeds, "off") < TOLERANCE
        assert pair.error(feeds, "all") < TOLERANCE
