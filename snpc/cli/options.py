"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from snpc.types import ROLES, Role

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., Any])
PATH_TYPE = click.Path(path_type=Path)


def combine_options(
    *decorators: Callable[[CommandFunction], CommandFunction],
) -> Callable[[CommandFunction], CommandFunction]:
    """Several click options as one decorator."""

    def apply(command: CommandFunction) -> CommandFunction:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def parse_roles(ctx: click.Context, param: click.Parameter, text: str) -> tuple[Role, ...]:
    if text.strip() == "none":
        return ()
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
        from snpc.runtime.execution.session import resolve_provider

        resolve_provider(name)
    return name


def parse_width_multiple(ctx: click.Context, param: click.Parameter, text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text}: a number, or auto") from None


def parse_target_name(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    if name is not None:
        from snpc.targets import find_target

        find_target(name)
    return name


def parse_memory_size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    from snpc.runtime.execution.memory import parse_bytes

    return None if text is None else parse_bytes(text)


planning_options = combine_options(
    click.option("--ratio", type=float, help="Fraction of the units of every chosen role to remove, in [0, 1)."),
    click.option(
        "--target",
        metavar="macs=R|params=R|bytes=R|latency=R|latency=Xms",
        help="Come down to this share of the dense model instead, taking it from all roles where it costs least. A "
        "latency is measured with --provider, --batch, --input-shapes and --threads, of what --build makes if given.",
    ),
    click.option(
        "--max-drift",
        type=float,
        help="Cut as much instead as keeps the outputs within this relative root mean square change, measured on the "
        "written model (needs --calib).",
    ),
    click.option(
        "--roles", default="qk,vo,ffn", show_default=True, callback=parse_roles, help="Which roles to cut, or none."
    ),
    click.option(
        "--tokens",
        metavar="METHOD:N[@BLOCKS]|auto",
        help="Also drop or merge tokens: merge:13 (13 fewer at every block), topk:0.7@3,6,9 (keep 70 % after these), "
        "star, fuse, guided, adaptive:0.9 (as many as have 90 % of the attention: fewer of easy inputs), several "
        "joined by +; auto: where and how many is chosen for --target macs=R. star, adaptive and auto need --calib.",
    ),
    click.option(
        "--method",
        type=click.Choice(["auto", "parallel", "select"]),
        help="auto: rotate, slice and refit in closed form, layer after layer (needs --calib); parallel: all layers at "
        "once; select: slice the units that --criterion prefers. Default: auto with --calib and no --criterion, "
        "parallel with --load-stats only, else select.",
    ),
    click.option(
        "--criterion",
        default=None,
        metavar="NAME[:KEY=VALUE,...]",
        help="How units are scored, see `snpc criteria`. Default: mixed with --calib, else magnitude.",
    ),
    click.option(
        "--allocator",
        type=click.Choice(["loss", "dimap"]),
        default="loss",
        show_default=True,
        help="How much of which layer goes: by the loss it brings, or by relative energy of the weights alone (dimap).",
    ),
    click.option("--uniform", is_flag=True, help="The same share of every group, instead of ranking across groups."),
    click.option(
        "--round-to",
        "--align",
        default="1",
        show_default=True,
        metavar="N|auto",
        callback=parse_width_multiple,
        help="Widths are multiples of this; auto: of what runs well where the model will run.",
    ),
    click.option("--min-width", default=1, show_default=True, type=int, help="No group gets narrower than this."),
    click.option(
        "--max-ratio",
        metavar="R|ROLE=R,...",
        help="No group loses more than this share of its units.",
    ),
    click.option("--include", metavar="REGEX", help="Only groups whose id matches."),
    click.option("--exclude", metavar="REGEX", help="Not the groups whose id matches."),
)

image_options = combine_options(
    click.option("--image-size", metavar="H,W", help="Size of calibration images; default: what the model asks."),
    click.option("--image-mean", metavar="R,G,B", help="Mean of pixels in 0..1.  [default: ImageNet's]"),
    click.option("--image-std", metavar="R,G,B", help="Deviation of pixels in 0..1.  [default: ImageNet's]"),
    click.option("--image-layout", type=click.Choice(["nchw", "nhwc"]), help="Axis order of the model's image input."),
)

calibration_options = combine_options(
    click.option(
        "--calib",
        "--calibration-data",
        "calib",
        metavar="DATA",
        help="Unlabelled inputs: .npz by input name, .npy, a folder of either, a folder of images, Polygraphy JSON, "
        "test_data_set_*/input_N.pb, or file.py:function (runs that code). `random`: noise, where there is no data.",
    ),
    click.option("--calib-samples", default=128, show_default=True, type=int, help="How many samples to use."),
    click.option("--calib-batch", default=8, show_default=True, type=int, help="Samples per run."),
    image_options,
    click.option(
        "--seed", default=0, show_default=True, type=click.IntRange(0), help="Which samples are drawn from larger data."
    ),
)

save_statistics_option = combine_options(
    click.option(
        "--save-stats", type=PATH_TYPE, metavar="FILE", help="Also write what was measured, for --load-stats."
    ),
)
statistics_options = combine_options(
    click.option(
        "--load-stats",
        multiple=True,
        type=PATH_TYPE,
        metavar="FILE",
        help="What --save-stats wrote, instead of measuring; repeatable: they add up. Without --calib it serves "
        "--method parallel and select.",
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        callback=parse_memory_size,
        help="Memory for statistics and kept activations, beside that of running the model: 2GB, 512MiB. Less means "
        "more passes over the data, and temporary files.  [default: half of what is free]",
    ),
)

latency_options = combine_options(
    click.option(
        "--batch", type=click.IntRange(1), help="Size of the batch axis when a latency is measured.  [default: 1]"
    ),
    click.option("--input-shapes", "shapes", multiple=True, metavar="NAME:1,3,224,224", help="Shape of an input then."),
    click.option("--threads", type=click.IntRange(0), help="Threads then; 0: onnxruntime chooses.  [default: 0]"),
)

execution_options = combine_options(
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        callback=parse_provider,
        help="onnxruntime provider: cpu, cuda, trt or its full name.",
    ),
)

build_options = combine_options(
    click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="Of the artefact.  [default: fp32]"
    ),
    click.option("--min-shapes", multiple=True, metavar="NAME:1,3,224,224", help="trt: least shape; repeatable."),
    click.option("--opt-shapes", multiple=True, metavar="NAME:8,3,224,224", help="trt: shape it is tuned for."),
    click.option("--max-shapes", multiple=True, metavar="NAME:16,3,224,224", help="trt: largest shape."),
    click.option("--sm", metavar="86,89,120", help="trt-rtx: compute capabilities.  [default: 8.0 and later]"),
    click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="trt: memory that tactics may use."),
    click.option("--timing-cache", type=PATH_TYPE, help="trt: what tactics took, read if it is there, and written."),
)

json_option = click.option(
    "--json",
    "json_path",
    type=PATH_TYPE,
    metavar="PATH",
    help="Also write the result as JSON ('-': to stdout, nothing else).",
)
dim_size_option = click.option(
    "--dim-param", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a dynamic dimension, for the quoted MACs."
)
kv_cache_option = click.option(
    "--prune-kv-cache",
    "kv_cache",
    is_flag=True,
    help="Let caches of keys and values become narrower: past inputs and present outputs change shape together.",
)
model_argument = click.argument("model", type=PATH_TYPE)
