"""Which patches of a picture are left at each stage of a token reduction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snpc.errors import SnpcError
from snpc.pipeline.prune import Pruned
from snpc.pipeline.token_decisions import decisions
from snpc.report.attention_maps import PICTURES, NoMaps, as_pixels, first_samples, grid_of, pictures_in
from snpc.report.png import Bytes
from snpc.runtime.calibration import Calibration
from snpc.tokens.inplace_oracle import members
from snpc.tokens.reduction import Reduction

LEAST = 0.12  # brightness of a patch that is gone


@dataclass(frozen=True)
class Stage:
    """Behind ``block`` there are ``left`` tokens. ``shares``, rows of the grid of patches: 0 where the patch was
    dropped, 1/k where it is one of k in the same token."""

    block: int
    left: int
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Survivor:
    """A calibration picture, [height, width] of (red, green, blue), and its stages."""

    pixels: tuple[tuple[tuple[int, int, int], ...], ...]
    stages: tuple[Stage, ...]

    def shaded(self, stage: Stage) -> Bytes:
        """[height, width, 3]: the picture, the darker the less of a patch is left."""
        pixels, shares = np.array(self.pixels, np.float64), np.array(stage.shares)
        rows, columns = (np.arange(n) * m // n for n, m in zip(pixels.shape[:2], shares.shape, strict=True))
        light = LEAST + (1 - LEAST) * np.sqrt(shares[np.ix_(rows, columns)])
        found: Bytes = np.round(pixels * light[:, :, None]).astype(np.uint8)
        return found


@dataclass(frozen=True)
class Survivors:
    """``pictures`` is empty where there is nothing to show, and ``reason`` then says why ("": tokens are as before)."""

    tokens: int = 0
    pictures: tuple[Survivor, ...] = ()
    reason: str = ""


def survivors(result: Pruned, calibration: Calibration | None) -> Survivors:
    """What the written file decides for the first calibration pictures."""
    reduction = result.plan.analysis.reduction
    if not isinstance(reduction, Reduction):
        return Survivors()
    count = reduction.steps[0].point.count
    try:
        return Survivors(count, found_survivors(result, reduction, calibration))
    except (NoMaps, SnpcError) as error:
        return Survivors(count, reason=str(error))


def found_survivors(result: Pruned, reduction: Reduction, calibration: Calibration | None) -> tuple[Survivor, ...]:
    if calibration is None:
        raise NoMaps("there is no calibration data to show pictures of")
    feeds = first_samples(result.plan.analysis, calibration)
    pictures = pictures_in(feeds)
    steps = reduction.steps
    where = grid_of(steps[0].point.count, pictures.shape[1:3])
    if where is None:
        raise NoMaps("the tokens are not a grid of patches")
    prefix, grid = where
    (decided,) = decisions(result.path, reduction.decisions, [feeds], "cpu")
    stages: list[list[Stage]] = [[] for _ in range(min(PICTURES, len(pictures)))]
    for step, holds in zip(steps, members(steps, decided, steps[0].point.count), strict=True):
        shares = (holds / np.maximum(holds.sum(2, keepdims=True), 1)).max(1)[:, prefix:]
        for k, mine in enumerate(stages):
            rows = shares[k].reshape(grid).tolist()
            mine.append(Stage(step.point.block, step.left, tuple(map(tuple, rows))))
    return tuple(Survivor(as_pixels(p), tuple(own)) for p, own in zip(pictures, stages, strict=False))
