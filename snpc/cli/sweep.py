"""``snpc sweep``: one model at several sizes, and which of them are worth having."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snpc.cli import progress as bars
from snpc.cli import tables as show
from snpc.cli.arguments import (
    calibration_from_flags,
    check_output_paths,
    evaluation_from_flags,
    load_and_analyze,
    resolve_width_multiple,
    split_calibration_flags,
    write_text_file,
)
from snpc.cli.options import (
    PATH_TYPE,
    calibration_options,
    execution_options,
    model_argument,
    parse_target_name,
    planning_options,
)
from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution


@click.command("sweep")
@model_argument
@click.option("--targets", required=True, metavar="macs=0.9,0.8,params=0.5", help="Sizes to come down to.")
@click.option("-o", "--output", type=PATH_TYPE, help="Folder for table, plot and models.  [default: MODEL-sweep]")
@click.option(
    "--eval", "held_out", metavar="DATA", help="Inputs to judge by (forms as --calib); default: those of --calib."
)
@click.option("--labels", metavar="NAME", help="Array of the --eval .npz with the right class of every sample.")
@click.option(
    "--build", metavar="TARGET", callback=parse_target_name, help="Build each model for a runtime and time that."
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="Of the built artefacts.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Batch size that is timed.")
@click.option("--iterations", default=30, show_default=True, type=int, help="Interleaved rounds that are timed.")
@planning_options
@calibration_options
@execution_options
def sweep_command(
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
    from snpc.pipeline.sweep import SweepRequest, count_sweep_steps
    from snpc.pipeline.sweep import sweep as run
    from snpc.planning.config import parse_target
    from snpc.report.sweep_plot import sweep_plot

    choice, calib = split_calibration_flags(flags)
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
    execution = Execution(provider=provider)
    choice |= resolve_width_multiple(choice, build, execution)
    names = [parse_target(name) for name in parse_target_list(targets)]
    folder = output or model.with_name(f"{model.stem}-sweep")
    analysis = load_and_analyze(model)
    calibration = calibration_from_flags(analysis, **calib)
    folder.mkdir(exist_ok=True)
    table, plot = folder / "sweep.json", folder / "sweep.svg"
    check_output_paths([table, plot], model, calib["calib"], held_out)
    judge = evaluation_from_flags(analysis, held_out, labels, calib) if held_out else None
    with bars.step_progress(count_sweep_steps(names)) as step:
        found = run(
            analysis,
            names,
            folder,
            calibration,
            SweepRequest(
                budget=snpc.Budget(target=names[0], **choice) if choice["roles"] else None,
                tokens=tokens,
                method=method,
                evaluation=judge,
                batch=batch,
                rounds=iterations,
            ),
            builder=sweep_builder(build, precision or "fp32", execution, calibration, batch) if build else None,
            execution=execution,
            on_step=step,
        )
    show.emit_json(found.to_json(), table)
    write_text_file(plot, sweep_plot(found))
    show.print_sweep(found)
    show.print_line(f"written to {folder}: sweep.json, sweep.svg and the models on the front")


def sweep_builder(target: str, precision: Any, execution: Any, calibration: Any, batch: int) -> Any:
    """What the models of a sweep are built into."""
    import snpc
    from snpc.pipeline.sweep import SweepBuilder

    def build(model: Path, output: Path) -> tuple[Path, ...]:
        return snpc.build(
            model, target, output, precision=precision, execution=execution, calibration=calibration, batch=batch
        ).files

    artifact = snpc.timed_artifact(
        target, precision=precision, execution=execution, calibration=calibration, batch=batch
    )
    return SweepBuilder(snpc.TARGETS[target].suffix, build, artifact)


def parse_target_list(text: str) -> list[str]:
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
