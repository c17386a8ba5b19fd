"""The plot of a sweep: an SVG document on its own, with every size in its place."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from snpc.errors import UserError
from snpc.pipeline.sweep import ORIGINAL_NAME, SweepPoint, SweepResult, mark_pareto_front
from snpc.report.charts.pictures import picture_svg
from snpc.report.charts.points import PeerPoint
from snpc.report.charts.shapes import Dot
from snpc.report.charts.sweep_plot import labels_beside, round_ticks, sweep_chart, write_sweep_plot

SVG = "{http://www.w3.org/2000/svg}"


def point(name: str, accuracy: float, speedup: float, macs: int = 100) -> SweepPoint:
    return SweepPoint(
        name, (), macs, 1, 1, 1 - accuracy, None, accuracy, latency=10 / speedup, speedup=speedup, low=speedup
    )


def sweep(*points: SweepPoint, model: str = "m.onnx") -> SweepResult:
    return SweepResult(Path(model), Path(), tuple(mark_pareto_front(list(points))), 1)


SIZES = (
    point(ORIGINAL_NAME, 0.9, 1.0, 100),
    point("fast", 0.8, 2.0, 50),
    point("slow", 0.85, 0.5, 40),
    point("bad", 0.7, 0.8, 60),
)


def drawn(root: ElementTree.Element) -> tuple[list[tuple[float, float, str]], list[tuple[float, float, str]]]:
    """(x, y, class) of the dots of both panels, without those of the key."""
    dots = [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("class", "")) for c in root.iter(f"{SVG}circle")]
    dots = [dot for dot in dots if dot[1] > 60]
    return [d for d in dots if d[0] < 440], [d for d in dots if d[0] > 440]


def test_a_panel_for_macs_and_one_for_latency() -> None:
    root = ElementTree.fromstring(picture_svg(sweep_chart(sweep(*SIZES), [PeerPoint("theirs", 70, 75)])))
    by_macs, by_latency = drawn(root)
    assert [kind for _, _, kind in by_macs] == ["dense", "beaten", "front", "beaten", "peer"]
    assert [kind for _, _, kind in by_latency] == ["dense", "front", "beaten", "beaten"]  # peers have no latency
    macs = [100, 50, 40, 60, 70]
    order = sorted(range(5), key=lambda k: by_macs[k][0])
    assert order == sorted(range(5), key=macs.__getitem__)
    heights = [90, 80, 85, 70, 75]
    assert sorted(range(5), key=lambda k: -by_macs[k][1]) == sorted(range(5), key=heights.__getitem__)
    assert [y for _, y, _ in by_latency] == [y for _, y, _ in by_macs[:4]]  # both panels have one scale
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert all(texts.count(p.name) == 2 for p in SIZES) and texts.count("theirs") == 1 and "others" in texts
    lines = [len(line.get("points", "").split()) for line in root.iter(f"{SVG}polyline")]
    assert lines == [2, 2]


def test_a_lower_perplexity_is_higher_up_and_scores_of_others_need_one() -> None:
    points = [replace(p, accuracy=None, perplexity=10 / (p.accuracy or 1)) for p in SIZES[:2]]
    by_macs, _ = drawn(
        ElementTree.fromstring(picture_svg(sweep_chart(sweep(*points), [PeerPoint("theirs", 70, 20.0)])))
    )
    (_, dense, _), (_, pruned, _), (_, theirs, _) = by_macs
    assert dense < pruned < theirs
    bare = [replace(p, accuracy=None) for p in SIZES]
    with pytest.raises(UserError, match="--eval DATA --labels NAME"):
        sweep_chart(sweep(*bare), [PeerPoint("theirs", 70, 75)])
    assert "closeness to the original" in picture_svg(sweep_chart(sweep(*bare)))


def test_ticks_are_round_and_hold_all_values() -> None:
    assert round_ticks(0.0, 7.75) == [0, 2, 4, 6, 8]
    assert round_ticks(91.3, 98.2) == [90, 92, 94, 96, 98, 100]
    for low, high in ((2.0, 2.0), (0.0, 0.0), (-3.7, -3.2), (0.0, 1e-9), (0.0, 3e12)):
        ticks = round_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_names_cover_no_dot_and_no_other_name_where_there_is_room() -> None:
    dots = [Dot(x, y, 5, "front", "") for x, y in ((100, 100), (120, 100), (110, 104), (200, 100))]
    labels = labels_beside(dots, ["left", "right", "between", "alone"])
    boxes = []
    for label in labels:
        width = 7 * len(label.text)
        start = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
        boxes.append((start, label.y - 10, start + width, label.y + 2))
    for a, b in combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_names_stay_text() -> None:
    name = "<script>alert('x')</script> & \" ]]>"
    root = ElementTree.fromstring(picture_svg(sweep_chart(sweep(point(name, 0.9, 1.0), model="m<b>.onnx"))))
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    assert name in texts
    assert any(text.startswith("m<b>.onnx: ") for text in texts)
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no/folder"):
        write_sweep_plot(sweep(point(ORIGINAL_NAME, 0.9, 1.0)), tmp_path / "no" / "folder" / "plot.svg")
    with pytest.raises(UserError, match=r"an \.svg or a \.png"):
        write_sweep_plot(sweep(point(ORIGINAL_NAME, 0.9, 1.0)), tmp_path / "plot.pdf")
