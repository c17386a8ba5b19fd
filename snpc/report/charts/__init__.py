"""Charts: shapes with coordinates, drawn as SVG.

Files
  bars        Bars: what is left of each layer, and amounts of the original and of each file.
  curves      Loss curves: what each width of a group costs.
  pictures    Charts as files of their own: SVG, and PNG through resvg (extra ``plots``).
  points      Points of others, for plots: a name, MACs and a score each, from CSV or JSON.
  shapes      Charts as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes them as SVG.
  sweep_plot  The plot of a sweep: quality against MACs, and against latency.
"""

from __future__ import annotations

from snpc.report.charts.bars import amounts_chart, latency_chart, remaining_chart, tokens_chart
from snpc.report.charts.curves import curve_chart, curve_decades
from snpc.report.charts.pictures import PICTURE_SUFFIXES, check_picture, write_picture
from snpc.report.charts.points import PeerPoint, read_points
from snpc.report.charts.shapes import Bar, Chart, Label
from snpc.report.charts.sweep_plot import write_sweep_plot

__all__ = [
    "PICTURE_SUFFIXES",
    "Bar",
    "Chart",
    "Label",
    "PeerPoint",
    "amounts_chart",
    "check_picture",
    "curve_chart",
    "curve_decades",
    "latency_chart",
    "read_points",
    "remaining_chart",
    "tokens_chart",
    "write_picture",
    "write_sweep_plot",
]
