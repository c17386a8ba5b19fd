"""Constants and nodes of two graphs that are the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import snpc
from snpc.passes.companions.alignment import align_graphs
from tests.models.decoder_pairs import LAYERS, WIDTH, pair_paths
from tests.oracle import analysis_of


def contents(model: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    """Float constants that are more than a number."""
    values = {name: v.const_value for name, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    return {name: tensor.numpy() for name, tensor in values.items() if tensor is not None and tensor.size >= WIDTH}


@pytest.mark.parametrize("cross", [True, False])
def test_weights_are_found_by_their_contents(cross: bool) -> None:
    first, second = (snpc.load(path).graph for path in pair_paths(cross))
    found, ours, theirs = align_graphs(first, second).constants, contents(second), contents(first)
    assert len(ours) > 8 * LAYERS and set(ours) <= set(found)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[found[name]])


def test_constants_of_equal_contents_are_told_apart_by_what_they_are_added_to() -> None:
    """All biases of output projections are zero."""
    first, second = (snpc.load(path).graph for path in pair_paths())
    found = align_graphs(first, second).constants
    zeros = [name for name, array in contents(second).items() if not array.any()]
    zeros = [name for name in zeros if product_of(second, name)]
    assert len(zeros) == 2 * LAYERS
    for name in zeros:
        assert found[product_of(second, name)] == product_of(first, found[name])


def product_of(model: ir.Model, bias: str) -> str:
    """The weight of the product to which a bias is added; "" where it is added to none."""
    value = model.graph.initializers[bias]
    ((node, _),) = value.uses()
    producers = [other.producer() for other in node.inputs if other is not None and other is not value]
    weights = [v for producer in producers if producer is not None for v in producer.inputs if v is not None]
    return next((str(v.name) for v in weights if v.is_initializer()), "")


def test_models_with_other_weights_have_nothing_in_common() -> None:
    first = snpc.load(pair_paths()[0]).graph
    assert not align_graphs(first, analysis_of("gpt2_cached__ts14").model.graph).nodes
