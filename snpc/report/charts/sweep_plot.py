"""Quality against latency: the plot of a sweep, an SVG file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from snpc.pipeline import SweepPoint, SweepResult
from snpc.report.charts.shapes import Chart, ChartShape, Dot, Label, Line, Polyline
from snpc.report.quality_text import TASK_METRIC_TEXTS
from snpc.report.render import render_template
from snpc.runtime.io import atomic_write

PLOT_WIDTH, PLOT_HEIGHT = 640.0, 400.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 70.0, 90.0, 36.0, 48.0


def sweep_plot(sweep: SweepResult) -> str:
    """An SVG document: points on the Pareto front are filled and joined, the others are rings."""
    return render_template("sweep_plot.svg.j2", chart=sweep_chart(sweep))


def write_sweep_plot(sweep: SweepResult, path: Path) -> None:
    """Write the plot to ``path``. Raises UserError where that cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(sweep_plot(sweep), encoding="utf-8")


def sweep_chart(sweep: SweepResult) -> Chart:
    """Quality over latency, with grid, axes and a point for each size."""
    points = sweep.points
    qualities = [quality_of(point) for point in points]
    latencies = [0.0, *(p.latency for p in points)]
    left, right, floor = MARGIN_LEFT, PLOT_WIDTH - MARGIN_RIGHT, PLOT_HEIGHT - MARGIN_BOTTOM
    x_of, y_of = linear_scale(latencies, left, right), linear_scale(qualities, floor, MARGIN_TOP)
    shapes: list[ChartShape] = []
    for tick in even_ticks(min(qualities), max(qualities)):
        shapes.append(Line(left, y_of(tick), right, y_of(tick), "grid"))
        shapes.append(Label(left - 6, y_of(tick) + 4, f"{100 * tick:.1f} %", "end"))
    for tick in even_ticks(0.0, max(latencies)):
        shapes.append(Label(x_of(tick), floor + 18, f"{tick:.3g}", "middle"))
    shapes.append(Line(left, floor, right, floor, "axis"))
    shapes.append(Label((left + right) / 2, PLOT_HEIGHT - 10, f"latency, ms, batch {sweep.batch}", "middle"))
    score = TASK_METRIC_TEXTS.get(sweep.metric, sweep.metric)
    quality = score if points[0].accuracy is not None else "closeness to the original (1 - relative drift)"
    shapes.append(Label(left, 18, f"{sweep.model.name}: {quality}"))
    front = sorted((p for p in points if p.front), key=lambda p: p.latency)
    shapes.append(Polyline(tuple((x_of(p.latency), y_of(quality_of(p))) for p in front), "step"))
    for point in points:
        shapes += plot_point(point, x_of(point.latency), y_of(quality_of(point)))
    return Chart(PLOT_WIDTH, PLOT_HEIGHT, "quality against latency", tuple(shapes))


def quality_of(point: SweepPoint) -> float:
    """Accuracy where it is known, else how close the outputs are to the original."""
    return point.accuracy if point.accuracy is not None else max(0.0, 1.0 - point.drift)


def plot_point(point: SweepPoint, x: float, y: float) -> tuple[ChartShape, ...]:
    """A dot with a tooltip, and its label."""
    name = f"{point.name}, tokens {point.tokens}" if point.tokens else point.name
    tooltip = f"{name}: {100 * quality_of(point):.2f} %, {point.latency:.3g} ms, {point.speedup:.2f} x"
    return Dot(x, y, 5, "front" if point.front else "beaten", tooltip), Label(x + 9, y + 4, point.name)


def linear_scale(numbers: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Maps the least of ``numbers`` to pixel ``first`` and the largest to ``last``."""
    low = min(numbers)
    span = (max(numbers) - low) or 1.0
    return lambda number: first + (number - low) / span * (last - first)


def even_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """``count`` evenly spaced numbers; one where there is no span."""
    return [low + (high - low) * k / (count - 1) for k in range(count)] if high > low else [low]
