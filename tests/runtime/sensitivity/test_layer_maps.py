"""Maps that stand for attention layers: fitted by least squares, and blind to tokens that the layer does not see."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from snpc.passes.sublayers import TokenMap
from snpc.runtime.sensitivity.layer_maps import TokenSums, layers_that_look_ahead
from snpc.types import FloatArray
from tests.oracle import analysis_of, feeds_of

SAMPLES, TOKENS, READ, ADDED = 40, 6, 8, 12


def sums_of(x: FloatArray, y: FloatArray) -> TokenSums:
    sums = TokenSums()
    for part in np.array_split(np.arange(len(x)), 3):
        sums.add(x[part], y[part], np.ones((*x[part].shape[:2], 1)))
    return sums


def mapped(found: TokenMap, bias: FloatArray, x: FloatArray) -> FloatArray:
    inner = x @ found.reduce
    if found.pooled is not None:
        inner = inner + x.mean(1, keepdims=True) @ found.pooled[0] + x[:, :1] @ found.pooled[1]
    return np.asarray(inner @ found.expand + bias)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_layer_that_is_such_a_map_is_found(pooled: bool) -> None:
    """Samples differ in their mean, and the output has as many directions as a map has columns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, TOKENS, READ)) + 3 * rng.normal(size=(SAMPLES, 1, READ))
    truth = TokenMap("x", *(rng.normal(size=shape) for shape in ((READ, 2), (2, ADDED), (2, READ, 2))))
    truth = truth if pooled else TokenMap("x", truth.reduce, truth.expand)
    y = mapped(truth, rng.normal(size=ADDED), x) + 1e-3 * rng.normal(size=(SAMPLES, TOKENS, ADDED))
    found = sums_of(x, y).fit("x", pooled)
    assert found is not None and found.map is not None and (found.map.pooled is not None) == pooled
    assert found.map.reduce.shape == (READ, READ // 4)
    fresh = rng.normal(size=(SAMPLES, TOKENS, READ)) + 3 * rng.normal(size=(SAMPLES, 1, READ))
    expected = mapped(truth, y.mean((0, 1)) - mapped(truth, np.zeros(ADDED), x).mean((0, 1)), fresh)
    error = np.square(mapped(found.map, found.constant, fresh) - expected).sum() / np.square(expected).sum()
    assert error < 1e-3


def test_what_other_samples_do_not_show_has_no_map() -> None:
    """The layer turns the sign of what it adds from each sample to the next."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, TOKENS, READ))
    y = np.where(np.arange(SAMPLES) % 2, 1.0, -1.0)[:, None, None] * x
    assert sums_of(x, y).fit("x", pooled=True) is None


@pytest.mark.parametrize(("name", "ahead"), [("vit_timm__ts17", True), ("gpt2__dyn20_sdpa", False)])
def test_which_layers_look_ahead(name: str, ahead: bool) -> None:
    """Feed-forward layers and causal attention do not; the last attention of a classifier reads for one token alone."""
    analysis = analysis_of(name)
    feeds: Mapping[str, FloatArray] = feeds_of(name)
    attention = [s for s in analysis.sublayers if s.kind == "attention"]
    found = layers_that_look_ahead(analysis, analysis.sublayers, feeds)
    assert found == ({s.name for s in attention[:-1]} if ahead else set())
