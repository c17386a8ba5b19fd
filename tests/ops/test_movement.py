"""Labels behind operators that move positions: sizes that do not fit are refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from snpc.ops import Blocked, reshape_labels


@pytest.mark.parametrize(
    ("labels", "source", "target"),
    [
        ((1, 37), (1, 16), (4, 4)),  # labels of another tensor
        ((5,), (1, 5), (5,)),  # of another rank
        ((1, 6), (1, 6), (4, 2)),  # other products of sizes
        ((1, 6), (0, 6), (2, 3)),  # nothing, and something
        ((1, 6), (1, 6), (0, 6)),
    ],
)
def test_sizes_that_do_not_factor_are_refused(
    labels: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(Blocked):
        reshape_labels(np.arange(np.prod(labels), dtype=np.int32).reshape(labels), source, target)


@pytest.mark.parametrize(
    ("labels", "source", "target"),
    [((1, 6), (4, 6), (4, 2, 3)), ((1, 1), (0, 6), (0, 2, 3)), ((4, 6), (4, 6), (24,)), ((1, 6), (3, 6), (18,))],
)
def test_labels_are_laid_out_as_the_tensor_is(
    labels: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    given = np.arange(np.prod(labels), dtype=np.int32).reshape(labels)
    moved = reshape_labels(given, source, target)
    assert (np.broadcast_to(moved, target) == np.broadcast_to(given, source).reshape(target)).all()
