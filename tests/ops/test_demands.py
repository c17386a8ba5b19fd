"""What nodes demand of sizes, and which demands are not met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from snpc.ops import OpCall, SizeDemand, lookup
from snpc.ops.demands import unmet_demands
from snpc.types import AnyArray, Shape

CASES: list[tuple[str, dict[str, Any], list[Shape], AnyArray | None, set[SizeDemand]]] = [
    ("Add", {}, [(2, 11, 4), (20, 1)], None, {SizeDemand("equal", 11, 20)}),
    ("Add", {}, [(2, 11, 4), (11, 4)], None, set()),
    ("Concat", {"axis": 1}, [(2, 5, 3), (2, 7, 4)], None, {SizeDemand("equal", 3, 4)}),
    ("MatMul", {}, [(2, 3, 5, 8), (2, 3, 9, 4)], None, {SizeDemand("equal", 8, 9)}),
    ("MatMul", {}, [(3, 5, 8), (8, 4)], None, set()),
    ("Gather", {"axis": 1}, [(2, 11), (20,)], np.arange(20), {SizeDemand("at least", 11, 20)}),
    ("Gather", {"axis": 1}, [(2, 11), (2,)], np.array([-11, 10]), set()),
    ("GatherND", {"batch_dims": 1}, [(2, 11), (2, 4, 1)], np.full((2, 4, 1), 13), {SizeDemand("at least", 11, 14)}),
    ("Reshape", {}, [(2, 7, 6), (4,)], np.array([2, -1, 4, 6]), {SizeDemand("multiple", 2, 8),
        SizeDemand("multiple", 7, 4), SizeDemand("multiple", 6, 24)}),
    ("Reshape", {}, [(2, 8, 6), (4,)], np.array([0, -1, 4, 6]), set()),
    ("Expand", {}, [(2, 7, 1), (3,)], np.array([2, 9, 5]), {SizeDemand("equal", 7, 9)}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attrs", "shapes", "second", "expected"), CASES)
def test_unmet_demands(
    op: str, attrs: dict[str, Any], shapes: list[Shape], second: AnyArray | None, expected: set[SizeDemand]
) -> None:
    call = OpCall(op, 17, attrs, tuple(shapes), (None, second), ())
    assert set(unmet_demands(lookup("", op), call)) == expected


def test_a_fixed_length_is_named() -> None:
    call = OpCall("Reshape", 17, {}, ((7, 2, 48), (3,)), (None, np.array([9, 6, 16])), ())
    assert SizeDemand("equal", 7, 9) in unmet_demands(lookup("", "Reshape"), call)
