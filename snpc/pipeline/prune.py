"""The one call: load, analyze, reduce tokens, plan, apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from snpc.errors import UserError
from snpc.passes import analyze
from snpc.pipeline.apply import apply
from snpc.pipeline.candidate import PrunedModel
from snpc.pipeline.planner import PlanRequest, plan
from snpc.pipeline.search import check_labels
from snpc.pipeline.stage_costs import run_stages
from snpc.pipeline.token_request import ALL_TOKENS, AUTO_TOKENS, apply_token_request
from snpc.planning import Allocator, Budget, Effort, PruningMethod, ResourceTarget
from snpc.runtime.calibration import Calibration, TextOptions, find_tokenizer, load_calibration
from snpc.runtime.evaluation import EvaluationData, MetricRequest, with_metrics
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, announce
from snpc.runtime.io import load
from snpc.targets import dequantize as dequantized
from snpc.targets import kept_vocabulary, restrict, write_vocabulary
from snpc.types import Role

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from snpc.runtime.io import ModelSource


class BudgetOptions(TypedDict, total=False):
    """The fields of ``Budget``; ``target`` and ``max_ratio`` as text too."""

    ratio: float
    target: ResourceTarget | str
    max_drift: float
    max_ppl: float | str
    max_drop: float
    roles: tuple[Role, ...]
    uniform: bool
    round_to: int
    min_width: int
    include: str
    exclude: str
    max_ratio: Mapping[str, float] | str
    allocator: Allocator


class PruneOptions(BudgetOptions, total=False):
    """The same, how units are chosen and outputs judged (see ``plan``), whether caches may get narrower (see
    ``analyze``), and which models are cut alike (see ``load``)."""

    method: PruningMethod | None
    criterion: str | None
    metric: MetricRequest | None
    effort: Effort
    prune_kv_cache: bool
    dequantize: bool
    vocabulary: Sequence[int] | Path | str | None
    last_logits: bool
    companions: Sequence[Path | str]


def prune(
    model: ModelSource,
    path: Path | str | None = None,
    *,
    calibration: Calibration | Any = None,
    evaluation: EvaluationData | None = None,
    tokens: str | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    **options: Unpack[PruneOptions],
) -> PrunedModel:
    """Prune ``model`` and write it to ``path``, verified. ``path`` None: ``PrunedModel.model`` has the result.

        snpc.prune("model.onnx", "half.onnx", target="macs=0.5", calibration="calib.npz")

    ``model``: a path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graph of onnx-graphsurgeon. ``calibration``: a
    ``Calibration``, or what ``load_calibration`` reads; of text, the tokenizer is the ``tokenizer.json`` beside the
    model. ``evaluation``: data with labels, on which the original and the result are scored (``PrunedModel.task``), and
    ``max_drop`` is measured. ``tokens``: how tokens are reduced ("merge:8@3-9"); "auto": as many go as is best for a
    target in MACs or of latency; "none": all stay. None is "auto" where there is such a target and calibration data and
    the model's tokens can get fewer, else "none". ``options``: the fields of ``Budget``, one of ``ratio``, ``target``,
    ``max_drift``, ``max_ppl`` and ``max_drop`` among them; with ``tokens`` alone no widths are cut. ``method``,
    ``criterion``, ``metric`` and ``effort`` are among them too: see ``plan``. ``dequantize``: the float model of a
    quantized one is pruned, see ``snpc.dequantize``. ``vocabulary``, ``last_logits``: the model says less first, see
    ``snpc.restrict``; ids of the data are those of the original, and without an amount to cut, nothing else goes.
    ``companions``: models with the same weights (a decoder that goes on from this one's caches), cut by the same plan
    and written beside ``path`` under their own names.

    Raises UserError where the request cannot be served, CheckFailed where the result fails verification; then nothing
    is left at ``path``.
    """
    method, criterion, metric = options.pop("method", None), options.pop("criterion", None), options.pop("metric", None)
    effort, narrow_caches = options.pop("effort", "normal"), options.pop("prune_kv_cache", False)
    of_quantized, companions = options.pop("dequantize", False), options.pop("companions", ())
    vocabulary, last_logits = options.pop("vocabulary", None), options.pop("last_logits", False)
    restricted = vocabulary is not None or last_logits
    budget: dict[str, Any] = {**options}
    tokens_only = not budget and tokens is not None and tokens.strip() not in (AUTO_TOKENS, ALL_TOKENS)
    limits = None if tokens_only or (restricted and not budget) else Budget(**budget)
    check_labels(limits, evaluation)
    if of_quantized and companions:
        raise UserError("dequantize is for one model: call snpc.dequantize for each, and prune what it writes")
    loaded = dequantized(model, execution=execution) if of_quantized else load(model, companions=companions)
    if restricted:
        loaded = restrict(loaded, vocabulary=vocabulary, last_logits=last_logits, execution=execution)
    analysis = with_metrics(analyze(loaded, prune_kv_cache=narrow_caches), metric)
    if isinstance(calibration, Calibration) and kept_vocabulary(loaded) is not None:
        raise UserError(
            "with a vocabulary, give the data themselves in place of a Calibration: their ids are renumbered"
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        text = TextOptions(find_tokenizer(loaded.source), vocabulary=kept_vocabulary(loaded))
        calibration = load_calibration(calibration, loaded.inputs, text=text)
    widths = PlanRequest(limits, method, criterion, effort=effort) if limits is not None else None
    announce(execution.progress, run_stages(analysis, calibration, widths, tokens, method=method))
    analysis = apply_token_request(
        analysis,
        calibration,
        tokens,
        target=limits.target if limits is not None else None,
        widths=widths,
        execution=execution,
    )
    pruning_plan = plan(
        analysis, limits, calibration, method=method, criterion=criterion, execution=execution, effort=effort
    )
    result = apply(pruning_plan, path, evaluation=evaluation)
    kept = kept_vocabulary(loaded)
    if path is not None and kept is not None:
        write_vocabulary(Path(path), kept)
    return result
