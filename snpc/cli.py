"""The command line: each command parses, calls one verb, prints.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from snpc import show
from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.types import ROLES, Role

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class Commands(click.Group):
    """Turns snpc's own errors into one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SnpcError as error:
            click.echo(f"snpc: {error}", err=True)
            sys.exit(1 if isinstance(error, CheckFailed) else 2)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator."""

    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def parse_roles(ctx: click.Context, param: click.Parameter, text: str) -> tuple[Role, ...]:
    named = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in named if name not in ROLES]
    if unknown or not named:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(ROLES)}, separated by commas"
        )
    return named  # type: ignore[return-value]


def parse_provider(ctx: click.Context, param: click.Parameter, name: str) -> str:
    """Refuse at once what this onnxruntime does not have; the CPU is always there."""
    if name != "cpu":
        from snpc.runtime.session import resolve_provider

        resolve_provider(name)
    return name


def numbers(text: str | None, name: str, kind: Callable[[str], Any], counts: Sequence[int]) -> tuple[Any, ...] | None:
    """The numbers in ``text``, as many as one of ``counts``; None where the option is not given."""
    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        found = ()
    if len(found) not in counts:
        raise UserError(f"{name} {text!r}: {' or '.join(map(str, counts))} numbers separated by commas are needed")
    return found


choosing = options(
    click.option("--ratio", type=float, help="Fraction of the units of every chosen role to remove, in [0, 1)."),
    click.option(
        "--target",
        metavar="macs=R|params=R|bytes=R",
        help="Come down to this share of the dense model instead, taking it from all roles where it costs least.",
    ),
    click.option("--roles", default="qk,vo,ffn", show_default=True, callback=parse_roles, help="Which roles to cut."),
    click.option(
        "--method",
        type=click.Choice(["auto", "parallel", "select"]),
        help="auto: rotate, slice and refit in closed form, layer after layer (needs --calib); parallel: all layers at "
        "once; select: slice the units that --criterion prefers. Default: auto with --calib and no --criterion, else "
        "select.",
    ),
    click.option(
        "--criterion",
        default=None,
        metavar="NAME[:KEY=VALUE,...]",
        help="How units are scored, see `snpc criteria`. Default: mixed with --calib, else magnitude.",
    ),
    click.option("--uniform", is_flag=True, help="The same share of every group, instead of ranking across groups."),
    click.option("--round-to", "--align", default=1, show_default=True, type=int, help="Widths are multiples of this."),
    click.option("--min-width", default=1, show_default=True, type=int, help="No group gets narrower than this."),
    click.option(
        "--max-ratio",
        metavar="R|ROLE=R,...",
        help="No group loses more than this share of its units.",
    ),
    click.option("--include", metavar="REGEX", help="Only groups whose id matches."),
    click.option("--exclude", metavar="REGEX", help="Not the groups whose id matches."),
)

calibrating = options(
    click.option(
        "--calib",
        "--calibration-data",
        "calib",
        metavar="DATA",
        help="Unlabelled inputs: .npz by input name, .npy, a folder of either, a folder of images, Polygraphy JSON, "
        "test_data_set_*/input_N.pb, or file.py:function (runs that code).",
    ),
    click.option("--calib-samples", default=128, show_default=True, type=int, help="How many samples to use."),
    click.option("--calib-batch", default=8, show_default=True, type=int, help="Samples per run."),
    click.option("--image-size", metavar="H,W", help="Size of calibration images; default: what the model asks."),
    click.option("--image-mean", metavar="R,G,B", help="Mean of pixels in 0..1.  [default: ImageNet's]"),
    click.option("--image-std", metavar="R,G,B", help="Deviation of pixels in 0..1.  [default: ImageNet's]"),
    click.option("--image-layout", type=click.Choice(["nchw", "nhwc"]), help="Axis order of the model's image input."),
    click.option(
        "--seed", default=0, show_default=True, type=click.IntRange(0), help="Which samples are drawn from larger data."
    ),
)

running = options(
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        callback=parse_provider,
        help="onnxruntime provider: cpu, cuda, trt or its full name.",
    ),
)

as_json = click.option(
    "--json",
    "json_path",
    type=FILE,
    metavar="PATH",
    help="Also write the result as JSON ('-': to stdout, nothing else).",
)
at_sizes = click.option(
    "--dim-param", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a dynamic dimension, for the quoted MACs."
)
caches = click.option(
    "--prune-kv-cache",
    "kv_cache",
    is_flag=True,
    help="Let caches of keys and values become narrower: past inputs and present outputs change shape together.",
)
model_argument = click.argument("model", type=FILE)


def check_targets(targets: Sequence[Path | None], *inputs: Path | str | None) -> None:
    """Refuse outputs that are an input, that are each other, or that cannot be written."""
    from snpc.runtime.model_io import check_target

    named = [path for path in targets if path is not None and str(path) != "-"]
    for index, path in enumerate(named):
        check_target(path, *(Path(source) for source in inputs if source is not None))
        if path.resolve() in [other.resolve() for other in named[:index]]:
            raise UserError(f"{path}: is the name of two outputs; give each its own")


def parse_dims(dims: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in dims:
        name, equals, size = text.rpartition("=")
        if not equals or not size.isdigit() or not int(size):
            raise UserError(f"--dim-param {text!r}: must look like batch=1")
        found[name] = int(size)
    return found


def analysed(path: Path, dims: Sequence[str] = (), kv_cache: bool = False) -> Any:
    import snpc

    model = snpc.load(path)
    sizes = parse_dims(dims)
    named = {d for spec in model.inputs for d in spec.shape if isinstance(d, str)}
    unknown = sorted(set(sizes) - named)
    if unknown:
        raise UserError(
            f"--dim-param {unknown[0]}: no such dynamic dimension; there is {', '.join(sorted(named)) or 'none'}"
        )
    return snpc.analyze(model, sizes, prune_kv_cache=kv_cache)


def calibration_of(
    model: Any,
    calib: str | None,
    calib_samples: int,
    calib_batch: int,
    image_size: str | None,
    image_mean: str | None,
    image_std: str | None,
    image_layout: str | None,
    seed: int,
) -> Any:
    """The calibration data that the flags describe, or None without --calib."""
    import snpc

    given = {
        "size": numbers(image_size, "--image-size", int, (2,)),
        "mean": numbers(image_mean, "--image-mean", float, (1, 3, 4)),
        "std": numbers(image_std, "--image-std", float, (1, 3, 4)),
        "layout": image_layout,
    }
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if calib is None:
        if chosen:
            raise UserError("--image-size, -mean, -std and -layout describe calibration images: give --calib too")
        return None
    images = snpc.ImageOptions(**chosen)
    if chosen and not Path(calib).is_dir():
        raise UserError(f"{calib}: --image-size, -mean, -std and -layout are for a folder of images; leave them out")
    return snpc.load_calibration(
        calib, model.inputs, samples=calib_samples, batch=calib_batch, images=images, seed=seed
    )


def decided(
    analysis: Any,
    calibration: Any,
    *,
    method: Any,
    criterion: str | None,
    provider: str,
    watch: Any,
    **choice: Any,
) -> Any:
    """Score and plan as the flags say, and say what the flags leave unused."""
    import snpc

    wanted = snpc.Choice(**choice)
    with watch.stage("score and plan"):
        decision = snpc.decide(
            analysis,
            wanted,
            calibration=calibration,
            method=method,
            criterion=criterion,
            provider=provider,
            progress=show.progress("calibrating", calibration),
        )
    if calibration is None and criterion is None:
        show.note("no --calib: scoring by weight magnitude, which needs no data and keeps less accuracy")
    show.skipped(decision.compression)
    return decision


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snpc")
def main() -> None:
    """Make exported attention models small and fast: structured pruning of ONNX files, without training code."""


@main.command()
@model_argument
@as_json
@at_sizes
@caches
@click.option("--pins/--no-pins", default=True, help="List what cannot be pruned and why.")
@click.option("--curves", is_flag=True, help="Measure how much the outputs mind narrower groups (needs --calib).")
@calibrating
@running
def inspect(
    model: Path,
    json_path: Path | None,
    dims: tuple[str, ...],
    kv_cache: bool,
    pins: bool,
    curves: bool,
    provider: str,
    **calib: Any,
) -> None:
    """Show what can be made narrower in MODEL, and why the rest cannot."""
    import snpc
    from snpc.runtime.model_io import model_files

    analysis = analysed(model, dims, kv_cache)
    check_targets([json_path], *model_files(model), calib["calib"])
    if curves != (calib["calib"] is not None):
        raise UserError("--curves and --calib go together: curves are measured on calibration data")
    calibration = calibration_of(analysis.model, **calib)
    found = snpc.decide(analysis, snpc.Choice(ratio=0), calibration=calibration, provider=provider) if curves else None
    show.emit_json(show.analysis_json(analysis, found.curves if found else {}), json_path)
    if str(json_path) != "-":
        show.groups(analysis)
        if found:
            show.curves(analysis, found.curves)
        if pins:
            show.pins(analysis)


@main.command()
@model_argument
@choosing
@calibrating
@running
@at_sizes
@caches
@click.option("-o", "--output", type=FILE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@click.option("--plan", "plan_path", type=FILE, help="Also write the plan here.")
@as_json
@click.option("--dry-run", is_flag=True, help="Score and plan, show what would be kept, write no model.")
def prune(
    model: Path,
    output: Path | None,
    plan_path: Path | None,
    json_path: Path | None,
    dry_run: bool,
    provider: str,
    dims: tuple[str, ...],
    kv_cache: bool,
    **flags: Any,
) -> None:
    """Prune MODEL, write the result, verify what was written, and show before and after."""
    import snpc
    from snpc.runtime.model_io import data_file, model_files
    from snpc.runtime.prune import Stopwatch

    watch = Stopwatch()
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    with watch.stage("analyze"):
        analysis = analysed(model, dims, kv_cache)
    choice, calib = split_flags(flags)
    written = [] if dry_run else [target, data_file(target)]
    check_targets([*written, plan_path, json_path], *model_files(model), calib["calib"])
    with watch.stage("calibration"):
        calibration = calibration_of(analysis.model, **calib)
    decision = decided(analysis, calibration, provider=provider, watch=watch, **choice)
    plan = decision.plan
    if plan_path is not None:
        write_text(plan_path, snpc.plan_to_json(plan))
    if dry_run:
        show.emit_json({"dry_run": True, "groups": show.plan_json(plan), "options": dict(plan.options)}, json_path)
        if str(json_path) != "-":
            show.plan(plan)
        return
    result = snpc.apply_plan(
        plan, target, compression=decision.compression, calibration=calibration, provider=provider, watch=watch
    )
    finish(result, json_path)


def split_flags(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("calib", "calib_samples", "calib_batch", "image_size", "image_mean", "image_std", "image_layout", "seed")
    return {k: v for k, v in flags.items() if k not in names}, {k: flags[k] for k in names}


def finish(result: Any, json_path: Path | None) -> None:
    import snpc

    show.emit_json(snpc.report(result), json_path)
    if str(json_path) != "-":
        show.result(result)


def write_text(path: Path, text: str) -> None:
    from snpc.runtime.model_io import replacing

    with replacing(path) as temporary:
        temporary.write_text(text)


@main.command()
@model_argument
@choosing
@calibrating
@running
@caches
@click.option("-o", "--output", type=FILE, help="The plan.  [default: MODEL.plan.json]")
def plan(model: Path, output: Path | None, provider: str, kv_cache: bool, **flags: Any) -> None:
    """Score MODEL and write a plan: small JSON that can be read and edited before `snpc apply`."""
    import snpc
    from snpc.runtime.model_io import model_files
    from snpc.runtime.prune import Stopwatch

    target = output or model.with_name(f"{model.stem}.plan.json")
    analysis = analysed(model, kv_cache=kv_cache)
    choice, calib = split_flags(flags)
    check_targets([target], *model_files(model), calib["calib"])
    calibration = calibration_of(analysis.model, **calib)
    made = decided(analysis, calibration, provider=provider, watch=Stopwatch(), **choice).plan
    write_text(target, snpc.plan_to_json(made))
    show.plan(made)
    show.line(f"plan written to {target}")


@main.command()
@model_argument
@click.argument("plan_file", type=FILE)
@calibrating
@running
@click.option("-o", "--output", type=FILE, help="The pruned model.  [default: MODEL-pruned.onnx]")
@as_json
def apply(
    model: Path, plan_file: Path, output: Path | None, json_path: Path | None, provider: str, **flags: Any
) -> None:
    """Apply PLAN_FILE to MODEL, write the result and verify it.

    A plan of --method auto needs --calib, the data that it was made with; others use it for verification only.
    """
    import snpc
    from snpc.runtime.compress import compression_for
    from snpc.runtime.model_io import data_file, model_files
    from snpc.runtime.prune import Stopwatch

    watch = Stopwatch()
    with watch.stage("analyze"):
        plan = read_plan(plan_file, model)
    analysis = plan.analysis
    _, calib = split_flags(flags)
    target = output or model.with_name(f"{model.stem}-pruned.onnx")
    check_targets([target, data_file(target), json_path], *model_files(model), plan_file, calib["calib"])
    calibration = calibration_of(analysis.model, **calib)
    with watch.stage("closed forms"):
        compression = compression_for(plan, calibration, provider=provider)
    result = snpc.apply_plan(
        plan, target, compression=compression, calibration=calibration, provider=provider, watch=watch
    )
    finish(result, json_path)


def read_plan(path: Path, model: Path) -> Any:
    """The plan in ``path``, for ``model`` analysed as it was then."""
    import snpc
    from snpc.passes.planfile import wants_caches

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return snpc.plan_from_json(text, analysed(model, kv_cache=wants_caches(text)), str(path))


@main.command()
@model_argument
@click.argument("pruned", type=FILE)
@click.option("--plan", "plan_path", type=FILE, help="The plan that made it: also checks that slicing equals masking.")
@click.option("--data", "calib", metavar="DATA", help="Inputs to run on (forms as --calib of prune); default: random.")
@click.option(
    "--max-drift", type=click.FloatRange(0), help="Fail if an output moves by more: root mean square, relative."
)
@as_json
@running
def verify(
    model: Path,
    pruned: Path,
    plan_path: Path | None,
    calib: str | None,
    max_drift: float | None,
    json_path: Path | None,
    provider: str,
) -> None:
    """Check PRUNED against MODEL: structure, drift of the outputs, and slicing equals masking where --plan is given."""
    import snpc
    from snpc.runtime.model_io import model_files
    from snpc.runtime.prune import verdict_json

    plan = read_plan(plan_path, model) if plan_path else None
    analysis = plan.analysis if plan else analysed(model)
    snpc.load(pruned)
    check_targets([json_path], *model_files(model), *model_files(pruned), plan_path, calib)
    calibration = snpc.load_calibration(calib, analysis.model.inputs) if calib else None
    verdict = snpc.verify(model, pruned, plan=plan, calibration=calibration, provider=provider)
    show.emit_json(verdict_json(verdict), json_path)
    if str(json_path) != "-":
        show.verdict(verdict)
    moved = max((d.relative for d in verdict.drift), default=0.0)
    if max_drift is not None and not moved <= max_drift:
        raise CheckFailed(f"{pruned}: outputs moved by {moved:.3g}, more than --max-drift {max_drift:g}")


@main.command()
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--batch", default=1, show_default=True, type=int, help="Size of the batch axis, where it is dynamic.")
@click.option(
    "--input-shapes", "shapes", multiple=True, metavar="NAME:1,3,224,224", help="Shape of an input; repeatable."
)
@click.option("--data", metavar="DATA", help="Run on these inputs instead of random ones (forms as --calib of prune).")
@click.option("--warmup", default=5, show_default=True, type=int, help="Rounds that are not counted.")
@click.option("--iterations", default=50, show_default=True, type=int, help="Rounds that are.")
@click.option("--duration", type=float, help="Go on until so many seconds have passed.")
@click.option("--threads", default=0, show_default=True, type=int, help="Threads per model; 0: onnxruntime chooses.")
@as_json
@running
def bench(
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
    """Time MODELS side by side, interleaved, on the same inputs; ratios are to the first."""
    import snpc
    from snpc.runtime.feeds import parse_shapes

    check_targets([json_path], *models, data)
    feeds = None
    if data is not None:
        feeds = snpc.load_calibration(data, snpc.load(models[0]).inputs, samples=batch * 16, batch=batch).batches()
    if data is not None and shapes:
        raise UserError("--data brings its own shapes: leave out --input-shapes")
    drawn: dict[str, Any] = {} if feeds else {"batch": batch, "shapes": parse_shapes(shapes) or None}
    result = snpc.bench(
        list(models),
        provider=provider,
        threads=threads,
        data=feeds,
        warmup=warmup,
        iterations=iterations,
        duration=duration,
        **drawn,
    )
    show.emit_json(result.to_json(), json_path)
    if str(json_path) != "-":
        show.benchmark(result)


@main.command()
@click.argument("name")
@click.argument("folder", type=FILE)
def example(name: str, folder: Path) -> None:
    """Write a shipped example into FOLDER: NAME is `digits`, a trained ViT with calibration and evaluation data."""
    import snpc

    for path in snpc.write_example(name, folder):
        show.line(str(path))


@main.command()
def criteria() -> None:
    """List the criteria and their options."""
    from snpc.criteria import describe

    show.criteria(describe())


if __name__ == "__main__":
    main()
