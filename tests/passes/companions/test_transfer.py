"""Fitted weights carried over to a companion."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import snpc
from snpc.passes.companions.alignment import GraphAlignment
from snpc.passes.companions.transfer import transferred_edits
from snpc.passes.weights import UnsupportedWeightForm, WeightEdits, apply_edits
from tests.models.decoder_pairs import HIDDEN, WIDTH, pair_paths


def pair_analysis() -> snpc.Analysis:
    first, second = pair_paths()
    return snpc.analyze(snpc.load(first, companions=[second]))


def test_constants_and_added_biases_get_their_places() -> None:
    analysis = pair_analysis()
    (companion,) = analysis.companions
    alignment, model = companion.alignment, analysis.traced_graph.model
    shared = {original: name for name, original in alignment.constants.items()}
    weight = next(
        n for n, v in model.graph.initializers.items() if n in shared and v.shape == ir.Shape((HIDDEN, WIDTH))
    )
    node = next(n.name for n, _ in model.graph.initializers[weight].uses())
    head = next(n.name for n in model.graph if n.outputs[0].name == "logits")
    edits = WeightEdits({weight: [lambda array: array + 1]})
    edits.add_bias(str(node), np.ones(WIDTH))
    edits.add_bias(str(head), np.arange(40.0))
    found = transferred_edits(model, apply_edits(analysis.traced_graph, edits), alignment)
    before = model.graph.initializers[weight].const_value
    assert before is not None
    (change,) = found.changes[shared[weight]]
    np.testing.assert_array_equal(change(np.zeros(before.shape.numpy())), before.numpy() + 1)
    assert list(found.biases) == [alignment.nodes[str(head)]], "a projection's bias was changed in its place"
    np.testing.assert_array_equal(found.biases[alignment.nodes[str(head)]], np.arange(40.0))
    assert len(found.changes) == 2, "weight and bias"


def test_a_change_that_has_no_place_is_refused() -> None:
    analysis = pair_analysis()
    (companion,) = analysis.companions
    model = analysis.traced_graph.model
    name = next(original for copy, original in companion.alignment.constants.items() if "MatMul" in copy)
    fitted = apply_edits(analysis.traced_graph, WeightEdits({name: [lambda array: array + 1]}))
    lost = GraphAlignment({}, {}, companion.alignment.contents)
    with pytest.raises(UnsupportedWeightForm, match="several constants have its contents"):
        transferred_edits(model, fitted, lost)
    assert not transferred_edits(model, fitted, GraphAlignment({}, {}, frozenset())).changes, "weights it does not have"
