"""How many rows and how much ridge second moments need: two tables of held-out errors, layer by layer.

    python benchmarks/rows_and_ridge.py MODEL.onnx --calib DATA [--samples 128] [--held-out 128] [--layers 3]

Feed-forward layers, spread over the depth, are cut to three quarters, half and a quarter of their hidden units. The
weight that reads these is refitted on the calibration samples, and its output is compared with the dense one on the
held-out samples: squared error as a share of the output's variance.

The first table compares ridges, for several numbers of samples: the rule by the number of rows, the one chosen by
halves of the samples (``snpc.runtime.closed_form.ridge``), the third of it that refits take ("as used"), the best of a
fine grid on the held-out samples themselves, and no refit at all (mean fill). The second compares rows: all tokens of
the samples, one of 2, 4 and 8, and all of fewer samples. Both are in Markdown; docs/rows-and-ridge.md has results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

import snpc
from snpc.passes.weights import closed_form_kinds
from snpc.runtime.batches import unpack_symmetric
from snpc.runtime.closed_form.algebra import relative_ridge, unit_columns
from snpc.runtime.closed_form.elimination import LeastSquaresSystem, eliminate
from snpc.runtime.closed_form.ridge import REFIT_SHARE, choose_refit_ridge, refit_regression
from snpc.runtime.statistics import StatisticRequest, required_statistics, statistic_requests
from snpc.runtime.statistics.measure import measure_batches
from snpc.runtime.statistics.moments import moment_about
from snpc.types import FloatArray, Group, IntArray

STRIDES = (1, 2, 4, 8)
GRID = np.geomspace(1e-4, 100, 25)


@dataclass(frozen=True)
class Halves:
    """X'X over even and odd batches, with a column of ones, weighted up to all rows; ``seen``: the rows summed."""

    even: FloatArray
    odd: FloatArray
    seen: float

    @property
    def whole(self) -> FloatArray:
        return np.asarray(self.even + self.odd)


@dataclass(frozen=True)
class Layer:
    """A feed-forward group and the weight [units * columns, D] that reads it."""

    group: Group
    request: StatisticRequest
    weight: FloatArray


@dataclass(frozen=True)
class Errors:
    """Held-out errors of one layer at one width, as shares of the output's variance; and the ridges. ``used``: with the
    smaller ridge that refits take, for the sake of the model's outputs."""

    by_rule: float
    by_halves: float
    used: float
    best: float
    mean_fill: float
    ridges: tuple[float, float, float]


def layers_of(analysis: snpc.Analysis, count: int) -> list[Layer]:
    groups = [g for g in analysis.groups if g.role == "ffn" and g.prunable]
    kinds = closed_form_kinds(analysis.weights, groups)
    groups = [g for g in groups if kinds.get(g.id) == "refit" and len(analysis.weights[g.id].consumers) == 1]
    if not groups:
        raise SystemExit("no feed-forward group with a refit and one consumer")
    chosen = [groups[round((k + 0.6) * len(groups) / count - 0.5)] for k in range(min(count, len(groups)))]
    keys = {g.id: required_statistics(analysis.weights[g.id])[:1] for g in chosen}
    return [
        Layer(r.group, r, analysis.weights[r.group.id].consumers[0].matrix(analysis.traced_graph))
        for r in statistic_requests(analysis, keys)
    ]


def measure(
    analysis: snpc.Analysis, layers: Sequence[Layer], batches: Iterator[dict[str, np.ndarray]], strides: Sequence[int]
) -> dict[tuple[str, int], Halves]:
    """(group id, stride) -> sums."""
    requests = {
        (layer.group.id, stride): replace(layer.request, stride=stride, output=f"{layer.request.output}_{stride}")
        for layer in layers
        for stride in strides
    }
    sums: dict[tuple[tuple[str, int], int], FloatArray] = {}
    for number, outputs in enumerate(measure_batches(analysis, list(requests.values()), batches)):
        for key, request in requests.items():
            sums[key, number % 2] = sums.get((key, number % 2), 0.0) + outputs[request.output].astype(np.float64)
    found = {}
    for key in requests:
        even, odd = (unpack_symmetric(sums[key, half]) for half in (0, 1))
        found[key] = Halves(even, odd, (even[-1, -1] + odd[-1, -1]) / key[1])
    return found


def errors_of(layer: Layer, halves: Halves, held_out: FloatArray, keep: IntArray) -> Errors:
    """The errors of one layer with the units ``keep``; ``held_out``: X'X of the held-out samples."""
    whole = halves.whole
    mean = whole[-1, :-1] / whole[-1, -1]
    moment, odd, test = (moment_about(sums.copy(), mean) for sums in (whole, halves.odd, held_out))
    own = moment_about(held_out.copy(), held_out[-1, :-1] / held_out[-1, -1])
    variance = float(np.sum(layer.weight * (own @ layer.weight)))
    fitted, judged = refit_regression(moment, layer.weight, keep), refit_regression(test, layer.weight, keep)
    removed = np.setdiff1d(np.arange(len(moment)), keep)
    fill = float(np.sum(layer.weight[removed] * (test[np.ix_(removed, removed)] @ layer.weight[removed])))

    def error(ridge: float) -> float:
        return (fill + judged.excess_error(fitted.solve(ridge))) / variance

    rule = relative_ridge(len(moment), halves.seen) * float(np.trace(moment)) / len(moment) / fitted.mean_diagonal
    used = choose_refit_ridge(moment, odd, layer.weight, keep).ridge
    chosen = used / REFIT_SHARE
    best, at = best_of_grid(error)
    return Errors(error(rule), error(chosen), error(used), best, fill / variance, (rule, chosen, at))


def best_of_grid(error: Callable[[float], float]) -> tuple[float, float]:
    """(least error, its ridge)."""
    return min((error(float(ridge)), float(ridge)) for ridge in GRID)


def kept_columns(layer: Layer, halves: Halves, share: float) -> IntArray:
    """The columns of the units that an elimination on these moments keeps."""
    whole = halves.whole
    moment = moment_about(whole, whole[-1, :-1] / whole[-1, -1])
    system = LeastSquaresSystem(moment, layer.weight, relative_ridge(len(moment), halves.seen))
    order = eliminate([system], layer.group.size).order
    units = np.sort(order[layer.group.size - round(share * layer.group.size) :])
    return unit_columns(units, len(moment) // layer.group.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    model = snpc.load(options.model)
    analysis = snpc.analyze(model)
    data = snpc.load_calibration(
        options.calib, model.inputs, samples=options.samples, batch=options.batch, held_out=options.held_out
    )
    if data.held_out is None:
        raise SystemExit("no samples are left to be held out: give more data, or fewer --samples")
    layers = layers_of(analysis, options.layers)
    held_out = measure(analysis, layers, data.held_out.batches(), (1,))
    numbers = [
        n for n in (data.samples // 16, data.samples // 4, data.samples // 2, data.samples) if n >= 2 * options.batch
    ]
    by_number = {
        n: measure(analysis, layers, islice(data.batches(), n // options.batch), STRIDES if n == numbers[-1] else (1,))
        for n in numbers
    }
    print_ridges(layers, by_number, {layer.group.id: held_out[layer.group.id, 1].whole for layer in layers})
    print_rows(layers, by_number, {layer.group.id: held_out[layer.group.id, 1].whole for layer in layers})


def print_ridges(
    layers: Sequence[Layer],
    by_number: dict[int, dict[tuple[str, int], Halves]],
    held_out: dict[str, FloatArray],
) -> None:
    print("| samples | rows per column | layer | kept | rule | by halves | as used | best | mean fill | ridges |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number, measured in by_number.items():
        for layer in layers:
            halves = measured[layer.group.id, 1]
            for share in (0.75, 0.5, 0.25):
                found = errors_of(layer, halves, held_out[layer.group.id], kept_columns(layer, halves, share))
                rows = f"{halves.seen / (len(halves.odd) - 1):.1f}"
                errors = " | ".join(
                    f"{e:.4f}" for e in (found.by_rule, found.by_halves, found.used, found.best, found.mean_fill)
                )
                ridges = ", ".join(f"{ridge:.2g}" for ridge in found.ridges)
                print(f"| {number} | {rows} | {layer.group.id} | {share:.0%} | {errors} | {ridges} |", flush=True)
    print()


def print_rows(
    layers: Sequence[Layer],
    by_number: dict[int, dict[tuple[str, int], Halves]],
    held_out: dict[str, FloatArray],
) -> None:
    print("| rows | which | rule | by halves | as used |")
    print("|---|---|---|---|---|")
    most = max(by_number)
    keep = {layer.group.id: kept_columns(layer, by_number[most][layer.group.id, 1], 0.5) for layer in layers}
    lines = [(most, stride) for stride in STRIDES] + [(number, 1) for number in reversed(by_number) if number != most]
    for number, stride in lines:
        found = [
            errors_of(layer, by_number[number][layer.group.id, stride], held_out[layer.group.id], keep[layer.group.id])
            for layer in layers
        ]
        rows = "/".join(sorted({f"{by_number[number][layer.group.id, stride].seen:.0f}" for layer in layers}))
        which = f"{number} samples, {'all tokens' if stride == 1 else f'1 token of {stride}'}"
        by_ridge = zip(*[(f.by_rule, f.by_halves, f.used) for f in found], strict=True)
        columns = ["/".join(f"{error:.4f}" for error in errors) for errors in by_ridge]
        print(f"| {rows} | {which} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
