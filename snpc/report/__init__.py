"""The HTML report of a pruned model, and the plot of a sweep: files that load nothing else.

data            everything that the page shows, as one value
comparison      files beside their original, at any later time
reproduction    how to make a file again
page            the data as HTML
figures         its charts with captions
charts/         bars, curves and plots, as shapes with coordinates
card            the report as a model card of the Hugging Face hub
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
  charts/         Charts: shapes with coordinates, drawn as SVG.
  comparison      Files beside their original: what each costs, which widths are left, and how close its outputs are.
  data            Everything that the report shows, as one value.
  figures         Figures: charts with captions, for the page and as a picture of their own.
  format          Numbers and methods as text, the same on the terminal and in the report.
  history         How a file was made, in words: the steps of its provenance.
  page            The report page: one HTML file that loads nothing else.
  png             Small pictures as PNG in a ``data:`` URL.
  quality_text    The two statements on a result, in words: whether the rewrite is correct, and how close its outputs
                  are.
  render          Templates to text: every value is escaped, and an unknown name is an error.
  reproduction    How to make a file again: the command, the call, and what both were run with.
  token_maps      Token maps: which patches of a picture are left after each step of a token reduction.
"""

from __future__ import annotations

from snpc.report.card import BaseModelRelation, CardOptions, model_card
from snpc.report.charts import PICTURE_SUFFIXES, PeerPoint, check_picture, read_points, write_sweep_plot
from snpc.report.comparison import FileComparison, compare_files
from snpc.report.data import ReportData
from snpc.report.format import describe_method, format_count, format_share
from snpc.report.history import history_text, step_text
from snpc.report.page import glance_rows, write_report
from snpc.report.quality_text import (
    dequantization_text,
    drift_text,
    output_lines,
    quality_text,
    quality_warning,
    requantization_text,
    restriction_text,
    rewrite_text,
    task_text,
)

__all__ = [
    "PICTURE_SUFFIXES",
    "BaseModelRelation",
    "CardOptions",
    "FileComparison",
    "PeerPoint",
    "ReportData",
    "check_picture",
    "compare_files",
    "dequantization_text",
    "describe_method",
    "drift_text",
    "format_count",
    "format_share",
    "glance_rows",
    "history_text",
    "model_card",
    "output_lines",
    "quality_text",
    "quality_warning",
    "read_points",
    "requantization_text",
    "restriction_text",
    "rewrite_text",
    "step_text",
    "task_text",
    "write_report",
    "write_sweep_plot",
]
