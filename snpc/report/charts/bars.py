"""Bars: what is left of each layer, and amounts of the original and of each file."""

from __future__ import annotations

from collections.abc import Sequence

from snpc.report.charts.shapes import Bar, Chart, ChartShape, Label
from snpc.report.data import GroupWidth, Measured, TokenCount
from snpc.report.format import format_count, format_share

CHART_WIDTH = 340.0  # of a phone's page
ROW_LABEL, ROW_TEXT = 30.0, 92.0  # in front of a bar, and behind it
THICK, THIN, ROW_GAP = 14.0, 9.0, 6.0


def file_style(index: int) -> str:
    """The class of the bars of one file."""
    return f"file{index}"


def remaining_chart(items: Sequence[GroupWidth]) -> Chart:
    """A row for each group: a track that stands for the original, and on it a bar for each file."""
    rows = []
    for item in items:
        known = list(dict.fromkeys(str(kept) for kept in item.kept if kept is not None)) or ["?"]
        tooltip = f"{item.id}: {item.blocks} x {item.size} before, {item.blocks} x {' and '.join(known)} after"
        rows.append(track_row(str(item.layer), item.size, item.kept, f"{', '.join(known)} of {item.size}", tooltip))
    return stack_rows(rows, f"what is left of {items[0].role} in each layer")


def tokens_chart(steps: Sequence[TokenCount]) -> Chart:
    """The same for tokens: a row for each block behind which they get fewer."""
    rows = [
        track_row(
            str(step.block),
            step.tokens,
            (step.left,),
            f"{step.left:g} of {step.tokens:g}",
            f"{step.left:g} of {step.tokens:g} tokens are left behind block {step.block}",
        )
        for step in steps
    ]
    return stack_rows(rows, "tokens that are left behind each block")


Row = tuple[float, tuple[Bar | Label, ...]]
"""(height, shapes with y from 0)"""


def track_row(label: str, whole: float, kept: Sequence[float | None], text: str, tooltip: str) -> Row:
    length = CHART_WIDTH - ROW_LABEL - ROW_TEXT
    each = THICK if len(kept) == 1 else THIN
    height = each * len(kept)
    shapes: list[Bar | Label] = [Bar(ROW_LABEL, 0, length, height, "before", tooltip)]
    for index, left in enumerate(kept):
        if left is not None:
            shapes.append(Bar(ROW_LABEL, index * each, length * left / whole, each, file_style(index), tooltip))
    middle = height / 2 + 4
    shapes += [Label(ROW_LABEL - 6, middle, label, "end"), Label(ROW_LABEL + length + 8, middle, text)]
    return height + ROW_GAP, tuple(shapes)


def stack_rows(rows: Sequence[Row], label: str) -> Chart:
    """Rows below each other."""
    y = 0.0
    placed: list[ChartShape] = []
    for height, shapes in rows:
        placed += [shape.moved(0, y) for shape in shapes]
        y += height
    return Chart(CHART_WIDTH, y, label, tuple(placed))


def amounts_chart(rows: Sequence[Measured], names: Sequence[str], files: Sequence[str]) -> Chart:
    """A row of bars for each amount under its name: the original's and that of each file, with their numbers."""
    top = max(number for row in rows for number in (row.before, *row.after) if number is not None) or 1.0
    whole = sum(row.before for row in rows)
    drawn = []
    for row, name in zip(rows, names, strict=True):
        shapes: list[Bar | Label] = [Label(0, 12, name)]
        y = 18.0
        bars = [("before", "original", row.before)]
        bars += [(file_style(k), file, number) for k, (file, number) in enumerate(zip(files, row.after, strict=True))
                 if number is not None]  # fmt: skip
        for style, file, number in bars:
            tooltip = f"{name}, {file}: {number:,.0f} MACs, {format_share(number, whole)} of the original's"
            length = number / top * (CHART_WIDTH - 60)
            shapes.append(Bar(0, y, max(length, 1.0), 10, style, tooltip))
            shapes.append(Label(length + 6, y + 9, format_count(number)))
            y += 12
        drawn.append((y + ROW_GAP, tuple(shapes)))
    return stack_rows(drawn, "multiply-accumulates of the original and of each file, by role")


def latency_chart(latency: Measured, names: Sequence[str], texts: Sequence[str]) -> Chart:
    """A row for each model, the original first. ``texts``: what stands over its bar."""
    numbers = (latency.before, *latency.after)
    top = max(number for number in numbers if number is not None) or 1.0
    rows = []
    for index, (number, name, text) in enumerate(zip(numbers, names, texts, strict=True)):
        style = "before" if index == 0 else file_style(index - 1)
        length = (number or 0.0) / top * CHART_WIDTH
        tooltip = f"{name}: {number or 0.0:.4g} ms"
        bar = Bar(0, 33, max(length, 1.0), THICK, style, tooltip)
        rows.append((33 + THICK + 2 * ROW_GAP, (Label(0, 12, name), Label(0, 27, text), bar)))
    return stack_rows(rows, "median latency of the original and of each file")
