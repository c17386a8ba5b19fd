"""Closed forms of normalizations inside a group: in a hidden layer, or on the heads of queries and keys.

Over fewer units a normalization has another mean and deviation. Its gain and bias are fitted channel by channel,
so that the kept channels come out as before in least squares (``affine_for_fewer_units``).

Of queries and keys, the gain is then fitted to their scores as well. The scores of one head are a sum over units,
s = sum_u q_u k_u', and a factor a_u on the gain of unit u multiplies its term. The factors that make the kept terms
closest to s, over all queries and keys, solve M_KK a = M_K 1 with M of ``score_loss.py``. A unit is a pair of channels
where rotary tables turn pairs, which commutes with one factor on both. All heads of a layer share the gain, so that M
is summed over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from snpc.passes import Analysis
from snpc.passes.weights import HiddenNormalization, WeightEdits
from snpc.runtime.closed_form.algebra import (
    NormalizedMoments,
    affine_for_fewer_units,
    refit_rows,
    relative_ridge,
    statistic_variances,
    unit_columns,
)
from snpc.runtime.closed_form.elimination import LeastSquaresSystem
from snpc.runtime.statistics import ConsumerMoments, GroupMoments
from snpc.types import FloatArray, Group, IntArray


def score_systems(analysis: Analysis, group: Group, moments: GroupMoments, block: int) -> list[LeastSquaresSystem]:
    """Of one block: one per gain that is fitted to scores, and one per normalization for what its statistic loses."""
    weights = analysis.weights[group.id]
    ones = np.ones((group.size, 1))
    systems: list[LeastSquaresSystem] = []
    for norm, outputs in zip(weights.normalizations, moments.normalized, strict=True):
        if norm.products:
            losses = score_losses_of(norm, moments)[block]
            systems.append(LeastSquaresSystem(losses, ones, relative_ridge(group.size, outputs.count)))
    energy = sum(float(system.moment.sum()) for system in systems)
    for norm, outputs in zip(weights.normalizations, moments.normalized, strict=True):
        variances = statistic_variances(before_gain(analysis, norm, outputs), norm.positions)
        of_units = variances.reshape(group.blocks, group.size, -1)[block].sum(1)
        systems.append(LeastSquaresSystem(np.diag(of_units), np.full((group.size, 1), np.sqrt(energy))))
    return systems


def score_losses_of(norm: HiddenNormalization, moments: GroupMoments) -> FloatArray:
    """[blocks, size, size]: of all products whose scores this gain is fitted to, see ``score_loss.py``."""
    return np.asarray(np.sum([moments.score_losses[number] for number in norm.products], axis=0))


def before_gain(analysis: Analysis, norm: HiddenNormalization, outputs: ConsumerMoments) -> NormalizedMoments:
    """The moments of a normalization's output before gain and bias, channel by channel."""
    gain, bias = gain_and_bias(analysis, norm)
    mean, covariance = np.mean(outputs.means, axis=0), outputs.moment / max(outputs.count, 1.0)
    return NormalizedMoments.before_affine(mean, covariance, gain, bias)


def gain_and_bias(analysis: Analysis, norm: HiddenNormalization) -> tuple[FloatArray, FloatArray]:
    """Gain and bias (nil where there is none) of each channel."""
    constants, positions = analysis.traced_graph.model.graph.initializers, norm.channels
    gain = constant_vector(constants[norm.gain])[positions]
    return gain, np.zeros(len(gain)) if norm.bias is None else constant_vector(constants[norm.bias])[positions]


def fit_normalizations_inside(
    edits: WeightEdits, analysis: Analysis, group: Group, moments: GroupMoments, keep: Sequence[Sequence[int]]
) -> None:
    """Fit gain and bias of the normalizations of a hidden layer, or of queries and keys, to statistics over the units
    ``keep`` [blocks][kept], and those that make queries to the scores of all units."""
    units = np.concatenate([np.array(row, np.int64) + block * group.size for block, row in enumerate(keep)])
    for norm, outputs in zip(analysis.weights[group.id].normalizations, moments.normalized, strict=True):
        columns = len(norm.channels) // (group.blocks * group.size)
        kept = unit_columns(units, columns)
        scale, shift = affine_for_fewer_units(before_gain(analysis, norm, outputs), kept, norm.centered)
        factors = np.ones(len(kept))
        if norm.products:
            factors = np.repeat(score_factors(score_losses_of(norm, moments), keep, outputs.count), columns)
        where, gain = norm.channels[kept], gain_and_bias(analysis, norm)[0][kept]
        edits.changes.setdefault(norm.gain, []).append(affine_at(where, scale * factors))
        if norm.bias is not None:
            edits.changes.setdefault(norm.bias, []).append(affine_at(where, factors, gain * shift * factors))


def score_factors(losses: FloatArray, keep: Sequence[Sequence[int]], rows: float) -> FloatArray:
    """[blocks * kept]: the factors of the kept units, block by block. ``losses`` [blocks, size, size]."""
    ones, ridge = np.ones((losses.shape[1], 1)), relative_ridge(losses.shape[1], rows)
    fitted = (refit_rows(of_block, ones, np.array(row), ridge) for of_block, row in zip(losses, keep, strict=True))
    return np.concatenate([rows[:, 0] for rows in fitted])


def constant_vector(value: ir.Value) -> FloatArray:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64).reshape(-1)


def affine_at(
    positions: IntArray, factors: FloatArray, terms: FloatArray | float = 0.0
) -> Callable[[FloatArray], FloatArray]:
    """The change that multiplies a vector of any shape at these positions, and adds to it."""

    def change(array: FloatArray) -> FloatArray:
        flat = array.reshape(-1)
        flat[positions] = flat[positions] * factors + terms
        return flat.reshape(array.shape)

    return change
