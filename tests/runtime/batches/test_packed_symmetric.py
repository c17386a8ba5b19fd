"""Packed symmetric sums: what is not kept can be had back, and the graph packs as this says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpc.runtime.batches import packed_symmetric as triangle
from snpc.runtime.batches.packed_symmetric import packed_length, row_strips, unpack_symmetric, unpacked_size
from tests.closed_forms import prunable_of, random_feeds, statistics_of
from tests.oracle import analysis_of


@given(st.integers(1, 1300))
def test_the_size_is_known_from_the_length(size: int) -> None:
    assert unpacked_size(packed_length(size)) == size
    assert [row for start, stop in row_strips(size) for row in range(start, stop)] == list(range(size))


def test_other_lengths_are_of_nothing() -> None:
    lengths = {packed_length(size) for size in range(1, 40)}
    assert [unpacked_size(n) is not None for n in range(1, 1000)] == [n in lengths for n in range(1, 1000)]


@pytest.mark.parametrize("strip", [1, 4, 5, 100])
def test_strips_of_any_height_hold_the_whole(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in the graph in several strips, and in one."""
    group = next(g for g in prunable_of(analysis_of("vit_timm__ts17")) if g.role == "ffn")
    feeds = random_feeds("vit_timm__ts17", 3)
    (one,) = statistics_of("vit_timm__ts17", feeds, 3).sums[group.id].values()
    whole = unpack_symmetric(one)
    assert whole.shape == (group.size + 1,) * 2
    monkeypatch.setattr(triangle, "STRIP_ROWS", strip)
    (found,) = statistics_of("vit_timm__ts17", feeds, 3).sums[group.id].values()
    assert len(found) == packed_length(group.size + 1) and (strip == 100 or len(found) < len(one))
    np.testing.assert_allclose(unpack_symmetric(found), whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max())
    np.testing.assert_array_equal(unpack_symmetric(found), unpack_symmetric(found).T)
