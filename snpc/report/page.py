"""The page: a report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from snpc.pipeline.planner import Decision
from snpc.pipeline.prune import Pruned
from snpc.report.attention_maps import HeadMap, Picture
from snpc.report.charts import curve_chart, decades, pairs_chart, percent, widths_chart
from snpc.report.data import Pair, Report, Width, by_role, collect, plural
from snpc.report.format import count, share
from snpc.report.markup import Child, Element, el, text_of
from snpc.report.png import coloured, data_url
from snpc.report.style import STYLE
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.bench import Bench
from snpc.runtime.io.atomic import replacing
from snpc.types import Difference

# A page that came from somebody else's model may load and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

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
    result: Pruned,
    target: Path,
    *,
    decision: Decision | None = None,
    calibration: Calibration | None = None,
    bench: Bench | None = None,
) -> Report:
    """Write an HTML page about ``result`` to ``target`` and return what it shows.

    ``decision`` (that the plan is of) gives the loss curves, ``calibration`` the pictures for attention maps of vision
    models, ``bench`` (of the original and the pruned file, in this order) the latency. Raises UserError where
    ``target`` cannot be written.
    """
    report = collect(result, decision=decision, calibration=calibration, bench=bench)
    text = page(report)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return report


def page(report: Report) -> str:
    name = Path(report.model).name
    head = el(
        "head",
        None,
        el("meta", {"charset": "utf-8"}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        el("title", None, f"{name}, pruned"),
        el("style", None, STYLE),
    )
    return text_of(el("html", {"lang": "en"}, head, el("body", None, el("main", None, *sections(report, name)))))


def sections(report: Report, name: str) -> Iterator[Element]:
    yield el("header", None, el("h1", None, f"{name}, pruned"), el("p", {"class": "soft"}, report.done))
    yield el("div", {"class": "grid cards"}, *(card(pair) for pair in report.costs), drift_card(report))
    yield from drift(report)
    yield from widths(report.widths)
    yield from macs(report)
    yield from curves(report.widths)
    yield from tokens(report)
    yield from attention(report)
    yield from rest(report)


# -- the headline ----------------------------------------------------------------------------------------------------


def amount(pair: Pair, number: float) -> str:
    if pair.unit in ("", "B"):
        text = count(number) + pair.unit
        return f"{number:.0f} {pair.unit}" if pair.unit and abs(number) < 1000 else text
    return f"{number:.3g} {pair.unit}"


def card(pair: Pair) -> Element:
    exact = f"{pair.before:,.6g} before, {pair.after:,.6g} after"
    if pair.unit in ("", "B"):
        exact = f"{pair.before:,.0f} before, {pair.after:,.0f} after"
    return el(
        "div",
        {"class": "card", "title": exact},
        el("span", None, pair.name),
        el("b", None, amount(pair, pair.after)),
        el("span", None, f"from {amount(pair, pair.before)}, now {share(pair.after, pair.before)}"),
    )


def drift_card(report: Report) -> Child:
    if not report.drift:
        return None
    worst = max(report.drift, key=lambda d: d.relative)
    same = f", same top entry in {100 * worst.agreement:.1f} %" if worst.agreement is not None else ""
    return el(
        "div",
        {"class": "card"},
        el("span", None, "drift of the outputs"),
        el("b", None, percent(worst.relative)),
        el("span", None, f"{worst.output}{same}"),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> Element:
    def cells(tag: str, row: Sequence[str]) -> Element:
        return el("tr", None, *(el(tag, {"class": "text"} if k in text else None, c) for k, c in enumerate(row)))

    body = el("tbody", None, *(cells("td", row) for row in rows))
    return el("div", {"class": "wide"}, el("table", None, el("thead", None, cells("th", header)), body))


def drift(report: Report) -> Iterator[Element]:
    if not report.drift:
        return
    yield el("h2", None, "Drift of the outputs")
    yield el(
        "p",
        {"class": "soft"},
        f"The written file against the original, on {report.compared}. Root mean square of the difference is relative "
        "to that of the original.",
    )
    header = ("output", "root mean square", "largest", "cosine", "same top entry")
    yield table(header, [difference(d) for d in report.drift])


def difference(d: Difference) -> tuple[str, ...]:
    same = "-" if d.agreement is None else f"{100 * d.agreement:.1f} %"
    return d.output, percent(d.relative), f"{d.max_abs_diff:.3g}", f"{d.cosine:.5f}", same


# -- charts ----------------------------------------------------------------------------------------------------------


def key(*entries: tuple[str, str]) -> Element:
    return el("div", {"class": "key"}, *(el("span", None, el("i", {"class": kind}), text) for kind, text in entries))


BEFORE_AFTER = (("before", "before"), ("after", "after"))


def role_name(role: str) -> str:
    return ROLE_NAMES.get(role, role)


def widths(items: Sequence[Width]) -> Iterator[Element]:
    yield el("h2", None, "Widths")
    yield key(*BEFORE_AFTER)
    figures = []
    for role, mine in by_role(items).items():
        before, after = (sum(w.blocks * n for w, n in zip(mine, s, strict=True)) for s in sizes(mine))
        caption = f": {count(after)} of {count(before)} units kept, {share(after, before)}"
        figures.append(
            el(
                "figure",
                None,
                named(role_name(role), f" ({role}){caption}"),
                widths_chart(mine),
            )
        )
    yield el("div", {"class": "grid charts"}, *figures)


def sizes(items: Sequence[Width]) -> tuple[list[int], list[int]]:
    return [w.size for w in items], [w.kept for w in items]


def macs(report: Report) -> Iterator[Element]:
    yield el("h2", None, "MACs by role")
    at = ", ".join(f"{name} = {size}" for name, size in report.macs_at.items())
    yield el(
        "p",
        {"class": "soft"},
        "Multiply-accumulates of one run" + (f" at {at}" if at else "") + ", every product counted once: for the role "
        "whose width is an axis of it.",
    )
    yield key(*BEFORE_AFTER)
    names = [role_name(pair.name) for pair in report.macs]
    yield el("div", {"class": "grid charts"}, el("figure", None, pairs_chart(report.macs, names)))


def curves(items: Sequence[Width]) -> Iterator[Element]:
    drawn = [item for item in items if item.curve]
    if not drawn:
        return
    low, high = decades(drawn)
    yield el("h2", None, "What each width costs")
    yield el(
        "p",
        {"class": "soft"},
        "Across: units kept per block. Up: root mean square change of the outputs, relative and on a logarithmic "
        "scale, when this group alone is made narrower. Measured at a few widths; between them the curve is estimated.",
    )
    yield key(("after", "change of the outputs"), ("chosen", "chosen width"))
    for role, mine in by_role(drawn).items():
        figures = [
            el(
                "figure",
                None,
                named(item.id, f" {item.size} to {item.kept}"),
                curve_chart(item, low, high),
            )
            for item in mine
        ]
        number = f"{role_name(role)} ({role}), {len(mine)} {plural('group', len(mine))}"
        yield el(
            "details", {"open": "open"}, el("summary", None, number), el("div", {"class": "grid curves"}, *figures)
        )


# -- fewer tokens ----------------------------------------------------------------------------------------------------


def tokens(report: Report) -> Iterator[Element]:
    found = report.survivors
    if not found.pictures:
        return
    yield el("h2", None, "Which patches are left")
    yield el(
        "p",
        {"class": "soft"},
        "Calibration pictures, and what is left of them behind each block that has fewer tokens. Patches that were "
        "dropped are nearly black; the more patches share a token, the darker they are.",
    )
    for picture in found.pictures:
        images = [
            el(
                "figure",
                None,
                el("figcaption", None, f"block {stage.block}: {stage.left} of {found.tokens}"),
                el("img", {"src": data_url(picture.shaded(stage)), "alt": f"patches left behind block {stage.block}"}),
            )
            for stage in picture.stages
        ]
        pixels = data_url(np.array(picture.pixels, np.uint8))
        original = el("img", {"src": pixels, "alt": "calibration picture"})
        yield el("div", {"class": "picture"}, original, el("div", {"class": "stages"}, *images))


# -- attention maps --------------------------------------------------------------------------------------------------


def attention(report: Report) -> Iterator[Element]:
    found = report.attention
    if not found.pictures:
        return
    yield el("h2", None, "Where heads look")
    yield el(
        "p",
        {"class": "soft"},
        f"Attention of {found.seen_from} over the patches of calibration pictures: left before, right after. Both of "
        "a pair have the same scale, of square roots. The overlap is the share of the attention that stays on its "
        "patches.",
    )
    yield key(("ramp", "none to most"))
    for picture in found.pictures:
        yield picture_row(picture)


def picture_row(picture: Picture) -> Element:
    layers: dict[str, list[HeadMap]] = {}
    for item in picture.maps:
        layers.setdefault(item.group, []).append(item)
    rows = [
        el("figure", None, named(group), el("div", {"class": "heads"}, *map(pair, mine)))
        for group, mine in layers.items()
    ]
    pixels = data_url(np.array(picture.pixels, np.uint8))
    return el(
        "div",
        {"class": "picture"},
        el("img", {"src": pixels, "alt": "calibration picture"}),
        el("div", {"class": "layers"}, *rows),
    )


def named(group: str, text: str = "") -> Element:
    return el("figcaption", None, el("b", None, group), text)


def pair(item: HeadMap) -> Element:
    most = float(np.max([item.before, item.after])) or 1.0
    images = []
    for when, grid in (("before", item.before), ("after", item.after)):
        text = f"{item.group}, head {item.head}, {when}: at most {percent(float(np.max(grid)))} on one patch"
        url = data_url(coloured(np.sqrt(np.array(grid) / most)))
        images.append(el("img", {"src": url, "alt": text, "title": text}))
    caption = el("figcaption", None, f"head {item.head}, overlap {100 * item.overlap:.1f} %")
    return el("figure", None, el("div", {"class": "pair"}, *images), caption)


# -- what is folded away ---------------------------------------------------------------------------------------------


def rest(report: Report) -> Iterator[Element]:
    yield el("h2", None, "Details")
    if report.warnings:
        notes = el("ul", None, *(el("li", None, text) for text in report.warnings))
        yield folded(f"Notes ({len(report.warnings)})", notes)
    if report.pins:
        rows = [(p.tensor, str(p.axis), str(p.size), p.reason, p.operator) for p in report.pins]
        header = ("tensor", "axis", "size", "reason", "operator")
        yield folded(f"Pins: what keeps its width, and why ({len(rows)})", table(header, rows, text=(0, 3, 4)))
    groups = [
        (w.id, w.role, f"{w.blocks} x {w.size}", f"{w.blocks} x {w.kept}", share(w.kept, w.size), made(w))
        for w in report.widths
    ]
    columns = ("group", "role", "before", "after", "kept", "weights")
    yield folded(f"Groups ({len(groups)})", table(columns, groups, text=(0, 1, 5)))
    yield folded("Checks of the written file", checks(report))
    yield folded("The run", run(report))


def made(item: Width) -> str:
    forms = {"scores": "rotated", "values": "rotated", "refit": "refitted", "coupled": "selected by scores"}
    return forms.get(item.form, "sliced" if item.kept < item.size else "as they were")


def checks(report: Report) -> Element:
    listed = [el("li", None, text) for text in report.structure]
    for d in report.equals_mask:
        text = f"{d.output}: sliced equals masked to {d.relative:.1e} relative, {d.max_abs_diff:.1e} at most"
        listed.append(el("li", None, text))
    return el("ul", None, *listed)


def run(report: Report) -> Element:
    rows = [("original", report.model), ("pruned", report.output), ("sha256 of the original", report.digest)]
    rows += [(f"option {name}", words(value)) for name, value in report.options.items()]
    rows += [(f"seconds: {name}", f"{seconds:.2f} s") for name, seconds in report.seconds.items()]
    if report.attention.reason:
        rows.append(("no attention maps", report.attention.reason))
    if report.survivors.reason:
        rows.append(("no pictures of tokens", report.survivors.reason))
    return table(("", ""), rows, text=(0, 1))


def words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def folded(title: str, content: Element) -> Element:
    return el("details", None, el("summary", None, title), content)
