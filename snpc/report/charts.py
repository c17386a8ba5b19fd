"""The charts of the page, as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes them as SVG.

Colors come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from snpc.report.data import BeforeAfter, GroupWidth
from snpc.report.format import format_count, format_percent, format_share

LEFT, BOTTOM, TOP = 48.0, 34.0, 10.0  # margins


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
    """A text at (x, y). ``anchor``: which end of it that is; ``vertical``: rotated to read upwards."""

    shape: ClassVar[str] = "label"
    x: float
    y: float
    text: str
    anchor: str = "start"
    vertical: bool = False


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


def axis_ticks(top: float, count: int = 4) -> list[float]:
    """0 and about ``count`` round numbers up to ``top``."""
    if top <= 0:
        return [0.0]
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    step = max(step, 1.0)
    return [k * step for k in range(int(top / step + 1e-9) + 1)]


# -- widths ----------------------------------------------------------------------------------------------------------


def widths_chart(items: Sequence[GroupWidth]) -> Chart:
    """Bar pairs over layers: units per block before and after."""
    width, height = 340.0, 180.0
    top = max(item.size for item in items)
    floor, scale = height - BOTTOM, (height - BOTTOM - TOP) / top
    shapes: list[ChartShape] = []
    for tick in axis_ticks(top):
        y = floor - tick * scale
        shapes += [Line(LEFT, y, width, y, "grid"), Label(LEFT - 5, y + 4, f"{tick:g}", "end")]
    slot = min(48.0, (width - LEFT) / len(items))
    each = slot * 0.4
    every = math.ceil(len(items) / 14)
    for k, item in enumerate(items):
        x = LEFT + k * slot + slot * 0.1
        tooltip = f"{item.id}: {item.blocks} x {item.size} before, {item.blocks} x {item.kept} after"
        shapes.append(Bar(x, floor - item.size * scale, each, item.size * scale, "before", tooltip))
        shapes.append(Bar(x + each, floor - item.kept * scale, each, item.kept * scale, "after", tooltip))
        if k % every == 0:
            shapes.append(Label(x + each, floor + 14, str(item.layer), "middle"))
    shapes.append(Line(LEFT, floor, width, floor, "axis"))
    shapes.append(Label(LEFT + min(width - LEFT, slot * len(items)) / 2, height - 4, "layer", "middle"))
    unit = "units per block" if any(item.blocks > 1 for item in items) else "units"
    shapes.append(Label(10, TOP + (floor - TOP) / 2, unit, "middle", vertical=True))
    return Chart(width, height, f"widths of {items[0].role} per layer, before and after", tuple(shapes))


# -- MACs ------------------------------------------------------------------------------------------------------------


def before_after_chart(pairs: Sequence[BeforeAfter], names: Sequence[str]) -> Chart:
    """Horizontal bar pairs, a row per name, with their numbers."""
    width, row = 340.0, 48.0
    top = max(max(p.before, p.after) for p in pairs) or 1.0
    whole = sum(p.before for p in pairs)
    shapes: list[ChartShape] = []
    for k, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        y = k * row
        shapes.append(Label(0, y + 13, name))
        for offset, number, style in ((18, pair.before, "before"), (30, pair.after, "after")):
            tooltip = f"{name}, {style}: {number:,.0f} MACs, {format_share(number, whole)} of the original's"
            length = number / top * (width - 60)
            shapes.append(Bar(0, y + offset, max(length, 1.0), 10, style, tooltip))
            shapes.append(Label(length + 6, y + offset + 9, format_count(number)))
    return Chart(width, row * len(pairs), "before and after", tuple(shapes))


# -- loss curves -----------------------------------------------------------------------------------------------------


def curve_decades(items: Sequence[GroupWidth]) -> tuple[int, int]:
    """Powers of ten that hold the curves where something is kept and something is not; four at most."""
    changes = [c for item in items for c in item.curve[1:-1] if c > 0] or [0.01]
    high = math.ceil(math.log10(max(changes)) - 1e-9)
    low = math.floor(math.log10(min(changes)))
    return max(low, high - 4) if low < high else high - 1, high


def curve_chart(item: GroupWidth, low: int, high: int) -> Chart:
    """Change of the outputs over kept units, logarithmic between 10**low and 10**high; the chosen width is marked."""
    width, height, left, bottom = 170.0, 118.0, 46.0, 18.0
    floor, right = height - bottom, width - 8

    def x_of(kept: int) -> float:
        return left + (right - left) * kept / item.size

    def y_of(change: float) -> float:
        at = (math.log10(max(change, 1e-300)) - low) / (high - low)
        return floor - (floor - 6) * min(max(at, 0.0), 1.0)

    shapes: list[ChartShape] = []
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        shapes += [Line(left, y, right, y, "grid"), Label(left - 4, y + 4, f"{100 * 10.0**power:g} %", "end")]
    points = [(x_of(k), y_of(c)) for k, c in enumerate(item.curve)][1:]
    shapes.append(Polyline(tuple(points), "curve"))
    shapes.append(Line(left, floor, right, floor, "axis"))
    shapes.append(Label(left, height - 3, "0", "middle"))
    shapes.append(Label(right, height - 3, f"{item.size} units", "end"))
    change = item.curve[item.kept]
    tooltip = f"{item.id}: {item.kept} of {item.size} kept, {format_percent(change)} change of the outputs"
    shapes.append(Dot(x_of(item.kept), y_of(change), 4, "chosen", tooltip, drop=floor))
    return Chart(width, height, f"change of the outputs over the width of {item.id}", tuple(shapes))
