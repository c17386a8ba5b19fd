"""Routing of tokens to experts: positions that are chosen along an axis, and one-hot rows of them."""

from __future__ import annotations

import numpy as np

from snpc.ops.spec import OpCall, OpSpec, ParameterUpdate, TensorCut

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
    ]  # fmt: skip
