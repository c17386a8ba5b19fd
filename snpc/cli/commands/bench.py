"""``snpc bench``: latency of models, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import (
    ArgumentGroup,
    ExecutionArguments,
    ImageArguments,
    JsonArguments,
    ModelPath,
    SizeArguments,
    TextArguments,
    TypedCommand,
    argument,
    check_output_paths,
    command,
    option,
    subgroup,
)
from snpc.errors import UserError
from snpc.runtime.evaluation import TimingProtocol
from snpc.runtime.execution import RandomInputs, open_runner


@dataclass(frozen=True)
class BenchModels(ArgumentGroup):
    """The models to time, in any mix of formats."""

    models: tuple[Path, ...] = argument(nargs=-1, required=True, type=ModelPath())


@dataclass(frozen=True)
class BenchInputs(ArgumentGroup):
    """What the models are run on."""

    section: ClassVar[str] = "Inputs"

    batch: int = option(
        "--batch", default=1, show_default=True, type=int, help="Size of the batch axis, where it is dynamic."
    )
    at: SizeArguments = subgroup(section="Inputs")
    data: str | None = option(
        "--calib",
        "--data",
        metavar="DATA",
        help="Run on these inputs (forms as --calib of prune).  [default: random inputs]",
    )
    images: ImageArguments = subgroup(section="Inputs")
    text: TextArguments = subgroup(section="Inputs")


@dataclass(frozen=True)
class BenchProtocol(ArgumentGroup):
    """How long is measured, and with how many threads."""

    section: ClassVar[str] = "Running"

    warmup: int = option(
        "--warmup", default=5, show_default=True, type=int, help="Rounds before those that are counted."
    )
    iterations: int = option("--iterations", default=50, show_default=True, type=int, help="Rounds that are counted.")
    duration: float | None = option("--duration", type=float, help="Go on until this many seconds have passed.")
    threads: int = option(
        "--threads", default=0, show_default=True, type=int, help="Threads per model; 0: onnxruntime chooses."
    )


@command("bench")
def bench_command(
    models: BenchModels,
    inputs: BenchInputs,
    protocol: BenchProtocol,
    json: JsonArguments,
    running: ExecutionArguments,
) -> None:
    """Time MODELS side by side, interleaved, on the same inputs; ratios are to the first.

    MODELS are .onnx, .ort and OpenVINO's .xml, in any mix.
    """
    paths, source, batch = list(models.models), inputs.data, inputs.batch
    check_output_paths([json.json_path], *paths, source)
    data = None
    inputs.text.check(source)
    if source is not None:
        specs = open_runner(paths[0]).inputs
        images, text = inputs.images.load(), inputs.text.load(paths[0])
        calibration = snpc.load_calibration(source, specs, samples=batch * 16, batch=batch, images=images, text=text)
        inputs.images.print_format(calibration)
        inputs.text.print_format(calibration)
        data = calibration.batches()
    if source is not None and (inputs.at.shapes or inputs.at.dims):
        raise UserError("--calib brings its own shapes: leave out --input-shapes and --dim-param")
    result = snpc.bench(
        paths,
        RandomInputs(batch, inputs.at.input_shapes() or None, inputs.at.dim_sizes()) if data is None else data,
        protocol=TimingProtocol(protocol.warmup, protocol.iterations, protocol.duration),
        execution=replace(running.load(), threads=protocol.threads),
    )
    json.write(result.to_json())
    if not json.replaces_tables:
        tables.print_bench(result)
    fastest = min(zip(result.timings, paths, strict=True), key=lambda pair: pair[0].median)[1]
    if fastest.suffix == ".onnx":
        print_next(TypedCommand("build", (str(fastest),), (("--target", "ort"),)))
