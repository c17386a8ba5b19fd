"""Verification of written files: the sliced graph equals the masked one; how close its outputs are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from snpc.errors import CheckFailed, UserError
from snpc.graph import DimSizes, dynamic_axes
from snpc.passes import Analysis, analyze, partly_written_outputs
from snpc.passes.slicing import RewrittenModel, rewrite_as_stored
from snpc.pipeline.planner import PruningPlan, fills_caches
from snpc.pipeline.refit import with_refitted_weights
from snpc.pipeline.token_decisions import check_token_reduction
from snpc.planning import cuts_of
from snpc.runtime.batches import open_file, run_each, too_large_to_stream
from snpc.runtime.calibration import MAX_HELD_OUT, Calibration
from snpc.runtime.evaluation import (
    LanguageJudge,
    MetricRequest,
    OutputMetrics,
    RunningDecoder,
    cache_interface,
    cached_decoding_error,
    check_removed_layers,
    check_structure,
    compare_models,
    compare_on_equal_selections,
    decoder_interface,
    find_language_head,
    find_selectors,
    is_cache_input,
    measure_requantization,
    name_selectors,
    narrow_past,
    raise_if_unequal,
    rounding_tolerance,
    sum_surprise,
    take_until,
    with_metrics,
)
from snpc.runtime.execution import (
    ARTIFACT_SUFFIXES,
    DEFAULT_EXECUTION,
    Execution,
    RunFunction,
    SessionLoadError,
    SpillableStore,
    feed_sizes,
    find_running_sizes,
    id_limits,
    memory_budget,
    probe_batch,
    random_batch,
    sizes_text,
)
from snpc.runtime.io import load
from snpc.types import AnyArray, Difference, Feeds, Model, Quality, TensorSpec, Verdict

NOT_COMPARED = Quality((), 0, False, "nothing", False)
RANDOM, RANDOM_SAMPLES = "random inputs", 2
MASKED_SAMPLES = 8  # on which sliced and masked outputs are compared
MAX_OUTPUT_BYTES = 256 << 20  # of the original's outputs: fewer samples are compared where they are larger


@dataclass(frozen=True)
class VerificationData:
    """Feeds to verify on. ``sizes``: samples of each; ``held_out``: nothing was fitted to them. ``source``: words."""

    batches: Sequence[Feeds]
    sizes: Sequence[int]
    source: str
    held_out: bool = False
    random_inputs: bool = False

    def first(self, batches: int) -> VerificationData:
        return replace(self, batches=self.batches[:batches], sizes=self.sizes[:batches])

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def describe(self) -> str:
        samples = "sample" if self.samples == 1 else "samples"
        return f"{self.samples} {'held-out ' if self.held_out else ''}{samples} of {self.source}"


@dataclass(frozen=True)
class SizeProbe:
    """Random inputs at ``sizes`` of dynamic dimensions that differ from those of the analysis, and what the original
    makes of them: a rewrite that is right at one length only is found out."""

    feeds: Feeds
    outputs: Mapping[str, AnyArray]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Reference:
    """The original's ``outputs`` for each batch of ``data``, how they are judged. ``not_run``: why they are missing."""

    data: VerificationData
    metrics: OutputMetrics
    outputs: Sequence[Mapping[str, AnyArray]] = ()
    not_run: str = ""
    probe: SizeProbe | None = None


def masked_batches(sizes: Sequence[int]) -> int:
    """How many of the first batches, of so many samples each, sliced and masked outputs are compared on: the check is
    exact but for rounding, so a few samples show what any would."""
    return int(np.searchsorted(np.cumsum(sizes), MASKED_SAMPLES)) + 1


def verification_data(
    analysis: Analysis,
    calibration: Calibration | None,
    *,
    fitted_to: bool = True,
    execution: Execution = DEFAULT_EXECUTION,
) -> VerificationData:
    """Feeds for verification: samples that were held out, else the calibration data, or seeded random inputs.

    ``fitted_to``: the model was made from ``calibration``, all of which is fed otherwise.
    """
    if calibration is None:
        return random_data(analysis, analysis.traced_graph.dim_sizes)
    held_out = calibration.held_out
    if held_out is not None:
        return replace(data_of(held_out, held_out.source, execution), held_out=True)
    if not fitted_to:
        return data_of(calibration, calibration.source, execution)
    sizes = calibration.batch_sizes()
    enough = int(np.searchsorted(np.cumsum(sizes), MAX_HELD_OUT)) + 1
    return data_of(calibration, f"{calibration.source}, which the model was made from", execution, enough)


def random_data(analysis: Analysis, dim_sizes: DimSizes) -> VerificationData:
    """Random inputs at ``dim_sizes``, of which ``source`` names those of the model's own inputs."""
    own = {name for name, *_ in dynamic_axes(analysis.model.graph.graph)}
    sizes = {k: v for k, v in feed_sizes(analysis, RANDOM_SAMPLES, dim_sizes).items() if k in own}
    batch = random_batch(analysis, RANDOM_SAMPLES, dim_sizes=dim_sizes)
    source = f"{RANDOM} at {sizes_text(sizes)}" if sizes else RANDOM
    return VerificationData([batch], [len(next(iter(batch.values()), ()))], source, random_inputs=True)


def data_of(calibration: Calibration, source: str, execution: Execution, count: int | None = None) -> VerificationData:
    """The first ``count`` batches, or all. They take up to a quarter of ``execution.memory_limit`` bytes of memory; the
    others lie in temporary files."""
    store = SpillableStore(memory_budget(execution.memory_limit) // 4)
    batches = [
        {name: store.keep(array) for name, array in feeds.items()} for feeds in islice(calibration.batches(), count)
    ]
    return VerificationData(batches, calibration.batch_sizes()[:count], source, random_inputs=calibration.random)


def run_original(analysis: Analysis, original: Path, data: VerificationData, execution: Execution) -> Reference:
    """Run the original on as many batches as its outputs leave room for.

    Random inputs that it does not run on are drawn again, at sizes of dynamic dimensions at which it does.
    """
    sizes = analysis.traced_graph.dim_sizes
    unwritten = partly_written_outputs(analysis.model.graph)
    with open_file(original, execution) as run:

        def outputs_for(batches: Sequence[Feeds]) -> list[dict[str, AnyArray]]:
            results = run_each(run, batches, execution, "verification, original")
            written = ({name: array for name, array in r.items() if name not in unwritten} for r in results)
            return take_until(written, MAX_OUTPUT_BYTES)

        try:
            outputs = outputs_for(data.batches)
        except UserError:
            if not data.random_inputs:
                raise
            sizes = find_running_sizes(analysis, run)
            data = random_data(analysis, sizes)
            outputs = outputs_for(data.batches)
        probe = run_probe(analysis, sizes, unwritten, run) if analysis.reduction is None else None
        metrics = OutputMetrics.of(analysis)
        if not data.random_inputs:
            metrics = replace(metrics, language=judge_language(analysis, run, data.batches, outputs, execution))
    return Reference(data.first(len(outputs)), metrics, outputs, probe=probe)


def judge_language(
    analysis: Analysis,
    run: RunFunction,
    batches: Sequence[Feeds],
    outputs: Sequence[Mapping[str, AnyArray]],
    execution: Execution,
) -> LanguageJudge | None:
    """The surprise of a causal language model on all batches; None for any other model. ``outputs``: of the first."""
    try:
        head = find_language_head(analysis.model, id_limits(analysis), run, batches[0], outputs[0])
    except UserError:  # it does not run on other ids
        return None
    if head is None:
        return None
    dense, rest = sum_surprise(head, batches[: len(outputs)], outputs), batches[len(outputs) :]
    if rest:
        for feeds, made in zip(rest, run_each(run, rest, execution, "perplexity, original"), strict=True):
            dense += head.surprise(feeds, made)
    return LanguageJudge(head, dense, rest)


def run_probe(analysis: Analysis, sizes: DimSizes, unwritten: Collection[str], run: RunFunction) -> SizeProbe | None:
    """Without the outputs ``unwritten``. None where the model has no dynamic axis, or the original runs at no other
    sizes, or to no finite outputs."""
    feeds, others = probe_batch(analysis, sizes)
    if not feeds:
        return None
    try:
        outputs = {name: array for name, array in run(feeds).items() if name not in unwritten}
    except UserError:
        return None
    finite = all(not array.size or np.isfinite(array.astype(np.float64)).any() for array in outputs.values())
    return SizeProbe(feeds, outputs, others) if finite else None


def candidate_reference(plan: PruningPlan) -> Reference:
    """The original's outputs, to compare candidates of ``plan`` with.

    They are missing where the original is too large for this machine or has an operator that this onnxruntime does not
    have. Raises UserError where onnxruntime refuses it for any other reason.
    """
    analysis, execution = plan.analysis, plan.execution
    data = verification_data(analysis, plan.calibration, execution=execution)
    if data.held_out and not plan.measured_on_calibration:
        data = replace(data, held_out=False, source=f"{data.source}, which the statistics may include")
    too_large = too_large_to_stream(analysis.traced_graph.model, analysis.traced_graph.facts, execution)
    if too_large:
        return Reference(data, OutputMetrics(), not_run=too_large)
    try:
        return run_original(analysis, analysis.model.path, data, execution)
    except SessionLoadError as error:
        if error.missing_operator:
            return Reference(data, OutputMetrics(), not_run=str(error))
        raise UserError(f"nothing can be verified, so nothing is written: {error}; run onnx.checker on it") from None
    except UserError as error:  # it loads: then nothing is written that was not compared
        raise UserError(f"the original does not run, so nothing can be verified: {error}") from None


def compare_with_reference(
    analysis: Analysis,
    pruned: Path,
    rewritten: RewrittenModel | None,
    reference: Reference,
    structure: tuple[str, ...],
    execution: Execution,
) -> Verdict:
    """Run the pruned file on all batches and, where ``rewritten`` is known, the masked graph on the first ones.

    Raises CheckFailed where they differ by more than rounding, or fewer tokens from the same tokens taken out in place.
    """
    tolerance, data = rounding_tolerance(analysis.model), reference.data
    first = data.first(masked_batches(data.sizes))
    decided = list(first.batches)
    if analysis.reduction is not None:
        decided, check = check_token_reduction(analysis, pruned, first.batches, tolerance, execution)
        structure = (*structure, check)
    if analysis.removal is not None:
        structure = (*structure, check_removed_layers(analysis, decided, tolerance, execution))

    def verdict(
        equals_mask: Sequence[Difference], drift: Sequence[Difference], checks: tuple[str, ...], on: VerificationData
    ) -> Verdict:
        quality = Quality(tuple(drift), on.samples, on.held_out, on.describe(), on.random_inputs)
        found = Verdict(checks, tuple(equals_mask), quality, first.describe(), tolerance)
        raise_if_unequal(found)
        return found

    measured: tuple[Sequence[Difference], Sequence[Difference]] | None = None
    probes = [reference.probe] if reference.probe is not None and rewritten is not None else []
    checks = tuple(f"sliced equals masked at {sizes_text(probe.sizes)} too" for probe in probes)
    try:
        measured = compare_models(
            [*(probe.outputs for probe in probes), *reference.outputs],
            pruned,
            rewritten,
            [*(probe.feeds for probe in probes), *data.batches],
            execution,
            [*(probe.feeds for probe in probes), *decided],
            reference.metrics,
            len(probes),
        )
        return verdict(*measured, (*structure, *checks), data)
    except CheckFailed as error:
        if rewritten is None:
            raise
        at = f" (random inputs at {sizes_text(probes[0].sizes)} were compared too)" if probes else ""
        feeds = [*((probe.feeds, probe.feeds) for probe in probes), *zip(first.batches, decided, strict=True)]
        same = compare_on_equal_selections(
            analysis.model.graph, pruned, rewritten, feeds, tolerance, reference.metrics, execution, len(probes)
        )
        if same is None:
            raise CheckFailed(f"{error}{at}") from None
    drift, on = (measured[1], data) if measured else (same.drift, first)
    return verdict(same.equals_mask, drift, (*structure, *checks, same.describe()), on)


def measure_quality(
    analysis: Analysis, files: Sequence[Path], data: VerificationData, execution: Execution = DEFAULT_EXECUTION
) -> tuple[Quality, ...]:
    """How close the outputs of each file are to the original's. Raises UserError for a file with narrower caches where
    the data fills caches."""
    reference = run_original(analysis, analysis.model.path, data, execution)
    fitting = (with_narrow_caches(reference, analysis.model, file) for file in files)
    verdicts = (
        compare_with_reference(analysis, file, None, own, (), execution)
        for file, own in zip(files, fitting, strict=True)
    )
    return tuple(verdict.quality for verdict in verdicts)


def with_narrow_caches(reference: Reference, original: Model, file: Path) -> Reference:
    """The same for a file whose caches are narrower: empty caches get as narrow, and what it writes there is not
    compared."""
    if not any(map(is_cache_input, original.inputs)) or file.suffix in ARTIFACT_SUFFIXES:
        return reference
    model = load(file)
    declared, own = ({s.name: s.shape[-1:] for s in (*m.inputs, *m.outputs)} for m in (original, model))
    narrower = {name for name, width in own.items() if width != declared.get(name, width)}
    if not narrower:
        return reference
    language = reference.metrics.language
    rest = language.rest if language is not None else []
    if any(feeds[name].size for feeds in (*reference.data.batches, *rest) for name in narrower & feeds.keys()):
        raise UserError(
            f"{file}: its caches are narrower than the original's, and these inputs fill them: give data with "
            "token ids alone, whose caches are empty"
        )
    batches = [narrow_past(feeds, model.inputs) for feeds in reference.data.batches]
    outputs = [{n: a for n, a in made.items() if n not in narrower} for made in reference.outputs]
    if language is not None:
        language = replace(language, rest=[narrow_past(feeds, model.inputs) for feeds in rest])
    metrics = replace(reference.metrics, language=language)
    return replace(reference, data=replace(reference.data, batches=batches), outputs=outputs, metrics=metrics)


def measure_whole(
    original: Analysis, pruned: Path, data: VerificationData, fed: VerificationData, execution: Execution
) -> Quality:
    """How close the judged outputs of ``pruned`` on ``fed`` are to those of the original on ``data``: the same samples,
    behind what was pruned too, and behind its original."""
    reference = run_original(original, original.model.path, data, execution)
    judged = [{n: a for n, a in made.items() if reference.metrics[n].judged} for made in reference.outputs]
    whole = replace(reference, outputs=judged, data=fed.first(len(judged)))
    return compare_with_reference(original, pruned, None, whole, (), execution).quality


def verify_candidate(path: Path, rewritten: RewrittenModel, reference: Reference, plan: PruningPlan) -> Verdict:
    """Verify a file that was just written. Without outputs of the original, the verdict says so.

    The message of CheckFailed says that nothing is written, and what to try.
    """
    analysis = plan.analysis
    structure = check_structure(analysis.model.path, path, rewritten.sliced_interface(), declared_interface(analysis))
    if reference.not_run:
        return not_run_verdict(structure, reference.not_run, rounding_tolerance(analysis.model))
    structure = (*structure, *outputs_left_out(analysis))
    if cache_interface(analysis.model) is not None:
        pruned = load(path)
        structure = (
            *structure,
            *check_cached_decoding(
                DecoderPair(analysis.model, analysis.model), DecoderPair(pruned, pruned), plan.execution
            ),
        )
    try:
        verdict = compare_with_reference(analysis, path, rewritten, reference, structure, plan.execution)
    except CheckFailed as error:
        advice = selection_advice(rewritten) if reference.data.random_inputs else ""
        raise CheckFailed(f"{error}; nothing is written{advice}") from None
    if rewritten.rounded is None:
        return verdict
    first = reference.data.first(masked_batches(reference.data.sizes)).batches
    measured = measure_requantization(rewritten, path, first, reference.metrics, plan.execution)
    return replace(verdict, requantization=measured)


def check_caches_fit(plan: PruningPlan, calibration: Calibration | None) -> None:
    """Raise UserError where the data fills caches whose channels the plan rotates."""
    rotated = plan.closed_forms.bases if plan.closed_forms is not None else {}
    if calibration is None or not any(plan.analysis.group(name).cached for name in rotated):
        return
    if not fills_caches(plan.analysis, calibration):
        return
    raise UserError(
        f"{calibration.source}: its caches hold keys and values of the original, and the pruned model's caches have "
        "another basis; give data with empty caches, or with token ids alone"
    )


def declared_interface(analysis: Analysis) -> tuple[TensorSpec, ...]:
    """Inputs and outputs as the canonical graph declares them."""
    return (*analysis.model.inputs, *analysis.model.outputs)


def outputs_left_out(analysis: Analysis) -> tuple[str, ...]:
    """Which outputs are not compared, in words; nothing where all are."""
    unwritten = sorted(partly_written_outputs(analysis.model.graph))
    return (
        (f"not compared: {', '.join(unwritten)}, of which rows behind the tokens are not written",) if unwritten else ()
    )


@dataclass(frozen=True)
class DecoderPair:
    """The decoder that reads a prompt, and the one that goes on from its caches, which may be the same. ``states``: of
    an encoder, with their mask, for the decoders' inputs; random ones where there are none."""

    first: Model
    second: Model
    states: Feeds = field(default_factory=dict)

    @property
    def decodes(self) -> bool:
        """Are these decoders whose inputs are of known kinds, and does the second take the caches of the first?"""
        first, second = decoder_interface(self.first), decoder_interface(self.second)
        return first is not None and second is not None and second.continues(first)

    def error(self, execution: Execution) -> float | None:
        """See ``cached_decoding_error``."""
        with ExitStack() as sessions:
            models = (self.first, self.second)
            runs = {path: sessions.enter_context(open_file(path, execution)) for path in {m.path for m in models}}
            first, second = (
                RunningDecoder(interface, runs[model.path], self.states)
                for model in models
                if (interface := decoder_interface(model))
            )
            return cached_decoding_error(first, second)


def check_cached_decoding(original: DecoderPair, pruned: DecoderPair, execution: Execution) -> tuple[str, ...]:
    """The check that decoding through caches gives what all tokens at once give, in words; none where ``pruned`` has no
    caches, or the originals do not do so either. Raises CheckFailed where only the pruned ones do not."""
    tolerance = rounding_tolerance(original.first)
    if not pruned.decodes:
        return ()
    error = pruned.error(execution)
    if error is not None and error <= tolerance:
        return (f"decoding step by step through the caches equals decoding at once to {error:.1e}",)
    dense = original.error(execution) if original.decodes else None
    if dense is None or dense > tolerance:
        return ()
    found = f"differs from decoding at once by {error:.1e}" if error is not None else "does not run"
    raise CheckFailed(
        f"{pruned.second.path}: decoding step by step through the caches {found}; in the original both give the same"
    )


def selection_advice(rewritten: RewrittenModel) -> str:
    """What to try where outputs depend on a selection, which random inputs make among scores that hardly differ."""
    selectors = find_selectors(rewritten.source, rewritten.removed)
    if not selectors:
        return ""
    return f"; outputs depend on what {name_selectors(selectors)} selects of random inputs: try --calib DATA"


def not_run_verdict(structure: tuple[str, ...], reason: str, tolerance: float) -> Verdict:
    """The verdict on a file whose outputs cannot be compared here."""
    advice = "outputs were not compared; compare them with `snpc verify` where the model runs"
    return Verdict(structure, (), NOT_COMPARED, "nothing", tolerance, f"{reason}; {advice}")


def verify(
    original: Path | str,
    pruned: Path | str,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    metric: MetricRequest | None = None,
    dim_sizes: Mapping[str, int] | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Verdict:
    """Check a pruned file against its original: structure, quality, and sliced equals masked where the plan is known.

    ``calibration``: inputs to run on; None: those of the plan, or random ones. Quality is measured on its held-out
    samples if it has some, else on all of it. A plan that refits weights must have its closed forms
    (``complete_plan``); made with other data than ``calibration`` it says nothing about this file's weights, and is
    left out. ``dim_sizes``: sizes of dynamic dimensions that random inputs have, where there is no plan. Raises
    CheckFailed where a check fails.
    """
    analysis = with_metrics(plan.analysis if plan is not None else analyze(load(original), dim_sizes), metric)
    pruned_model = load(pruned)
    rewritten, refits = None, plan is not None and plan.slices.method != "select"
    notes: tuple[str, ...] = ()
    if plan is not None and refits and plan.other_data:
        notes = (f"sliced against masked is not compared: the plan was made with {plan.other_data}",)
    elif plan is not None:
        calibration = calibration or plan.calibration
        check_caches_fit(plan, calibration)
        slices, source = with_refitted_weights(plan)
        rewritten, _ = rewrite_as_stored(analysis.model, source, cuts_of(slices))
    narrowed = rewritten.sliced_interface() if rewritten is not None else None
    dense = analysis.model  # of branches, files of their own
    structure = check_structure(dense.path, pruned_model.path, narrowed, declared_interface(analysis))
    companions = zip(dense.companions, pruned_model.companions, strict=False)
    for first, second in ((dense, pruned_model), *companions):
        pairs = DecoderPair(dense, first), DecoderPair(pruned_model, second)
        structure = (*structure, *check_cached_decoding(*pairs, execution))
    data = verification_data(analysis, calibration, fitted_to=refits, execution=execution)
    reference = run_original(analysis, dense.path, data, execution)
    return compare_with_reference(
        analysis, pruned_model.path, rewritten, reference, (*structure, *outputs_left_out(analysis), *notes), execution
    )
