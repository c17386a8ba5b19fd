"""What is measured inside the graph is what numpy says of the activations, in batches of any size."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.runtime.statistics.keys import StatisticKey
from snpc.runtime.statistics.measure import StatisticRequest, measure_batches, statistic_requests
from snpc.runtime.statistics.probe_layout import infer_probe_layout
from snpc.runtime.statistics.unit_weights import criterion_inputs
from snpc.types import Group, Probe
from tests.command_line import CALIB, VIT
from tests.models.encoders import Encoder
from tests.models.exports import load_feeds
from tests.oracle import analysis_of, prunable, require, written
from tests.recorded_progress import RecordedProgress

Array = npt.NDArray[Any]

# GPT-2 by the TorchScript exporter multiplies [batch * sequence, width] matrices; Swin's samples are windows.
NAMES = [
    "vit_timm__ts17",
    "bert__dyn20",
    "gpt2__ts17",
    "llama__ts17",
    "llama__dyn20_sdpa",
    "t5__ts17",
    "swin_timm__ts17",
]
CRITERIA = ["snp", "snp:average=grams", "activation", "magnitude", "random", "mixed"]
LARGEST_GRAM = 64


def batches(name: str, size: int) -> Iterator[dict[str, Array]]:
    feeds = samples_of(name)
    for start in range(0, 9, size):
        yield {key: value[start : start + size] for key, value in feeds.items()}


@functools.cache
def samples_of(name: str) -> dict[str, Array]:
    """Nine samples: the export's own three, without padding, and two more sets that differ from it."""
    require(name)
    feeds = {k: np.ones_like(v) if "mask" in k else v for k, v in load_feeds(name).items()}
    sets = []
    for turn in range(3):
        ids = {k: np.roll(v, turn, axis=1) if v.dtype.kind == "i" and "mask" not in k else v for k, v in feeds.items()}
        sets.append({k: (v * (1 + turn)).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in ids.items()})
    return {key: np.concatenate([s[key] for s in sets]) for key in feeds}


@functools.cache
def wanted(name: str) -> tuple[StatisticRequest, ...]:
    """Every statistic that any probe of a prunable group can have."""
    names = {}
    for group in prunable(analysis_of(name).groups):
        kinds = dict.fromkeys(p.kind for p in group.probes)
        names[group.id] = [StatisticKey("energy", kind) for kind in kinds]
        if group.size <= LARGEST_GRAM and group.role != "head":
            names[group.id] += [StatisticKey("gram", kind) for kind in kinds]
    return tuple(statistic_requests(analysis_of(name), names))


@functools.cache
def measured(name: str, size: int) -> dict[str, Array]:
    """Statistics summed over all samples, from batches of ``size``."""
    total: dict[str, Array] = {}
    for result in measure_batches(analysis_of(name), wanted(name), batches(name, size)):
        for key, array in result.items():
            total[key] = total.get(key, 0.0) + array.sum(axis=0)
    return total


@functools.cache
def activations(name: str) -> dict[str, Array]:
    """The probed tensors over all samples, from the exporter's file with those as its outputs."""
    model = onnx.load_from_string(written(analysis_of(name).traced_graph.model.clone()))
    tensors = sorted({w.probe.tensor for w in wanted(name)})
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = samples_of(name)
    return dict(zip(tensors, session.run(tensors, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


def labelled(array: Array, probe: Probe) -> tuple[Array, Array]:
    """[rows, columns] of an activation, and the unit of each column: axes on which no unit varies become rows."""
    units = np.asarray(probe.units)
    assert units.ndim == array.ndim
    columns = [k for k, n in enumerate(units.shape) if n > 1]
    if 0 in columns:  # batch and units merged in one axis
        size = units.shape[0] // 2
        array = array.reshape(-1, size, *array.shape[1:])
        units = units.reshape(2, size, *units.shape[1:])[:1]
        columns = [k for k, n in enumerate(units.shape) if n > 1]
    rows = [k for k in range(array.ndim) if k not in columns]
    flat = array.transpose(*rows, *columns).astype(np.float64)
    count = int(np.prod([array.shape[k] for k in columns]))
    return flat.reshape(-1, count), units.transpose(*rows, *columns).reshape(-1)


def energy(array: Array, probe: Probe, group: Group) -> Array:
    values, units = labelled(array, probe)
    found = np.zeros(group.blocks * group.size)
    np.add.at(found, units[units >= 0], np.square(values).sum(0)[units >= 0])
    return found.reshape(group.blocks, group.size)


def gram(array: Array, probe: Probe, group: Group) -> Array:
    """Units that are seen in several columns (heads that share a key head) are stacked as further rows."""
    values, units = labelled(array, probe)
    seen = [np.flatnonzero(units == unit) for unit in range(group.blocks * group.size)]
    found = np.zeros((group.blocks, group.size, group.size))
    for block in range(group.blocks):
        for i in range(group.size):
            for j in range(group.size):
                pairs = zip(seen[block * group.size + i], seen[block * group.size + j], strict=True)
                found[block, i, j] = sum(float(values[:, a] @ values[:, b]) for a, b in pairs)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_energies_and_grams_are_numpys(name: str) -> None:
    values, found = activations(name), measured(name, 8)
    assert {request.key.kind for request in wanted(name)} == {"energy", "gram"}
    for item in wanted(name):
        make = gram if item.key.kind == "gram" else energy
        expected = make(values[item.probe.tensor], item.probe, item.group)
        where = f"{item.group.id} {item.key} of {item.probe.tensor}"
        assert found[item.output].shape == expected.shape, where
        scale = np.abs(expected).max()
        assert scale > 0, where
        np.testing.assert_allclose(found[item.output], expected, rtol=1e-4, atol=1e-5 * scale, err_msg=where)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_any_size_say_the_same(name: str) -> None:
    one, eight = measured(name, 1), measured(name, 8)
    for key, array in eight.items():
        np.testing.assert_allclose(one[key], array, rtol=1e-4, atol=1e-5 * np.abs(array).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_role_has_its_probes(name: str) -> None:
    """The kinds that docs and criteria speak of, and every unit is in each of them."""
    expected = {"qk": {"query", "key"}, "vo": {"context", "value"}, "ffn": {"hidden"}, "head": {"context"}}
    for group in prunable(analysis_of(name).groups, *expected):
        assert {p.kind for p in group.probes} == expected[group.role], group.id
        for probe in group.probes:
            assert set(np.unique(probe.units)) - {-1} == set(range(group.blocks * group.size))


# -- scores ----------------------------------------------------------------------------------------------------------


def calibration(name: str, batch: int, model: Any) -> snpc.Calibration:
    return snpc.load_calibration(samples_of(name), model.inputs, samples=9, batch=batch)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "llama__dyn20_sdpa"])
def test_every_criterion_scores_every_group(name: str, criterion: str) -> None:
    analysis = analysis_of(name)
    roles = ("qk", "vo", "ffn", "head")
    made = {b: snpc.score(analysis, criterion, calibration(name, b, analysis.model), roles=roles) for b in (1, 8)}
    groups = prunable(analysis.groups, *roles)
    assert set(made[8].values) == {g.id for g in groups}
    assert made[8].criterion == criterion
    for group in groups:
        values = made[8].values[group.id]
        assert values.shape == (group.blocks, group.size)
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert np.ptp(values) > 0, group.id
        np.testing.assert_allclose(made[1].values[group.id], values, rtol=2e-3, err_msg=group.id)
    assert made[1].samples == made[8].samples == (9 if criterion not in ("magnitude", "random") else 0)


def test_activation_is_the_formula_by_hand() -> None:
    """E[h^2] |w|^2 for a feed-forward unit, up to one factor for the whole group."""
    name = "gpt2__ts17"
    analysis = analysis_of(name)
    scores = snpc.score(analysis, "activation", calibration(name, 4, analysis.model), roles=("ffn",))
    for group in prunable(analysis.groups, "ffn"):
        (probe,) = group.probes
        hidden = activations(name)[probe.tensor]
        weight = np.asarray(criterion_inputs(analysis, group, {}, 0).consume[next(
            s.tensor for s in group.sites if s.kind == "consume")])  # fmt: skip
        expected = np.square(hidden.astype(np.float64)).mean(0) * np.square(weight).sum(1)
        found = scores.values[group.id][0]
        np.testing.assert_allclose(found / found.mean(), expected / expected.mean(), rtol=1e-4)


def test_weights_are_rows_per_unit() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(VIT).graph.initializer}
    ffn = criterion_inputs(analysis, analysis.group("blocks.0.mlp.ffn"), {}, 0)
    (up,), (down,) = ffn.produce.values(), ffn.consume.values()
    np.testing.assert_array_equal(up, held["onnx::MatMul_431"].T)
    np.testing.assert_array_equal(down, held["onnx::MatMul_432"])
    packed = held["onnx::MatMul_426"]  # Q, K and V beside each other
    query, key = criterion_inputs(analysis, analysis.group("blocks.0.attn.qk"), {}, 0).produce.values()
    np.testing.assert_array_equal(query, packed[:, :96].T)
    np.testing.assert_array_equal(key, packed[:, 96:192].T)
    head = criterion_inputs(analysis, analysis.group("blocks.0.attn.head"), {}, 0)
    value = next(w for n, w in head.produce.items() if n.startswith("vo:"))
    np.testing.assert_array_equal(value, packed[:, 192:].T.reshape(4, -1))


def test_what_needs_data_says_so() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    with pytest.raises(snpc.UserError, match="activation needs calibration data for ffn, qk, vo"):
        snpc.score(analysis, "activation")
    assert snpc.score(analysis, "snp", roles=("vo", "ffn")).samples == 0  # its other roles look at weights only


def test_a_criterion_of_ones_own() -> None:
    """Any object of the protocol will do, and gets sums over all samples."""
    seen: list[Mapping[str, Array]] = []

    class First:
        name = "first"
        __dataclass_fields__: Any = {}  # noqa: RUF012

        def probes(self, role: str) -> tuple[str, ...]:
            return ("energy:hidden",)

        def observe(self, role: str, batch: Mapping[str, Array]) -> Mapping[str, Array]:
            return {"count": np.float64(len(batch["energy:hidden"])), "sum": batch["energy:hidden"].sum(0)}

        def score(self, numbers: Any) -> Array:
            seen.append(numbers.sums)
            assert numbers.samples == 20
            return np.arange(numbers.blocks * numbers.size, dtype=float).reshape(numbers.blocks, numbers.size)

    model = snpc.load(VIT)
    data = snpc.load_calibration(CALIB, model.inputs, samples=20, batch=6)
    scores = snpc.score(snpc.analyze(model), First(), data, roles=("ffn",))  # type: ignore[arg-type]
    assert (scores.criterion, scores.samples) == ("first", 20)
    assert [float(s["count"]) for s in seen] == [20.0] * 4
    assert all(s["sum"].shape == (1, 384) for s in seen)
    plan = snpc.make_slice_plan(scores, snpc.Budget(0.5, ("ffn",), uniform=True))
    assert all(rows == (tuple(range(192, 384)),) for rows in plan.keep.values())


def test_progress_sees_every_batch() -> None:
    model = snpc.load(VIT)
    data = snpc.load_calibration(CALIB, model.inputs, samples=20, batch=6)
    progress = RecordedProgress()
    snpc.score(snpc.analyze(model), "snp", data, roles=("qk",), execution=snpc.Execution(progress=progress))
    assert progress.finished == [("statistics", 4, 4)]


def test_units_that_are_not_seen_are_zeros() -> None:
    """Unit 0 stands in two columns, unit 1 in one, unit 2 in none; the column behind the others stands for zeros."""
    layout = infer_probe_layout(Probe("hidden", "x", np.array([[1, 0, -1, 0]])), 3)
    assert layout.columns.reshape(layout.repeats, 3).tolist() == [[1, 0, 4], [3, 4, 4]]
    assert not layout.shows_all
    assert layout.is_shown(3).tolist() == [[True, True, False], [True, False, False]]


def test_layouts() -> None:
    """Rows before units, whatever the order of the axes; a merged batch axis is told from its period."""
    query = Probe("query", "q", np.arange(6).reshape(1, 2, 1, 3))
    key = Probe("key", "k", np.arange(6).reshape(1, 2, 1, 3).transpose(0, 1, 3, 2))
    for probe in (query, key):
        layout = infer_probe_layout(probe, 6)
        assert (layout.period, layout.repeats, layout.row_axes) == (0, 1, (2,) if probe is query else (3,))
        assert layout.columns.tolist() == [0, 1, 2, 3, 4, 5]
    merged = Probe("query", "q", np.tile(np.arange(6).reshape(2, 1, 3), (4, 1, 1)))
    assert (infer_probe_layout(merged, 6).period, infer_probe_layout(merged, 6).columns.tolist()) == (
        2,
        [0, 1, 2, 3, 4, 5],
    )
    shared = Probe("value", "v", np.array([0, 1, 0, 1]).reshape(1, 1, 4))
    assert (infer_probe_layout(shared, 2).repeats, infer_probe_layout(shared, 2).columns.tolist()) == (2, [0, 1, 2, 3])


def test_the_file_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    path.write_bytes(VIT.read_bytes())
    model = snpc.load(path)
    snpc.score(snpc.analyze(model), "mixed", snpc.load_calibration(CALIB, model.inputs, samples=4))
    assert path.read_bytes() == VIT.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("apart", ["sliced", "gathered"])
@pytest.mark.parametrize("budget", [{"uniform": True}, {"method": "select", "criterion": "snp"}], ids=["auto", "snp"])
def test_heads_that_are_computed_one_by_one_are_pruned_as_heads_in_one_tensor(
    tmp_path: Path, apart: Literal["sliced", "gathered"], budget: dict[str, Any]
) -> None:
    """A probe then shows one head of the group only."""
    together = Encoder(depth=2, heads=4, exit="mean")
    outputs = []
    for encoder in (together, replace(together, apart=apart)):
        path, cut = tmp_path / "dense.onnx", tmp_path / "cut.onnx"
        onnx.save(encoder.model(), path)
        data = [encoder.feeds(batch=8)]
        snpc.prune(path, cut, ratio=0.5, roles=("qk", "vo", "ffn"), calibration=data, **budget)
        shapes = {t.name: t.dims for t in onnx.load(cut).graph.initializer}
        assert shapes["q0"] == [together.width, together.width // 2]
        session = ort.InferenceSession(cut, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, encoder.feeds(batch=3, seed=5))[0])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4 * np.abs(outputs[0]).max())
