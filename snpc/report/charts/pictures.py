"""Charts as files of their own: SVG, and PNG through resvg (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path

from snpc.errors import UserError
from snpc.report.charts.shapes import Chart
from snpc.report.render import render_template
from snpc.runtime.io import atomic_write

PICTURE_SUFFIXES = (".svg", ".png")
PNG_ZOOM = 2  # pixels of a PNG for one of the chart
PAPER = "#ffffff"


def picture_svg(chart: Chart) -> str:
    """An SVG document. Where it is shown in a browser, it follows the reader's light or dark setting."""
    return render_template("picture.svg.j2", chart=chart)


def write_picture(chart: Chart, path: Path) -> None:
    """Write a chart as .svg or .png. Raises UserError for another suffix, where ``path`` cannot be written, and where a
    PNG cannot be drawn on this machine."""
    check_picture(path)
    text = picture_svg(chart)
    data = png_of(text) if path.suffix == ".png" else text.encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def check_picture(path: Path) -> None:
    """Raise UserError where no picture can be written under this name."""
    if path.suffix not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: a picture is an .svg or a .png")
    if path.suffix == ".png":
        check_fonts()


def png_of(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise UserError("a .png is drawn by resvg: pip install 'snpc[plots]', or write an .svg") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=PNG_ZOOM, background=PAPER))


def check_fonts() -> None:
    """Raise UserError on a machine without fonts, as in a small container: resvg leaves the text out."""
    empty = Chart(20, 20, "", ())
    written = picture_svg(empty).replace("</svg>", '<text x="2" y="16">M</text></svg>')
    if png_of(written) == png_of(picture_svg(empty)):
        raise UserError(
            "a .png needs a font, and this machine has none that is known: install one (apt install "
            "fonts-dejavu-core), or write an .svg"
        )
