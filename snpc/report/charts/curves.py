"""Loss curves: what each width of a group costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from snpc.report.charts.shapes import Chart, ChartShape, Dot, Label, Line, Polyline
from snpc.report.data import GroupWidth
from snpc.report.format import format_percent


def curve_decades(items: Sequence[GroupWidth]) -> tuple[int, int]:
    """Powers of ten that hold the curves where something is kept and something is not; four at most."""
    changes = [c for item in items for c in item.curve[1:-1] if c > 0] or [0.01]
    high = math.ceil(math.log10(max(changes)) - 1e-9)
    low = math.floor(math.log10(min(changes)))
    return max(low, high - 4) if low < high else high - 1, high


def curve_chart(item: GroupWidth, low: int, high: int) -> Chart:
    """Change of the outputs over kept units, logarithmic between 10**low and 10**high; the chosen width is marked."""
    kept = item.kept[0] or 0
    width, height, left, bottom = 170.0, 118.0, 46.0, 18.0
    floor, right = height - bottom, width - 8

    def x_of(units: int) -> float:
        return left + (right - left) * units / item.size

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
    change = item.curve[kept]
    tooltip = f"{item.id}: {kept} of {item.size} kept, {format_percent(change)} change of the outputs"
    shapes.append(Dot(x_of(kept), y_of(change), 4, "chosen", tooltip, drop=floor))
    return Chart(width, height, f"change of the outputs over the width of {item.id}", tuple(shapes))
