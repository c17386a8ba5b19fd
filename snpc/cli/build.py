"""``snpc build``, and what ``snpc prune --build`` shares with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from snpc.cli import tables as show
from snpc.cli.arguments import calibration_from_flags, check_output_paths, parse_numbers, split_calibration_flags
from snpc.cli.options import (
    PATH_TYPE,
    build_options,
    calibration_options,
    execution_options,
    json_option,
    model_argument,
    parse_target_name,
)
from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution

BUILD_FLAGS = ("precision", "min_shapes", "opt_shapes", "max_shapes", "sm", "workspace", "timing_cache")


@click.command("build")
@model_argument
@click.option(
    "--target", required=True, metavar="NAME", callback=parse_target_name, help="Runtime to build for, see below."
)
@click.option("-o", "--output", type=PATH_TYPE, help="The artefact.  [default: MODEL-TARGET and the target's suffix]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Samples to time candidates on.")
@click.option("--emit-script", is_flag=True, help="trt: write the model and a trtexec line instead of an engine.")
@build_options
@calibration_options
@execution_options
@json_option
def build_command(
    model: Path,
    target: str,
    output: Path | None,
    batch: int,
    emit_script: bool,
    json_path: Path | None,
    provider: str,
    **flags: Any,
) -> None:
    """Make MODEL into what a runtime loads fastest; load it again and compare its outputs.

    \b
    Targets:
      ort       onnxruntime's optimised graph as .onnx and .ort, attention fused where that is faster
      openvino  OpenVINO IR (.xml and .bin)
      trt-rtx   TensorRT for RTX engine for the compute capabilities of --sm, built without a GPU
      trt       TensorRT engine for this machine's GPU; --emit-script: what builds it elsewhere
    """
    import snpc
    from snpc.runtime.io.load import model_files

    rest, calib = split_calibration_flags(flags)
    loaded = snpc.load(model)
    check_output_paths([output, json_path], *model_files(model), calib["calib"])
    calibration = calibration_from_flags(snpc.analyze(loaded) if calib["calib"] else None, **calib)
    made = build_from_flags(
        model, target, output, calibration, Execution(provider=provider), batch=batch, emit_script=emit_script, **rest
    )
    show.emit_json(build_json(made), json_path)
    if str(json_path) != "-":
        show.print_build(made)


def build_from_flags(
    model: Path,
    target: str,
    output: Path | None,
    calibration: Any,
    execution: Execution,
    *,
    batch: int | None,
    **flags: Any,
) -> Any:
    """Build as the flags of ``build_options`` say."""
    import snpc

    asked = build_arguments(execution, calibration, batch or 1, **flags)
    return snpc.build(model, target, output, **asked)


def expected_artifacts(
    build: str | None, model: Path, execution: Execution, calibrated: bool, batch: int | None, **flags: Any
) -> list[Path]:
    """What building ``model`` will write, or nothing. UserError: what is asked for cannot be built here."""
    from snpc.targets.build import check_build

    if build is None:
        return []
    asked = build_arguments(execution, None, batch or 1, **flags)
    return [check_build(model, build, None, asked["precision"], execution, calibrated, asked["options"])]


def timed_artifact_from_flags(
    build: str | None, latency: bool, execution: Execution, calibration: Any, batch: int | None, **flags: Any
) -> Any:
    """What a latency is measured on: the artefact that will be built, or None for the model itself."""
    import snpc

    return (
        snpc.timed_artifact(build, **build_arguments(execution, calibration, batch or 1, **flags))
        if build and latency
        else None
    )


def build_arguments(
    execution: Execution,
    calibration: Any,
    batch: int,
    *,
    precision: str | None,
    min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...],
    max_shapes: tuple[str, ...],
    sm: str | None,
    workspace: int | None,
    timing_cache: Path | None,
    emit_script: bool = False,
) -> dict[str, Any]:
    """The arguments of ``snpc.build`` that the flags of ``build_options`` stand for."""
    import snpc
    from snpc.runtime.execution.feeds import parse_shapes

    options = snpc.BuildOptions(
        min_shapes=parse_shapes(min_shapes),
        opt_shapes=parse_shapes(opt_shapes),
        max_shapes=parse_shapes(max_shapes),
        sm=parse_numbers(sm, "--sm", int, range(1, 17)) or (),
        workspace=workspace,
        timing_cache=timing_cache,
        emit_script=emit_script,
    )
    return {
        "precision": precision or "fp32",
        "execution": execution,
        "calibration": calibration,
        "batch": batch,
        "options": options,
    }


def split_build_flags(flags: dict[str, Any], target: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the rest, the flags of ``build_options``), which say nothing without a target."""
    mine = {name: flags[name] for name in BUILD_FLAGS}
    given = [name for name, value in mine.items() if value]
    if target is None and given:
        raise UserError(f"--{given[0].replace('_', '-')} is for a build: give --build TARGET too, or leave it out")
    return {k: v for k, v in flags.items() if k not in BUILD_FLAGS}, mine


def build_json(made: Any) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "snpc_build": 1,
        "path": str(made.path),
        "files": [str(file) for file in made.files],
        "target": made.target,
        "precision": made.precision,
        "seconds": round(made.seconds, 3),
        "bytes": made.bytes,
        "weights": made.weights,
        "notes": list(made.notes),
        "drift": [asdict(d) for d in made.drift],
    }
