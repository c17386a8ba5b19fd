"""Charts as files: the PNG has the shapes and the texts of the SVG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snpc.errors import UserError
from snpc.report.charts.pictures import check_fonts, picture_svg, write_picture
from snpc.report.charts.shapes import Bar, Chart, Label

CHART = Chart(100, 60, "a chart", (Bar(10, 10, 40, 20, "file0", "a bar"), Label(10, 50, "words")))


def test_a_png_is_drawn_at_twice_the_size(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg draws PNG: pip install resvg-py")
    from PIL import Image

    write_picture(CHART, tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    assert pixels.shape == (120, 200, 3)
    assert tuple(pixels[40, 60]) == (0x00, 0x72, 0xB2)  # inside the bar
    assert tuple(pixels[5, 5]) == (255, 255, 255)
    assert (pixels[80:104, 20:100] < 128).any()  # the words


def test_a_machine_without_fonts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resvg = pytest.importorskip("resvg_py", reason="resvg draws PNG: pip install resvg-py")
    check_fonts()
    drawn = resvg.svg_to_bytes
    monkeypatch.setattr(resvg, "svg_to_bytes", lambda **options: drawn(**options, skip_system_fonts=True))
    with pytest.raises(UserError, match="needs a font"):
        check_fonts()


def test_an_svg_has_colors_for_both_modes(tmp_path: Path) -> None:
    write_picture(CHART, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text()
    assert text == picture_svg(CHART) and "prefers-color-scheme: dark" in text and 'class="file0"' in text
