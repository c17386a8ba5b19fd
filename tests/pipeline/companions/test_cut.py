"""A plan carried over to companions."""

from __future__ import annotations

import numpy as np
import pytest

import snpc
from snpc.errors import UserError
from snpc.passes.companions import GraphAlignment
from snpc.passes.grouping import trace_graph
from snpc.passes.weights import WeightEdits, apply_edits
from snpc.pipeline.companions.cut import FittedPlan
from tests.models.decoder_pairs import pair_paths


def magnitude_plan() -> snpc.PruningPlan:
    first, second = pair_paths()
    analysis = snpc.analyze(snpc.load(first, companions=[second]), prune_kv_cache=True)
    return snpc.plan(analysis, snpc.Budget(ratio=0.4), method="select", criterion="magnitude")


def test_the_same_units_stay_in_both() -> None:
    """Sliced weights that both have are equal."""
    plan = magnitude_plan()
    fitted = FittedPlan(plan.slices, plan.analysis.traced_graph)
    (companion,) = plan.analysis.companions
    own, other = (part.rewrite()[0].model.graph.initializers for part in (fitted, fitted.of_companion(companion)))
    compared = 0
    for name, original in companion.alignment.constants.items():
        ours, theirs = other[name].const_value, own[original].const_value
        assert ours is not None and theirs is not None
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        compared += tuple(ours.shape) != tuple(
            plan.analysis.traced_graph.model.graph.initializers[original].shape or ()
        )
    assert compared > 20, "most of them got narrower"


def test_a_fitted_weight_without_a_place_names_the_way_out() -> None:
    plan = magnitude_plan()
    (companion,) = plan.analysis.companions
    name = next(original for copy, original in companion.alignment.constants.items() if "MatMul" in copy)
    traced = plan.analysis.traced_graph
    changed = apply_edits(traced, WeightEdits({name: [lambda array: array + 1]}))
    fitted = FittedPlan(plan.slices, trace_graph(changed, traced.dim_sizes, kv_cache=True))
    lost = type(companion)(companion.analysis, GraphAlignment({}, {}, companion.alignment.contents), companion.matches)
    with pytest.raises(UserError, match=r"cannot be carried over: .*; give --method select"):
        fitted.of_companion(lost)
