"""A model that says less: some entries of the vocabulary, logits of the last position. Written, compared, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snpc.errors import CheckFailed, UserError
from snpc.graph import choose_dim_sizes
from snpc.passes.canonicalization import finalize
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.slicing import find_logits, keep_last_row, rewrite_model, vocabulary_cuts
from snpc.planning import VOCABULARY_ENTRY, write_provenance
from snpc.runtime.calibration import find_ids
from snpc.runtime.evaluation import batch_differences, run_batches
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, random_feeds
from snpc.runtime.io import atomic_write, load, save
from snpc.targets.dequantize import write_place
from snpc.types import AnyArray, IntArray, Model, Restriction

if TYPE_CHECKING:
    from snpc.runtime.io import ModelSource

ALONE_ADVICE = "leave out --vocabulary and --last-logits, or give one file without companions"
LARGEST_DIFFERENCE = 1e-4  # of the logits that stay, relative to them: kernels of other sizes round apart


def restrict(
    model: ModelSource | Model,
    path: Path | str | None = None,
    *,
    vocabulary: Sequence[int] | Path | str | None = None,
    last_logits: bool = False,
    execution: Execution = DEFAULT_EXECUTION,
) -> Model:
    """The model with logits of some entries of the vocabulary only, or of the last position only, or both. It is
    written to ``path`` (None: to a temporary file that lives as long as the returned value), and loaded.

        small = snpc.restrict("model.onnx", "small.onnx", vocabulary="ids.json")

    ``vocabulary``: token ids that stay, or a file of them (``read_vocabulary``). Their embeddings and logits stay, and
    id ``vocabulary[k]``, in ascending order, becomes k; beside ``path`` the mapping is written (``write_vocabulary``),
    and the model's metadata have it under ``snpc.vocabulary``. ``last_logits``: logits [batch, 1, vocabulary], of
    position -1, which is that of padding where a text is padded on the right; rows that only other positions need are
    not computed once the result is pruned. Logits that stay equal those of the original to rounding.

    Raises UserError where that cannot be done, CheckFailed where logits are not equal.
    """
    if vocabulary is None and not last_logits:
        raise UserError("nothing to restrict: give a vocabulary (--vocabulary), or --last-logits")
    loaded = model if isinstance(model, Model) else load(model, execution.observer)
    if loaded.companions:
        raise UserError(
            f"{loaded.source}: goes with {loaded.companions[0].source.name}, and a vocabulary or the last logits are "
            "those of one model: restrict both first, one after the other"
        )
    kept = None if vocabulary is None else read_vocabulary(vocabulary)
    if loaded.companions or loaded.merged:
        other = loaded.companions[0].path if loaded.companions else loaded.merged
        raise UserError(f"{loaded.path}: one model is restricted at a time, and {other} goes with it: {ALONE_ADVICE}")
    ids = find_ids(loaded.inputs)
    if ids is None:
        raise UserError(f"{loaded.path}: it takes no token ids, so it has no vocabulary and no last position")
    sizes, facts = choose_dim_sizes(loaded.graph)
    traced = trace_graph(loaded.graph, sizes, facts)
    try:
        logits = find_logits(traced, ids.name)
        entries = int((traced.facts.shape[logits] or (0,))[-1])
        cut = restricted_graph(traced, ids.name, str(logits.name), kept, last_logits)
        with write_place(loaded, path) as (target, folder):
            finalize(cut)
            write_provenance(cut, loaded, {"step": "restrict"})
            save(cut, target, external=loaded.external)
    except UserError as error:
        raise UserError(f"{loaded.path}: {error}") from None
    written = Path(path) if path is not None else target
    if path is not None and kept is not None:
        write_vocabulary(written, kept)
    record = Restriction(loaded.source, kept, entries, last_logits)
    result = replace(load(written, execution.observer), kind=loaded.kind, folder=folder, restriction=record)
    compared = compare_restricted(loaded, result, ids.name, str(logits.name), execution)
    return replace(result, restriction=compared, dequantization=loaded.dequantization)


def restricted_graph(traced: TracedGraph, ids: str, logits: str, kept: IntArray | None, last_logits: bool) -> Any:
    """The graph with fewer entries of the vocabulary, and then with the last row alone."""
    if kept is None:
        graph = traced.model.clone()
    else:
        graph = rewrite_model(traced, vocabulary_cuts(traced, ids, kept)).model
        graph.metadata_props[VOCABULARY_ENTRY] = json.dumps(kept.tolist(), separators=(",", ":"))
    if last_logits:
        keep_last_row(graph, logits)
    return graph


def compare_restricted(original: Model, result: Model, ids: str, logits: str, execution: Execution) -> Restriction:
    """The record of ``result`` with how far its outputs are from the original's at what both have. Raises CheckFailed
    where logits are not equal."""
    record = result.restriction
    assert record is not None
    entries = record.entries if record.vocabulary is None else len(record.vocabulary)
    sizes, _ = choose_dim_sizes(result.graph)
    feeds = random_feeds(result.inputs, dim_sizes=sizes, id_limits={ids: entries})
    try:
        found = run_batches(result.path, [feeds], execution)
        before = run_batches(original.path, [original_ids(feeds, ids, record.vocabulary)], execution)
    except UserError as error:
        return replace(record, compared=f"not compared: {error}")
    expected = [{**outputs, logits: same_part(outputs[logits], record)} for outputs in before]
    differences = batch_differences(expected, found)
    worst = next(d for d in differences if d.output == logits)
    if not worst.relative <= LARGEST_DIFFERENCE:
        raise CheckFailed(
            f"{original.path}: logits that stay differ by {worst.relative:.1e} from the original's: report this model"
        )
    return replace(record, differences=differences, compared="random inputs")


def original_ids(feeds: Mapping[str, AnyArray], ids: str, kept: IntArray | None) -> dict[str, AnyArray]:
    """The feeds of the original for those of the restricted model."""
    return dict(feeds) if kept is None else {**feeds, ids: kept[feeds[ids]].astype(feeds[ids].dtype)}


def same_part(logits: AnyArray, record: Restriction) -> AnyArray:
    """What of the original's logits the restricted model has."""
    part = logits if record.vocabulary is None else logits[..., record.vocabulary]
    return part[:, -1:] if record.last_logits else part


def read_vocabulary(source: Sequence[int] | IntArray | Path | str) -> IntArray:
    """[kept] token ids, ascending, of a sequence or a file: JSON (a list of ids, or a mapping of tokens to ids) or text
    with an id per line. Raises UserError where it holds none."""
    if not isinstance(source, Path | str):
        return checked_ids(list(source), "vocabulary")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = json.loads(text) if path.suffix.lower() == ".json" else [int(word) for word in text.split()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .json or .txt file of token ids") from None
    except ValueError as error:
        raise UserError(
            f"{path}: holds no token ids ({str(error) or type(error).__name__}): a .json list, or .txt"
        ) from None
    return checked_ids(list(values.values()) if isinstance(values, dict) else values, str(path))


def checked_ids(values: Any, label: str) -> IntArray:
    """The ids, ascending, each once. Raises UserError where they are no ids."""
    whole = isinstance(values, list) and all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values
    )
    if not whole or not values or min(values) < 0:
        raise UserError(f"{label}: holds no token ids: give a list of whole numbers from 0 on")
    kept = np.unique(np.asarray(values, np.int64))
    if len(kept) < 2:
        raise UserError(f"{label}: holds {len(kept)} token id: a vocabulary has at least two")
    return kept


def kept_vocabulary(model: Model) -> IntArray | None:
    """The ids of its source that a model has; None where it has all."""
    return model.restriction.vocabulary if model.restriction is not None else None


def vocabulary_path(model: Path) -> Path:
    """The mapping of a model's ids: ``out.vocabulary.json`` beside ``out.onnx``."""
    return model.with_name(f"{model.stem}.vocabulary.json")


def write_vocabulary(model: Path, kept: IntArray) -> Path:
    """Write the mapping beside ``model``: JSON, id of the original (text) -> id of the model."""
    place = vocabulary_path(model)
    with atomic_write(place) as temporary:
        temporary.write_text(
            json.dumps({str(old): new for new, old in enumerate(kept.tolist())}) + "\n", encoding="utf-8"
        )
    return place
