"""Charts: shapes with coordinates, drawn as SVG.

Files
  bars        Bars: what is left of each layer, and amounts of the original and of each file.
  curves      Loss curves: what each width of a group costs.
  shapes      Charts as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes them as SVG.
  sweep_plot  Quality against latency: the plot of a sweep, an SVG file of its own.
"""

from __future__ import annotations

from snpc.report.charts.bars import amounts_chart, latency_chart, remaining_chart, tokens_chart
from snpc.report.charts.curves import curve_chart, curve_decades
from snpc.report.charts.shapes import Chart
from snpc.report.charts.sweep_plot import write_sweep_plot

__all__ = [
    "Chart",
    "amounts_chart",
    "curve_chart",
    "curve_decades",
    "latency_chart",
    "remaining_chart",
    "tokens_chart",
    "write_sweep_plot",
]
