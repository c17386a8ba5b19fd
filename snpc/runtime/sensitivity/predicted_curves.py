"""Loss curves without trials: the closed-form losses of all groups, brought to one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from snpc.planning import UnitScores
from snpc.runtime.closed_form import ClosedForms
from snpc.types import ClosedFormKind, FloatArray, Group

# The share of a group's units at whose loss its curve is scaled. A few directions may carry nearly all of the energy
# and stay in any plan (massive activations; keys that all queries agree on): relative to the loss of the whole group,
# the rest would seem free. Chosen on ViT-Tiny, see docs/how-it-works.md.
REFERENCE_SHARE = 1 / 64
SCORE_REFERENCE_SHARE = 1 / 4
SCORED_FORMS: frozenset[ClosedFormKind] = frozenset({"low_rank_qk", "score_selection", "score_refit"})
# Per unit of loss, summed over the norms, trials of a rotated stream change the outputs about three times as much as
# those of hidden layers and nine times as much as those of values (a small Llama, see docs/design-notes.md).
STREAM_SCALE = 4.0
NO_LOSS = 1e-9  # of the whole group's: a loss that is smaller says nothing


def predicted_curves(closed_forms: ClosedForms, scores: UnitScores, groups: Sequence[Group]) -> dict[str, FloatArray]:
    """Group id -> [size + 1]: a loss by units per block that are kept, comparable between groups.

    Each curve is the closed form's loss, or the sum of the scores that go in its place. It is scaled at the width that
    is the reference share of the group's: there, all groups of a role lose the same, the median over them of the loss
    relative to that of removing the whole group. A rotated stream loses what all the layers do that read it.
    """
    relative = {group.id: relative_loss(closed_forms, scores, group) for group in groups}
    at_reference = {g.id: float(relative[g.id][reference_width(closed_forms, g)]) for g in groups}
    levels = role_levels(groups, at_reference)
    return {
        g.id: relative[g.id] * (levels[g.role] / max(at_reference[g.id], NO_LOSS)) if levels[g.role] else relative[g.id]
        for g in groups
    }


def reference_width(closed_forms: ClosedForms, group: Group) -> int:
    share = SCORE_REFERENCE_SHARE if closed_forms.kinds.get(group.id) in SCORED_FORMS else REFERENCE_SHARE
    return min(max(1, int(group.size * share)), group.size - 1)


def role_levels(groups: Sequence[Group], losses: Mapping[str, float]) -> dict[str, float]:
    """Role -> the median, in logarithms, of its groups' losses; 0 where more than half of them lose nothing."""
    by_role: dict[str, list[float]] = {}
    for group in groups:
        by_role.setdefault(group.role, []).append(losses[group.id])
    return {
        role: math.exp(float(np.median(np.log(np.maximum(values, NO_LOSS))))) if np.median(values) > NO_LOSS else 0.0
        for role, values in by_role.items()
    }


def relative_loss(closed_forms: ClosedForms, scores: UnitScores, group: Group) -> FloatArray:
    """[size + 1]: the closed form's loss relative to that of removing the whole group, or the scores' in its place."""
    stream = closed_forms.analysis.stream_loss(group)
    if stream is not None:
        return STREAM_SCALE * stream
    curve = closed_forms.loss_curve(group)
    if curve is None:
        ordered = np.sort(scores.values[group.id], axis=1).mean(0)
        curve = np.concatenate([[0.0], np.cumsum(ordered - min(float(ordered[0]), 0.0))])[::-1]
    return curve / max(float(curve[0]), 1e-300)
