"""Positions that meet: the algebra of labels under pointwise operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.spec import MISFIT, Labels
from snpc.passes.propagation.labels import varying
from snpc.passes.propagation.state import Carried, Factors, Here


def same_labels(left: Carried, right: Carried) -> bool:
    """Two tensors made of one (x and its cube, in a polynomial activation) carry the same labels."""
    mine = {labels.tobytes() for labels in left.factors}
    return any(labels.tobytes() in mine for labels in right.factors)


def meet(here: Here, parts: Sequence[Carried]) -> Factors:
    """Factors of several tensors at the same positions: same axes join, coarser covers finer, the rest is pinned."""
    if any(len({c.shape[k] for c in parts} - {1}) > 1 for k in range(max((len(c.shape) for c in parts), default=0))):
        here.refuse(parts, MISFIT)
        return ()
    book = here.trace.book
    kept: list[tuple[int, Labels]] = []
    for index, carried in enumerate(parts):
        for labels in carried.factors:
            stranger = unlabelled_partner(parts, index, labels)
            if stranger is not None:
                here.pin(carried, labels, f"it meets {here.stranger(stranger)}")
                if carried.constant:
                    continue
            joined = False
            for k, (owner, other) in enumerate(kept):
                if owner == index or not (varying(labels) & varying(other)):
                    continue
                if varying(labels) == varying(other):
                    book.match(labels, other)
                    pin_half_labelled(here, carried, labels, other)
                    if parts[owner].constant and not carried.constant:
                        kept[k] = (owner, labels)
                    joined = True
                elif varying(labels) < varying(other):
                    book.cover(labels, other, "meet")
                elif varying(labels) > varying(other):
                    book.cover(other, labels, "meet")
                else:
                    book.share(labels, other, "meet")
            if not joined:
                kept.append((index, labels))
    return tuple(labels for _, labels in kept)


def unlabelled_partner(parts: Sequence[Carried], index: int, labels: Labels) -> Carried | None:
    """Another tensor that has entries along an axis of ``labels`` but no labels of its own there."""
    for other, carried in enumerate(parts):
        if other == index:
            continue
        for axis in varying(labels):
            if carried.shape[axis] > 1 and not any(axis in varying(f) for f in carried.factors):
                return carried
    return None


def pin_half_labelled(here: Here, carried: Carried, left: Labels, right: Labels) -> None:
    a, b = np.broadcast_arrays(left, right)
    odd = (a >= 0) != (b >= 0)
    if odd.any():
        here.pin(carried, np.concatenate([a[odd], b[odd]]), "it meets positions that no weight makes")
