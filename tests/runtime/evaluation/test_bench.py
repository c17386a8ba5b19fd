"""Timing: the order of runs, the statistics, the comparison, and the refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import snpc
from snpc.cli.tables import fitting_columns
from snpc.errors import UserError
from snpc.runtime.evaluation.bench import (
    BenchResult,
    OutputDiff,
    TimingProtocol,
    bench,
    common_inputs,
    compare_outputs,
    median_interval,
    round_order,
    run_rounds,
    summarize_ratios,
    summarize_times,
)
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import RandomInputs
from snpc.types import Feeds, TensorSpec
from tests.models.builder_decoders import BuilderDecoder


def chain(path: Path, *, width: int, layers: int, hidden: int | None = None, seed: int = 0) -> Path:
    """x [n, width] -> ``layers`` pairs of MatMul through ``hidden`` -> y [n, width]."""
    hidden = hidden or width
    rng = np.random.default_rng(seed)
    weights, nodes = [], []
    for i in range(2 * layers):
        rows, columns = (width, hidden) if i % 2 == 0 else (hidden, width)
        weight = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        output = "y" if i == 2 * layers - 1 else f"h{i + 1}"
        nodes.append(helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [output]))
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def write(path: Path, signature: str, body: str) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {signature} {{ {body} }}'), path)
    return path


class FakeClock:
    """A clock that calls move on, and the record of which call ran when."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, model: str, feed: int = 0) -> Callable[[], object]:
        def run() -> None:
            self.ran.append(f"{model}{feed}")
            self.now += self.seconds[model]

        return run


class TestRounds:
    @pytest.mark.parametrize("models", [1, 2, 3, 5])
    def test_every_model_takes_every_place_equally_often(self, models: int) -> None:
        orders = [round_order(models, turn) for turn in range(models)]
        for order in orders:
            assert sorted(order) == list(range(models))
        for place in range(models):
            assert sorted(order[place] for order in orders) == list(range(models))

    def test_two_models_alternate(self) -> None:
        clock = FakeClock({"a": 2.0, "b": 1.0})
        times = run_rounds([[clock.call("a")], [clock.call("b")]], iterations=4, clock=clock)
        assert clock.ran == ["a0", "b0", "b0", "a0", "a0", "b0", "b0", "a0"]
        np.testing.assert_allclose(times, [[2.0, 1.0]] * 4)

    def test_three_models_rotate(self) -> None:
        clock = FakeClock({"a": 1.0, "b": 2.0, "c": 3.0})
        times = run_rounds([[clock.call(model)] for model in "abc"], iterations=3, clock=clock)
        assert clock.ran == ["a0", "b0", "c0", "b0", "c0", "a0", "c0", "a0", "b0"]
        np.testing.assert_allclose(times, [[1.0, 2.0, 3.0]] * 3)

    def test_a_round_has_one_feed_and_every_feed_meets_every_order(self) -> None:
        clock = FakeClock({"a": 1.0, "b": 1.0})
        run_rounds([[clock.call(model, feed) for feed in (0, 1)] for model in "ab"], iterations=5, clock=clock)
        assert clock.ran == ["a0", "b0", "b0", "a0", "a1", "b1", "b1", "a1", "a0", "b0"]

    def test_the_duration_adds_rounds_and_takes_none_away(self) -> None:
        clock = FakeClock({"a": 1.0})
        assert run_rounds([[clock.call("a")]], iterations=2, duration=7.5, clock=clock).shape == (8, 1)
        assert run_rounds([[clock.call("a")]], iterations=20, duration=7.5, clock=clock).shape == (20, 1)

    def test_what_is_done_is_told_between_rounds(self) -> None:
        clock, shares = FakeClock({"a": 1.0, "b": 1.0}), []
        run_rounds([[clock.call("a")], [clock.call("b")]], iterations=4, clock=clock, advance=shares.append)
        assert shares == [0.25] * 4
        shares.clear()
        run_rounds([[clock.call("a")]], iterations=2, duration=4.0, clock=clock, advance=shares.append)
        assert shares == [0.25] * 4

    def test_no_rounds(self) -> None:
        assert run_rounds([[], []], iterations=0).shape == (0, 2)


class TestStatistics:
    times = np.random.default_rng(3).gamma(4.0, 0.5, 201)

    def test_timing_is_numpys(self) -> None:
        result = summarize_times("m", self.times, (50, 90, 99.9))
        assert result.median == pytest.approx(np.median(self.times))
        assert result.mean == pytest.approx(self.times.mean())
        assert result.min == self.times.min()
        assert [percent for percent, _ in result.percentiles] == [50, 90, 99.9]
        assert [ms for _, ms in result.percentiles] == pytest.approx(np.percentile(self.times, (50, 90, 99.9)))
        assert result.percentiles[0][1] == pytest.approx(result.median)

    def test_speedup_is_the_median_ratio_with_quartiles(self) -> None:
        result = summarize_ratios("b", "a", self.times, ())
        assert result.ratio == pytest.approx(np.median(self.times))
        assert (result.q1, result.q3) == pytest.approx(tuple(np.percentile(self.times, (25, 75))))
        assert result.iqr == pytest.approx(result.q3 - result.q1)
        assert result.q1 < result.low < result.ratio < result.high < result.q3

    def test_drift_moves_times_and_not_the_ratio(self) -> None:
        """Why ratios are taken within a round: the machine gets 5 times slower and the ratio stays."""
        drift = np.linspace(1.0, 5.0, 101)
        result = summarize_ratios("b", "a", (3.0 * drift) / (2.0 * drift), ())
        assert (result.low, result.ratio, result.high) == pytest.approx((1.5, 1.5, 1.5))

    def test_the_interval_agrees_with_order_statistics(self) -> None:
        """Of 201 sorted values, numbers 87 and 115 bound the median at 95 % (binomial); the bootstrap lands near."""
        low, high = median_interval(self.times, seed=0)
        ordered = np.sort(self.times)
        assert ordered[82] <= low <= ordered[91]
        assert ordered[109] <= high <= ordered[118]

    def test_the_interval_is_seeded(self) -> None:
        assert median_interval(self.times, seed=1) == median_interval(self.times, seed=1)

    def test_the_interval_of_one_round_is_a_point(self) -> None:
        assert median_interval(np.array([1.25])) == (1.25, 1.25)

    def test_the_interval_of_a_long_run_is_drawn_in_pieces(self) -> None:
        """The median of n normal values has standard error sqrt(pi / 2n), the interval is 2 x 1.96 of those wide."""
        values = np.random.default_rng(0).normal(2.0, 1.0, 3001)
        low, high = median_interval(values)
        assert low < np.median(values) < high
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.pi / 2 / 3001), rel=0.3)


class TestCompareOutputs:
    def test_the_largest_difference_by_name(self) -> None:
        a: Feeds = {"logits": np.array([[1.0, 2.0]], np.float32), "pooled": np.array([0.0], np.float16)}
        b: Feeds = {"logits": np.array([[1.0, 2.5]], np.float32), "pooled": np.array([2.0], np.float16)}
        diffs = compare_outputs(a, b)
        assert diffs == (OutputDiff("logits", 0.5), OutputDiff("pooled", 2.0))
        worst = summarize_ratios("b", "a", np.ones(3), diffs).largest_difference
        assert worst is not None
        assert worst.name == "pooled"

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, ml_dtypes.bfloat16, np.complex64])
    def test_types_that_do_not_subtract_as_they_are(self, dtype: type) -> None:
        diffs = compare_outputs({"y": np.array([0, 1]).astype(dtype)}, {"y": np.array([1, 1]).astype(dtype)})
        assert diffs == (OutputDiff("y", 1.0),)

    def test_equal_infinities_and_nans_are_no_difference(self) -> None:
        array = np.array([np.inf, -np.inf, np.nan, 1.0])
        assert compare_outputs({"y": array}, {"y": array.copy()}) == (OutputDiff("y", 0.0),)

    @pytest.mark.filterwarnings("error")
    def test_one_sided_infinities_and_nans_are_counted(self) -> None:
        diffs = compare_outputs({"y": np.array([np.inf, np.inf, 1.0])}, {"y": np.array([1.0, -np.inf, np.nan])})
        assert diffs == (OutputDiff("y", None, "3 entries not finite in only one model"),)

    def test_empty_outputs(self) -> None:
        assert compare_outputs({"y": np.zeros((0, 3))}, {"y": np.zeros((0, 3))}) == (OutputDiff("y", 0.0),)

    def test_what_cannot_be_compared_says_why(self) -> None:
        a = {"x": np.zeros((1, 4)), "text": np.array(["a"], object), "left": np.zeros(1)}
        b = {"x": np.zeros((1, 5)), "text": np.array(["b"], object), "right": np.zeros(1)}
        diffs = compare_outputs(a, b)
        assert [diff.reason for diff in diffs] == [
            "shapes [1,4] and [1,5]",
            "strings",
            "only the first model has it",
            "only the other model has it",
        ]
        assert summarize_ratios("b", "a", np.ones(3), diffs).largest_difference is None


class TestCommonInputs:
    @staticmethod
    def x(*shape: int | str, name: str = "x", dtype: type = np.float32) -> TensorSpec:
        return TensorSpec(name, np.dtype(dtype), shape)

    def test_a_size_that_any_model_fixes_holds(self) -> None:
        a = [self.x("n", "seq", 3), self.x("n", "seq", name="mask")]
        b = [self.x("k", "seq", name="mask"), self.x("k", 128, "")]
        merged = common_inputs(["a", "b"], [a, b])
        assert merged == (self.x("n", 128, 3), self.x("n", 128, name="mask"))

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ([], "a and b cannot run on the same inputs: only a has 'x'"),
            ([("x", "n", 3), ("z", 1)], "b and a cannot run on the same inputs: only b has 'z'"),
            ([("x", "n", 4)], r"input 'x' of a and b: the shapes differ, \[n,3\] and \[n,4\]"),
            ([("x", 3)], r"the shapes differ, \[n,3\] and \[3\]"),
        ],
    )
    def test_refusals(self, other: list[tuple[str, ...]], words: str) -> None:
        specs = [self.x(*shape, name=name) for name, *shape in other]
        with pytest.raises(UserError, match=words):
            common_inputs(["a", "b"], [[self.x("n", 3)], specs])

    def test_types_are_compared(self) -> None:
        with pytest.raises(UserError, match="input 'x' of a and b: the types differ, float32 and float16"):
            common_inputs(["a", "b"], [[self.x(3)], [self.x(3, dtype=np.float16)]])

    def test_the_third_model_is_checked_too(self) -> None:
        with pytest.raises(UserError, match="input 'x' of a and c"):
            common_inputs(["a", "b", "c"], [[self.x(3)], [self.x("n")], [self.x(4)]])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """A model, one with 16 times fewer MACs, and the first again."""
    folder = tmp_path_factory.mktemp("models")
    big = chain(folder / "big.onnx", width=128, layers=6, hidden=1024)
    small = chain(folder / "small.onnx", width=128, layers=6, hidden=64)
    return bench(
        [big, small, big],
        RandomInputs(batch=32, seed=5),
        protocol=TimingProtocol(iterations=30, warmup=3),
        execution=Execution(threads=1),
    )


class TestBench:
    @pytest.mark.timing
    def test_the_smaller_model_is_faster(self, result: BenchResult) -> None:
        """Of 16 times fewer MACs little is asked for: the machine is shared."""
        assert [timing.model.rpartition("/")[2] for timing in result.timings] == ["big.onnx", "small.onnx", "big.onnx"]
        assert result.speedups[0].ratio > 1.5
        assert result.timings[0].median > result.timings[1].median

    @pytest.mark.timing
    def test_a_model_is_as_fast_as_itself(self, result: BenchResult) -> None:
        assert 0.5 < result.speedups[1].ratio < 2.0
        assert result.speedups[1].largest_difference == OutputDiff("y", 0.0)

    def test_numbers_are_in_order(self, result: BenchResult) -> None:
        for timing_ in result.timings:
            assert 0 < timing_.min <= timing_.median
            assert timing_.min <= timing_.mean
            assert sorted(ms for _, ms in timing_.percentiles) == [ms for _, ms in timing_.percentiles]
        for pair in result.speedups:
            assert pair.low <= pair.ratio <= pair.high
            assert pair.q1 <= pair.ratio <= pair.q3

    def test_different_models_differ(self, result: BenchResult) -> None:
        worst = result.speedups[0].largest_difference
        assert worst is not None
        assert worst.name == "y"
        assert worst.max_abs is not None
        assert worst.max_abs > 0.01

    def test_the_facts(self, result: BenchResult) -> None:
        import onnxruntime

        assert result.machine.provider == "CPUExecutionProvider"
        assert result.machine.threads == 1
        assert result.machine.runtime == f"onnxruntime {onnxruntime.__version__}"
        assert result.machine.cores >= 1
        assert result.machine.cpu
        assert (result.rounds, result.warmup, result.feeds, result.seed) == (30, 3, 1, 5)
        assert result.shapes == {"x": (32, 128)}

    def test_json_is_plain(self, result: BenchResult) -> None:
        report = result.to_json()
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert set(report["timings"][0]["percentiles"]) == {"p50", "p90", "p99"}
        assert report["speedups"][1]["outputs"] == [{"name": "y", "max_abs": 0.0, "reason": ""}]
        assert report["shapes"] == {"x": [32, 128]}

    def test_rows_are_a_table(self, result: BenchResult) -> None:
        header, *rows = result.rows()
        assert header == (
            *("model", "median ms", "mean", "min", "p90", "p99"),
            *("speed-up", "95 %", "quartiles", "max |diff|"),
        )
        assert len(rows) == 3
        assert {len(row) for row in rows} == {len(header)}
        assert rows[0][6:] == ("1.00x", "", "", "")
        assert rows[1][0] == "small.onnx"
        assert rows[1][6] == f"{result.speedups[0].ratio:.2f}x"
        assert rows[2][9] == "0 (y)"

    def test_one_model_alone(self, tmp_path: Path) -> None:
        result = bench([chain(tmp_path / "m.onnx", width=8, layers=1)], protocol=TimingProtocol(iterations=3, warmup=0))
        assert result.speedups == ()
        assert result.rows()[0] == ("model", "median ms", "mean", "min", "p90", "p99")
        assert [len(row) for row in result.rows()] == [6, 6]

    def test_data_is_used_in_turn(self, tmp_path: Path) -> None:
        def endless() -> Iterator[dict[str, np.ndarray]]:
            while True:
                yield {"x": np.ones((2, 8), np.float32), "label": np.zeros(1)}

        path = chain(tmp_path / "m.onnx", width=8, layers=1)
        once = TimingProtocol(iterations=1, warmup=0)
        assert bench([path], endless(), protocol=once).feeds == 16
        single = bench([path], next(endless()), protocol=once)
        assert (single.feeds, single.shapes) == (1, {"x": (2, 8)})

    def test_bfloat16_models_can_be_timed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.onnx", "(bfloat16[n, 4] x) => (bfloat16[n, 4] y)", "y = Identity(x)")
        result = bench([path, path], protocol=TimingProtocol(iterations=2, warmup=0))
        assert result.speedups[0].outputs == (OutputDiff("y", 0.0),)


class TestRefusals:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return chain(tmp_path / "m.onnx", width=8, layers=1)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"data": RandomInputs(shapes={"x": (1, 9)})}, r"input 'x': shape \[1,9\] does not fit \[n,8\]"),
            (
                {"data": RandomInputs(dim_sizes={"m": 3})},
                r"axis 'm': no input has a dynamic axis of that name: x \[n,8\]",
            ),
            ({"data": []}, "the data is empty"),
            ({"data": {"x": np.zeros((1, 8))}}, "the data is float64, the model takes float32"),
            ({"execution": Execution(provider="abacus")}, "provider 'abacus' is not in this onnxruntime"),
        ],
    )
    def test_requests(self, model: Path, options: dict[str, object], words: str) -> None:
        with pytest.raises(UserError, match=words):
            bench([model], **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"iterations": 0}, "iterations 0, .*at least 1 round"),
            ({"warmup": -1}, "warmup -1"),
            ({"duration": -0.5}, r"duration -0\.5"),
            ({"percentiles": (50, 101)}, r"percentile 101 is not in \[0, 100\]"),
        ],
    )
    def test_protocols(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            TimingProtocol(**fields)

    def test_no_model(self) -> None:
        with pytest.raises(UserError, match="no model to time"):
            bench([])

    def test_a_missing_file(self, model: Path) -> None:
        with pytest.raises(UserError, match=r"gone\.onnx: no such file"):
            bench([model, model.with_name("gone.onnx")])

    def test_a_file_that_is_no_model(self, model: Path) -> None:
        broken = model.with_name("broken.onnx")
        broken.write_bytes(b"no model")
        with pytest.raises(UserError, match=r"broken\.onnx: onnxruntime does not load it"):
            bench([model, broken])

    def test_models_with_different_inputs(self, model: Path) -> None:
        other = chain(model.with_name("wide.onnx"), width=16, layers=1)
        with pytest.raises(UserError, match=r"input 'x' of m\.onnx and wide\.onnx: the shapes differ"):
            bench([model, other])

    def test_a_batch_no_input_can_have(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.onnx", "(float[1, 4] x) => (float[1, 4] y)", "y = Identity(x)")
        with pytest.raises(UserError, match=r"batch 4: no input has a dynamic first axis: x \[1,4\]"):
            bench([path], RandomInputs(batch=4))

    def test_a_model_that_fails_when_it_runs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.onnx", "(float[a] x, float[b] z) => (float[c] y)", "y = Add(x, z)")
        with pytest.raises(UserError, match=r"^m\.onnx: onnxruntime does not run it on these inputs: "):
            bench([path], RandomInputs(shapes={"x": (3,), "z": (2,)}))


@pytest.mark.parametrize(("room", "left"), [(100, "abcd"), (29, "abcd"), (28, "acd"), (20, "ad"), (3, "ad")])
def test_a_narrow_terminal_goes_without_what_is_spare(room: int, left: str) -> None:
    columns = fitting_columns(room, "abcd", [4, 4, 4, 4], ("b", "none", "c"))
    assert "".join("abcd"[k] for k in columns) == left


def test_models_with_narrower_caches_are_timed_beside_the_original(tmp_path: Path) -> None:
    """Each is given the columns that it takes, also where the file has a name for the width of its caches."""
    path = BuilderDecoder().write(tmp_path / "decoder.onnx")
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    half = snpc.apply(snpc.plan(analysis, snpc.Budget(0.5), method="select"), tmp_path / "half.onnx").path
    inputs = RandomInputs(dim_sizes={"sequence_length": 1, "past_sequence_length": 4, "total_sequence_length": 5})
    quick = TimingProtocol(warmup=0, iterations=1, duration=None)
    for order in ((path, half), (half, path), (half, half)):
        result = bench(order, inputs, protocol=quick)
        assert result.shapes["past_key_values.0.key"] == (1, 2, 4, 16 if order[1] == order[0] else 32)
        found = {diff.name: diff.max_abs for diff in result.speedups[0].outputs}
        assert found["logits"] is not None
        assert (found["logits"] == 0) == (order[0] == order[1])


def test_pictures_of_other_sizes_are_no_caches() -> None:
    one, other = (TensorSpec("pixels", np.dtype(np.float32), ("N", 3, n, n)) for n in (224, 192))
    with pytest.raises(UserError, match="the shapes differ"):
        common_inputs(["a", "b"], [(one,), (other,)])
