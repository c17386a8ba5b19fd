"""The float model of a quantized file, written and compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from snpc.errors import UserError
from snpc.graph import choose_dim_sizes, run_passes
from snpc.passes.canonicalization import finalize
from snpc.passes.quantization import DEQUANTIZATION_PASSES, operator_counts, quantized_operators
from snpc.planning import write_provenance
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import VERIFICATION_BATCHES, OutputMetrics, batch_differences, run_batches
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, embedding_rows, random_feeds
from snpc.runtime.io import (
    check_target,
    load,
    model_files,
    publish_files,
    refuse_branches,
    save,
    staging_folder,
    write_errors,
)
from snpc.temporary import TemporaryFolder
from snpc.types import Dequantization, Difference, Feeds, Model

if TYPE_CHECKING:
    from snpc.runtime.io import ModelSource


def dequantize(
    model: ModelSource,
    path: Path | str | None = None,
    *,
    calibration: Calibration | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Model:
    """The float model that a quantized file stands for, written to ``path`` (None: to a temporary file that lives as
    long as the returned value), and loaded.

        model = snpc.dequantize("model_quantized.onnx", "float.onnx")
        snpc.plan(snpc.analyze(model), snpc.Budget(ratio=0.5))

    Weights are what runtimes dequantize them to; activations are no longer rounded. ``Model.dequantization`` of the
    result says how many nodes became float, which did not, and how far the outputs are from those of the quantized
    model, on ``calibration`` or on random inputs. Raises UserError where nothing is quantized, or no rule knows how.
    """
    loaded = load(model, execution.observer)
    refuse_branches(loaded, "dequantize")
    before = quantized_operators(loaded.graph)
    if not before:
        raise UserError(f"{loaded.path}: nothing in it is quantized; prune it as it is")
    graph = run_passes(loaded.graph.clone(), DEQUANTIZATION_PASSES, execution.observer).model
    left = quantized_operators(graph)
    replaced = {op: count - left.get(op, 0) for op, count in before.items() if count > left.get(op, 0)}
    if not replaced:
        inner = any(node.graph is not loaded.graph.graph for node in loaded.graph.graph.all_nodes())
        where = "; loops and branches are not looked into" if inner else ""
        raise UserError(f"{loaded.path}: it cannot be dequantized: no rule fits its {operator_counts(left)}{where}")
    with write_place(loaded, path) as (target, folder):
        try:
            finalize(graph)
            write_provenance(graph, loaded, {"step": "dequantize"})
            save(graph, target, external=loaded.external)
        except UserError as error:
            raise UserError(f"{loaded.path}: {error}") from None
    written = Path(path) if path is not None else target
    differences, compared = compare_with_quantized(loaded, written, calibration, execution)
    record = Dequantization(loaded.path, replaced, left, differences, compared)
    return replace(load(written, execution.observer), kind=loaded.kind, folder=folder, dequantization=record)


@contextmanager
def write_place(loaded: Model, path: Path | str | None) -> Iterator[tuple[Path, TemporaryFolder | None]]:
    """Where the model is written: in a temporary folder, or in one from which it gets to ``path`` afterwards."""
    if path is None:
        folder = TemporaryFolder()
        yield folder.path / loaded.path.name, folder
        return
    target = Path(path)
    check_target(target, *model_files(loaded.path))
    with staging_folder(target) as staging, write_errors(target):
        yield staging / target.name, None
        publish_files([staging / target.name], target)


def compare_with_quantized(
    quantized: Model, written: Path, calibration: Calibration | None, execution: Execution
) -> tuple[tuple[Difference, ...], str]:
    """Differences of the float model's outputs from those of the quantized one, and the inputs in words."""
    feeds, words = comparison_feeds(quantized, calibration)
    try:
        reference = run_batches(quantized.path, feeds, execution)
        outputs = run_batches(written, feeds, execution)
    except UserError as error:
        return (), str(error)
    return batch_differences(reference, outputs, OutputMetrics.of_model(quantized)), words


def comparison_feeds(model: Model, calibration: Calibration | None) -> tuple[list[Feeds], str]:
    """A few batches of the data, or random inputs, and what they are in words."""
    if calibration is not None:
        batches: list[Feeds] = list(islice((calibration.held_out or calibration).batches(), VERIFICATION_BATCHES))
        return batches, calibration.source
    sizes, facts = choose_dim_sizes(model.graph)
    feeds: Feeds = random_feeds(model.inputs, dim_sizes=sizes, id_limits=embedding_rows(model.graph, facts))
    return [feeds], "random inputs"
