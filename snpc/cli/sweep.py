"""``snpc sweep``: one model at several sizes, and which of them are worth having."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snpc.cli import progress as bars
from snpc.cli import tables as show
from snpc.cli.arguments import (
    analysed,
    calibration_of,
    check_targets,
    evaluation_of,
    liked_widths,
    split_flags,
    write_text,
)
from snpc.cli.options import FILE, calibrating, choosing, model_argument, running, target_name
from snpc.errors import UserError


@click.command()
@model_argument
@click.option("--targets", required=True, metavar="macs=0.9,0.8,params=0.5", help="Sizes to come down to.")
@click.option("-o", "--output", type=FILE, help="Folder for table, plot and models.  [default: MODEL-sweep]")
@click.option(
    "--eval", "held_out", metavar="DATA", help="Inputs to judge by (forms as --calib); default: those of --calib."
)
@click.option("--labels", metavar="NAME", help="Array of the --eval .npz with the right class of every sample.")
@click.option("--build", metavar="TARGET", callback=target_name, help="Build each model for a runtime and time that.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="Of the built artefacts.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Batch size that is timed.")
@click.option("--iterations", default=30, show_default=True, type=int, help="Interleaved rounds that are timed.")
@choosing
@calibrating
@running
def sweep(
    model: Path,
    targets: str,
    output: Path | None,
    held_out: str | None,
    labels: str | None,
    build: str | None,
    precision: str | None,
    batch: int,
    iterations: int,
    provider: str,
    **flags: Any,
) -> None:
    """Prune MODEL to several sizes; write a table, a plot and the models that no other one beats.

    --tokens auto chooses the tokens for every target of MACs; any other --tokens holds for all targets, and widths are
    cut for the rest of the way.

    Into the folder go sweep.json, sweep.svg (quality against latency) and the models on the Pareto front.
    """
    import snpc
    from snpc.pipeline.sweep import steps
    from snpc.pipeline.sweep import sweep as run
    from snpc.report.sweep_plot import scatter

    choice, calib = split_flags(flags)
    method, criterion = choice.pop("method"), choice.pop("criterion")
    for name in ("ratio", "target", "max_drift"):
        if choice.pop(name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: a sweep goes through --targets; leave it out")
    if criterion is not None:
        raise UserError("--criterion: a sweep uses closed forms; leave it out")
    if precision is not None and build is None:
        raise UserError("--precision is for a build: give --build TARGET too, or leave it out")
    if labels and not held_out:
        raise UserError("--labels names an array of --eval: give --eval DATA.npz too")
    if calib["calib"] is None:
        raise UserError("a sweep measures what goes: give --calib DATA")
    tokens = choice.pop("tokens")
    choice |= liked_widths(choice, build, provider)
    names = parse_targets(targets)
    folder = output or model.with_name(f"{model.stem}-sweep")
    analysis = analysed(model)
    calibration = calibration_of(analysis, **calib)
    folder.mkdir(exist_ok=True)
    table, plot = folder / "sweep.json", folder / "sweep.svg"
    check_targets([table, plot], model, calib["calib"], held_out)
    judge = evaluation_of(analysis, held_out, labels, calib) if held_out else None
    with bars.steps(steps(names)) as step:
        found = run(
            analysis,
            names,
            folder,
            calibration,
            choice=snpc.Choice(target=names[0], **choice) if choice["roles"] else None,
            tokens=tokens,
            evaluation=judge,
            method=method,
            target=build,
            precision=precision or "fp32",  # type: ignore[arg-type]
            provider=provider,
            batch=batch,
            rounds=iterations,
            step=step,
        )
    show.emit_json(found.to_json(), table)
    write_text(plot, scatter(found))
    show.sweep(found)
    show.line(f"written to {folder}: sweep.json, sweep.svg and the models on the front")


def parse_targets(text: str) -> list[str]:
    """``macs=0.9,0.8,params=0.5`` -> ``["macs=0.9", "macs=0.8", "params=0.5"]``."""
    found: list[str] = []
    kind = ""
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        kind = name if equals else kind
        if not kind:
            raise UserError(f"--targets {text!r}: must look like macs=0.9,0.8")
        found.append(f"{kind}={number}")
    return found
