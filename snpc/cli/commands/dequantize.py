"""``snpc dequantize``: the float model of a quantized file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    FILE_PATH,
    ArgumentGroup,
    CalibrationArguments,
    DumpArguments,
    ExecutionArguments,
    JsonArguments,
    ModelArguments,
    TypedCommand,
    check_output_paths,
    command,
    option,
    subgroup,
)
from snpc.pipeline import dequantization_json


@dataclass(frozen=True)
class DequantizeOutput(ArgumentGroup):
    """What is written."""

    section: ClassVar[str] = "Output"

    output: Path | None = option(
        "-o", "--output", type=FILE_PATH, help="The float model to write.  [default: MODEL-float.onnx]"
    )
    json: JsonArguments = subgroup()
    dump: DumpArguments = subgroup()


@command("dequantize")
def dequantize_command(
    model: ModelArguments, calibration: CalibrationArguments, output: DequantizeOutput, running: ExecutionArguments
) -> None:
    """Write the float model that a quantized MODEL stands for, and compare it with MODEL.

    Weights are what runtimes dequantize them to; activations are no longer rounded. --calib: inputs to compare on.
    """
    path = output.output or model.sibling("-float.onnx")
    check_output_paths([path, output.json.json_path], *model.files(), calibration.calib)
    calibration.check()
    data = calibration.load(model.load()) if calibration.calib is not None else None
    execution = replace(running.load(), observer=output.dump.load())
    written = snpc.dequantize(model.path, path, calibration=data, execution=execution)
    output.json.write({"snpc_dequantize": 1, "path": str(path), **(dequantization_json(written) or {})})
    if not output.json.replaces_tables:
        tables.print_dequantization(written)
        tables.print_line(f"float model written to {path}")
    print_next(TypedCommand("prune", (str(path),), ()))
