"""``snpc build``: what a runtime loads fastest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import click

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    BuildArguments,
    CalibrationArguments,
    DumpArguments,
    ExecutionArguments,
    JsonArguments,
    ModelArguments,
    TypedCommand,
    check_output_paths,
    command,
    option,
    parse_target_name,
    subgroup,
)


@dataclass(frozen=True)
class BuildOutputArguments(ArgumentGroup):
    """What a build writes."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The artifact to write.  [default: MODEL-TARGET and the target's suffix]"
    )
    json: JsonArguments = subgroup()
    dump: DumpArguments = subgroup()


@dataclass(frozen=True)
class BuildTargetArguments(ArgumentGroup):
    """The runtime to build for."""

    section: ClassVar[str] = "Building"

    target: str = option(
        "--target",
        required=True,
        metavar="NAME",
        callback=parse_target_name,
        help="Runtime to build for, see above.",
    )
    batch: int = option(
        "--batch", default=1, show_default=True, type=click.IntRange(1), help="Batch size that candidates are timed at."
    )
    emit_script: bool = option(
        "--emit-script",
        is_flag=True,
        help="trt, trt-rtx: write the model and a script that builds the engine, profiles and compares it.",
    )


@command("build")
def build_command(
    model: ModelArguments,
    target: BuildTargetArguments,
    arguments: BuildArguments,
    calibration: CalibrationArguments,
    output: BuildOutputArguments,
    running: ExecutionArguments,
) -> None:
    """Make MODEL into what a runtime loads fastest; load it again and compare its outputs.

    \b
    Targets:
      ort       onnxruntime's optimized graph as .onnx or .ort, attention fused where that is faster
      openvino  OpenVINO IR (.xml and .bin)
      trt-rtx   TensorRT for RTX engine for the compute capabilities of --sm, built without a GPU
      trt       TensorRT engine for this machine's GPU; --emit-script: what builds it elsewhere

    \b
    For TensorRT the scale of attention goes into the weights, and in fp16 and bf16 heads
    become equally wide by zeros, so that attention is one kernel. The result says how
    often it is, before and after.
    """
    loaded = snpc.load(model.path)
    check_output_paths([output.output, output.json.json_path], *model.files(), calibration.calib)
    calibration.check()
    sizes = model.at.sizes(loaded.inputs)
    data = calibration.load(snpc.analyze(loaded, sizes)) if calibration.calib is not None else None
    result = snpc.build(
        model.path,
        target.target,
        output.output,
        precision=arguments.precision or "fp32",
        execution=replace(running.load(), observer=output.dump.load()),
        calibration=data,
        batch=target.batch,
        options=replace(arguments.load(emit_script=target.emit_script), dim_sizes=sizes),
    )
    output.json.write(build_json(result))
    if not output.json.replaces_tables:
        tables.print_build(result)
    if result.path.suffix in (".onnx", ".ort", ".xml"):  # bench does not run engines
        print_next(TypedCommand("bench", (str(model.path), str(result.path)), ()))


def build_json(result: snpc.BuildResult) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "snpc_build": 1,
        "path": str(result.path),
        "files": [str(file) for file in result.files],
        "target": result.target,
        "precision": result.precision,
        "seconds": round(result.seconds, 3),
        "bytes": result.bytes,
        "weights": result.weight_bytes,
        "notes": list(result.notes),
        "drift": [asdict(d) for d in result.drift],
        "attentions": [asdict(a) for a in result.attentions],
    }
