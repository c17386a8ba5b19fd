"""The plot of a sweep: quality against MACs, and against latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snpc.errors import UserError
from snpc.pipeline import SweepPoint, SweepResult
from snpc.report.charts.pictures import write_picture
from snpc.report.charts.points import PeerPoint
from snpc.report.charts.shapes import Chart, ChartShape, Dot, Label, Line, Polyline
from snpc.report.format import format_count
from snpc.report.quality_text import TASK_METRIC_TEXTS

PANEL_WIDTH, PLOT_HEIGHT = 440.0, 420.0
LETTER_WIDTH = 7.0  # of a label, on average
Box = tuple[float, float, float, float]
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 66.0, 70.0, 64.0, 48.0


@dataclass(frozen=True)
class QualityAxis:
    """What is plotted upwards. ``value``: of a point, the higher the better; ``text``: of a value, as it is read."""

    name: str
    value: Callable[[SweepPoint], float]
    text: Callable[[float], str]
    sign: float = 1.0


@dataclass(frozen=True)
class PlottedPoint:
    """A dot of class ``style`` at (x, y) in units of the axes."""

    name: str
    x: float
    y: float
    style: str
    tooltip: str
    front: bool = False


def write_sweep_plot(sweep: SweepResult, path: Path, peers: Sequence[PeerPoint] = ()) -> None:
    """Write the plot as .svg or .png. ``peers``: models of others, beside the MACs. Raises UserError where the plot
    cannot be written, and for peers where there is no score to put them beside."""
    write_picture(sweep_chart(sweep, peers), path)


def sweep_chart(sweep: SweepResult, peers: Sequence[PeerPoint] = ()) -> Chart:
    """Two panels with a point for each size: the front is filled and joined, the original is a thick ring."""
    axis = quality_axis(sweep)
    if peers and sweep.points[0].accuracy is None and sweep.points[0].perplexity is None:
        raise UserError("points of others have scores: sweep with --eval DATA --labels NAME to put yours beside them")
    theirs = [
        PlottedPoint(
            p.name,
            p.macs,
            axis.sign * p.score,
            "peer",
            f"{p.name}: {axis.text(axis.sign * p.score)}, {format_count(p.macs)} MACs",
        )
        for p in peers
    ]
    dense = sweep.points[0]
    by_macs = mark_front([plotted(p, float(p.macs), axis, p is dense) for p in sweep.points])
    by_latency = [plotted(p, p.latency, axis, p is dense) for p in sweep.points]
    values = [p.y for p in (*by_macs, *theirs)]
    title = Label(MARGIN_LEFT, 20, f"{sweep.model.name}: {axis.name}", style="title")
    shapes: list[ChartShape] = [title, *legend(bool(peers))]
    latency = f"latency, ms, batch {sweep.batch}"
    shapes += panel([*by_macs, *theirs], values, axis, ("MACs", format_count), 0.0)
    shapes += panel(by_latency, values, axis, (latency, "{:.3g}".format), PANEL_WIDTH)
    return Chart(2 * PANEL_WIDTH, PLOT_HEIGHT, "quality against MACs and against latency", tuple(shapes))


def quality_axis(sweep: SweepResult) -> QualityAxis:
    """The score on labels where it is known, else the perplexity, else how close the outputs are to the original's."""
    dense = sweep.points[0]
    if dense.accuracy is not None:
        name = TASK_METRIC_TEXTS.get(sweep.metric, sweep.metric)
        return QualityAxis(f"{name}, %", lambda point: 100 * (point.accuracy or 0.0), "{:.4g}".format)
    if dense.perplexity is not None:
        return QualityAxis("perplexity, the lower the better", lambda point: -(point.perplexity or 0.0),
                           lambda value: f"{-value:.4g}", -1.0)  # fmt: skip
    closeness = "closeness to the original (1 - relative drift), %"
    return QualityAxis(closeness, lambda point: 100 * max(0.0, 1 - point.drift), "{:.4g}".format)


def plotted(point: SweepPoint, x: float, axis: QualityAxis, dense: bool) -> PlottedPoint:
    """A size of the sweep at ``x``."""
    style = "dense" if dense else "front" if point.front else "beaten"
    name = f"{point.name}, tokens {point.tokens}" if point.tokens else point.name
    y = axis.value(point)
    numbers = f"{format_count(point.macs)} MACs, {point.latency:.3g} ms, {point.speedup:.2f} x"
    return PlottedPoint(point.name, x, y, style, f"{name}: {axis.text(y)}, {numbers}", point.front)


def mark_front(points: Sequence[PlottedPoint]) -> list[PlottedPoint]:
    """The points with ``front`` where no other has at most as many MACs and at least its quality, and more of one. MACs
    are exact, so that the noise of the timing does not matter here."""

    def is_beaten(a: PlottedPoint) -> bool:
        return any(b.x <= a.x and b.y >= a.y and (b.x, b.y) != (a.x, a.y) for b in points)

    marked = []
    for point in points:
        front = not is_beaten(point)
        style = point.style if point.style == "dense" else "front" if front else "beaten"
        marked.append(replace(point, front=front, style=style))
    return marked


def legend(has_peers: bool) -> list[ChartShape]:
    entries = [("dense", "the original"), ("front", "no size is better in both"), ("beaten", "another size is better")]
    entries += [("peer", "others")] if has_peers else []
    shapes: list[ChartShape] = []
    x = MARGIN_LEFT + 6
    for style, text in entries:
        shapes += [Dot(x, 40, 5, style, text), Label(x + 11, 44.5, text)]
        x += 34 + 7 * len(text)
    return shapes


def panel(
    points: Sequence[PlottedPoint],
    values: Sequence[float],
    axis: QualityAxis,
    across: tuple[str, Callable[[float], str]],
    offset: float,
) -> list[ChartShape]:
    """Grid, axes and points. ``across``: name of the x axis, and its numbers as text."""
    name, text_of = across
    x_ticks, y_ticks = round_ticks(0.0, max(p.x for p in points)), round_ticks(min(values), max(values))
    left, right = offset + MARGIN_LEFT, offset + PANEL_WIDTH - MARGIN_RIGHT
    floor = PLOT_HEIGHT - MARGIN_BOTTOM
    x_of, y_of = linear_scale(x_ticks, left, right), linear_scale(y_ticks, floor, MARGIN_TOP + 8)
    shapes: list[ChartShape] = []
    for tick in y_ticks:
        shapes.append(Line(left, y_of(tick), right, y_of(tick), "grid"))
        shapes.append(Label(left - 6, y_of(tick) + 4, axis.text(tick), "end"))
    shapes += [Label(x_of(tick), floor + 18, text_of(tick), "middle") for tick in x_ticks]
    shapes.append(Line(left, floor, right, floor, "axis"))
    shapes.append(Label((left + right) / 2, PLOT_HEIGHT - 8, name, "middle"))
    joined = sorted((p for p in points if p.front), key=lambda p: p.x)
    shapes.append(Polyline(tuple((x_of(p.x), y_of(p.y)) for p in joined), "step"))
    dots = [Dot(x_of(p.x), y_of(p.y), 5, p.style, p.tooltip) for p in points]
    return [*shapes, *dots, *labels_beside(dots, [p.name for p in points])]


def labels_beside(dots: Sequence[Dot], names: Sequence[str]) -> list[Label]:
    """The name of each dot where it covers no dot and no other name: right, left, over or under it."""
    taken = [(dot.x - 6, dot.y - 6, dot.x + 6, dot.y + 6) for dot in dots]
    labels = []
    for dot, name in zip(dots, names, strict=True):
        width = LETTER_WIDTH * len(name)
        offered: list[tuple[float, int, Label, Box]] = []
        for dx, dy, anchor, start in (
            (9, 4.5, "start", 0.0),
            (-9, 4.5, "end", -width),
            (0, -10, "middle", -width / 2),
            (0, 20, "middle", -width / 2),
        ):
            x, y = dot.x + dx, dot.y + dy
            box = (x + start, y - 10, x + start + width, y + 2)
            offered.append((sum(overlap(box, other) for other in taken), len(offered), Label(x, y, name, anchor), box))
        _, _, label, box = min(offered, key=lambda offer: offer[:2])
        labels.append(label)
        taken.append(box)
    return labels


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def linear_scale(numbers: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Maps the least of ``numbers`` to pixel ``first`` and the largest to ``last``."""
    low = min(numbers)
    span = (max(numbers) - low) or 1.0
    return lambda number: first + (number - low) / span * (last - first)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` evenly spaced round numbers: the first is at most ``low``, the last at least ``high``."""
    rough = ((high - low) or abs(high) or 1.0) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]
