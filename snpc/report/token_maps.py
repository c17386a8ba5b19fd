"""Token maps: which patches of a picture are left after each step of a token reduction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpc.errors import SnpcError
from snpc.passes import Analysis
from snpc.pipeline import file_decisions
from snpc.report.attention_maps import (
    MAX_PICTURES,
    MapsUnavailable,
    find_pictures,
    first_samples,
    patch_grid,
    to_pixels,
)
from snpc.report.png import PixelArray
from snpc.runtime.calibration import Calibration
from snpc.tokens import TokenReductionPlan, token_membership

DROPPED_BRIGHTNESS = 0.12  # brightness of a patch that was dropped


@dataclass(frozen=True)
class TokenStage:
    """The tokens after ``block``. ``shares``, rows of the grid of patches: 0 where the patch was dropped, 1/k where it
    is one of k patches in the same token."""

    block: int
    tokens_left: int
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TokenPicture:
    """A calibration picture, [height, width] of (red, green, blue), and its stages."""

    pixels: tuple[tuple[tuple[int, int, int], ...], ...]
    stages: tuple[TokenStage, ...]

    def shade_dropped_patches(self, stage: TokenStage) -> PixelArray:
        """[height, width, 3]: the picture, a patch the darker the less of it is left."""
        pixels, shares = np.array(self.pixels, np.float64), np.array(stage.shares)
        rows, columns = (np.arange(n) * m // n for n, m in zip(pixels.shape[:2], shares.shape, strict=True))
        light = DROPPED_BRIGHTNESS + (1 - DROPPED_BRIGHTNESS) * np.sqrt(shares[np.ix_(rows, columns)])
        shaded: PixelArray = np.round(pixels * light[:, :, None]).astype(np.uint8)
        return shaded


@dataclass(frozen=True)
class TokenMaps:
    """``pictures`` is empty where there is nothing to show, and ``reason`` says why ("": no tokens were reduced)."""

    tokens: int = 0
    pictures: tuple[TokenPicture, ...] = ()
    reason: str = ""


def token_maps(analysis: Analysis, path: Path, calibration: Calibration | None) -> TokenMaps:
    """The token decisions of the written file for the first calibration pictures. ``analysis``: with fewer tokens."""
    reduction = analysis.reduction
    if not isinstance(reduction, TokenReductionPlan):
        return TokenMaps()
    count = reduction.steps[0].point.count
    try:
        return TokenMaps(count, compute_token_maps(analysis, reduction, path, calibration))
    except (MapsUnavailable, SnpcError) as error:
        return TokenMaps(count, reason=str(error))


def compute_token_maps(
    analysis: Analysis, reduction: TokenReductionPlan, path: Path, calibration: Calibration | None
) -> tuple[TokenPicture, ...]:
    """The pictures with their patches after each step. MapsUnavailable: no pictures, or no grid of patches."""
    if calibration is None:
        raise MapsUnavailable("there is no calibration data to show pictures of")
    feeds = first_samples(analysis, calibration)
    pictures = find_pictures(feeds)
    steps = reduction.steps
    layout = patch_grid(steps[0].point.count, pictures.shape[1:3])
    if layout is None:
        raise MapsUnavailable("the tokens are not a grid of patches")
    prefix, grid = layout
    (decisions,) = file_decisions(path, reduction.decisions, [feeds])
    stages: list[list[TokenStage]] = [[] for _ in range(min(MAX_PICTURES, len(pictures)))]
    for step, members in zip(steps, token_membership(steps, decisions, steps[0].point.count), strict=True):
        shares = (members / np.maximum(members.sum(2, keepdims=True), 1)).max(1)[:, prefix:]
        for k, own in enumerate(stages):
            rows = shares[k].reshape(grid).tolist()
            own.append(TokenStage(step.point.block, step.remaining, tuple(map(tuple, rows))))
    return tuple(TokenPicture(to_pixels(p), tuple(own)) for p, own in zip(pictures, stages, strict=False))
