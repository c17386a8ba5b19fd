"""Token decisions as arrays: computed for given inputs, replayed as graph inputs, and checked against the oracle.

During calibration and fitting the decisions of the dense model are fed as inputs, so that no decision flips because a
weight changed in its last digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import choose_dim_sizes, dynamic_axes, infer_graph
from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.passes.token_analysis import TOKEN_AXIS, TokenPoint
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import batch_differences, run_batches
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
    SpillableStore,
    memory_budget,
    open_session,
    run_session,
)
from snpc.runtime.io import NOT_STORED, read_model, save
from snpc.temporary import temporary_folder
from snpc.tokens import TokenReductionPlan, full_length_oracle, oracle_feeds
from snpc.types import AnyArray, Difference, Feeds


@dataclass(frozen=True)
class CalibrationWithDecisions(Calibration):
    """Calibration data with the token decisions of each batch, as a graph with external decisions takes them."""

    decisions: tuple[Mapping[str, AnyArray], ...] = ()

    def batches(self) -> Iterator[dict[str, AnyArray]]:
        for feeds, decided in zip(super().batches(), self.decisions, strict=True):
            yield {**feeds, **decided}

    def slice(self, start: int, stop: int) -> CalibrationWithDecisions:
        sliced = super().slice(start, stop)
        assert isinstance(sliced, CalibrationWithDecisions)
        return replace(sliced, decisions=self.decisions[start:stop])

    def has_sample_axis(self, name: str) -> bool:
        return name in self.decisions[0] or super().has_sample_axis(name)


def with_token_decisions(
    analysis: Analysis, calibration: Calibration | None, execution: Execution = DEFAULT_EXECUTION
) -> Calibration | None:
    """Calibration data as the analyzed graph takes it: where tokens are reduced, with the decisions of the model at
    full width, which is run once over the data for them.

    Decisions take up to a quarter of ``execution.memory_limit`` bytes of memory; the others lie in temporary files."""
    if analysis.reduction is None or calibration is None:
        return calibration
    stage = NOT_STORED
    if execution.work is not None:
        stage = execution.stored_stage("token decisions", analysis.identity, calibration.identity)
    decided = stage.get_batches("all", len(calibration.batch_plan))
    if decided is None:
        store = SpillableStore(memory_budget(execution.memory_limit) // 4)
        found = model_decisions(self_deciding_model(analysis), analysis.reduction.decisions, calibration, execution)
        decided = [{name: store.keep(array) for name, array in feeds.items()} for feeds in found]
        stage.put_batches("all", decided)
    decisions = tuple(decided)
    known = {f.name: getattr(calibration, f.name) for f in fields(Calibration)}
    return CalibrationWithDecisions(**known, decisions=decisions)


def model_decisions(
    model: ir.Model, names: Sequence[str], calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> Iterator[Feeds]:
    """The decisions of ``model``, batch by batch. The model is changed."""
    batches = execution.track("token decisions", calibration.batches(), len(calibration.batch_plan))
    with temporary_folder() as folder:
        path = folder / "deciding.onnx"
        save(finalize(model), path)
        yield from file_decisions(path, names, batches, execution)


def self_deciding_model(analysis: Analysis) -> ir.Model:
    """A copy of the analyzed model at full width, with its decisions embedded."""
    model = analysis.traced_graph.model.clone()
    if analysis.reduction is not None:
        analysis.reduction.embed_decisions(model)
    return model


def file_decisions(
    path: Path, names: Sequence[str], batches: Iterable[Feeds], execution: Execution = DEFAULT_EXECUTION
) -> Iterator[Feeds]:
    """The decisions of the model at ``path``, batch by batch. Raises CheckFailed where it computes none."""
    model = read_model(path)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    missing = [name for name in names if name not in values]
    if missing:
        raise CheckFailed(f"{path}: computes no {missing[0]}; is it the model that this plan made?")
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    with temporary_folder() as folder:
        shown = folder / "decisions.onnx"
        save(finalize(model), shown)
        session = open_session(shown, execution=execution, optimization="basic", memory="least")
        known = {i.name for i in session.get_inputs()}
        for feeds in batches:
            yield run_session(session, {k: v for k, v in feeds.items() if k in known}, name=path.name)


def check_token_reduction(
    analysis: Analysis, path: Path, batches: Sequence[Feeds], tolerance: float, execution: Execution = DEFAULT_EXECUTION
) -> tuple[list[Feeds], str]:
    """(``batches`` with the decisions of the file at ``path``, the check in words).

    Raises CheckFailed where the same decisions, applied in place at full length, give other outputs.
    """
    assert analysis.reduction is not None
    decisions = list(file_decisions(path, analysis.reduction.decisions, batches, execution))
    differences = compare_with_oracle(analysis, batches, decisions, execution)
    for difference in differences:
        if difference.relative > tolerance:
            raise CheckFailed(
                f"output {difference.output}: fewer tokens differ from the same tokens taken out in place by "
                f"{difference.relative:.1e} relative, more than {tolerance:.0e}"
            )
    largest = max(difference.relative for difference in differences)
    note = f"fewer tokens equal the same tokens taken out in place to {largest:.1e}"
    return [{**feeds, **batch_decisions} for feeds, batch_decisions in zip(batches, decisions, strict=True)], note


def count_tokens(model: ir.Model, point: TokenPoint, feeds: Feeds) -> int:
    """The number of tokens of these inputs at ``point``."""
    if point.fixed_length:
        return point.count
    dim_sizes = {dim: feeds[name].shape[axis] for dim, name, axis, _ in dynamic_axes(model.graph) if name in feeds}
    shape = infer_graph(model, dim_sizes).shape[point.stream]
    assert shape is not None
    return shape[TOKEN_AXIS]


def compare_with_oracle(
    analysis: Analysis, batches: Sequence[Feeds], decisions: Sequence[Feeds], execution: Execution = DEFAULT_EXECUTION
) -> tuple[Difference, ...]:
    """Differences between the reduced graph at full width, with all its layers, and the oracle, which takes the same
    tokens out in place."""
    reduction = analysis.reduction
    assert isinstance(reduction, TokenReductionPlan)
    graph = analysis.model.graph
    _, facts = choose_dim_sizes(graph)
    with temporary_folder() as folder:
        short, full = folder / "fewer.onnx", folder / "in-place.onnx"
        reduced = analysis.removal.source if analysis.removal is not None else analysis.traced_graph  # with all layers
        save(finalize(reduced.model.clone()), short)
        save(finalize(full_length_oracle(graph, facts, reduction.steps)), full)
        dtype = reduction.dtypes[reduction.steps[0].point.value].numpy()
        oracle_batches = []
        for feeds, batch_decisions in zip(batches, decisions, strict=True):
            added = oracle_feeds(reduction.steps, batch_decisions, count_tokens(graph, reduction.steps[0].point, feeds))
            oracle_batches.append({**feeds, **{k: v.astype(dtype) for k, v in added.items()}})
        expected = run_batches(full, oracle_batches, execution)
        outputs = run_batches(short, [{**a, **b} for a, b in zip(batches, decisions, strict=True)], execution)
    return batch_differences(expected, outputs)
