"""Points of others, for plots: a name, MACs and a score each, from CSV or JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snpc.errors import UserError

COLUMNS = ("name", "macs", "score")


@dataclass(frozen=True)
class PeerPoint:
    """A model of others. ``score``: as on the axis of the plot: per cent of a score on labels, or a perplexity."""

    name: str
    macs: float
    score: float


def read_points(path: Path) -> tuple[PeerPoint, ...]:
    """The rows of a .csv with the columns name, macs and score, or the objects of a .json list with these keys. Raises
    UserError for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: Any = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is no {'JSON' if path.suffix == '.json' else 'text in UTF-8'} ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds no points: a row of {', '.join(COLUMNS)} each")
    return tuple(points_of(rows, path))


def points_of(rows: Iterable[Mapping[str, Any]], path: Path) -> Iterable[PeerPoint]:
    for number, row in enumerate(rows, 1):
        try:
            point = PeerPoint(str(row["name"]), float(row["macs"]), float(row["score"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: point {number} must have {', '.join(COLUMNS)}, the last two of them numbers: {row}"
            ) from None
        if not (point.macs > 0 and math.isfinite(point.macs) and math.isfinite(point.score)):
            raise UserError(f"{path}: point {number} ({point.name}): MACs must be above 0, and the score finite")
        yield point
