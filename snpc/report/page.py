"""The page: a report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from snpc.pipeline.planner import PruningPlan
from snpc.pipeline.prune import PrunedModel
from snpc.report.attention_maps import AttentionPicture, HeadMap
from snpc.report.charts import before_after_chart, curve_chart, curve_decades, format_percent, widths_chart
from snpc.report.data import BeforeAfter, GroupWidth, ReportData, collect_report_data, plural, widths_by_role
from snpc.report.format import format_count, format_share
from snpc.report.markup import Child, Element, document_text, make_element
from snpc.report.png import apply_colormap, png_data_url
from snpc.report.style import PAGE_STYLE
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.bench import BenchResult
from snpc.runtime.io.atomic import atomic_write
from snpc.types import Difference

# A page that came from somebody else's model may load and run nothing.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

ROLE_NAMES = {
    "qk": "query and key",
    "vo": "value and output",
    "ffn": "feed-forward, hidden",
    "head": "heads",
    "conv": "convolution channels",
    "residual": "residual stream",
    "other": "other weights",
}


def write_report(
    result: PrunedModel,
    target: Path,
    *,
    decision: PruningPlan | None = None,
    calibration: Calibration | None = None,
    bench: BenchResult | None = None,
) -> ReportData:
    """Write an HTML page about ``result`` to ``target`` and return what it shows.

    ``decision`` (that the plan is of) gives the loss curves, ``calibration`` the pictures for attention maps of vision
    models, ``bench`` (of the original and the pruned file, in this order) the latency. Raises UserError where
    ``target`` cannot be written.
    """
    report = collect_report_data(result, decision=decision, calibration=calibration, bench=bench)
    text = render_page(report)
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return report


def render_page(report: ReportData) -> str:
    name = Path(report.model).name
    head = make_element(
        "head",
        None,
        make_element("meta", {"charset": "utf-8"}),
        make_element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        make_element("meta", {"http-equiv": "Content-Security-Policy", "content": CONTENT_SECURITY_POLICY}),
        make_element("title", None, f"{name}, pruned"),
        make_element("style", None, PAGE_STYLE),
    )
    return document_text(
        make_element(
            "html",
            {"lang": "en"},
            head,
            make_element("body", None, make_element("main", None, *page_sections(report, name))),
        )
    )


def page_sections(report: ReportData, name: str) -> Iterator[Element]:
    yield make_element(
        "header",
        None,
        make_element("h1", None, f"{name}, pruned"),
        make_element("p", {"class": "soft"}, report.request),
    )
    yield make_element("div", {"class": "grid cards"}, *(cost_card(pair) for pair in report.costs), drift_card(report))
    yield from drift_section(report)
    yield from widths_section(report.widths)
    yield from macs_section(report)
    yield from curves_section(report.widths)
    yield from token_maps_section(report)
    yield from attention_section(report)
    yield from details_section(report)


# -- the headline ----------------------------------------------------------------------------------------------------


def format_amount(pair: BeforeAfter, number: float) -> str:
    if pair.unit in ("", "B"):
        text = format_count(number) + pair.unit
        return f"{number:.0f} {pair.unit}" if pair.unit and abs(number) < 1000 else text
    return f"{number:.3g} {pair.unit}"


def cost_card(pair: BeforeAfter) -> Element:
    exact = f"{pair.before:,.6g} before, {pair.after:,.6g} after"
    if pair.unit in ("", "B"):
        exact = f"{pair.before:,.0f} before, {pair.after:,.0f} after"
    return make_element(
        "div",
        {"class": "card", "title": exact},
        make_element("span", None, pair.name),
        make_element("b", None, format_amount(pair, pair.after)),
        make_element(
            "span", None, f"from {format_amount(pair, pair.before)}, now {format_share(pair.after, pair.before)}"
        ),
    )


def drift_card(report: ReportData) -> Child:
    if not report.drift:
        return None
    worst = max(report.drift, key=lambda d: d.relative)
    same = f", same top entry in {100 * worst.agreement:.1f} %" if worst.agreement is not None else ""
    return make_element(
        "div",
        {"class": "card"},
        make_element("span", None, "drift of the outputs"),
        make_element("b", None, format_percent(worst.relative)),
        make_element("span", None, f"{worst.output}{same}"),
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> Element:
    def cells(tag: str, row: Sequence[str]) -> Element:
        return make_element(
            "tr", None, *(make_element(tag, {"class": "text"} if k in text else None, c) for k, c in enumerate(row))
        )

    body = make_element("tbody", None, *(cells("td", row) for row in rows))
    return make_element(
        "div", {"class": "wide"}, make_element("table", None, make_element("thead", None, cells("th", header)), body)
    )


def drift_section(report: ReportData) -> Iterator[Element]:
    if not report.drift:
        return
    yield make_element("h2", None, "Drift of the outputs")
    yield make_element(
        "p",
        {"class": "soft"},
        f"The written file against the original, on {report.compared}. Root mean square of the difference is relative "
        "to that of the original.",
    )
    header = ("output", "root mean square", "largest", "cosine", "same top entry")
    yield html_table(header, [difference_row(d) for d in report.drift])


def difference_row(d: Difference) -> tuple[str, ...]:
    same = "-" if d.agreement is None else f"{100 * d.agreement:.1f} %"
    return d.output, format_percent(d.relative), f"{d.max_abs_diff:.3g}", f"{d.cosine:.5f}", same


# -- charts ----------------------------------------------------------------------------------------------------------


def chart_legend(*entries: tuple[str, str]) -> Element:
    return make_element(
        "div",
        {"class": "key"},
        *(make_element("span", None, make_element("i", {"class": kind}), text) for kind, text in entries),
    )


BEFORE_AFTER_LEGEND = (("before", "before"), ("after", "after"))


def role_name(role: str) -> str:
    return ROLE_NAMES.get(role, role)


def widths_section(items: Sequence[GroupWidth]) -> Iterator[Element]:
    yield make_element("h2", None, "Widths")
    yield chart_legend(*BEFORE_AFTER_LEGEND)
    figures = []
    for role, mine in widths_by_role(items).items():
        before, after = (sum(w.blocks * n for w, n in zip(mine, s, strict=True)) for s in units_before_and_after(mine))
        caption = f": {format_count(after)} of {format_count(before)} units kept, {format_share(after, before)}"
        figures.append(
            make_element(
                "figure",
                None,
                figure_caption(role_name(role), f" ({role}){caption}"),
                widths_chart(mine),
            )
        )
    yield make_element("div", {"class": "grid charts"}, *figures)


def units_before_and_after(items: Sequence[GroupWidth]) -> tuple[list[int], list[int]]:
    return [w.size for w in items], [w.kept for w in items]


def macs_section(report: ReportData) -> Iterator[Element]:
    yield make_element("h2", None, "MACs by role")
    at = ", ".join(f"{name} = {size}" for name, size in report.macs_at.items())
    yield make_element(
        "p",
        {"class": "soft"},
        "Multiply-accumulates of one run" + (f" at {at}" if at else "") + ", every product counted once: for the role "
        "whose width is an axis of it.",
    )
    yield chart_legend(*BEFORE_AFTER_LEGEND)
    names = [role_name(pair.name) for pair in report.macs]
    yield make_element(
        "div", {"class": "grid charts"}, make_element("figure", None, before_after_chart(report.macs, names))
    )


def curves_section(items: Sequence[GroupWidth]) -> Iterator[Element]:
    drawn = [item for item in items if item.curve]
    if not drawn:
        return
    low, high = curve_decades(drawn)
    yield make_element("h2", None, "What each width costs")
    yield make_element(
        "p",
        {"class": "soft"},
        "Across: units kept per block. Up: root mean square change of the outputs, relative and on a logarithmic "
        "scale, when this group alone is made narrower. Measured at a few widths; between them the curve is estimated.",
    )
    yield chart_legend(("after", "change of the outputs"), ("chosen", "chosen width"))
    for role, mine in widths_by_role(drawn).items():
        figures = [
            make_element(
                "figure",
                None,
                figure_caption(item.id, f" {item.size} to {item.kept}"),
                curve_chart(item, low, high),
            )
            for item in mine
        ]
        number = f"{role_name(role)} ({role}), {len(mine)} {plural('group', len(mine))}"
        yield make_element(
            "details",
            {"open": "open"},
            make_element("summary", None, number),
            make_element("div", {"class": "grid curves"}, *figures),
        )


# -- fewer tokens ----------------------------------------------------------------------------------------------------


def token_maps_section(report: ReportData) -> Iterator[Element]:
    found = report.token_maps
    if not found.pictures:
        return
    yield make_element("h2", None, "Which patches are left")
    yield make_element(
        "p",
        {"class": "soft"},
        "Calibration pictures, and what is left of them behind each block that has fewer tokens. Patches that were "
        "dropped are nearly black; the more patches share a token, the darker they are.",
    )
    for picture in found.pictures:
        images = [
            make_element(
                "figure",
                None,
                make_element("figcaption", None, f"block {stage.block}: {stage.tokens_left} of {found.tokens}"),
                make_element(
                    "img",
                    {
                        "src": png_data_url(picture.shade_dropped_patches(stage)),
                        "alt": f"patches left behind block {stage.block}",
                    },
                ),
            )
            for stage in picture.stages
        ]
        pixels = png_data_url(np.array(picture.pixels, np.uint8))
        original = make_element("img", {"src": pixels, "alt": "calibration picture"})
        yield make_element("div", {"class": "picture"}, original, make_element("div", {"class": "stages"}, *images))


# -- attention maps --------------------------------------------------------------------------------------------------


def attention_section(report: ReportData) -> Iterator[Element]:
    found = report.attention
    if not found.pictures:
        return
    yield make_element("h2", None, "Where heads look")
    yield make_element(
        "p",
        {"class": "soft"},
        f"Attention of {found.seen_from} over the patches of calibration pictures: left before, right after. Both of "
        "a pair have the same scale, of square roots. The overlap is the share of the attention that stays on its "
        "patches.",
    )
    yield chart_legend(("ramp", "none to most"))
    for picture in found.pictures:
        yield picture_row(picture)


def picture_row(picture: AttentionPicture) -> Element:
    layers: dict[str, list[HeadMap]] = {}
    for item in picture.maps:
        layers.setdefault(item.group, []).append(item)
    rows = [
        make_element(
            "figure", None, figure_caption(group), make_element("div", {"class": "heads"}, *map(head_map_pair, mine))
        )
        for group, mine in layers.items()
    ]
    pixels = png_data_url(np.array(picture.pixels, np.uint8))
    return make_element(
        "div",
        {"class": "picture"},
        make_element("img", {"src": pixels, "alt": "calibration picture"}),
        make_element("div", {"class": "layers"}, *rows),
    )


def figure_caption(group: str, text: str = "") -> Element:
    return make_element("figcaption", None, make_element("b", None, group), text)


def head_map_pair(item: HeadMap) -> Element:
    most = float(np.max([item.before, item.after])) or 1.0
    images = []
    for when, grid in (("before", item.before), ("after", item.after)):
        text = f"{item.group}, head {item.head}, {when}: at most {format_percent(float(np.max(grid)))} on one patch"
        url = png_data_url(apply_colormap(np.sqrt(np.array(grid) / most)))
        images.append(make_element("img", {"src": url, "alt": text, "title": text}))
    caption = make_element("figcaption", None, f"head {item.head}, overlap {100 * item.overlap:.1f} %")
    return make_element("figure", None, make_element("div", {"class": "pair"}, *images), caption)


# -- what is folded away ---------------------------------------------------------------------------------------------


def details_section(report: ReportData) -> Iterator[Element]:
    yield make_element("h2", None, "Details")
    if report.warnings:
        notes = make_element("ul", None, *(make_element("li", None, text) for text in report.warnings))
        yield folded_section(f"Notes ({len(report.warnings)})", notes)
    if report.pins:
        rows = [(p.tensor, str(p.axis), str(p.size), p.reason, p.operator) for p in report.pins]
        header = ("tensor", "axis", "size", "reason", "operator")
        yield folded_section(
            f"Pins: what keeps its width, and why ({len(rows)})", html_table(header, rows, text=(0, 3, 4))
        )
    groups = [
        (
            w.id,
            w.role,
            f"{w.blocks} x {w.size}",
            f"{w.blocks} x {w.kept}",
            format_share(w.kept, w.size),
            weight_origin(w),
        )
        for w in report.widths
    ]
    columns = ("group", "role", "before", "after", "kept", "weights")
    yield folded_section(f"Groups ({len(groups)})", html_table(columns, groups, text=(0, 1, 5)))
    yield folded_section("Checks of the written file", checks_list(report))
    yield folded_section("The run", run_table(report))


def weight_origin(item: GroupWidth) -> str:
    forms = {
        "low_rank_qk": "rotated",
        "low_rank_vo": "rotated",
        "refit": "refitted",
        "score_selection": "selected by scores",
    }
    return forms.get(item.form, "sliced" if item.kept < item.size else "as they were")


def checks_list(report: ReportData) -> Element:
    listed = [make_element("li", None, text) for text in report.structure]
    for d in report.equals_mask:
        text = f"{d.output}: sliced equals masked to {d.relative:.1e} relative, {d.max_abs_diff:.1e} at most"
        listed.append(make_element("li", None, text))
    return make_element("ul", None, *listed)


def run_table(report: ReportData) -> Element:
    rows = [("original", report.model), ("pruned", report.output), ("sha256 of the original", report.digest)]
    rows += [(f"option {name}", option_text(value)) for name, value in report.options.items()]
    rows += [(f"seconds: {name}", f"{seconds:.2f} s") for name, seconds in report.seconds.items()]
    if report.attention.reason:
        rows.append(("no attention maps", report.attention.reason))
    if report.token_maps.reason:
        rows.append(("no pictures of tokens", report.token_maps.reason))
    return html_table(("", ""), rows, text=(0, 1))


def option_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def folded_section(title: str, content: Element) -> Element:
    return make_element("details", None, make_element("summary", None, title), content)
