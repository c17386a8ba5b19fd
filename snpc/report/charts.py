"""The charts. Colours come from the page's style, by class; sizes are in CSS pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from snpc.report.data import BeforeAfter, GroupWidth
from snpc.report.format import format_count, format_share
from snpc.report.markup import Element, make_element

LEFT, BOTTOM, TOP = 48.0, 34.0, 10.0


def svg_canvas(width: float, height: float, label: str) -> Element:
    attributes = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}", "role": "img"}
    return make_element("svg", {**attributes, "aria-label": label})


def svg_text(x: float, y: float, text: str, anchor: str = "start", turn: bool = False) -> Element:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    if turn:
        attributes["transform"] = f"rotate(-90 {x:.1f} {y:.1f})"
    return make_element("text", attributes, text)


def svg_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return make_element("line", {**{k: f"{v:.1f}" for k, v in ends.items()}, "class": kind})


def svg_bar(x: float, y: float, width: float, height: float, kind: str, tip: str) -> Element:
    sides = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0)}
    return make_element(
        "rect", {**{k: f"{v:.1f}" for k, v in sides.items()}, "class": kind}, make_element("title", None, tip)
    )


def axis_ticks(top: float, wanted: int = 4) -> list[float]:
    """0 and round numbers up to ``top``."""
    if top <= 0:
        return [0.0]
    rough = top / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    step = max(step, 1.0)
    return [k * step for k in range(int(top / step + 1e-9) + 1)]


# -- widths ----------------------------------------------------------------------------------------------------------


def widths_chart(items: Sequence[GroupWidth]) -> Element:
    """Bar pairs over layers: units per block before and after."""
    width, height = 340.0, 180.0
    top = max(item.size for item in items)
    made = svg_canvas(width, height, f"widths of {items[0].role} per layer, before and after")
    floor, scale = height - BOTTOM, (height - BOTTOM - TOP) / top
    for tick in axis_ticks(top):
        y = floor - tick * scale
        made.append(svg_line(LEFT, y, width, y, "grid"))
        made.append(svg_text(LEFT - 5, y + 4, f"{tick:g}", "end"))
    slot = min(48.0, (width - LEFT) / len(items))
    each = slot * 0.4
    every = math.ceil(len(items) / 14)
    for k, item in enumerate(items):
        x = LEFT + k * slot + slot * 0.1
        tip = f"{item.id}: {item.blocks} x {item.size} before, {item.blocks} x {item.kept} after"
        made.append(svg_bar(x, floor - item.size * scale, each, item.size * scale, "before", tip))
        made.append(svg_bar(x + each, floor - item.kept * scale, each, item.kept * scale, "after", tip))
        if k % every == 0:
            made.append(svg_text(x + each, floor + 14, str(item.layer), "middle"))
    made.append(svg_line(LEFT, floor, width, floor, "axis"))
    made.append(svg_text(LEFT + min(width - LEFT, slot * len(items)) / 2, height - 4, "layer", "middle"))
    unit = "units per block" if any(item.blocks > 1 for item in items) else "units"
    made.append(svg_text(10, TOP + (floor - TOP) / 2, unit, "middle", turn=True))
    return made


# -- MACs ------------------------------------------------------------------------------------------------------------


def before_after_chart(pairs: Sequence[BeforeAfter], names: Sequence[str]) -> Element:
    """Horizontal bar pairs, a row per name, with their numbers."""
    width, row = 340.0, 48.0
    made = svg_canvas(width, row * len(pairs), "before and after")
    top = max(max(p.before, p.after) for p in pairs) or 1.0
    whole = sum(p.before for p in pairs)
    for k, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        y = k * row
        made.append(svg_text(0, y + 13, name))
        for offset, number, kind in ((18, pair.before, "before"), (30, pair.after, "after")):
            tip = f"{name}, {kind}: {number:,.0f} MACs, {format_share(number, whole)} of the original's"
            length = number / top * (width - 60)
            made.append(svg_bar(0, y + offset, max(length, 1.0), 10, kind, tip))
            made.append(svg_text(length + 6, y + offset + 9, format_count(number)))
    return made


# -- loss curves -----------------------------------------------------------------------------------------------------


def curve_decades(items: Sequence[GroupWidth]) -> tuple[int, int]:
    """Powers of ten that hold the curves where something is kept and something is not; four at most."""
    found = [c for item in items for c in item.curve[1:-1] if c > 0] or [0.01]
    high = math.ceil(math.log10(max(found)) - 1e-9)
    low = math.floor(math.log10(min(found)))
    return max(low, high - 4) if low < high else high - 1, high


def curve_chart(item: GroupWidth, low: int, high: int) -> Element:
    """Change of the outputs over kept units, logarithmic between 10**low and 10**high; the chosen width is marked."""
    width, height, left, bottom = 170.0, 118.0, 46.0, 18.0
    made = svg_canvas(width, height, f"change of the outputs over the width of {item.id}")
    floor, right = height - bottom, width - 8

    def x_of(kept: int) -> float:
        return left + (right - left) * kept / item.size

    def y_of(change: float) -> float:
        at = (math.log10(max(change, 1e-300)) - low) / (high - low)
        return floor - (floor - 6) * min(max(at, 0.0), 1.0)

    for power in range(low, high + 1):
        y = y_of(10.0**power)
        made.append(svg_line(left, y, right, y, "grid"))
        made.append(svg_text(left - 4, y + 4, f"{100 * 10.0**power:g} %", "end"))
    points = [(x_of(k), y_of(c)) for k, c in enumerate(item.curve)][1:]
    made.append(make_element("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": "curve"}))
    made.append(svg_line(left, floor, right, floor, "axis"))
    made.append(svg_text(left, height - 3, "0", "middle"))
    made.append(svg_text(right, height - 3, f"{item.size} units", "end"))
    made.append(chosen_width_mark(item, x_of(item.kept), y_of(item.curve[item.kept]), floor))
    return made


def chosen_width_mark(item: GroupWidth, x: float, y: float, floor: float) -> Element:
    tip = f"{item.id}: {item.kept} of {item.size} kept, {format_percent(item.curve[item.kept])} change of the outputs"
    dot = make_element("circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4", "class": "chosen"})
    return make_element("g", None, svg_line(x, y, x, floor, "drop"), dot, make_element("title", None, tip))


def format_percent(ratio: float) -> str:
    """Three digits, and no more zeros than a reader can take in."""
    return f"{100 * ratio:.3g} %" if ratio == 0 or ratio >= 1e-6 else "under 0.0001 %"
