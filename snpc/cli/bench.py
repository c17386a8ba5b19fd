"""``snpc bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snpc.cli import progress as bars
from snpc.cli import tables as show
from snpc.cli.arguments import check_output_paths
from snpc.cli.options import PATH_TYPE, execution_options, json_option
from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=PATH_TYPE)
@click.option("--batch", default=1, show_default=True, type=int, help="Size of the batch axis, where it is dynamic.")
@click.option(
    "--input-shapes", "shapes", multiple=True, metavar="NAME:1,3,224,224", help="Shape of an input; repeatable."
)
@click.option("--data", metavar="DATA", help="Run on these inputs instead of random ones (forms as --calib of prune).")
@click.option("--warmup", default=5, show_default=True, type=int, help="Rounds that are not counted.")
@click.option("--iterations", default=50, show_default=True, type=int, help="Rounds that are.")
@click.option("--duration", type=float, help="Go on until so many seconds have passed.")
@click.option("--threads", default=0, show_default=True, type=int, help="Threads per model; 0: onnxruntime chooses.")
@json_option
@execution_options
def bench_command(
    models: tuple[Path, ...],
    batch: int,
    shapes: tuple[str, ...],
    data: str | None,
    warmup: int,
    iterations: int,
    duration: float | None,
    threads: int,
    json_path: Path | None,
    provider: str,
) -> None:
    """Time MODELS side by side, interleaved, on the same inputs; ratios are to the first.

    MODELS are .onnx, .ort and OpenVINO's .xml, in any mix.
    """
    import snpc
    from snpc.runtime.execution.feeds import parse_shapes
    from snpc.runtime.execution.runners import open_runner

    check_output_paths([json_path], *models, data)
    feeds = None
    if data is not None:
        feeds = snpc.load_calibration(data, open_runner(models[0]).inputs, samples=batch * 16, batch=batch).batches()
    if data is not None and shapes:
        raise UserError("--data brings its own shapes: leave out --input-shapes")
    drawn: dict[str, Any] = {} if feeds else {"batch": batch, "shapes": parse_shapes(shapes) or None}
    with bars.timing_progress() as heard:
        result = snpc.bench(
            list(models),
            execution=Execution(provider=provider, threads=threads),
            data=feeds,
            warmup=warmup,
            iterations=iterations,
            duration=duration,
            heard=heard,
            **drawn,
        )
    show.emit_json(result.to_json(), json_path)
    if str(json_path) != "-":
        show.print_bench(result)
