"""Templates and charts: text is escaped, a missing value is an error, and every shape is drawn."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest

import snpc.report
from snpc.report.charts.shapes import Bar, Chart, ChartShape, Dot, Label, Line, Polyline
from snpc.report.render import render_template, template_environment

TEMPLATES = Path(snpc.report.__file__).parent / "templates"
SHAPES: dict[str, ChartShape] = {
    "line": Line(0, 1, 2, 3, "grid"),
    "text": Label(4, 5, "<label>", "end", "title"),
    "rect": Bar(6, 7, 8, -9, "before", "<tooltip>"),
    "polyline": Polyline(((0, 0), (1, 2)), "curve"),
    "circle": Dot(1, 2, 3, "chosen", "dot", drop=9),
}


def draw(chart: Chart) -> list[tuple[str, dict[str, str | None]]]:
    """Tags and attributes of a chart."""
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    source = '{% from "chart.svg.j2" import svg %}{{ svg(chart) }}'
    Collector().feed(template_environment().from_string(source).render(chart=chart))
    return tags


@pytest.mark.parametrize("tag", SHAPES)
def test_every_shape_is_drawn(tag: str) -> None:
    drawn = dict(draw(Chart(10, 20, "a <chart>", (SHAPES[tag],))))
    assert drawn["svg"]["viewbox"] == "0 0 10 20"
    assert drawn["svg"]["aria-label"] == "a <chart>"
    assert tag in drawn and "label" not in drawn and "tooltip" not in drawn
    if tag == "rect":
        assert drawn["rect"]["height"] == "0.0"  # never negative
    if tag == "text":
        assert (drawn["text"]["text-anchor"], drawn["text"]["class"]) == ("end", "title")
    if tag == "polyline":
        assert drawn["polyline"]["points"] == "0.0,0.0 1.0,2.0"
    if tag == "circle":
        assert drawn["line"] == {"x1": "1.0", "y1": "2.0", "x2": "1.0", "y2": "9.0", "class": "drop"}


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render_template("page.html.j2")


def test_no_template_switches_escaping_off() -> None:
    texts = [path.read_text() for path in TEMPLATES.iterdir()]
    assert len(texts) == 5
    assert not [text for text in texts if "|safe" in text.replace(" ", "") or "autoescape" in text]
    assert template_environment().autoescape is True
