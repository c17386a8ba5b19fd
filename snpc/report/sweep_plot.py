"""Quality against latency: the plot of a sweep, an SVG of its own."""

from __future__ import annotations

from xml.etree import ElementTree

from snpc.pipeline.sweep import SweepPoint, SweepResult
from snpc.report.charts import svg_canvas, svg_line, svg_text
from snpc.report.markup import Element, make_element

WIDTH, HEIGHT = 640.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 70.0, 90.0, 36.0, 48.0
PLOT_STYLE = (
    "text { font: 13px sans-serif; fill: #222 } .grid { stroke: #ddd } .axis { stroke: #444 } "
    ".front { fill: #1668b0 } .beaten { fill: none; stroke: #888; stroke-width: 1.5 } "
    ".step { fill: none; stroke: #1668b0; stroke-dasharray: 4 3 } svg { background: #fff }"
)


def sweep_plot(sweep: SweepResult) -> str:
    """An SVG document: points on the front are filled and joined, the others are rings."""
    made = svg_canvas(WIDTH, HEIGHT, "quality against latency")
    made.set("xmlns", "http://www.w3.org/2000/svg")
    made.append(make_element("style", None, PLOT_STYLE))
    points = sweep.points
    known = points[0].accuracy is not None
    title = "accuracy" if known else "closeness to the original (1 - relative drift)"
    heights = [quality_of(point) for point in points]
    x_of = linear_scale([0.0, *(p.latency for p in points)], LEFT, WIDTH - RIGHT)
    y_of = linear_scale(heights, HEIGHT - BOTTOM, TOP)
    for tick in even_ticks(min(heights), max(heights)):
        made.append(svg_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "grid"))
        made.append(svg_text(LEFT - 6, y_of(tick) + 4, f"{100 * tick:.1f} %", "end"))
    top = max(p.latency for p in points)
    for tick in even_ticks(0.0, top):
        made.append(svg_text(x_of(tick), HEIGHT - BOTTOM + 18, f"{tick:.3g}", "middle"))
    made.append(svg_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    made.append(svg_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, f"latency, ms, batch {sweep.batch}", "middle"))
    made.append(svg_text(LEFT, 18, f"{sweep.model.name}: {title}"))
    joined = sorted((p for p in points if p.front), key=lambda p: p.latency)
    path = " ".join(f"{x_of(p.latency):.1f},{y_of(quality_of(p)):.1f}" for p in joined)
    made.append(make_element("polyline", {"points": path, "class": "step"}))
    for point in points:
        made.extend(plot_point(point, x_of(point.latency), y_of(quality_of(point))))
    text: str = ElementTree.tostring(made, encoding="unicode")
    return text + "\n"


def quality_of(point: SweepPoint) -> float:
    return point.accuracy if point.accuracy is not None else max(0.0, 1.0 - point.drift)


def plot_point(point: SweepPoint, x: float, y: float) -> list[Element]:
    kind = "front" if point.front else "beaten"
    name = f"{point.name}, tokens {point.tokens}" if point.tokens else point.name
    tip = f"{name}: {100 * quality_of(point):.2f} %, {point.latency:.3g} ms, {point.speedup:.2f} x"
    dot = make_element(
        "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5", "class": kind}, make_element("title", None, tip)
    )
    return [dot, svg_text(x + 9, y + 4, point.name)]


class LinearScale:
    """Numbers from ``low`` to ``high`` to pixels from ``first`` to ``last``."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.span = low, (high - low) or 1.0
        self.first, self.length = first, last - first

    def __call__(self, number: float) -> float:
        return self.first + (number - self.low) / self.span * self.length


def linear_scale(numbers: list[float], first: float, last: float) -> LinearScale:
    return LinearScale(min(numbers), max(numbers), first, last)


def even_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """``count`` evenly spaced numbers; one where there is no span."""
    return [low + (high - low) * k / (count - 1) for k in range(count)] if high > low else [low]
