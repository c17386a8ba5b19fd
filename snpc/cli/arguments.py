"""What flags ask for, as values: calibration data, sizes, plans, and files that may be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from snpc.cli import tables as show
from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution

RANDOM_CALIBRATION = "random"  # --calib without data; a file of that name is ./random


def parse_numbers(
    text: str | None, name: str, kind: Callable[[str], Any], counts: Sequence[int]
) -> tuple[Any, ...] | None:
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


def check_output_paths(targets: Sequence[Path | None], *inputs: Path | str | None) -> None:
    """Refuse outputs that are an input, that are each other, or that cannot be written."""
    from snpc.runtime.io.atomic import check_target

    named = [path for path in targets if path is not None and str(path) != "-"]
    for index, path in enumerate(named):
        check_target(path, *(Path(source) for source in inputs if source is not None))
        if path.resolve() in [other.resolve() for other in named[:index]]:
            raise UserError(f"{path}: is the name of two outputs; give each its own")


def parse_dim_sizes(dims: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in dims:
        name, equals, size = text.rpartition("=")
        if not equals or not size.isdigit() or not int(size):
            raise UserError(f"--dim-param {text!r}: must look like batch=1")
        found[name] = int(size)
    return found


def load_and_analyze(path: Path, dims: Sequence[str] = (), kv_cache: bool = False) -> Any:
    import snpc

    model = snpc.load(path)
    sizes = parse_dim_sizes(dims)
    named = {d for spec in model.inputs for d in spec.shape if isinstance(d, str)}
    unknown = sorted(set(sizes) - named)
    if unknown:
        raise UserError(
            f"--dim-param {unknown[0]}: no such dynamic dimension; there is {', '.join(sorted(named)) or 'none'}"
        )
    return snpc.analyze(model, sizes, prune_kv_cache=kv_cache)


def calibration_from_flags(
    analysis: Any,
    calib: str | None,
    calib_samples: int,
    calib_batch: int,
    image_size: str | None,
    image_mean: str | None,
    image_std: str | None,
    image_layout: str | None,
    seed: int,
) -> Any:
    """The calibration data that the flags describe, noise for `--calib random`, or None without --calib."""
    import snpc

    given = {
        "size": parse_numbers(image_size, "--image-size", int, (2,)),
        "mean": parse_numbers(image_mean, "--image-mean", float, (1, 3, 4)),
        "std": parse_numbers(image_std, "--image-std", float, (1, 3, 4)),
        "layout": image_layout,
    }
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if calib is None:
        if chosen:
            raise UserError("--image-size, -mean, -std and -layout describe calibration images: give --calib too")
        return None
    if calib == RANDOM_CALIBRATION and not chosen:
        show.print_note("--calib random: the model is fitted to noise; its own inputs, without labels, serve it better")
        return snpc.random_calibration(analysis, samples=calib_samples, batch=calib_batch, seed=seed)
    images = snpc.ImageOptions(**chosen)
    if chosen and not Path(calib).is_dir():
        raise UserError(f"{calib}: --image-size, -mean, -std and -layout are for a folder of images; leave them out")
    return snpc.load_calibration(
        calib, analysis.model.inputs, samples=calib_samples, batch=calib_batch, images=images, seed=seed
    )


def statistics_from_files(load_stats: Sequence[Path]) -> Any:
    """What the files hold, added up; None without --load-stats."""
    import snpc

    return snpc.load_statistics(*load_stats) if load_stats else None


def split_calibration_flags(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("calib", "calib_samples", "calib_batch", "image_size", "image_mean", "image_std", "image_layout", "seed")
    return {k: v for k, v in flags.items() if k not in names}, {k: flags[k] for k in names}


def apply_token_flags(
    analysis: Any, calibration: Any, tokens: str | None, choice: dict[str, Any], execution: Execution
) -> Any:
    """The analysis with its tokens reduced as --tokens asks."""
    import snpc
    from snpc.pipeline.planner import PlanRequest
    from snpc.pipeline.token_request import AUTO_TOKENS
    from snpc.pipeline.token_request import apply_token_request as reduced
    from snpc.planning.config import parse_target

    widths = None
    if tokens is not None and tokens.strip() == AUTO_TOKENS and choice["roles"]:
        named = {f.name: choice[f.name] for f in fields(snpc.Budget)}
        widths = PlanRequest(snpc.Budget(**named), choice["method"], choice["criterion"])
    target = parse_target(choice["target"]) if choice["target"] is not None else None
    return reduced(analysis, calibration, tokens, target=target, widths=widths, execution=execution)


def resolve_width_multiple(choice: dict[str, Any], build: str | None, execution: Execution) -> dict[str, Any]:
    """What --round-to auto stands for; {} where it was not asked for."""
    import snpc

    if choice["round_to"] != "auto":
        return {}
    liked = snpc.widths_for_target(build, execution)
    return {"round_to": liked.multiple, "min_width": max(liked.minimum, choice["min_width"])}


def write_text_file(path: Path, text: str) -> None:
    from snpc.runtime.io.atomic import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(text)


def read_plan_file(path: Path, model: Path) -> Any:
    """The plan in ``path``, for ``model`` analyzed as it was then."""
    import snpc

    return snpc.load_plan(path, snpc.load(model))


def workload_from_flags(batch: int | None, shapes: Sequence[str], threads: int | None, artefact: Any = None) -> Any:
    """What is timed, or None where no flag says anything about it."""
    import snpc
    from snpc.runtime.execution.feeds import parse_shapes

    if batch is None and not shapes and threads is None and artefact is None:
        return None
    return snpc.Workload(batch=batch or 1, shapes=parse_shapes(shapes) or None, threads=threads or 0, artifact=artefact)


def evaluation_from_flags(analysis: Any, data: str, labels: str | None, calib: dict[str, Any]) -> Any:
    """All of the data to judge by, prepared as the calibration data are, and its labels, as an Evaluation."""
    import numpy as np

    from snpc.runtime.evaluation.accuracy import EvaluationData

    loaded = calibration_from_flags(analysis, **{**calib, "calib": data, "calib_samples": 1 << 30})
    if labels is None:
        return EvaluationData(loaded)
    if not data.endswith(".npz"):
        raise UserError(f"{data}: --labels names an array of an .npz")
    with np.load(data) as arrays:
        if labels not in arrays:
            raise UserError(f"{data}: holds no {labels!r}; it has {', '.join(arrays)}")
        return EvaluationData(loaded, arrays[labels])
