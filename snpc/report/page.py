"""The report page: one HTML file that loads nothing else. ``templates/page.html.j2`` is its markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpc.pipeline import PrunedModel, PruningPlan, describe_approximation
from snpc.report.attention_maps import AttentionPicture, HeadMap
from snpc.report.charts import Chart, before_after_chart, curve_chart, curve_decades, widths_chart
from snpc.report.data import BeforeAfter, GroupWidth, ReportData, collect_report_data, plural, widths_by_role
from snpc.report.format import format_count, format_percent, format_share
from snpc.report.png import apply_colormap
from snpc.report.quality_text import drift_text, perplexity_text
from snpc.report.render import image_url, render_template
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import BenchResult
from snpc.runtime.io import atomic_write
from snpc.types import Difference

# A page that came from somebody else's model may load and run nothing.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

ROLE_NAMES = {
    "qk": "query and key",
    "vo": "value and output",
    "ffn": "feed-forward, hidden",
    "head": "heads",
    "experts": "whole experts",
    "conv": "convolution channels",
    "residual": "residual stream",
    "other": "other weights",
}
WEIGHT_ORIGINS = {
    "low_rank_qk": "rotated",
    "low_rank_vo": "rotated",
    "refit": "refitted",
    "score_selection": "selected by scores",
    "score_refit": "selected by scores",
}


def write_report(
    result: PrunedModel,
    path: Path | str,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    bench: BenchResult | None = None,
) -> ReportData:
    """Write an HTML page about ``result`` to ``path``, and return what it shows.

    ``plan`` gives the loss curves, ``calibration`` (default: the plan's) the pictures for the attention maps of vision
    models, ``bench`` (of the original and the pruned file, in this order) the latency. Raises UserError where ``path``
    cannot be written.
    """
    if calibration is None and plan is not None:
        calibration = plan.calibration
    report = collect_report_data(result, plan=plan, calibration=calibration, bench=bench)
    text = render_page(report)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return report


def render_page(report: ReportData) -> str:
    """The page as HTML."""
    return render_template(
        "page.html.j2",
        report=report,
        policy=CONTENT_SECURITY_POLICY,
        name=Path(report.model).name,
        cards=[*(cost_card(pair) for pair in report.costs), *drift_cards(report.drift)],
        drift_rows=[drift_row(d) for d in report.drift],
        width_figures=width_figures(report.widths),
        macs_at=", ".join(f"{name} = {size}" for name, size in report.macs_at.items()),
        macs_chart=before_after_chart(report.macs, [role_name(pair.name) for pair in report.macs]),
        curve_sections=curve_sections(report.widths),
        attention_rows=[attention_row(picture) for picture in report.attention.pictures],
        pin_rows=[(p.tensor, p.axis, p.size, p.reason, p.operator) for p in report.pins],
        group_rows=[group_row(w) for w in report.widths],
        checks=[*report.structure, *map(mask_check, report.equals_mask)],
        run_rows=run_rows(report),
    )


# -- the headline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One number in large print. ``exact``: its tooltip."""

    name: str
    value: str
    note: str
    exact: str = ""


def cost_card(pair: BeforeAfter) -> Card:
    exact = f"{pair.before:,.6g} before, {pair.after:,.6g} after"
    if pair.unit in ("", "B"):
        exact = f"{pair.before:,.0f} before, {pair.after:,.0f} after"
    note = f"from {format_amount(pair, pair.before)}, now {format_share(pair.after, pair.before)}"
    return Card(pair.name, format_amount(pair, pair.after), note, exact)


def format_amount(pair: BeforeAfter, number: float) -> str:
    """A number with its unit, as on a card."""
    if pair.unit in ("", "B"):
        text = format_count(number) + pair.unit
        return f"{number:.0f} {pair.unit}" if pair.unit and abs(number) < 1000 else text
    return f"{number:.3g} {pair.unit}"


def drift_cards(drift: Sequence[Difference]) -> Iterator[Card]:
    """The output that changed most, where outputs were compared, and the perplexity of a language model."""
    if drift:
        worst = max(drift, key=lambda d: d.relative)
        yield Card("drift of the outputs", format_percent(worst.relative), f"{worst.output}: {drift_text(worst)}")
    for found in (d.perplexity for d in drift if d.perplexity is not None):
        note = f"from {found.before:.4g}, now x {found.factor:.3g}"
        yield Card("perplexity", f"{found.after:.4g}", note, perplexity_text(found))


def drift_row(d: Difference) -> tuple[str, ...]:
    same = f"{100 * d.agreement:.1f} %" if d.agreement is not None and d.metric == "kl" else "-"
    distance = f"{d.metric} {d.distance:.3g}" if d.metric != "none" else "not judged"
    return d.output, distance, format_percent(d.relative), f"{d.max_abs_diff:.3g}", f"{d.cosine:.5f}", same


# -- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    caption: str
    chart: Chart


@dataclass(frozen=True)
class CurveSection:
    """The loss curves of one role."""

    title: str
    figures: tuple[Figure, ...]


def role_name(role: str) -> str:
    return ROLE_NAMES.get(role, role)


def width_figures(items: Sequence[GroupWidth]) -> list[Figure]:
    """A chart of the widths before and after for each role."""
    figures = []
    for role, widths in widths_by_role(items).items():
        before = sum(w.blocks * w.size for w in widths)
        after = sum(w.blocks * w.kept for w in widths)
        kept = f"{format_count(after)} of {format_count(before)} units kept, {format_share(after, before)}"
        figures.append(Figure(role_name(role), f" ({role}): {kept}", widths_chart(widths)))
    return figures


def curve_sections(items: Sequence[GroupWidth]) -> list[CurveSection]:
    """By role; all charts share one scale, so that they can be compared."""
    measured = [item for item in items if item.curve]
    if not measured:
        return []
    low, high = curve_decades(measured)
    sections = []
    for role, widths in widths_by_role(measured).items():
        figures = tuple(Figure(w.id, f" {w.size} to {w.kept}", curve_chart(w, low, high)) for w in widths)
        title = f"{role_name(role)} ({role}), {len(widths)} {plural('group', len(widths))}"
        sections.append(CurveSection(title, figures))
    return sections


# -- attention maps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadImages:
    """Attention of one head before and after: (URL of the image, what it shows)."""

    caption: str
    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AttentionRow:
    """A calibration picture, and the heads of each group: (group, heads)."""

    picture: str
    layers: tuple[tuple[str, tuple[HeadImages, ...]], ...]


def attention_row(picture: AttentionPicture) -> AttentionRow:
    """A picture with the maps on it, by layer."""
    groups = dict.fromkeys(item.group for item in picture.maps)
    layers = ((group, tuple(head_images(m) for m in picture.maps if m.group == group)) for group in groups)
    return AttentionRow(image_url(picture.pixels), tuple(layers))


def head_images(item: HeadMap) -> HeadImages:
    """The maps of one head; both have one scale, so that they can be compared."""
    before, after = np.array(item.before), np.array(item.after)
    scale = max(before.max(), after.max()) or 1.0
    images = []
    for when, weights in (("before", before), ("after", after)):
        text = f"{item.group}, head {item.head}, {when}: at most {format_percent(float(weights.max()))} on one patch"
        images.append((image_url(apply_colormap(np.sqrt(weights / scale))), text))
    return HeadImages(f"head {item.head}, overlap {100 * item.overlap:.1f} %", tuple(images))


# -- what is folded away ---------------------------------------------------------------------------------------------


def group_row(item: GroupWidth) -> tuple[str, ...]:
    """A row of the table of groups."""
    origin = WEIGHT_ORIGINS.get(item.form, "sliced" if item.kept < item.size else "as they were")
    if item.normalized_inside and item.kept < item.size:
        origin += f"; approximate: {describe_approximation(item.role, item.form)}"
    before, after = f"{item.blocks} x {item.size}", f"{item.blocks} x {item.kept}"
    return item.id, item.role, before, after, format_share(item.kept, item.size), origin


def mask_check(d: Difference) -> str:
    return f"{d.output}: sliced equals masked to {d.relative:.1e} relative, {d.max_abs_diff:.1e} at most"


def run_rows(report: ReportData) -> list[tuple[str, str]]:
    """What was run, with which options, and how long it took."""
    rows = [("original", report.model), ("pruned", report.output), ("sha256 of the original", report.digest)]
    rows += [(f"option {name}", option_text(value)) for name, value in report.options.items()]
    rows += [(f"seconds: {name}", f"{seconds:.2f} s") for name, seconds in report.seconds.items()]
    if report.attention.reason:
        rows.append(("no attention maps", report.attention.reason))
    if report.token_maps.reason:
        rows.append(("no pictures of tokens", report.token_maps.reason))
    return rows


def option_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
