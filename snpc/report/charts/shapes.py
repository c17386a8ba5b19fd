"""Charts as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes them as SVG.

Colors come from a style sheet, by class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Line:
    """A straight line of class ``style``."""

    shape: ClassVar[str] = "line"
    x1: float
    y1: float
    x2: float
    y2: float
    style: str


@dataclass(frozen=True)
class Label:
    """A text of class ``style`` at (x, y). ``anchor``: which end of it that is."""

    shape: ClassVar[str] = "label"
    x: float
    y: float
    text: str
    anchor: str = "start"
    style: str = ""

    def moved(self, x: float, y: float) -> Label:
        return replace(self, x=self.x + x, y=self.y + y)


@dataclass(frozen=True)
class Bar:
    """A rectangle of class ``style`` that shows ``tooltip``."""

    shape: ClassVar[str] = "bar"
    x: float
    y: float
    width: float
    height: float
    style: str
    tooltip: str

    def moved(self, x: float, y: float) -> Bar:
        return replace(self, x=self.x + x, y=self.y + y)


@dataclass(frozen=True)
class Polyline:
    """Straight lines from point to point."""

    shape: ClassVar[str] = "polyline"
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True)
class Dot:
    """A circle; ``drop``: with a line down to this y."""

    shape: ClassVar[str] = "dot"
    x: float
    y: float
    radius: int
    style: str
    tooltip: str
    drop: float | None = None


ChartShape = Line | Label | Bar | Polyline | Dot


@dataclass(frozen=True)
class Chart:
    """``label`` says to a screen reader what is drawn."""

    width: float
    height: float
    label: str
    shapes: tuple[ChartShape, ...]
