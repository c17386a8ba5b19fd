"""Label propagation through element-wise operators: labels at the same position are unified, covered or pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from snpc.ops import SHAPE_MISMATCH, Labels
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext, labels_fit


def have_labels_in_common(left: LabeledValue, right: LabeledValue) -> bool:
    """Whether two operands share a factor, as x and its cube in a polynomial activation do."""
    left_labels = {labels.tobytes() for labels in left.factors}
    return any(labels.tobytes() in left_labels for labels in right.factors)


def unify_factors(context: NodeContext, parts: Sequence[LabeledValue]) -> Factors:
    """Factors of an element-wise combination of ``parts``, which broadcast against each other.

    Factors on the same axes are unified, coarser ones cover finer ones, and labels that are combined with an unlabeled
    operand are pinned.
    """
    if not broadcast_together(parts):
        context.refuse(parts, SHAPE_MISMATCH)
        return ()
    table, unlabeled = context.trace.table, unlabeled_operands(parts)
    kept: list[tuple[int, Labels]] = []
    for index, operand in enumerate(parts):
        for labels in operand.factors:
            partner = unlabeled_partner(unlabeled, index, labels)
            if partner is not None:
                description = context.describe_unlabeled(parts[partner])
                context.pin(operand, labels, f"combined element-wise with {description}")
            joined = partner is not None and operand.constant
            for k, (owner, kept_labels) in enumerate(kept):
                if owner == index or not (varying_axes(labels) & varying_axes(kept_labels)):
                    continue
                if varying_axes(labels) == varying_axes(kept_labels):
                    table.unify_or_cover(labels, kept_labels)
                    pin_partly_labeled(context, operand, labels, kept_labels)
                    if parts[owner].constant and not operand.constant:
                        kept[k] = (owner, labels)
                    joined = True
                elif varying_axes(labels) < varying_axes(kept_labels):
                    table.cover(labels, kept_labels, "aligned")
                elif varying_axes(labels) > varying_axes(kept_labels):
                    table.cover(kept_labels, labels, "aligned")
                else:
                    table.cover_in_common(labels, kept_labels, "aligned")
            if not joined:
                kept.append((index, labels))
    return tuple(labels for _, labels in kept)


def broadcast_together(parts: Sequence[LabeledValue]) -> bool:
    """Whether operands of one rank have equal sizes, or 1, and labels that fit these; not so in a damaged graph."""
    ranks = {len(c.shape) for c in parts}
    if len(ranks) > 1:
        return False
    sizes = [{c.shape[k] for c in parts} - {1} for k in range(max(ranks, default=0))]
    return all(len(found) < 2 for found in sizes) and all(labels_fit(c) for c in parts)


def unlabeled_operands(parts: Sequence[LabeledValue]) -> dict[int, list[int]]:
    """Axis -> the operands that have entries, but no labels, along it: their indices in order. Two say it all: one may
    be the operand that asks."""
    found: dict[int, list[int]] = {}
    for index, operand in enumerate(parts):
        labeled = {axis for factor in operand.factors for axis in varying_axes(factor)}
        for axis, size in enumerate(operand.shape):
            if size > 1 and axis not in labeled and len(found.setdefault(axis, [])) < 2:
                found[axis].append(index)
    return found


def unlabeled_partner(unlabeled: Mapping[int, Sequence[int]], index: int, labels: Labels) -> int | None:
    """The first other operand that has entries, but no labels, along an axis of ``labels``."""
    others = [other for axis in varying_axes(labels) for other in unlabeled.get(axis, ()) if other != index]
    return min(others, default=None)


def pin_partly_labeled(context: NodeContext, operand: LabeledValue, left: Labels, right: Labels) -> None:
    """Pin labels at positions where only one of the two factors has a label."""
    a, b = np.broadcast_arrays(left, right)
    half_labeled = (a >= 0) != (b >= 0)
    if half_labeled.any():
        context.pin(
            operand,
            np.concatenate([a[half_labeled], b[half_labeled]]),
            "combined with entries that no weight produces",
        )
