"""Slicing equals masking: for every group of every export, alone and all at once, by running both graphs."""

from __future__ import annotations

import zlib

import numpy as np
import onnx
import pytest
from exports import EXPORTS, export
from oracle import TOLERANCE, Feeds, analysis_of, cut, feeds_of, prunable, random_cuts, relative_error, run

NAMES = list(EXPORTS)
DYNAMIC = [name for name in NAMES if EXPORTS[name].dynamic]
RATIOS = {"qk": 0.5, "vo": 0.34, "ffn": 0.6, "conv": 0.5, "residual": 0.25, "head": 0.3}


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def changes_something(original: list[np.ndarray], masked: list[np.ndarray]) -> bool:
    """The oracle is not the original: a cut that removes nothing would pass every comparison."""
    return relative_error(original, masked) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_each_group_alone(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    original = run(export(name), feeds)
    groups = prunable(analysis.groups)
    assert groups
    wrong = []
    for group in groups:
        pair = cut(analysis, random_cuts([group], seed_of(name + group.id)))
        masked = run(pair.masked, feeds)
        error = relative_error(masked, run(pair.sliced, feeds))
        if error > TOLERANCE:
            wrong.append(f"{group.id}: sliced is {error:.1e} off the mask")
        if not changes_something(original, masked):
            wrong.append(f"{group.id}: the mask silences nothing")
    assert not wrong, "\n".join(wrong)
