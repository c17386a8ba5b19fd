"""The plot of a sweep: an SVG document on its own, with every size in its place."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from snpc.errors import UserError
from snpc.pipeline.sweep import ORIGINAL_NAME, SweepPoint, SweepResult, mark_pareto_front
from snpc.report.charts.sweep_plot import even_ticks, sweep_plot, write_sweep_plot

SVG = "{http://www.w3.org/2000/svg}"


def point(name: str, accuracy: float, speedup: float) -> SweepPoint:
    return SweepPoint(
        name, (), 1, 1, 1, 1 - accuracy, None, accuracy, latency=10 / speedup, speedup=speedup, low=speedup
    )


def sweep(*points: SweepPoint, model: str = "m.onnx") -> SweepResult:
    return SweepResult(Path(model), Path(), tuple(mark_pareto_front(list(points))), 1)


def test_the_plot_puts_faster_left_and_better_higher() -> None:
    points = (point(ORIGINAL_NAME, 0.9, 1.0), point("fast", 0.8, 2.0), point("bad", 0.7, 0.5))
    root = ElementTree.fromstring(sweep_plot(sweep(*points)))
    dots = [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("class")) for c in root.iter(f"{SVG}circle")]
    (x0, y0, kind0), (x1, y1, kind1), (x2, y2, kind2) = dots
    assert x1 < x0 < x2 and y0 < y1 < y2
    assert (kind0, kind1, kind2) == ("front", "front", "beaten")
    assert {ORIGINAL_NAME, "fast", "bad"} <= {t.text for t in root.iter(f"{SVG}text")}
    assert even_ticks(2.0, 2.0) == [2.0] and even_ticks(0.0, 4.0) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_names_stay_text() -> None:
    name = "<script>alert('x')</script> & \" ]]>"
    root = ElementTree.fromstring(sweep_plot(sweep(point(name, 0.9, 1.0), model="m<b>.onnx")))
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    assert name in texts
    assert any(text.startswith("m<b>.onnx: ") for text in texts)
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no/folder"):
        write_sweep_plot(sweep(point(ORIGINAL_NAME, 0.9, 1.0)), tmp_path / "no" / "folder" / "plot.svg")
