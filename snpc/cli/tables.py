"""Results as text: rich tables on a terminal, plain aligned lines in a pipe."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from snpc.criteria import Description
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.quantization import describe_quantization, is_mostly_quantized
from snpc.passes.token_analysis import TokenPoint
from snpc.pipeline import PrunedModel, PruningPlan, SearchResult, SweepResult, describe_approximation, describe_stream
from snpc.planning import ProvenanceStep, SlicePlan, read_provenance
from snpc.report import (
    ReportData,
    dequantization_text,
    describe_method,
    drift_text,
    format_count,
    format_share,
    glance_rows,
    history_text,
    output_lines,
    quality_text,
    quality_warning,
    requantization_text,
    restriction_text,
    rewrite_text,
    step_text,
    task_text,
)
from snpc.runtime.closed_form import ClosedForms
from snpc.runtime.evaluation import BenchResult
from snpc.targets import BuildResult, slower_decoding_text
from snpc.types import ClosedFormKind, Cost, FloatArray, Group, Model, Quality, TensorSpec, Verdict, shape_text

if TYPE_CHECKING:  # this needs torch
    from snpc.torch import FinetuneResult


# What a terminal would act on, or a line would break at: control characters, marks that turn the direction of text,
# separators of lines, halves of surrogate pairs (from file names that are not UTF-8).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# in click's ``Context.meta``:
QUIET_KEY = "snpc.quiet"  # was --quiet given?
CLEAR_KEY = "snpc.clear"  # a function that takes what is drawn on the terminal away, before other text is printed


def printable(text: str) -> str:
    """The text in one line, with escapes for what does not show: names in a model may hold anything."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def print_text(text: str, err: bool = False, color: bool | None = None) -> None:
    """Print a text as it is; characters that the stream cannot encode become escapes. Raises UserError where stdout
    cannot be written; a reader that went away ends the command silently."""
    context = click.get_current_context(silent=True)
    clear = context.meta.get(CLEAR_KEY) if context is not None else None
    if clear is not None:
        clear()
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err, color=color)
    except OSError as error:
        refuse_full_stdout(error)


def refuse_full_stdout(error: OSError) -> NoReturn:
    """UserError for a stdout that takes nothing more, as on a full disk. What is left in its buffer is dropped: Python
    would try to write it again at the end."""
    if error.errno == errno.EPIPE:
        raise error
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise UserError(f"stdout cannot be written ({error.strerror or error}); files that were asked for are complete")


def print_line(text: str) -> None:
    print_text(printable(text))


def is_quiet() -> bool:
    """Does the command that runs print results, warnings and errors only (``--quiet``)?"""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET_KEY))


def print_note(text: str) -> None:
    """Print a remark to stderr, so that pipes get results only. ``--quiet`` leaves it out."""
    print_step(f"note: {text}")


def print_step(text: str) -> None:
    """Print to stderr what is about to be done, or what may follow. ``--quiet`` leaves it out."""
    if not is_quiet():
        print_error(text)


def print_error(text: str) -> None:
    """Print to stderr why a command ends."""
    print_text(printable(f"snpc: {text}"), err=True)


def print_warning(text: str, err: bool = True) -> None:
    """Print what may cost the user the model; bold on a terminal. ``err``: to stderr; else it is part of the result."""
    head = click.style("snpc: warning:" if err else "WARNING:", bold=True, fg="red")
    print_text(f"{head} {printable(text)}", err=err, color=False if os.environ.get("NO_COLOR") else None)


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print rows of cells under a header.

    ``right``: indices of the columns of numbers. ``spare``: names of the columns that a narrow terminal leaves out, the
    first ones first; a pipe gets all columns.
    """
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(str(r[k])) for r in (header, *rows)) for k in range(len(header))]
    if sys.stdout is not None and sys.stdout.isatty():  # None: it was closed
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        shown = [header[k] for k in fitting_columns(console.width, header, widths, spare)]
        drawn = Table(title=Text(printable(title)), title_justify="left")
        for k, name in enumerate(header):
            if name in shown:
                number = k in right
                drawn.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
        for row in rows:
            drawn.add_row(*(Text(cell) for name, cell in zip(header, row, strict=True) if name in shown))  # no markup
        try:
            console.print(drawn)
        except OSError as error:
            refuse_full_stdout(error)
        return
    print_line(title)
    for row in (header, *rows):
        cells = (c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        print_line("  " + "  ".join(cells).rstrip())


def fitting_columns(line_width: int, header: Sequence[str], widths: Sequence[int], spare: Sequence[str]) -> list[int]:
    """Indices of the columns to show in ``line_width`` characters, borders included. Only ``spare`` columns are left
    out, in their order, until the rest fits."""
    columns = list(range(len(header)))
    for k in (k for name in spare for k in range(len(header)) if header[k] == name):
        if sum(widths[k] + 3 for k in columns) + 1 <= line_width:
            break
        columns.remove(k)
    return columns


# -- inspect ---------------------------------------------------------------------------------------------------------


def group_cost_row(group: Group, cost: Cost) -> tuple[str, ...]:
    freedom = group.freedom if not group.pins else "pinned"
    return (
        group.id,
        group.role,
        str(group.layer),
        f"{group.blocks} x {group.size}",
        freedom,
        format_share(group.macs, cost.macs),
        format_share(group.params, cost.params),
    )


def print_groups(analysis: Analysis) -> None:
    """The costs of the model, its groups, and what can be pruned."""
    cost = analysis.cost
    sizes = ", ".join(f"{k}={v}" for k, v in analysis.dim_sizes.items())
    at = f" at {sizes}" if sizes else ""
    print_line(
        f"{analysis.model.source}: {format_count(cost.params)} parameters, {format_count(cost.macs)} MACs{at}, "
        f"{cost.nodes} nodes"
    )
    for title, tensors in (("inputs", analysis.model.inputs), ("outputs", analysis.model.outputs)):
        print_line(f"{title}: {tensors_text(tensors)}")
    print_history(read_provenance(analysis.model.graph))
    quantization = describe_quantization(analysis.model, cost)
    if quantization:
        print_line(quantization)
    print_dequantization(analysis.model)
    if cost.not_counted:
        print_line(f"MACs not counted: {', '.join(cost.not_counted)}")
    if analysis.dead_macs:
        print_line(
            f"rows that no output depends on: {format_share(analysis.dead_macs, cost.macs)} of the MACs, "
            "dropped without loss"
        )
    rows = [group_cost_row(g, cost) for g in analysis.groups]
    if rows:
        print_table(
            "groups", ("group", "role", "layer", "blocks x size", "freedom", "MACs", "params"), rows, right=(2, 5, 6)
        )
    restricted = Counter((g.freedom, g.freedom_reason) for g in analysis.groups if g.freedom != "basis" and not g.pins)
    for (freedom, reason), number in restricted.items():
        print_line(f"  {freedom} ({number} group{'s' if number > 1 else ''}): {reason}")
    print_token_points(analysis)
    counts = Counter(g.role for g in analysis.groups if g.prunable)
    print_line("prunable: " + (", ".join(f"{n} {role}" for role, n in counts.items()) or "nothing"))


def print_history(steps: Sequence[ProvenanceStep]) -> None:
    """How snpc made a file, where it says so: in a sentence, and step by step."""
    if steps:
        print_line(f"made by snpc: {history_text(steps)}")
    for step in steps:
        print_line(f"  {step_text(step)}")


def tensors_text(tensors: Sequence[TensorSpec], shown: int = 4) -> str:
    """Names, types and shapes; of the caches of a decoder there may be a hundred."""
    words = [f"{tensor.name} {tensor.dtype}{shape_text(tensor.shape)}" for tensor in tensors[:shown]]
    return ", ".join([*words, *([f"and {len(tensors) - shown} others"] if len(tensors) > shown else [])])


def print_sublayers(analysis: Analysis) -> None:
    """The layers beside the residual stream, what goes with each, and why some cannot go."""
    cost = analysis.cost
    rows = [
        (s.name, s.kind, format_share(s.macs, cost.macs), format_share(s.params, cost.params), s.reason or "can go")
        for s in analysis.sublayers
    ]
    if rows:
        print_table("layers", ("layer", "kind", "MACs", "params", "whole"), rows, right=(2, 3))


def print_token_points(analysis: Analysis) -> None:
    """After which blocks tokens can be dropped or merged, and why not after the others."""
    for count, leading, points in token_spans(analysis):
        first, last = points[0], points[-1]
        number = count if first.fixed_length else "as many as the input has"
        blocks = f"block {first.block}" if first is last else f"blocks {first.block} to {last.block}"
        where = f"after {blocks} of {analysis.tokens.blocks}"
        merged = f"can be merged {where}, and are back by block {last.exits[-1].block}" if first.exits else ""
        stays = ["the first always stays" if leading == 1 else f"the first {leading} always stay"] if leading else []
        stays += [f"{first.staying - leading} learned ones behind stay too"] if first.protected else []
        notes = [f"methods: {methods_at(first)}", *stays]
        print_line(f"tokens: {number}, {merged or f'can get fewer {where}'} ({'; '.join(notes)})")
    for pin in analysis.tokens.pins:
        print_line(f"tokens: stay as many where {pin.reason} ({pin.operator})")


def methods_at(point: TokenPoint) -> str:
    """The token methods that can be used there."""
    if point.side_input:
        return "topk, adaptive" if point.scores is not None else "none, as there are no attention weights to choose by"
    dropping = point.scores is not None and not point.exits
    possible = {
        "topk": dropping,
        "fuse": dropping and point.fixed_length,
        "merge": True,
        "guided": point.scores is not None,
        "energy": point.fixed_length,
        "adaptive": dropping,
    }
    return ", ".join(name for name, can_be_used in possible.items() if can_be_used)


def run_key(point: TokenPoint) -> tuple[int, int, int, str, int]:
    """What points of one run have in common."""
    return point.count, point.leading, point.staying, methods_at(point), point.exits[-1].block if point.exits else 0


def token_spans(analysis: Analysis) -> list[tuple[int, int, list[TokenPoint]]]:
    """(token count, leading tokens that are kept, points) of every run of consecutive blocks with the same values and
    last exits."""
    spans: list[tuple[int, int, list[TokenPoint]]] = []
    for point in analysis.tokens.points:
        last = spans[-1][2][-1] if spans else None
        same = last is not None and (last.block + 1, *run_key(last)) == (point.block, *run_key(point))
        if same:
            spans[-1][2].append(point)
        else:
            spans.append((point.count, point.leading, [point]))
    return spans


def print_loss_curves(analysis: Analysis, curves: Mapping[str, FloatArray]) -> None:
    """Change of the outputs (root of ``OutputMetrics.change``) when one group keeps a share of its units and all others
    keep theirs.

    ``curves``: group id -> [size + 1], change of the outputs by units kept per block.
    """
    shares = (0.9, 0.75, 0.5, 0.25)
    rows = [
        (g.id, *(f"{100 * float(curves[g.id][max(1, round(g.size * s))]) ** 0.5:.1f} %" for s in shares))
        for g in analysis.groups
        if g.id in curves
    ]
    header = ("group", *(f"{100 * s:.0f} % kept" for s in shares))
    print_table("change of the outputs, one group at a time", header, rows, right=(1, 2, 3, 4))


def print_dequantization(model: Model) -> None:
    """How the float model was made of a quantized file, and how much that changed."""
    if model.dequantization is not None:
        print_line(dequantization_text(model.dequantization))
    if model.restriction is not None:
        print_line(f"restricted: {restriction_text(model.restriction)}")


def print_pins(analysis: Analysis) -> None:
    """The axes that keep their size, with reasons. Those of a quantized model without a float graph are not listed:
    most are reached through nodes that are not looked into."""
    if analysis.pins and analysis.model.quantized is None and is_mostly_quantized(analysis.cost):
        print_line(f"pinned: {len(analysis.pins)} axes, as quantized nodes are not looked into (--json lists them)")
    elif analysis.pins:
        rows = [(p.tensor, str(p.axis), str(p.size), p.reason, p.operator) for p in analysis.pins]
        print_table("pinned (keeps its width)", ("tensor", "axis", "size", "reason", "operator"), rows, right=(1, 2))


def print_skipped_groups(closed_forms: ClosedForms | None) -> None:
    """Note the groups that no closed form fits, by reason."""
    if closed_forms is not None and closed_forms.skipped:
        reasons = Counter(closed_forms.skipped.values())
        text = "; ".join(f"{number}: {reason}" for reason, number in reasons.items())
        count = len(closed_forms.skipped)
        groups = "group is" if count == 1 else "groups are"
        print_note(f"{count} {groups} selected and sliced without refitting ({text})")


# -- plan and result -------------------------------------------------------------------------------------------------


def print_plan(plan: SlicePlan) -> None:
    """The width of each group of a plan, before and after."""
    print_removed_layers(plan)
    rows = []
    for g in plan.analysis.groups:
        if g.id in plan.keep:
            rows.append(
                (
                    g.id,
                    g.role,
                    f"{g.blocks} x {g.size}",
                    f"{g.blocks} x {plan.kept_width(g)}",
                    format_share(plan.kept_width(g), g.size),
                )
            )
    if rows or plan.analysis.removal is None:
        print_table(f"plan by {plan.criterion}", ("group", "role", "now", "kept", "share"), rows, right=(4,))
    print_streams(plan)
    if plan.method == "select":
        print_approximations(plan, {})
    else:
        kinds = {group_id: plan.analysis.weights[group_id].kind for group_id in plan.keep}
        print_approximations(plan, {group_id: kind for group_id, kind in kinds.items() if kind is not None})


def print_approximations(plan: SlicePlan, forms: Mapping[str, ClosedFormKind]) -> None:
    """What is approximate about the cut, a line each. ``forms``: closed forms by group id."""
    cut: dict[str, list[str]] = defaultdict(list)
    for group in plan.analysis.groups:
        if group.normalized_inside and plan.kept_width(group) < group.size:
            cut[describe_approximation(group.role, forms.get(group.id))].append(group.id)
    for text, names in cut.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        advice = "; refitting takes --calib DATA, and another method than select" if "not refitted" in text else ""
        print_line(f"approximate: {text}: {names[0]}{more}, whose statistics are now over fewer units{advice}")


def print_result(result: PrunedModel) -> None:
    """Costs before and after, what was removed, what was verified, and the time of each stage."""
    before, after = result.before, result.after
    rows = [
        (name, format_count(a), format_count(b), format_share(b, a))
        for name, a, b in (
            ("parameters", before.params, after.params),
            ("MACs", before.macs, after.macs),
            ("bytes on disk", before.bytes, after.bytes),
            ("nodes", before.nodes, after.nodes),
            *([("cache, bytes per token", *result.cache_bytes)] if result.cache_bytes[0] else []),
        )
    ]
    print_dequantization(result.plan.analysis.model)
    print_table(f"{result.path}", ("", "before", "after", "after/before"), rows, right=(1, 2, 3))
    if result.missed_target:
        print_warning(f"target {result.missed_target}")
    removed = Counter({g.role: 0 for g in result.plan.analysis.groups if g.id in result.plan.keep})
    total: Counter[str] = Counter()
    for g in result.plan.analysis.groups:
        if g.role in removed and g.prunable:
            removed[g.role] += g.blocks * (g.size - result.plan.kept_width(g))
            total[g.role] += g.blocks * g.size
    print_line(
        "removed: "
        + (", ".join(f"{format_share(n, total[role])} of {role}" for role, n in removed.items()) or "nothing")
        + f" ({describe_method(result)}{', ' + result.calibration if result.calibration else ', no data'})"
    )
    print_removed_layers(result.plan)
    print_streams(result.plan)
    slower = slower_decoding_text(*result.head_size) if result.head_size else ""
    if slower:
        print_note(slower)
    for sampled in result.sampled_rows:
        print_line(sampled.describe())
    print_approximations(result.plan, result.closed_forms)
    reduction = result.plan.analysis.reduction
    if reduction is not None:
        steps = reduction.to_json()["steps"]
        where = ""
        if "on_average" in steps[-1]:
            where = " on average of the calibration inputs, at which MACs are quoted"
        elif "any_length" in steps[-1]:
            where = " at the length at which MACs are quoted"
        print_line(f"tokens: {reduction.summary}{where}")
    if result.search is not None:
        print_line(search_text(result.search))
    seconds = [(name, f"{value:.2f}") for name, value in result.seconds.items()]
    print_line("seconds: " + ", ".join(f"{name} {value}" for name, value in seconds if float(value)))
    print_verdict(result.verification)
    if result.task is not None:
        print_line(task_text(result.task))


def print_removed_layers(plan: SlicePlan) -> None:
    """The layers that are gone whole, and what stands for them."""
    removal = plan.analysis.removal
    if removal is not None:
        print_line(f"layers gone: {', '.join(removal.descriptions)}")


def print_streams(plan: SlicePlan) -> None:
    """The basis of each residual stream that is cut with refitted weights, a line each."""
    for stream in plan.analysis.stream_bases:
        if stream.group in plan.keep:
            print_line(describe_stream(stream, plan.kept_width(plan.analysis.group(stream.group))))


def note_if_predicted(plan: PruningPlan) -> None:
    """Note that a drift, a perplexity or a latency is predicted, not measured."""
    budget = plan.budget
    if budget is not None and (budget.limits_quality or budget.is_latency):
        what = "latency" if budget.is_latency else "drift" if budget.max_drift is not None else "perplexity"
        print_note(f"the {what} of this plan is predicted; `snpc prune` measures it and adjusts the plan")


def search_text(search: SearchResult) -> str:
    """How a drift or a latency was met."""
    plans = f"{len(search.tried)} plan{'s' if len(search.tried) > 1 else ''} measured"
    return f"{search.kind}: {search.reached:.3g} {search.unit}, limit {search.limit:g} ({plans})"


def print_verdict(verdict: Verdict) -> None:
    """Two statements: whether the rewrite is correct, and how close outputs are to the original's."""
    print_line(rewrite_text(verdict))
    if verdict.requantization is not None:
        print_line(requantization_text(verdict.requantization))
    print_quality(verdict.quality)


def print_quality(quality: Quality) -> None:
    """The grade, a line per output, and a warning where outputs no longer resemble the original's."""
    print_line(quality_text(quality))
    for line in output_lines(quality):
        print_line(f"  {line}")
    warning = quality_warning(quality)
    if warning:
        print_warning(warning, err=False)


# -- finetuning ------------------------------------------------------------------------------------------------------


def print_finetuned(result: FinetuneResult) -> None:
    """Steps and loss of a training run, and the drift before and after it."""
    trained = result.trained
    print_line(f"{result.path}: {trained.steps} steps in {trained.seconds:.1f} s")
    if trained.losses:
        print_line(f"loss: {trained.losses[0]:.4g} at the first step, {trained.losses[-1]:.4g} at the last")
    if not result.helped:
        given = "given" if result.training.reinit == "none" else "new"
        print_line(f"training did not help: the {given} weights are kept")
    if result.training.sparsify:
        zeros, weights = result.sparsity
        print_line(f"{zeros:,} of {weights:,} weights in matrices are zero ({zeros / max(weights, 1):.1%})")
    print_line(f"written file: {'; '.join(result.structure)}")
    for line in output_lines(result.before):
        print_line(f"before: {line}")
    print_quality(result.after)


# -- build -----------------------------------------------------------------------------------------------------------


def print_build(result: BuildResult) -> None:
    """The files of a build, its notes, and the drift of its outputs."""
    files = [(file if file == result.path else file.name, file.stat().st_size) for file in result.files]
    sizes = ", ".join(f"{name} {format_count(size)}B" for name, size in files)
    print_line(f"{sizes}: {result.target}, {result.precision}, {result.seconds:.1f} s")
    for note in result.notes:
        print_line(f"  {note}")
    for d in result.drift:
        print_line(f"  {d.output}: {drift_text(d)}")


def print_sweep(result: SweepResult) -> None:
    """A row for each size, the original first."""
    dense = result.points[0]
    has_accuracy = dense.accuracy is not None
    has_perplexity = dense.perplexity is not None
    has_tokens = any(p.tokens for p in result.points)
    first = ("target", *(("tokens",) if has_tokens else ()))
    judged = [name for name, known in ((result.metric, has_accuracy), ("perplexity", has_perplexity)) if known]
    last = ("MACs", "params", "ms", "speed-up", *judged, "drift", "same top", "")
    rows = [
        (
            p.name,
            *((p.tokens or "-",) if has_tokens else ()),
            format_share(p.macs, dense.macs),
            format_share(p.params, dense.params),
            f"{p.latency:.3g}",
            f"{p.speedup:.2f}x ({p.low:.2f}..{p.high:.2f})" if p is not dense else "1.00x",
            *((f"{100 * (p.accuracy or 0):.1f} %",) if has_accuracy else ()),
            *((f"{p.perplexity:.4g}" if p.perplexity is not None else "-",) if has_perplexity else ()),
            f"{p.drift:.3g}",
            f"{100 * p.agreement:.1f} %" if p.agreement is not None else "-",
            "front" if p.front else "",
        )
        for p in result.points
    ]
    header = (*first, *last)
    print_table(f"{result.model.name}, batch {result.batch}", header, rows, right=range(len(first), len(header) - 1))


def print_comparison(report: ReportData) -> None:
    """A column for the original and for each file, and what is said of each."""
    header = ("", "original", *(file.name for file in report.files))
    print_table(report.model, header, glance_rows(report), right=range(1, len(header)))
    for file in report.files:
        print_line(f"{file.name}: {file.made}")
        print_line(f"  {file.quality}")
        if file.task is not None:
            print_line(f"  {task_text(file.task)}")
        if file.warning:
            print_warning(f"{file.name}: {file.warning}", err=False)
    for text in report.warnings:
        print_note(text)


# -- the rest --------------------------------------------------------------------------------------------------------


MAX_SHAPES = 3  # in a title: a decoder has as many caches as layers


def print_bench(result: BenchResult) -> None:
    """A row for each model, after a title that says what was measured where."""
    header, *rows = result.rows()
    machine = result.machine
    threads = machine.threads or "the runtime's choice of"
    shapes = [f"{name} {shape_text(shape)}" for name, shape in result.shapes.items()]
    more = f" and {len(shapes) - MAX_SHAPES} more" if len(shapes) > MAX_SHAPES else ""
    print_table(
        f"{', '.join(shapes[:MAX_SHAPES])}{more}; "
        f"{machine.provider}, {threads} threads, {machine.cpu} x {machine.cores}, {machine.runtime}; "
        f"{result.rounds} interleaved rounds after {result.warmup} of warm-up",
        header,
        rows,
        right=range(1, len(header)),
        spare=("quartiles", "mean", "p99", "min", "p90"),
    )


def print_criteria(criteria: Sequence[Description]) -> None:
    """Each criterion with its summary and options."""
    for criterion in criteria:
        print_line(f"{criterion.name}: {criterion.summary}")
        for option, meaning in criterion.options:
            print_line(f"    {option}: {meaning}")
