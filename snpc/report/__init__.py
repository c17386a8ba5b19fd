"""The HTML report of a pruned model, and the plot of a sweep: files that load nothing else.

data            everything that the page shows, as one value
page            that value as HTML
sweep_plot      quality against latency of a sweep, as SVG
card            the report as a model card of the Hugging Face hub
charts          bars and curves, as shapes with coordinates
attention_maps  where the heads of a vision model look, before and after
token_maps      which patches of a picture are left where tokens get fewer
render          the templates (``templates/*.j2``) with their values
format          numbers and results in words
quality_text    whether the rewrite is correct, and how close outputs are, in words
png             pictures as ``data:`` URLs

Files
  attention_maps  Attention maps: the attention weights of a vision model over the patches of a few pictures, before and
                  after.
  card            A model card: the ``README.md`` of a model on the Hugging Face hub, from the JSON report of a pruned
                  model.
  charts          The charts of the page, as shapes with coordinates in CSS pixels; ``templates/chart.svg.j2`` writes
                  them as SVG.
  data            Everything that the report shows, as one value.
  format          Numbers and methods as text, the same on the terminal and in the report.
  page            The report page: one HTML file that loads nothing else.
  png             Small pictures as PNG in a ``data:`` URL.
  quality_text    The two statements on a result, in words: whether the rewrite is correct, and how close its outputs
                  are.
  render          Templates to text: every value is escaped, and an unknown name is an error.
  sweep_plot      Quality against latency: the plot of a sweep, an SVG file of its own.
  token_maps      Token maps: which patches of a picture are left after each step of a token reduction.
"""

from __future__ import annotations

from snpc.report.card import BaseModelRelation, CardOptions, model_card
from snpc.report.format import describe_method, format_count, format_share
from snpc.report.page import write_report
from snpc.report.quality_text import (
    dequantization_text,
    drift_text,
    output_lines,
    provenance_text,
    quality_text,
    quality_warning,
    requantization_text,
    restriction_text,
    rewrite_text,
    task_text,
)
from snpc.report.sweep_plot import write_sweep_plot

__all__ = [
    "BaseModelRelation",
    "CardOptions",
    "dequantization_text",
    "describe_method",
    "drift_text",
    "format_count",
    "format_share",
    "model_card",
    "output_lines",
    "provenance_text",
    "quality_text",
    "quality_warning",
    "requantization_text",
    "restriction_text",
    "rewrite_text",
    "task_text",
    "write_report",
    "write_sweep_plot",
]
