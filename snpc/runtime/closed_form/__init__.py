"""Closed-form compression: rotations and least-squares refits, and the weights they give.

Files
  algebra                Linear algebra of the closed forms: low-rank bases and refitted weights from second moments of
                         activations.
  cut_stream             Refits what reads a cut residual stream on what the cut model itself computes.
  dense_algebra          The dense algebra that closed forms are solved with: numpy's, or another implementation that
                         registers itself.
  elimination            The order in which units are removed: structured optimal brain surgeon (OBS), and greedy
                         selection by score loss.
  factorization          One factorization of a least-squares system in the order of its units: the loss of every width,
                         and every refit.
  fit                    Closed forms of a model: weights rotated or refitted for a plan, so that slicing loses as
                         little as possible.
  layerwise              Layer-wise fitting: each feed-forward layer compensates for the error of the pruned layers
                         before it.
  masked_weights         Trial weights: edits applied and removed units zeroed; shapes unchanged.
  normalizations_inside  Closed forms of normalizations inside a group: in a hidden layer, or on the heads of queries
                         and keys.
  refit_normalizations   Refits normalizations whose channels are partly removed, and the weights that consume them.
  ridge                  The ridge of a regression, chosen by two halves of the calibration samples.
  stages                 The stages of layer-wise fitting: residual sums whose error a weight in front can compensate,
                         and the segments between them.
  stream_basis           Bases of residual streams: principal directions in place of channels, where fewer of them say
                         more.
"""

from __future__ import annotations

from snpc.runtime.closed_form.cut_stream import fit_on_cut_stream
from snpc.runtime.closed_form.dense_algebra import DenseAlgebra, current_algebra, register_algebra, using_algebra
from snpc.runtime.closed_form.fit import (
    ClosedForms,
    closed_form_edits,
    fit_parallel,
    in_rotated_order,
    missing_statistics,
    solve_closed_forms,
)
from snpc.runtime.closed_form.layerwise import fit_layerwise
from snpc.runtime.closed_form.masked_weights import changed_constants, constant_array, edited_constants, trial_weights
from snpc.runtime.closed_form.refit_normalizations import (
    approximate_groups,
    fit_normalizations,
    normalization_edits,
    without_groups,
)
from snpc.runtime.closed_form.ridge import Regression, choose_ridge
from snpc.runtime.closed_form.stages import (
    NotSegmentable,
    check_boundary_types,
    residual_error_values,
    residual_sums,
    residual_values,
)
from snpc.runtime.closed_form.stream_basis import with_stream_bases

__all__ = [
    "ClosedForms",
    "DenseAlgebra",
    "NotSegmentable",
    "Regression",
    "approximate_groups",
    "changed_constants",
    "check_boundary_types",
    "choose_ridge",
    "closed_form_edits",
    "constant_array",
    "current_algebra",
    "edited_constants",
    "fit_layerwise",
    "fit_normalizations",
    "fit_on_cut_stream",
    "fit_parallel",
    "in_rotated_order",
    "missing_statistics",
    "normalization_edits",
    "register_algebra",
    "residual_error_values",
    "residual_sums",
    "residual_values",
    "solve_closed_forms",
    "trial_weights",
    "using_algebra",
    "with_stream_bases",
    "without_groups",
]
