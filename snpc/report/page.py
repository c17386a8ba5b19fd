"""The report page: one HTML file that loads nothing else. ``templates/page.html.j2`` is its markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpc.errors import UserError
from snpc.pipeline import PrunedModel, PruningPlan, describe_approximation
from snpc.report.attention_maps import AttentionPicture, HeadMap
from snpc.report.charts import PICTURE_SUFFIXES, curve_chart, curve_decades, write_picture
from snpc.report.comparison import FileComparison
from snpc.report.data import (
    FileReport,
    GroupWidth,
    Measured,
    ReportData,
    collect_comparison_data,
    collect_report_data,
    plural,
    widths_by_role,
)
from snpc.report.figures import (
    Figure,
    latency_figure,
    macs_figure,
    overview_chart,
    role_name,
    speedup_of,
    width_figures,
)
from snpc.report.format import format_count, format_percent, format_share
from snpc.report.png import apply_colormap
from snpc.report.quality_text import (
    MEANINGS,
    TASK_METRIC_TEXTS,
    drift_text,
    perplexity_text,
    quality_words,
    score_words,
    task_text,
)
from snpc.report.render import image_url, render_template
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import BenchResult
from snpc.runtime.io import atomic_write
from snpc.types import Difference

# A page that came from somebody else's model may load and run nothing.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

WEIGHT_ORIGINS = {
    "low_rank_qk": "rotated",
    "low_rank_vo": "rotated",
    "refit": "refitted",
    "score_selection": "selected by scores",
    "score_refit": "selected by scores",
}


def write_report(
    result: PrunedModel | FileComparison,
    path: Path | str,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    bench: BenchResult | None = None,
    command: str = "",
) -> ReportData:
    """Write a page about ``result`` to ``path``, HTML or its charts alone as .svg or .png, and return what it shows.

    ``result``: a model that was just pruned, or files that ``compare_files`` compared with their original. ``plan``
    gives the loss curves, ``calibration`` (default: the plan's) the pictures for the attention maps of vision models,
    ``bench`` (of the original and the files, in this order) the latency, ``command`` what was typed to prune. Raises
    UserError where ``path`` cannot be written, and for options of a pruned model beside a comparison.
    """
    if isinstance(result, FileComparison):
        if plan is not None or calibration is not None or command:
            raise UserError("a comparison has its own data: plan, calibration and command are of a pruned model")
        report = collect_comparison_data(result, bench=bench)
    else:
        if calibration is None and plan is not None:
            calibration = plan.calibration
        report = collect_report_data(result, plan=plan, calibration=calibration, bench=bench, command=command)
    if Path(path).suffix in PICTURE_SUFFIXES:
        write_picture(overview_chart(report, lead(report)), Path(path))
        return report
    text = render_page(report)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return report


def render_page(report: ReportData) -> str:
    """The page as HTML."""
    single, pruned = len(report.files) == 1, report.options is not None
    names = tuple(file.name for file in report.files)
    return render_template(
        "page.html.j2",
        report=report,
        policy=CONTENT_SECURITY_POLICY,
        title=page_title(report),
        lead=lead(report),
        key=[("before", "original"), *((f"file{k}", name) for k, name in enumerate(names))],
        cards=cards(report) if single else [],
        glance=[] if single else glance_rows(report),
        names=names,
        sections=[file_section(file) for file in report.files],
        drift_rows=[
            ((file.name,) if not single else ()) + drift_row(d) for file in report.files for d in file.differences
        ],
        width_figures=width_figures(report),
        macs_at=", ".join(f"{name} = {size}" for name, size in report.macs_at.items()),
        macs_figure=macs_figure(report),
        latency=latency_figure(report),
        curve_sections=curve_sections(report.widths),
        attention_rows=[attention_row(picture) for picture in report.attention.pictures],
        pin_rows=[(p.tensor, p.axis, p.size, p.reason, p.operator) for p in report.pins],
        group_rows=[(*group_row(w), *([weights_cell(w)] if pruned else [])) for w in report.widths],
        weights=("weights",) if pruned else (),
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


def page_title(report: ReportData) -> str:
    name = Path(report.model).name
    if report.options is not None:
        return f"{name}, pruned"
    count = len(report.files)
    return f"{report.files[0].name if count == 1 else f'{count} files'} beside {name}"


def lead(report: ReportData) -> str:
    """What the one file is and what that cost, in a sentence or two; of several files, what the page shows."""
    name = Path(report.model).name
    if len(report.files) > 1:
        return f"What {len(report.files)} files keep of {name}, what that cost, and how fast they are."
    (file,) = report.files
    shares = [
        f"{format_share(after, row.before)} of the {row.name}"
        for row in report.costs
        if row.unit == "" and (after := row.after[0]) is not None and row.before
    ]
    kept = f"keeps {' and '.join(shares)} of {name}" if shares else f"was made of {name}"
    speed = speedup_of(report, 0)
    faster = f" and runs {speed.ratio:.2f} times as fast" if speed is not None else ""
    words = score_words(file.task) if file.task is not None else quality_words(file.differences, file.grade)
    return f"{file.name} {kept}{faster}. {words}"


def cards(report: ReportData) -> list[Card]:
    """Of the one file: MACs and parameters, what it cost, and how fast it is, or how large where that is not
    measured."""
    costs = {row.name: row for row in report.costs}
    last = "latency" if "latency" in costs else "size on disk"
    shown = [cost_card(costs[name]) for name in ("MACs", "parameters", last) if costs[name].after[0] is not None]
    speed = speedup_of(report, 0)
    if speed is not None:
        interval = f"{speed.low:.2f} to {speed.high:.2f}"
        note = f"{costs['latency'].after[0]:.3g} ms, from {costs['latency'].before:.3g} ms"
        shown[-1] = Card("speed-up", f"{speed.ratio:.2f} x", note, f"95 % interval {interval}")
    return [*shown[:2], quality_card(report.files[0]), *shown[2:]]


def cost_card(row: Measured) -> Card:
    after = row.after[0] or 0.0
    note = f"from {format_amount(row, row.before)} to {format_amount(row, after)}"
    return Card(row.name, format_share(after, row.before), note, f"{row.before:,.0f} before, {after:,.0f} after")


def format_amount(row: Measured, number: float) -> str:
    """A number with its unit, as on a card."""
    if row.unit in ("", "B"):
        text = format_count(number) + row.unit
        return f"{number:.0f} {row.unit}" if row.unit and abs(number) < 1000 else text
    return f"{number:.3g} {row.unit}"


def quality_card(file: FileReport) -> Card:
    """The score on labels; without any, the perplexity of a language model, or the output that changed most."""
    if file.task is not None:
        found = file.task
        lost = f"{abs(found.drop):.2g} points {'lost' if found.drop > 0 else 'gained'}"
        return Card(
            TASK_METRIC_TEXTS.get(found.metric, found.metric),
            f"{100 * found.after:.4g} %",
            f"from {100 * found.before:.4g} %, {lost}",
        )
    for perplexity in (d.perplexity for d in file.differences if d.perplexity is not None):
        note = f"from {perplexity.before:.4g}, now x {perplexity.factor:.3g}"
        return Card("perplexity", f"{perplexity.after:.4g}", note, perplexity_text(perplexity))
    if not file.differences:
        return Card("quality", "not known", "outputs were not compared")
    worst = max(file.differences, key=lambda d: d.relative)
    note = f"{file.grade}: {MEANINGS[file.grade]}" if file.grade in MEANINGS else "of random inputs, or not graded"
    return Card("drift of the outputs", format_percent(worst.relative), note, f"{worst.output}: {drift_text(worst)}")


def glance_rows(report: ReportData) -> list[tuple[str, ...]]:
    """A row for each number, a column for the original and for each file."""
    rows = [(row.name, format_amount(row, row.before), *amount_cells(row)) for row in report.costs]
    speeds = [speedup_of(report, index) for index in range(len(report.files))]
    if any(speeds):
        rows.append(("speed-up", "1.00 x", *(f"{s.ratio:.2f} x" if s is not None else "-" for s in speeds)))
    quality = [quality_card(file) for file in report.files]
    for name in dict.fromkeys(card.name for card in quality):
        before = {task.before for task in (file.task for file in report.files) if task is not None}
        first = f"{100 * before.pop():.4g} %" if len(before) == 1 else ""
        rows.append((name, first, *(card.value if card.name == name else "-" for card in quality)))
    return [*rows, ("grade", "", *(file.grade for file in report.files))]


def amount_cells(row: Measured) -> Iterator[str]:
    for number in row.after:
        if number is None:
            yield "not known"
        else:
            yield f"{format_amount(row, number)} ({format_share(number, row.before)})"


def drift_row(d: Difference) -> tuple[str, ...]:
    same = f"{100 * d.agreement:.1f} %" if d.agreement is not None and d.metric == "kl" else "-"
    distance = f"{d.metric} {d.distance:.3g}" if d.metric != "none" else "not judged"
    return d.output, distance, format_percent(d.relative), f"{d.max_abs_diff:.3g}", f"{d.cosine:.5f}", same


@dataclass(frozen=True)
class FileSection:
    """What the page says of one file: ``task``, its score."""

    file: FileReport
    task: str
    checks: tuple[str, ...]


def file_section(file: FileReport) -> FileSection:
    task = task_text(file.task) if file.task is not None else ""
    checks = (*file.structure, *map(mask_check, file.equals_mask))
    return FileSection(file, task, checks)


# -- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveSection:
    """The loss curves of one role."""

    title: str
    figures: tuple[Figure, ...]


def curve_sections(items: Sequence[GroupWidth]) -> list[CurveSection]:
    """By role; all charts share one scale, so that they can be compared."""
    measured = [item for item in items if item.curve]
    if not measured:
        return []
    low, high = curve_decades(measured)
    sections = []
    for role, widths in widths_by_role(measured).items():
        figures = tuple(Figure(w.id, f" {w.size} to {w.kept[0]}", curve_chart(w, low, high)) for w in widths)
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
    """A row of the table of groups: a cell for each file behind the first three."""
    after = ("not known" if kept is None else f"{item.blocks} x {kept}" for kept in item.kept)
    return item.id, item.role, f"{item.blocks} x {item.size}", *after


def weights_cell(item: GroupWidth) -> str:
    """Where the weights of a group come from, of a model that was just pruned."""
    narrower = any(kept is not None and kept < item.size for kept in item.kept)
    origin = WEIGHT_ORIGINS.get(item.form, "sliced" if narrower else "as they were")
    if item.normalized_inside and narrower:
        origin += f"; approximate: {describe_approximation(item.role, item.form)}"
    return origin


def mask_check(d: Difference) -> str:
    return f"{d.output}: sliced equals masked to {d.relative:.1e} relative, {d.max_abs_diff:.1e} at most"


def run_rows(report: ReportData) -> list[tuple[str, str]]:
    """What was run, with which options, and how long it took."""
    rows = [("original", report.model), ("sha256 of the original", report.digest)]
    rows += [(file.name, file.path) for file in report.files]
    rows += [(f"option {name}", option_text(value)) for name, value in (report.options or {}).items()]
    rows += [(f"seconds: {name}", f"{seconds:.2f} s") for name, seconds in (report.seconds or {}).items()]
    if report.attention.reason:
        rows.append(("no attention maps", report.attention.reason))
    if report.token_maps.reason:
        rows.append(("no pictures of tokens", report.token_maps.reason))
    return rows


def option_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
