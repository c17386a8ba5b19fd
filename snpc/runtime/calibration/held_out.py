"""Samples that are held out: nothing is fitted to them, so that the quality of a result can be measured on them.

Samples of a file are drawn by one permutation that the seed decides: those that are fitted to from its head, those that
are held out from its tail. Commands that are given the same data and seed therefore hold the same samples out, however
many samples each of them uses.
"""

from __future__ import annotations

import numpy as np

from snpc.types import BoolArray, IntArray

MAX_HELD_OUT = 64  # more samples make the measured quality hardly more certain, and cost time
HELD_OUT_SHARE = 0.1  # of all samples, where fewer are left over
MIN_HELD_OUT = 4
MIN_TO_SPLIT = 16  # of fewer samples none is taken away from what is fitted to
PER_FITTED = 4  # held-out samples per fitted one, at most: who asks for few samples wants a short run


def count_left_over(asked: int, limit: int) -> int:
    """How many samples beyond those ``asked`` for are of use."""
    return min(limit, PER_FITTED * asked)


def count_held_out(asked: int, total: int, limit: int, batch: int | None) -> int:
    """How many of ``total`` samples are held out where ``asked`` samples are to be fitted to.

    Those that are left over, at most ``limit``. Where fewer than a tenth of the samples are left over, a tenth of them,
    but at least four, if there are 16 samples or more. ``batch``: the batch size that the model fixes; the number is a
    multiple of it, and at most a quarter of the samples is taken away from those that are fitted to.
    """
    left_over = max(total - asked, 0)
    count = min(left_over, count_left_over(asked, limit))
    if total >= MIN_TO_SPLIT:
        least = max(MIN_HELD_OUT, round(HELD_OUT_SHARE * min(asked, total)))
        count = max(count, min(least, limit))
    if batch is None:
        return count
    whole = -(-count // batch) * batch
    whole = min(whole, limit // batch * batch or whole)
    return whole if whole - left_over <= total // 4 else left_over // batch * batch


def split_samples(asked: int, total: int, held_out: int, seed: int) -> tuple[BoolArray, BoolArray]:
    """([total]: fitted to, [total]: held out), drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(total)
    return marked(order[: min(asked, total - held_out)], total), marked(order[total - held_out :], total)


def split_in_order(asked: int, total: int, held_out: int) -> tuple[BoolArray, BoolArray]:
    """The same for a source of unknown length: the first samples, and those that follow."""
    order = np.arange(total)
    return marked(order[:asked], total), marked(order[asked : asked + held_out], total)


def marked(indices: IntArray, total: int) -> BoolArray:
    flags = np.zeros(total, bool)
    flags[indices] = True
    return flags
