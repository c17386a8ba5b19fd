"""Checks of a written model: its structure, sliced against masked outputs, and drift from the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
from onnx import shape_inference

from snpc.errors import CheckFailed, UserError
from snpc.graph import infer_graph
from snpc.passes.propagation import SlicedShape
from snpc.passes.quantization import with_float_graph
from snpc.passes.slicing import RewrittenModel
from snpc.runtime.batches import open_file, open_graph, run_each
from snpc.runtime.evaluation.distances import OutputMetric, as_float, same_finiteness, sample_pairs
from snpc.runtime.evaluation.metrics import RELATIVE_METRICS, OutputMetrics
from snpc.runtime.evaluation.perplexity import LanguageJudge, compare_surprise, sum_surprise
from snpc.runtime.evaluation.uncertainty import with_uncertainty
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
)
from snpc.runtime.io import load, read_without_weights
from snpc.types import AnyArray, Difference, Feeds, FloatArray, Model, Perplexity, TensorSpec, Verdict

TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-6}
HALF_PRECISION_TOLERANCE = 2e-2  # fp16 and bf16: rounding alone moves outputs by about a percent

VERIFICATION_BATCHES = 2


def check_structure(
    original: Path,
    pruned: Path,
    narrowed: Mapping[str, SlicedShape] | None = None,
    declared: Sequence[TensorSpec] = (),
) -> tuple[str, ...]:
    """Check inputs, outputs and graph of ``pruned``; returns the checks that were done, for the report.

    Inputs and outputs must be those of ``original``, except caches that are ``narrowed``, and axes that have a number
    in ``declared``, where the file has a name (``canonicalization.static_cache_widths``). onnx's checker and strict
    shape inference must accept the file if they accept the original; with custom operators they accept neither. Raises
    CheckFailed with onnx's message.
    """
    before, after = read_without_weights(original), read_without_weights(pruned)
    static = {spec.name: spec.shape for spec in declared}
    for direction in ("input", "output"):
        known = [declared_signature(value_signature(v), static) for v in graph_interface(before, direction)]
        a = [narrowed_signature(signature, narrowed or {}) for signature in known]
        b = [value_signature(v) for v in graph_interface(after, direction)]
        if a != b:
            old, new = next((x, y) for x, y in zip_longest(a, b) if x != y)
            raise CheckFailed(
                f"{pruned}: its {direction}s are not the original's: {old or 'none'} became {new or 'none'}"
            )
    checks = ["same inputs and outputs"]
    complaint = checker_error(pruned)
    if complaint is None:
        checks.append("onnx.checker and strict shape inference")
    elif checker_error(original) is None:
        raise CheckFailed(f"{pruned}: onnx.checker refuses it: {complaint}")
    else:
        checks.append("onnx.checker refuses the original as well, so it says nothing about the pruned model")
    return tuple(checks)


def graph_interface(model: onnx.ModelProto, direction: str) -> list[onnx.ValueInfoProto]:
    weights = {t.name for t in model.graph.initializer}
    return [v for v in getattr(model.graph, direction) if v.name not in weights]


ValueSignature = tuple[str, int, tuple[object, ...]]


def value_signature(value: onnx.ValueInfoProto) -> ValueSignature:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, tuple(d.dim_value or d.dim_param for d in tensor.shape.dim)


def declared_signature(original: ValueSignature, static: Mapping[str, tuple[int | str, ...]]) -> ValueSignature:
    """``original`` with the sizes of ``static`` on the axes for which the file has a name."""
    name, elem_type, dims = original
    sizes = static.get(name, ())
    if len(sizes) != len(dims):
        return original
    return (
        name,
        elem_type,
        tuple(b if isinstance(b, int) and isinstance(d, str) and d else d for d, b in zip(dims, sizes, strict=True)),
    )


def narrowed_signature(original: ValueSignature, narrowed: Mapping[str, SlicedShape]) -> ValueSignature:
    name, elem_type, dims = original
    packed = narrowed.get(name)
    if packed is None:
        return original
    return (
        name,
        elem_type,
        tuple(b if a != b else d for d, a, b in zip(dims, packed.old_shape, packed.new_shape, strict=True)),
    )


def checker_error(path: Path) -> str | None:
    """The first line of the error of onnx's checker or strict shape inference; None if both accept the file.

    Big weights are declared as inputs of the same shape: neither check depends on their values, and so a model of any
    size can be checked.
    """
    model = read_without_weights(path)
    for tensor in [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
        if tensor.name not in {v.name for v in model.graph.input}:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(model)
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # onnx raises ValidationError, InferenceError, RuntimeError: each means "not accepted"
        return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return None


def measure_differences(
    reference: Mapping[str, AnyArray], other: Mapping[str, AnyArray], metrics: OutputMetrics = RELATIVE_METRICS
) -> list[Difference]:
    """One Difference per output of one batch, over entries that are finite in both, each by its metric.

    Raises CheckFailed for other shapes, for NaN or infinity that the reference does not have at the same entry or that
    is gone, and where the reference has no finite entry.
    """
    metrics = metrics.for_values(reference)
    return [output_difference(name, a, other[name], metrics[name]) for name, a in reference.items()]


def output_difference(name: str, a: AnyArray, b: AnyArray, metric: OutputMetric) -> Difference:
    """The Difference of one output; see ``measure_differences``."""
    if a.shape != b.shape:
        raise CheckFailed(f"output {name}: shape {list(b.shape)} instead of {list(a.shape)}")
    if a.size and not np.isfinite(as_float(a)).any():
        raise CheckFailed(
            f"output {name}: the original has no finite value on these inputs, so nothing can be verified"
        )
    check_finiteness(name, as_float(a), as_float(b))
    largest, products = 0.0, np.zeros(3)
    for x, y in sample_pairs(a, b, None):  # one by one, since logits over a vocabulary are big
        finite = np.isfinite(x)
        x, y = np.where(finite, x, 0.0).reshape(-1), np.where(finite, y, 0.0).reshape(-1)
        largest = max(largest, float(np.abs(x - y).max(initial=0.0)))
        products += (x @ y, x @ x, y @ y)
    cosine = float(products[0]) / (float(np.sqrt(products[1] * products[2])) or 1.0)
    agreement = argmax_agreement(a, b, metric.axis) if metric.domain != "values" else None
    difference = Difference(name, largest, RELATIVE_METRICS[name].distance(a, b), cosine, agreement)
    if not metric.judged:
        return difference
    distance = metric.distance(a, b)
    drift = distance if metric.chosen or metric.name == "mismatch" else metric.relative_change(a, b)
    return replace(difference, metric=metric.name, distance=distance, drift=drift)


def check_finiteness(name: str, x: FloatArray, y: FloatArray) -> None:
    """Raise CheckFailed where NaN or infinity is at an entry of one of the two only."""
    if same_finiteness(x, y):
        return
    finite = np.isfinite(x), np.isfinite(y)
    appeared, gone = int(np.sum(finite[0] & ~finite[1])), int(np.sum(~finite[0] & finite[1]))
    if appeared:
        where = "the original does not" if finite[0].all() else "the original has numbers there"
        raise CheckFailed(f"output {name}: holds NaN or infinity, {where} ({appeared} of {x.size} entries)")
    if gone:
        raise CheckFailed(f"output {name}: {gone} of {x.size} entries that are NaN or infinite in the original are not")
    raise CheckFailed(f"output {name}: NaN and infinity are not those of the original")


def argmax_agreement(x: AnyArray, y: AnyArray, axis: int = -1) -> float | None:
    """Share of rows whose largest entry is the same; None for outputs without rows of at least two entries."""
    if x.ndim < 2 or x.shape[axis] < 2 or x.size == 0:
        return None
    return float((x.argmax(axis) == y.argmax(axis)).mean())


def aggregate(batches: Sequence[list[Difference]], samples: Sequence[int]) -> tuple[Difference, ...]:
    """One Difference per output over several batches: the largest difference, the mean over ``samples`` (a number for
    each batch) of the rest."""
    weights = [max(number, 1) for number in samples]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=weights))

    differences = []
    for of_output in zip(*batches, strict=True):
        rates = [d.agreement for d in of_output if d.agreement is not None]
        differences.append(
            Difference(
                of_output[0].output,
                max(d.max_abs_diff for d in of_output),
                mean([d.relative for d in of_output]),
                mean([d.cosine for d in of_output]),
                mean(rates) if len(rates) == len(of_output) else None,
                of_output[0].metric,
                mean([d.distance for d in of_output]),
                mean([d.drift for d in of_output]),
            )
        )
    return tuple(differences)


def batch_differences(
    reference: Sequence[Mapping[str, AnyArray]],
    other: Sequence[Mapping[str, AnyArray]],
    metrics: OutputMetrics = RELATIVE_METRICS,
) -> tuple[Difference, ...]:
    """One Difference per output over all batches; raises CheckFailed as ``measure_differences``."""
    if reference:
        metrics = metrics.for_values(reference[0])
    measured = [measure_differences(a, b, metrics) for a, b in zip(reference, other, strict=True)]
    return aggregate(measured, [max((len(a) for a in batch.values() if a.ndim), default=1) for batch in reference])


def judge_outputs(
    reference: Sequence[Mapping[str, AnyArray]], other: Sequence[Mapping[str, AnyArray]], metrics: OutputMetrics
) -> tuple[Difference, ...]:
    """``batch_differences`` with their uncertainty over samples."""
    metrics = metrics.for_values(reference[0])
    return tuple(
        with_uncertainty(d, [a[d.output] for a in reference], [b[d.output] for b in other], metrics[d.output])
        for d in batch_differences(reference, other, metrics)
    )


def measure_perplexity(
    pruned: Path,
    judge: LanguageJudge,
    batches: Sequence[Feeds],
    outputs: Sequence[Mapping[str, AnyArray]],
    cut: Mapping[str, SlicedShape],
    execution: Execution,
) -> Perplexity:
    """Of the original and the pruned file. ``outputs``: the file's, of the ``batches`` that are compared; it is run on
    the rest here, and no outputs of these are kept."""
    after = sum_surprise(judge.head, batches, outputs)
    if judge.rest:
        narrow = [narrow_caches(feeds, cut) for feeds in judge.rest]
        with open_file(pruned, execution) as run:
            for feeds, made in zip(judge.rest, run_each(run, narrow, execution, "perplexity"), strict=True):
                after += judge.head.surprise(feeds, made)
    return compare_surprise(judge.dense, after)


def max_relative(differences: Sequence[Difference]) -> float:
    """The largest relative difference of any output."""
    return max((d.relative for d in differences), default=0.0)


def run_batches(
    path: Path, batches: Sequence[Feeds], execution: Execution = DEFAULT_EXECUTION, stage: str | None = None
) -> list[dict[str, AnyArray]]:
    """Outputs per batch, by name. Basic optimizations only: wrong fusions of onnxruntime are not what is checked here.

    ``stage``: as of ``run_each``. bfloat16 runs as float32 where onnxruntime has no bfloat16 arithmetic.
    """
    with open_file(path, execution) as run:
        return list(run_each(run, batches, execution, stage))


def run_dequantized(path: Path, batches: Sequence[Feeds], execution: Execution) -> list[dict[str, AnyArray]]:
    """Outputs per batch of the float model that a quantized file stands for."""
    graph = with_float_graph(load(path)).graph
    with open_graph(graph, infer_graph(graph, {}, measure=False), execution) as run:
        return list(run_each(run, batches, execution))


def take_until(results: Iterable[dict[str, AnyArray]], max_bytes: float) -> list[dict[str, AnyArray]]:
    """The first results, outputs per batch. No further one is made once they are larger than ``max_bytes``, apart from
    the first ``VERIFICATION_BATCHES``."""
    outputs: list[dict[str, AnyArray]] = []
    size = 0
    for result in results:
        outputs.append(result)
        size += sum(array.nbytes for array in result.values())
        if len(outputs) >= VERIFICATION_BATCHES and size > max_bytes:
            break
    return outputs


def compare_models(
    dense: Sequence[Mapping[str, AnyArray]],
    pruned: Path,
    rewritten: RewrittenModel | None,
    batches: Sequence[Feeds],
    execution: Execution = DEFAULT_EXECUTION,
    masked_feeds: Sequence[Feeds] | None = None,
    metrics: OutputMetrics = RELATIVE_METRICS,
    probes: int = 0,
) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """(sliced against masked, pruned against original) on ``batches``; ``dense``: outputs of the original, those
    that are compared.

    Sliced against masked: the written model against the original at its full size with the removed units set to zero,
    and with refitted weights if there are any; empty where ``rewritten`` is None. Of a file that is written quantized,
    the float models that both stand for: rounded activations turn a difference in the last bit into one of a step, in
    everything behind. ``masked_feeds``: feeds of the masked
    original for the first batches, to which that is limited (with token decisions it has more inputs). ``metrics``: of
    pruned against original. ``probes``: so many of the first batches are there for sliced against masked only.
    """
    cut = rewritten.sliced_interface() if rewritten is not None else {}
    try:
        narrow = run_batches(
            pruned, [narrow_caches(feeds, cut) for feeds in batches], execution, "verification, pruned"
        )
    except UserError as error:  # the original ran
        raise CheckFailed(f"the pruned model does not run, the original does: {error}") from None
    drift = judge_outputs([narrow_caches(outputs, cut) for outputs in dense[probes:]], narrow[probes:], metrics)
    if metrics.language is not None:
        judge = metrics.language
        found = measure_perplexity(pruned, judge, batches[probes:], narrow[probes:], cut, execution)
        drift = tuple(replace(d, perplexity=found) if d.output == judge.head.logits else d for d in drift)
    if rewritten is None:
        return (), drift
    with open_graph(rewritten.masked(), rewritten.source.facts, execution) as run:
        masked = list(run_each(run, masked_feeds or batches, execution, "verification, masked"))
    compared = [{name: array for name, array in outputs.items() if name in dense[0]} for outputs in masked]
    same = [narrow_caches(outputs, cut) for outputs in compared]
    sliced = narrow[: len(same)]
    if rewritten.rounded is not None:
        sliced = run_dequantized(pruned, [narrow_caches(feeds, cut) for feeds in batches[: len(same)]], execution)
    equals_mask = batch_differences(same[probes:], sliced[probes:])
    worst = {d.output: d for d in batch_differences(same[:probes], sliced[:probes])}
    return tuple(max(d, worst.get(d.output, d), key=lambda found: found.relative) for d in equals_mask), drift


def narrow_caches(arrays: Mapping[str, AnyArray], cut: Mapping[str, SlicedShape]) -> dict[str, AnyArray]:
    """Inputs or outputs of the original in the pruned model's shapes: caches may be narrower."""
    return {name: cut[name].slice_array(array) if name in cut else array for name, array in arrays.items()}


def rounding_tolerance(model: Model, coarsest: bool = False) -> float:
    """Largest relative difference that rounding explains, by the most common type of the weights, or the coarsest."""
    dtypes = [
        v.dtype for v in model.graph.graph.initializers.values() if v.dtype is not None and v.dtype.is_floating_point()
    ]
    if not dtypes:
        return 1e-4
    tolerances = [TOLERANCE.get(dtype.numpy(), HALF_PRECISION_TOLERANCE) for dtype in dtypes]
    return max(tolerances) if coarsest else max(set(tolerances), key=tolerances.count)


def raise_if_unequal(verdict: Verdict) -> None:
    """Raise CheckFailed where sliced and masked outputs differ by more than rounding."""
    for d in verdict.equals_mask:
        if d.relative > verdict.tolerance:
            raise CheckFailed(
                f"output {d.output}: the pruned model differs from its masked original by {d.relative:.1e} relative "
                f"({d.max_abs_diff:.1e} at most), more than {verdict.tolerance:.0e}"
            )
