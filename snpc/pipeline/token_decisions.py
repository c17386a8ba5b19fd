"""Which tokens go, as numbers: decisions of a graph for given inputs, and whether fewer tokens are the same as the same
tokens taken out in place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph.binding import dynamic_axes
from snpc.graph.shapes import best_binding, evaluate
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import clean
from snpc.passes.token_analysis.reduction_points import TOKEN_AXIS, TokenPoint
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.compare import compare, outputs_of, pooled
from snpc.runtime.execution.session import open_session, run_session
from snpc.runtime.io.save import save
from snpc.tokens.inplace_oracle import inplace_feeds, inplace_model
from snpc.tokens.reduction import Reduction
from snpc.types import AnyArray, Difference, Feeds


@dataclass(frozen=True)
class Told(Calibration):
    """Calibration data with the decisions that go with each batch: what an open graph is fed."""

    decided: tuple[Feeds, ...]

    def batches(self) -> Iterator[dict[str, AnyArray]]:
        for feeds, decided in zip(super().batches(), self.decided, strict=True):
            yield {**feeds, **decided}

    def sampled(self, name: str) -> bool:
        return name in self.decided[0] or super().sampled(name)


def told(analysis: Analysis, calibration: Calibration | None, provider: str = "cpu") -> Calibration | None:
    """Calibration data as the analysed graph takes it: where its tokens are reduced, with the decisions that the model
    makes before any width is cut."""
    if analysis.reduction is None or calibration is None or isinstance(calibration, Told):
        return calibration
    decided = tuple(decided_by(closed(analysis), analysis.reduction.decisions, calibration, provider))
    known = {f.name: getattr(calibration, f.name) for f in fields(Calibration)}
    return Told(**known, decided=decided)


def decided_by(model: ir.Model, names: Sequence[str], calibration: Calibration, provider: str) -> Iterator[Feeds]:
    """What ``model``, which is taken over, decides, batch by batch."""
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "deciding.onnx"
        save(clean(model), path)
        yield from decisions(path, names, calibration.batches(), provider)


def closed(analysis: Analysis) -> ir.Model:
    """The analysed model at its full width, deciding itself."""
    model = analysis.traced.model.clone()
    if analysis.reduction is not None:
        analysis.reduction.close(model)
    return model


def decisions(path: Path, names: Sequence[str], batches: Iterable[Feeds], provider: str) -> Iterator[Feeds]:
    """What the model at ``path`` decides, batch by batch."""
    model = ir.load(path)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    missing = [name for name in names if name not in values]
    if missing:
        raise CheckFailed(f"{path}: nothing decides {missing[0]}; is it the model that this plan made?")
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        shown = Path(folder) / "decisions.onnx"
        save(clean(model), shown)
        session = open_session(shown, provider=provider, optimise="basic", memory="least")
        known = {i.name for i in session.get_inputs()}
        for feeds in batches:
            yield run_session(session, {k: v for k, v in feeds.items() if k in known}, name=path.name)


def check_tokens(
    analysis: Analysis, path: Path, batches: Sequence[Feeds], tolerance: float, provider: str
) -> tuple[list[Feeds], str]:
    """(``batches`` with what the file at ``path`` decides for them, what was checked in words).

    Raises CheckFailed where the decisions, carried out in place, give something else.
    """
    assert analysis.reduction is not None
    decided = list(decisions(path, analysis.reduction.decisions, batches, provider))
    found = same_in_place(analysis, batches, decided, provider)
    for d in found:
        if d.relative > tolerance:
            raise CheckFailed(
                f"output {d.output}: fewer tokens differ from the same tokens taken out in place by {d.relative:.1e} "
                f"relative, more than {tolerance:.0e}"
            )
    said = f"fewer tokens equal the same tokens taken out in place to {max(d.relative for d in found):.1e}"
    return [{**feeds, **one} for feeds, one in zip(batches, decided, strict=True)], said


def tokens_in(model: ir.Model, point: TokenPoint, feeds: Feeds) -> int:
    """How many tokens these inputs have at ``point``."""
    if point.fixed:
        return point.count
    sizes = {dim: feeds[name].shape[axis] for dim, name, axis, _ in dynamic_axes(model.graph) if name in feeds}
    shape = evaluate(model, sizes).shape[point.stream]
    assert shape is not None
    return shape[TOKEN_AXIS]


def same_in_place(
    analysis: Analysis, batches: Sequence[Feeds], decided: Sequence[Feeds], provider: str
) -> tuple[Difference, ...]:
    """The open graph at its full width against the model with the same tokens taken out in place."""
    reduction = analysis.reduction
    assert isinstance(reduction, Reduction)
    graph = analysis.model.graph
    _, facts = best_binding(graph)
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        short, full = Path(folder) / "fewer.onnx", Path(folder) / "in-place.onnx"
        save(clean(analysis.traced.model.clone()), short)
        save(clean(inplace_model(graph, facts, reduction.steps)), full)
        kind = reduction.dtypes[reduction.steps[0].point.value].numpy()
        fed = []
        for feeds, one in zip(batches, decided, strict=True):
            added = inplace_feeds(reduction.steps, one, tokens_in(graph, reduction.steps[0].point, feeds))
            fed.append({**feeds, **{k: v.astype(kind) for k, v in added.items()}})
        expected = outputs_of(full, fed, provider)
        found = outputs_of(short, [{**a, **b} for a, b in zip(batches, decided, strict=True)], provider)
    return pooled([compare(a, b) for a, b in zip(expected, found, strict=True)])
