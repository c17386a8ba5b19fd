"""The closed forms of one wide hidden layer, without a model: processor time and peak memory of order and refit.

    python benchmarks/wide_layer.py [--columns 11008] [--outputs 4096] [--kept 0.75] [--rows 2048]

The columns are random and correlated; the statistics are as a calibration with that many rows leaves them, with one
half of the samples apart. Memory is anonymous memory beyond that of the statistics and the weight. The last column is
the length of the result, weighted by places: two checkouts that print the same do the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from calibration_cost import Seconds, anonymous_bytes, sampled_peaks

AnyArray = np.ndarray[Any, np.dtype[Any]]
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--kept", type=float, default=0.75, help="share of the columns that stay")
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from snpc.runtime.batches.packed_symmetric import row_strips
    from snpc.runtime.closed_form.algebra import relative_ridge
    from snpc.runtime.closed_form.elimination import LeastSquaresSystem, eliminate
    from snpc.runtime.closed_form.fit import refit_kept_rows
    from snpc.runtime.statistics import ConsumerMoments

    rng, columns = np.random.default_rng(0), options.columns
    rows = rng.standard_normal((options.rows, columns + 1), np.float32)
    rows[:, : columns // 2] += 0.7 * rows[:, columns // 2 : 2 * (columns // 2)]
    rows[:, :columns] *= rng.uniform(0.2, 3, columns)
    rows[:, columns] = 1
    odd = rows[1::2].T @ rows[1::2]
    packed = np.concatenate([odd[start:stop, start:].reshape(-1) for start, stop in row_strips(columns + 1)])
    del odd
    moment = (rows[:, :columns].T @ rows[:, :columns]).astype(np.float64)
    moments = ConsumerMoments(moment, (np.zeros(columns),), options.rows, (packed,))
    weight = rng.standard_normal((columns, options.outputs)) / np.sqrt(columns)
    system = LeastSquaresSystem(moment, weight, relative_ridge(columns, options.rows))
    print(f"statistics and weight: {(moment.nbytes + packed.nbytes + weight.nbytes) / 1e9:.2f} GB\n")
    print("| | s | processor s | peak, GB | result |\n|---|---:|---:|---:|---|")
    order = measured("order", lambda: eliminate([system], columns).order)
    keep = np.sort(order[columns - int(options.kept * columns) :])
    measured("refit", lambda: refit_kept_rows(moments, weight, keep))


def measured(name: str, solve: Callable[[], AnyArray]) -> AnyArray:
    """The result; prints a line about it."""
    before, start = anonymous_bytes(), Seconds.now()
    with sampled_peaks() as peaks:
        result = solve()
    spent = Seconds.now() - start
    places = np.sqrt(1 + np.arange(len(result)))
    length = np.linalg.norm(result.T * places)
    peak = (max(peaks.values()) - before) / 1e9
    print(f"| {name} | {spent.wall:.1f} | {spent.cpu:.1f} | {peak:.2f} | {length:.8g} |", flush=True)
    return result


if __name__ == "__main__":
    main()
