"""Positions that meet: the algebra of labels under pointwise operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.spec import SHAPE_MISMATCH, Labels
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext


def have_labels_in_common(left: LabeledValue, right: LabeledValue) -> bool:
    """Two tensors made of one (x and its cube, in a polynomial activation) carry the same labels."""
    mine = {labels.tobytes() for labels in left.factors}
    return any(labels.tobytes() in mine for labels in right.factors)


def unify_factors(here: NodeContext, parts: Sequence[LabeledValue]) -> Factors:
    """Factors of several tensors at the same positions: same axes join, coarser covers finer, the rest is pinned."""
    if any(len({c.shape[k] for c in parts} - {1}) > 1 for k in range(max((len(c.shape) for c in parts), default=0))):
        here.refuse(parts, SHAPE_MISMATCH)
        return ()
    book = here.trace.table
    kept: list[tuple[int, Labels]] = []
    for index, carried in enumerate(parts):
        for labels in carried.factors:
            stranger = unlabeled_partner(parts, index, labels)
            if stranger is not None:
                here.pin(carried, labels, f"it meets {here.describe_unlabeled(stranger)}")
                if carried.constant:
                    continue
            joined = False
            for k, (owner, other) in enumerate(kept):
                if owner == index or not (varying_axes(labels) & varying_axes(other)):
                    continue
                if varying_axes(labels) == varying_axes(other):
                    book.unify_or_cover(labels, other)
                    pin_partly_labeled(here, carried, labels, other)
                    if parts[owner].constant and not carried.constant:
                        kept[k] = (owner, labels)
                    joined = True
                elif varying_axes(labels) < varying_axes(other):
                    book.cover(labels, other, "meet")
                elif varying_axes(labels) > varying_axes(other):
                    book.cover(other, labels, "meet")
                else:
                    book.cover_in_common(labels, other, "meet")
            if not joined:
                kept.append((index, labels))
    return tuple(labels for _, labels in kept)


def unlabeled_partner(parts: Sequence[LabeledValue], index: int, labels: Labels) -> LabeledValue | None:
    """Another tensor that has entries along an axis of ``labels`` but no labels of its own there."""
    for other, carried in enumerate(parts):
        if other == index:
            continue
        for axis in varying_axes(labels):
            if carried.shape[axis] > 1 and not any(axis in varying_axes(f) for f in carried.factors):
                return carried
    return None


def pin_partly_labeled(here: NodeContext, carried: LabeledValue, left: Labels, right: Labels) -> None:
    a, b = np.broadcast_arrays(left, right)
    odd = (a >= 0) != (b >= 0)
    if odd.any():
        here.pin(carried, np.concatenate([a[odd], b[odd]]), "it meets positions that no weight makes")
