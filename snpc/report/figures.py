"""Figures: charts with captions, for the page and as a picture of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snpc.report.charts import Bar, Chart, Label, amounts_chart, latency_chart, remaining_chart, tokens_chart
from snpc.report.data import GroupWidth, Measured, ReportData, widths_by_role
from snpc.report.format import format_count, format_share
from snpc.runtime.evaluation import Speedup

SMALL_SHARE = 0.01  # of all MACs
ROLE_NAMES = {
    "qk": "query and key",
    "vo": "value and output",
    "ffn": "feed-forward, hidden",
    "head": "heads",
    "experts": "whole experts",
    "conv": "convolution channels",
    "residual": "residual stream",
    "other": "other weights",
}


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    caption: str
    chart: Chart


def role_name(role: str) -> str:
    return ROLE_NAMES.get(role, role)


def width_figures(report: ReportData) -> list[Figure]:
    """What is left of each layer: a chart for each role, and one for tokens."""
    figures = [
        Figure(role_name(role), f" ({role}): {kept_text(widths)}", remaining_chart(widths))
        for role, widths in widths_by_role(report.widths).items()
    ]
    if report.tokens:
        last = report.tokens[-1]
        caption = f": {last.left:g} of {last.tokens:g} are left behind block {last.block}"
        figures.append(Figure("tokens", caption, tokens_chart(report.tokens)))
    return figures


def kept_text(widths: Sequence[GroupWidth]) -> str:
    """How many units of a role are left in each file."""
    before = sum(w.blocks * w.size for w in widths)
    texts = []
    for index in range(len(widths[0].kept)):
        kept = [w.kept[index] for w in widths]
        after = sum(w.blocks * (k or 0) for w, k in zip(widths, kept, strict=True))
        texts += [format_share(after, before)] if None not in kept else []
    return f"{', '.join(dict.fromkeys(texts)) or 'an unknown share'} of {format_count(before)} units"


def macs_figure(report: ReportData) -> Figure:
    """MACs by role, of the original and of each file; roles that hardly count are one."""
    names = tuple(file.name for file in report.files)
    whole = sum(row.before for row in report.macs)
    small = [row for row in report.macs if max(row.before, *(n or 0 for n in row.after)) < SMALL_SHARE * whole]
    rows = [row for row in report.macs if row not in small]
    if small:
        after = tuple(
            None if None in column else sum(n or 0 for n in column)
            for column in zip(*(r.after for r in small), strict=True)
        )
        rows.append(Measured("all others", "", sum(row.before for row in small), after))
    chart = amounts_chart(rows, [role_name(row.name) for row in rows], names)
    return Figure("MACs by role", "", chart)


def speedup_of(report: ReportData, index: int) -> Speedup | None:
    return report.bench.speedups[index] if report.bench is not None else None


def latency_figure(report: ReportData) -> Figure | None:
    """The latency of every model, and where it was measured; None where it was not."""
    bench = report.bench
    if bench is None:
        return None
    (latency,) = (row for row in report.costs if row.name == "latency")
    times = [f"{number:.3g} ms" for number in (latency.before, *latency.after) if number is not None]
    gains = ["", *(f", {s.ratio:.2f} x ({s.low:.2f} to {s.high:.2f})" for s in bench.speedups)]
    texts = [time + gain for time, gain in zip(times, gains, strict=True)]
    machine = bench.machine
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in bench.shapes.items())
    caption = (
        f"{machine.runtime}, {machine.provider}, {machine.threads or 'as many as the runtime chooses'} threads, "
        f"{machine.cpu} x {machine.cores}; inputs {shapes}; median of {bench.rounds} rounds in which every model ran "
        "once; in brackets the 95 % interval"
    )
    names = [Path(report.model).name, *(file.name for file in report.files)]
    return Figure("latency", caption, latency_chart(latency, names, texts))


# -- as a picture ----------------------------------------------------------------------------------------------------

COLUMN_WIDTH, PICTURE_COLUMNS = 390.0, 3
PICTURE_MARGIN, CAPTION_HEIGHT, FIGURE_GAP = 24.0, 24.0, 28.0


def overview_chart(report: ReportData, title: str) -> Chart:
    """All figures under one title, in columns: what is left of each layer, the latency where it was measured, and MACs
    by role."""
    latency = latency_figure(report)
    figures = [*width_figures(report), *([latency] if latency is not None else []), macs_figure(report)]
    shapes: list[Bar | Label] = [Label(PICTURE_MARGIN, 32, title, style="title"), *key_shapes(report)]
    bottoms = [80.0] * PICTURE_COLUMNS
    for figure in figures:
        column = min(range(PICTURE_COLUMNS), key=bottoms.__getitem__)
        x, y = PICTURE_MARGIN + column * COLUMN_WIDTH, bottoms[column]
        shapes.append(Label(x, y + 12, figure.title, style="title"))
        shapes += [s.moved(x, y + CAPTION_HEIGHT) for s in figure.chart.shapes if isinstance(s, Bar | Label)]
        bottoms[column] = y + CAPTION_HEIGHT + figure.chart.height + FIGURE_GAP
    width = PICTURE_MARGIN + COLUMN_WIDTH * min(PICTURE_COLUMNS, len(figures))
    return Chart(width, max(bottoms), title, tuple(shapes))


def key_shapes(report: ReportData) -> list[Bar | Label]:
    """Which color is which file."""
    shapes: list[Bar | Label] = []
    x = PICTURE_MARGIN
    for style, name in (("before", "original"), *((f"file{k}", f.name) for k, f in enumerate(report.files))):
        shapes += [Bar(x, 48, 12, 12, style, name), Label(x + 18, 58.5, name)]
        x += 40 + 7.5 * len(name)
    return shapes
