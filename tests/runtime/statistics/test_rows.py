"""Rows of second moments: how many are taken, which, and that sums over them stand for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import snpc
from snpc.passes.weights import closed_form_kinds
from snpc.runtime.batches.packed_symmetric import unpack_symmetric
from snpc.runtime.statistics import rows
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.measure import StatisticRequest, measure_batches, statistic_requests
from snpc.runtime.statistics.moments import required_statistics
from snpc.runtime.statistics.rows import MIN_ROWS, MIN_ROWS_PER_SAMPLE, ROWS_PER_COLUMN, row_stride
from snpc.runtime.statistics.statistics import Statistics
from snpc.types import FloatArray, Probe
from tests.closed_forms import calibration_of, prunable_of, random_feeds
from tests.oracle import Array, analysis_of, run, written

NAME = "vit_timm__ts17"
PADDED = "bert__ts17"


@pytest.mark.parametrize("columns", [64, 3072, 11008])
@pytest.mark.parametrize("per_sample", [1, 16, 197, 2048])
@pytest.mark.parametrize("samples", [8, 64, 512, 4096])
def test_as_many_rows_are_left_as_pay(samples: int, per_sample: int, columns: int) -> None:
    stride, total = row_stride(samples * per_sample, per_sample, columns), samples * per_sample

    def enough(step: int) -> bool:
        return total / step >= max(ROWS_PER_COLUMN * columns, MIN_ROWS) and per_sample / step >= MIN_ROWS_PER_SAMPLE

    assert stride == 1 or enough(stride)
    assert not enough(2 * stride)


def joint_requests(name: str) -> list[StatisticRequest]:
    analysis = analysis_of(name)
    groups = prunable_of(analysis)
    kinds = closed_form_kinds(analysis.weights, groups)
    keys = {g.id: required_statistics(analysis.weights[g.id]) for g in groups if kinds.get(g.id) == "refit"}
    return [r for r in statistic_requests(analysis, keys) if r.key.kind == "gram_joint"]


def grams(name: str, feeds: dict[str, Array], stride: int) -> dict[str, FloatArray]:
    """Output -> X'X of one batch, unpacked."""
    analysis = analysis_of(name)
    requests = [replace(request, stride=stride) for request in joint_requests(name)]
    (batch,) = measure_batches(analysis, requests, calibration_of(analysis, feeds, 64).batches())
    return {request.output: unpack_symmetric(batch[request.output].astype(np.float64)) for request in requests}


@pytest.mark.parametrize("name", [NAME, PADDED, "llama__ts17"])
def test_sums_are_over_one_row_of_every_stretch(name: str) -> None:
    """Batches of one sample, whose rows are told apart by leaving samples out: with a stride as long as a sample each
    has one row in the sum, with the weight of all."""
    feeds = random_feeds(name, 6)
    whole, every = grams(name, feeds, 1), grams(name, feeds, 1 << 20)
    halves = grams(name, feeds, 2)
    assert whole
    for output, full in whole.items():
        count = full[-1, -1]
        assert halves[output][-1, -1] == 2 * -(-count // 2)
        assert every[output][-1, -1] == 1 << 20
        one_row = every[output] / (1 << 20)
        np.testing.assert_allclose(np.outer(one_row[-1], one_row[-1]), one_row, rtol=1e-4, atol=1e-5)  # of rank one
        energy, sampled = np.trace(full), np.trace(halves[output])
        assert 0.7 * energy < sampled < 1.3 * energy
        assert np.abs(halves[output] - full).max() > 1e-6 * np.abs(full).max()  # it is a sample


@pytest.mark.parametrize(("samples", "tokens", "stride"), [(4, 12, 4), (3, 7, 2), (5, 9, 8), (2, 3, 16)])
def test_one_row_of_every_stretch_is_taken(samples: int, tokens: int, stride: int) -> None:
    """Every row has a column of its own, so that the diagonal counts rows."""
    total = samples * tokens
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", "t", total]))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 17}, name="rows")
    instrument = Instrument(ir.Model(graph, ir_version=8))
    probe = Probe("hidden", "x", np.arange(total).reshape(1, 1, total))
    instrument.add_output(instrument.gram_joint(probe, total, None, stride), "gram")
    rows_of = np.eye(total, dtype=np.float32).reshape(samples, tokens, total)
    (packed,) = run(written(instrument.model), {"x": rows_of})
    gram = unpack_symmetric(packed.astype(np.float64))
    taken = np.diag(gram)[:-1] / stride
    stretches = [taken[start : start + stride] for start in range(0, total, stride)]
    assert all(stretch.sum() == 1 for stretch in stretches[:-1]) and set(taken) <= {0, 1, 2}
    assert taken.sum() * stride == gram[-1, -1] == stride * len(stretches)
    if tokens >= 2 * stride:
        assert all(sample.sum() > 0 for sample in taken.reshape(samples, tokens))


def test_rows_that_do_not_count_are_not_taken() -> None:
    """Zeros and not in the number of rows, whether they are among the rows of a sum or not."""
    feeds = random_feeds(PADDED, 6)
    half = {k: np.where(np.arange(a.shape[1]) < a.shape[1] // 2, a, 0) if "mask" in k else a for k, a in feeds.items()}
    for stride in (1, 2):
        for output, full in grams(PADDED, feeds, stride).items():
            if full[-1, -1] >= 24:  # a layer of all tokens
                assert grams(PADDED, half, stride)[output][-1, -1] == pytest.approx(full[-1, -1] / 2, rel=0.25)


def sampled(monkeypatch: pytest.MonkeyPatch, name: str, samples: int, batch: int) -> tuple[Statistics, Statistics]:
    """Statistics over all rows, and with a rule that takes next to none."""
    analysis, feeds = analysis_of(name), random_feeds(name, samples)
    data = calibration_of(analysis, feeds, batch)
    whole = snpc.measure_statistics(analysis, data, prunable_of(analysis))
    for constant, value in (("ROWS_PER_COLUMN", 0.01), ("MIN_ROWS", 1), ("MIN_ROWS_PER_SAMPLE", 4)):
        monkeypatch.setattr(rows, constant, value)
    return whole, snpc.measure_statistics(analysis, data, prunable_of(analysis))


@pytest.mark.parametrize("name", [NAME, PADDED, "llama__ts17"])
def test_sampled_statistics_stand_for_all_rows(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, some = sampled(monkeypatch, name, 24, 4)
    refitted = {request.group.id for request in joint_requests(name)}
    assert set() < set(some.seen) <= refitted and not whole.seen  # a layer of one token keeps its rows
    assert all(share in (0.5, 0.25, 0.125) for share in some.seen.values())
    for group, arrays in whole.sums.items():
        for key, array in arrays.items():
            found = some.sums[group][key]
            if key.startswith("gram_joint:"):
                assert found[-1] == pytest.approx(array[-1], rel=0.1)  # rows
                assert unpack_symmetric(found).trace() == pytest.approx(unpack_symmetric(array).trace(), rel=0.2)
            else:
                np.testing.assert_array_equal(found, array)
    lines = [rows_seen.describe() for rows_seen in some.sampled_rows]
    assert sum(rows_seen.groups for rows_seen in some.sampled_rows) == len(some.seen)
    assert all(line.startswith("second moments of ") and " rows of " in line for line in lines)
    snpc.save_statistics(some, tmp_path / "s.npz")
    assert snpc.load_statistics(tmp_path / "s.npz").seen == some.seen
    mean = {group: (1 + share) / 2 for group, share in some.seen.items()}
    assert (whole + some).seen == pytest.approx(mean)
    closed = snpc.solve_closed_forms(analysis_of(name), some, prunable_of(analysis_of(name)))
    assert closed.elimination_orders


def test_parts_of_the_data_take_the_rows_that_the_whole_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, some = sampled(monkeypatch, NAME, 32, 4)
    analysis = analysis_of(NAME)
    data = calibration_of(analysis, random_feeds(NAME, 32), 4)
    first, second = (snpc.measure_statistics(analysis, data.shard(k, 2), prunable_of(analysis)) for k in (1, 2))
    both = first + second
    assert both.seen == first.seen == some.seen
    for group, arrays in some.sums.items():
        for key, array in arrays.items():
            np.testing.assert_allclose(both.sums[group][key], array, rtol=1e-9, atol=1e-12 * np.abs(array).max())
