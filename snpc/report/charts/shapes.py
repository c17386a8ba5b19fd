"""Charts as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes them as SVG.

Colors come from a style sheet, by class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

PlacedT = TypeVar("PlacedT", bound="PlacedShape")


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
class PlacedShape:
    """A shape at (x, y)."""

    x: float
    y: float

    def moved(self: PlacedT, x: float, y: float) -> PlacedT:
        return replace(self, x=self.x + x, y=self.y + y)


@dataclass(frozen=True)
class Label(PlacedShape):
    """A text of class ``style`` at (x, y). ``anchor``: which end of it that is."""

    shape: ClassVar[str] = "label"
    text: str
    anchor: str = "start"
    style: str = ""


@dataclass(frozen=True)
class Bar(PlacedShape):
    """A rectangle of class ``style`` that shows ``tooltip``."""

    shape: ClassVar[str] = "bar"
    width: float
    height: float
    style: str
    tooltip: str


@dataclass(frozen=True)
class Polyline:
    """Straight lines from point to point."""

    shape: ClassVar[str] = "polyline"
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True)
class Dot(PlacedShape):
    """A circle; ``drop``: with a line down to this y."""

    shape: ClassVar[str] = "dot"
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
