"""Routing of tokens to experts: positions chosen along an axis, one-hot rows of them, and experts in one node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snpc.ops.spec import MICROSOFT, SHAPE_MISMATCH, Blocked, OpCall, OpSpec, ParameterUpdate, TensorCut
from snpc.types import Shape

CHOSEN_BY_DATA = "which positions are read or written depends on the data"


def _chosen_axis(call: OpCall) -> tuple[int, ...]:
    return (int(call.attrs.get("axis", -1)) % len(call.shape(0)),)


def one_hot_axis(call: OpCall) -> int:
    """The axis of the output along which one position of each row is hot."""
    return int(call.attrs.get("axis", -1)) % len(call.out_shapes[0])


def _one_hot_depth(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    depth = call.value(1)
    dtype = np.int64 if depth is None else depth.dtype
    shape = () if depth is None else depth.shape
    return ParameterUpdate(inputs={1: np.full(shape, outs[0].new[one_hot_axis(call)], dtype)})


def most_chosen(call: OpCall) -> int | None:
    """How many positions TopK chooses; None where data decide."""
    count = call.value(1) if call.version >= 10 else np.asarray(call.attrs.get("k", 1))
    return None if count is None else int(count.reshape(-1)[0])


@dataclass(frozen=True)
class ExpertsForm:
    """The inputs of a node with all experts, by index: that of the ``router`` [tokens, experts], and (weight, bias) of
    the ``inner`` layers [experts, hidden, width], of which the second is the gate of the first, and of the ``outer``
    one [experts, width, hidden]."""

    router: int = 1
    inner: tuple[tuple[int, int], ...] = ((2, 3), (6, 7))
    outer: tuple[int, int] = (4, 5)


EXPERTS_FORM = ExpertsForm()


@dataclass(frozen=True)
class ExpertsGeometry:
    """Sizes of a node with all experts. ``fused``: how many rows of the first weight one hidden unit has;
    ``interleaved``: they are neighbors."""

    tokens: int
    experts: int
    chosen: int
    width: int
    hidden: int
    fused: int
    interleaved: bool


def experts_geometry(call: OpCall) -> ExpertsGeometry:
    """The sizes of a node with all experts. Raises Blocked where its weights do not fit each other."""
    form = EXPERTS_FORM
    data, router, first, last = (call.shape(k) for k in (0, form.router, form.inner[0][0], form.outer[0]))
    if len(first) != 3 or len(last) != 3 or first[1] not in (last[2], 2 * last[2]) or first[::2] != last[:2]:
        raise Blocked(0, SHAPE_MISMATCH)
    fused, fusion = first[1] // last[2], int(call.attrs.get("swiglu_fusion", 0))
    if first[2] != data[-1] or router[-1] != first[0] or (fused == 2) != (fusion > 0):
        raise Blocked(0, SHAPE_MISMATCH)
    tokens = int(np.prod(router[:-1], dtype=np.int64))
    return ExpertsGeometry(tokens, first[0], int(call.attrs.get("k", 1)), first[2], last[2], fused, fusion == 1)


def _data_shape(call: OpCall) -> list[Shape]:
    return [call.shape(0)]


def routing_entries() -> list[OpSpec]:
    return [
        OpSpec(
            "TopK", "choose", "positions along its axis are compared; its indices name those chosen", data=(0,),
            axes=_chosen_axis, reason=CHOSEN_BY_DATA,
        ),
        OpSpec(
            "OneHot", "one_hot", "indices that name experts: its new axis has their labels; others have none",
            recompute=_one_hot_depth,
        ),
        OpSpec(
            "NonZero", "opaque", f"pinned: {CHOSEN_BY_DATA}; of a row of OneHot: the tokens of one expert",
            reason=CHOSEN_BY_DATA, counts_data=True,
        ),
        OpSpec(
            "MoE", "experts", "experts have the router's labels, hidden units those of their weights", domain=MICROSOFT,
            out_shapes=_data_shape, reason="its experts do not fit its router or each other",
        ),
    ]  # fmt: skip
