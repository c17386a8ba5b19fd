"""Statistics as a value: halves add up to the whole, files hold them, and no limit on memory changes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import snpc
from snpc.errors import UserError
from snpc.passes.canonicalization.finalize import finalize
from snpc.planning.config import Budget
from snpc.planning.plan import PruningMethod
from snpc.runtime.closed_form.layerwise import fit_layerwise
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.memory import parse_bytes
from snpc.runtime.execution.random_inputs import random_batch
from snpc.runtime.io.spill_files import SpillFiles
from snpc.runtime.statistics.keys import StatisticKey
from snpc.runtime.statistics.moments import group_moments
from snpc.runtime.statistics.statistics import Statistics
from tests.closed_forms import calibration_of, initializers, initializers_of, prunable_of, random_feeds, statistics_of
from tests.command_line import CALIB, VIT, invoke
from tests.models.exports import export
from tests.oracle import Array, analysis_of, written
from tests.recorded_progress import RecordedProgress

NAME = "vit_timm__ts17"
NAMES = (NAME, "bert__ts17", "llama__ts17")
METHODS: tuple[PruningMethod, ...] = ("auto", "select")


def close(found: Statistics, expected: Statistics, tolerance: float) -> None:
    assert expected.sums
    assert {g: set(s) for g, s in found.sums.items()} == {g: set(s) for g, s in expected.sums.items()}
    for group, mine in expected.sums.items():
        for name, array in mine.items():
            gap = np.abs(found.sums[group][name] - array).max()
            assert gap <= tolerance * np.abs(array).max(), f"{group} {name}"


# -- they add up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_two_halves_are_the_whole(name: str, method: PruningMethod, tmp_path: Path) -> None:
    """To rounding in float64; also by way of files."""
    feeds = random_feeds(name, 8)
    halves = [
        statistics_of(name, {k: v[part] for k, v in feeds.items()}, 2, method) for part in (slice(4), slice(4, 8))
    ]
    whole = statistics_of(name, feeds, 2, method)
    for half, path in zip(halves, ("a.npz", "b.npz"), strict=True):
        snpc.save_statistics(half, tmp_path / path)
    loaded = snpc.load_statistics(tmp_path / "a.npz", tmp_path / "b.npz")
    for both in (halves[0] + halves[1], loaded):
        close(both, whole, 1e-13)
        assert both.samples == whole.samples == 8
    with pytest.raises(AssertionError):
        close(halves[0], whole, 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_does_not_matter(name: str, method: PruningMethod) -> None:
    feeds = random_feeds(name, 6)
    close(statistics_of(name, feeds, 1, method), statistics_of(name, feeds, 6, method), 1e-5)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    statistics = statistics_of(NAME, random_feeds(NAME, 3), 3)
    snpc.save_statistics(statistics, tmp_path / "s.npz")
    again = snpc.load_statistics(tmp_path / "s.npz")
    assert replace(again, sums={}, odd={}) == replace(statistics, sums={}, odd={})
    close(again, statistics, 0.0)


# -- halves of the samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_other_batch_is_the_odd_half(name: str, tmp_path: Path) -> None:
    feeds = random_feeds(name, 10)
    statistics = statistics_of(name, feeds, 2)
    odd = statistics_of(name, {k: np.concatenate([v[2:4], v[6:8]]) for k, v in feeds.items()}, 2)
    joint = {
        group: {key: array for key, array in arrays.items() if key.startswith("gram_joint:")}
        for group, arrays in odd.sums.items()
    }
    joint = {group: arrays for group, arrays in joint.items() if arrays}
    assert joint
    close(replace(statistics, sums=statistics.odd), replace(odd, sums=joint), 1e-6)
    snpc.save_statistics(statistics, tmp_path / "s.npz")
    again = snpc.load_statistics(tmp_path / "s.npz")
    close(replace(again, sums=again.odd), replace(statistics, sums=statistics.odd), 0.0)
    both = again + statistics
    for group, arrays in statistics.odd.items():
        for key, array in arrays.items():
            np.testing.assert_allclose(both.odd[group][key], 2 * array, rtol=1e-6)


def test_one_batch_has_no_halves_and_two_of_them_have() -> None:
    feeds = random_feeds(NAME, 4)
    first, second = (statistics_of(NAME, {k: v[part] for k, v in feeds.items()}, 2) for part in (slice(2), slice(2, 4)))
    assert not first.odd and not second.odd
    both = first + second
    for group, arrays in both.odd.items():
        for key, array in arrays.items():
            np.testing.assert_allclose(array, second.sums[group][key], rtol=1e-6)
    assert both.odd


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_a_half_are_about_the_mean_of_the_whole(name: str) -> None:
    """Those of the even half are what is left."""
    feeds = random_feeds(name, 8)
    statistics, even = statistics_of(name, feeds, 4), statistics_of(name, {k: v[:4] for k, v in feeds.items()}, 4)
    for group, arrays in statistics.odd.items():
        keys = {
            part: {StatisticKey.parse(k): a for k, a in sums.items()}
            for part, sums in (("whole", statistics.sums[group]), ("odd", arrays), ("even", even.sums[group]))
        }
        (moments, *_) = group_moments("refit", keys["whole"], keys["odd"]).consumers[0]
        (first, *_) = group_moments("refit", keys["even"]).consumers[0]
        odd = moments.odd_moment()
        assert odd is not None
        shift = first.means[0] - moments.means[0]
        expected = first.moment + first.count * np.outer(shift, shift)
        if len(moments.means) == 1:
            np.testing.assert_allclose(
                moments.moment - odd, expected, rtol=1e-4, atol=1e-4 * np.abs(moments.moment).max()
            )


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_a_job_array_are_the_whole(count: int, tmp_path: Path) -> None:
    """Their files add up to the sums and to the record of one run over all samples."""
    common = ("plan", VIT, "--calib", CALIB, "--calib-samples", 48, "--target", "macs=0.7", "--tokens", "none")
    files = [tmp_path / f"{index}.npz" for index in range(1, count + 1)]
    for index, file in enumerate(files, start=1):
        shown = invoke(*common, "--shard", f"{index}/{count}", "--save-stats", file).output
        assert f"part {index} of {count}" in shown
    assert not list(tmp_path.glob("*.json"))  # nothing is planned
    invoke(*common, "--save-stats", tmp_path / "whole.npz", "-o", tmp_path / "whole.json")
    whole, parts = snpc.load_statistics(tmp_path / "whole.npz"), snpc.load_statistics(*reversed(files))
    assert replace(parts, sums={}, odd={}) == replace(whole, sums={}, odd={})
    close(parts, whole, 1e-15)
    some = snpc.load_statistics(*files[1:])
    assert some.sources == () and [part.index for part in some.parts] == list(range(2, count + 1))
    close(snpc.load_statistics(files[0]) + some, whole, 1e-15)


def test_a_part_is_taken_once(tmp_path: Path) -> None:
    analysis = analysis_of(NAME)
    calibration = calibration_of(analysis, random_feeds(NAME, 8), 1)
    part = snpc.measure_statistics(analysis, calibration.shard(1, 2), prunable_of(analysis))
    with pytest.raises(UserError, match=r"part 1 of 2 of .* given twice"):
        part + part
    assert part.describe_sources().startswith("part 1 of 2 of ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calib", CALIB), "give --save-stats"),
        (("--save-stats", "s.npz"), "give --calib"),
        (("--calib", CALIB, "--save-stats", "s.npz", "--load-stats", CALIB), "no --load-stats"),
    ],
)
def test_a_part_without_data_or_a_file_is_refused(options: tuple[object, ...], message: str) -> None:
    shown = invoke("prune", VIT, "--ratio", 0.5, "--shard", "1/2", *options, code=2).output
    assert message in shown


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_add_up_is_refused() -> None:
    vit, bert = (statistics_of(name, random_feeds(name, 2), 2) for name in NAMES[:2])
    with pytest.raises(UserError, match="of one model"):
        vit + bert
    group = next(iter(vit.sums))
    with pytest.raises(UserError, match="same groups"):
        vit + replace(vit, sums={k: v for k, v in vit.sums.items() if k != group})
    with pytest.raises(UserError, match="same groups"):
        vit + replace(vit, criterion="mixed")


@pytest.mark.parametrize("method", ["parallel", "select"])
def test_statistics_of_something_else_are_refused(method: PruningMethod) -> None:
    analysis = analysis_of(NAME)
    groups = prunable_of(analysis)
    statistics = statistics_of(NAME, random_feeds(NAME, 2), 2, "auto" if method == "parallel" else "select")
    with pytest.raises(UserError, match="of another model"):
        snpc.plan(analysis, Budget(0.5), statistics=replace(statistics, digest="0" * 64), method=method)
    short = replace(statistics, sums={k: v for k, v in statistics.sums.items() if k != groups[0].id})
    with pytest.raises(UserError, match=f"nothing .*{groups[0].id}"):
        snpc.plan(analysis, Budget(0.5), statistics=short, method=method)
    if method == "select":
        with pytest.raises(UserError, match="criterion activation"):
            snpc.plan(analysis, Budget(0.5), statistics=statistics, method=method, criterion="activation")
    with pytest.raises(UserError, match="--method auto"):
        snpc.plan(analysis, Budget(0.5), statistics=statistics, method="auto")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    snpc.save_statistics(statistics_of(NAME, random_feeds(NAME, 2), 2), good)
    whole = good.read_bytes()
    header = json.loads(str(np.load(good)["header"]))
    arrays = {k: v for k, v in np.load(good).items() if k != "header"}
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-30], bytes(damaged)):
        bad.write_bytes(content)
        refused(bad)
    for change in ({"snpc_statistics": 1}, {"entries": [["a"]]}, {"entries": [["g", "n"]] * (len(arrays) + 1)}):
        np.savez(bad, header=np.array(json.dumps(header | change)), **arrays)
        refused(bad)
    np.savez(bad, header=np.array(json.dumps(header)), **arrays | {"0": arrays["0"] * np.nan})
    refused(bad)
    np.savez(bad, image=np.zeros(3))
    refused(bad)
    refused(tmp_path / "absent.npz")


def refused(path: Path) -> None:
    with pytest.raises(UserError, match="holds no statistics") as caught:
        snpc.load_statistics(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_several_passes_measure_what_one_does(name: str, method: PruningMethod) -> None:
    analysis, feeds = analysis_of(name), random_feeds(name, 4)
    passes, found = [], []
    for limit in (1 << 40, smallest_limit(name, feeds, method)):
        progress = RecordedProgress()
        found.append(
            snpc.measure_statistics(
                analysis,
                calibration_of(analysis, feeds, 2),
                prunable_of(analysis),
                method=method,
                criterion="snp",
                execution=Execution(memory_limit=limit, progress=progress),
            )
        )
        passes.append(sum(total for _, total, _ in progress.finished) / 2)
    (one, many), (first, second) = passes, found
    assert one == 1 < many
    close(second, first, 1e-6)


def smallest_limit(name: str, feeds: dict[str, Array], method: PruningMethod) -> int:
    """What the refusal of less says is enough."""
    limit = 1
    for _ in range(50):
        try:
            statistics_of(name, feeds, 2, method, limit)
        except UserError as error:
            limit = parse_bytes(str(error).partition("--memory-limit ")[2].split()[0])
        else:
            return limit
    raise AssertionError("no limit is ever enough")


def test_a_limit_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"--memory-limit .* or a smaller --calib-batch"):
        statistics_of(NAME, random_feeds(NAME, 2), 2, limit=1000)


def test_layers_are_fitted_the_same_from_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding: with so little memory the dense model runs in segments, which onnxruntime fuses otherwise."""
    analysis = analysis_of(NAME)
    data = calibration_of(analysis, random_feeds(NAME, 6), 2)
    made = snpc.plan(analysis, Budget(0.5, uniform=True), calibration=data, method="auto")
    assert made.closed_forms is not None
    files: list[int] = []

    keep = SpillFiles.keep

    def counted(self: SpillFiles, array: Array) -> Array:
        files.append(array.nbytes)
        return keep(self, array)

    monkeypatch.setattr(SpillFiles, "keep", counted)
    found = []
    for limit in (1 << 40, 1):
        source = fit_layerwise(made.closed_forms, made.slices, data, Execution(memory_limit=limit))
        found.append(initializers_of(written(finalize(source.model))))
        assert bool(files) == (limit == 1)
    for key, array in found[0].items():
        np.testing.assert_allclose(found[1][key], array, rtol=1e-4, atol=1e-6)


# -- the command line ------------------------------------------------------------------------------------------------


def test_prune_from_files(tmp_path: Path) -> None:
    """The same weights as from the data, and the data are not needed."""
    model, feeds = str(export(NAME)), random_feeds(NAME, 8)
    np.savez(tmp_path / "all.npz", **feeds)
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", **{name: a[4 * k : 4 * k + 4] for name, a in feeds.items()})
        common = ("--ratio", "0.5", "--dry-run", "--calib", tmp_path / f"{k}.npz", "--calib-batch", "2")
        invoke("prune", model, *common, "--save-stats", tmp_path / f"s{k}.npz")
    common = ("--ratio", "0.5", "--uniform", "--method", "parallel")
    data = ("--calib", tmp_path / "all.npz", "--calib-batch", "2")
    files = ("--load-stats", tmp_path / "s0.npz", "--load-stats", tmp_path / "s1.npz")
    invoke("prune", model, *common, *data, "-o", tmp_path / "data.onnx")
    saved = ("--save-stats", tmp_path / "both.npz")
    invoke("prune", model, *common, *files, *saved, "-o", tmp_path / "files.onnx")
    one, two = initializers(tmp_path / "data.onnx"), initializers(tmp_path / "files.onnx")
    assert one.keys() == two.keys()
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, rtol=1e-4, atol=1e-5)
    assert snpc.load_statistics(tmp_path / "both.npz").samples == 8
    plan = tmp_path / "plan.json"
    invoke("plan", model, "--ratio", "0.5", "--load-stats", tmp_path / "both.npz", "-o", plan)
    invoke("apply", model, plan, "--load-stats", tmp_path / "both.npz", "-o", tmp_path / "applied.onnx")
    assert (tmp_path / "applied.onnx").is_file()


def test_flags_that_say_nothing_are_refused(tmp_path: Path) -> None:
    model = str(export(NAME))
    statistics = tmp_path / "s.npz"
    snpc.save_statistics(statistics_of(NAME, random_feeds(NAME, 2), 2), statistics)
    for flags, said in (
        (("--save-stats", tmp_path / "new.npz"), "--save-stats"),
        (("--load-stats", statistics, "--method", "auto"), "--method auto"),
        (("--load-stats", statistics, "--save-stats", statistics), str(statistics)),
        (("--memory-limit", "lots"), "no size"),
        (("--load-stats", model), "holds no statistics"),
    ):
        done = invoke("prune", model, "--ratio", "0.5", "--dry-run", *flags, code=2)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


# -- no data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "bert__ts17", "bart__ts17", "vit_timm__ts17_static"])
def test_noise_fits_the_model(name: str) -> None:
    analysis = analysis_of(name)
    data = snpc.random_calibration(analysis, samples=12, batch=4)
    batches = list(data.batches())
    assert sum(len(next(iter(b.values()))) for b in batches) == data.samples == 12
    assert any(not np.array_equal(a, b) for a, b in zip(batches[0].values(), batches[1].values(), strict=True))
    for key, array in batches[0].items():
        if "mask" in key:
            assert (array == 1).all()
        elif key.endswith("input_ids"):
            table = max(v.shape[0] for v in embeddings(analysis.model.graph))
            assert table // 2 < max(b[key].max() for b in batches) < table
        elif array.dtype.kind == "f":
            assert abs(float(array.mean())) < 0.2
            assert 0.8 < float(array.std()) < 1.2
    again = snpc.random_calibration(analysis, samples=12, batch=4)
    for one, two in zip(batches, again.batches(), strict=True):
        for key, array in one.items():
            np.testing.assert_array_equal(array, two[key])


def embeddings(model: ir.Model) -> list[Array]:
    return [
        v.const_value.numpy()
        for v in model.graph.initializers.values()
        if v.const_value and len(v.const_value.shape) == 2
    ]


def test_noise_gives_as_many_samples_as_asked() -> None:
    assert {len(a) for a in random_batch(analysis_of("bert__ts17"), 5).values()} == {5}


def test_pruning_on_noise_says_so(tmp_path: Path) -> None:
    done = invoke(
        "prune", export(NAME), "--ratio", "0.5", "--calib", "random", "--calib-samples", "4", "-o", tmp_path / "o.onnx"
    )
    assert "noise" in done.stderr
    assert "no data" in done.stdout
