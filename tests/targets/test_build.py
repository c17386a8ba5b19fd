"""What is built loads again and says what the model says; what cannot be built is refused and harms nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main
from snpc.errors import CheckFailed, UserError
from snpc.passes.fusion.fuse_attention import FusionResult
from snpc.passes.pass_list import FUSE_ATTENTION
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.runners import open_runner
from snpc.targets import TARGETS
from snpc.targets.base import BuildJob, BuildOptions, BuildOutput
from snpc.targets.engines.shape_profile import shape_ranges
from snpc.targets.onnxruntime import ONNXRUNTIME_TARGET as ORT
from snpc.targets.preferred_widths import widths_for_target
from snpc.targets.quantize import find_outliers
from tests.models.exports import export
from tests.models.language import Language
from tests.oracle import require
from tests.patching import patch

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rounds to go through the motions."""
    monkeypatch.setattr("snpc.targets.onnxruntime.TIMING_SECONDS", 0.2)


def calibration(digits: Path, samples: int = 64) -> snpc.Calibration:
    model = snpc.load(digits / "half.onnx")
    return snpc.load_calibration(str(digits / "calib.npz"), model.inputs, samples=samples, batch=32)


def reference(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """onnxruntime itself, without snpc."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def images(digits: Path) -> dict[str, Array]:
    with np.load(digits / "eval.npz") as data:
        return {"image": data["image"]}


def accuracy(path: Path, digits: Path) -> float:
    with np.load(digits / "eval.npz") as data:
        return float((open_runner(path).run({"image": data["image"]})["logits"].argmax(-1) == data["labels"]).mean())


def extra(name: str, package: str) -> Any:
    return pytest.importorskip(name, reason=f"pip install 'snpc[{package}]'")


# -- ort -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "ort"])
def test_ort_writes_the_form_that_is_named_and_it_says_what_the_model_says(
    form: str, digits: Path, tmp_path: Path
) -> None:
    other = tmp_path / f"out.{'ort' if form == 'onnx' else 'onnx'}"
    other.write_bytes(b"of someone else")
    built = snpc.build(digits / "half.onnx", "ort", tmp_path / f"out.{form}")
    assert built.files == (tmp_path / f"out.{form}",)
    assert built.bytes == built.path.stat().st_size
    expected = reference(digits / "half.onnx", images(digits))
    np.testing.assert_allclose(open_runner(built.path).run(images(digits))["logits"], expected["logits"], atol=1e-3)
    assert any("attention in one node (4 times)" in note for note in built.notes)
    assert set(tmp_path.iterdir()) == {built.path, other}, "nothing else is left"
    assert other.read_bytes() == b"of someone else"


@pytest.mark.slow
def test_the_plain_graph_stays_unless_another_is_faster(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds as they would be measured, in which one candidate is twice as fast or slow as the plain one."""

    def rounds(speed: float) -> Any:
        def measured(calls: Any, *, iterations: int, duration: float | None = None, clock: Any = None) -> Array:
            times = np.ones((iterations, len(calls)))
            times[:, 1] = 1 / speed
            return times

        return measured

    def kinds(name: str, speed: float) -> list[str]:
        monkeypatch.setattr("snpc.targets.onnxruntime.run_rounds", rounds(speed))
        built = snpc.build(digits / "half.onnx", "ort", tmp_path / name)
        return [node.op_type for node in onnx.load(built.path).graph.node]

    assert "MultiHeadAttention" in kinds("fast.onnx", 2.0)
    assert "MultiHeadAttention" not in kinds("slow.onnx", 0.5)


def test_a_candidate_that_changes_outputs_is_not_used(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any) -> Any:
        fused = model.clone()
        weight = max(fused.graph.initializers.values(), key=lambda v: v.const_value.size)
        weight.const_value = onnx_tensor(weight.const_value.numpy() * 1.1, weight.name)
        return FusionResult(fused, True, 1)

    entry = dataclasses.replace(FUSE_ATTENTION, run=lambda: broken)
    monkeypatch.setattr("snpc.targets.onnxruntime.FUSE_ATTENTION", entry)
    built = snpc.build(digits / "half.onnx", "ort", tmp_path / "out.onnx")
    assert any("attention in one node" in note and "from the model's" in note for note in built.notes)
    assert built.drift[0].relative < 1e-5


def onnx_tensor(array: Array, name: str) -> Any:
    import onnx_ir as ir

    return ir.Tensor(array, name=name)


def test_weights_too_big_for_one_file_lie_beside_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, "snpc.runtime.io.save.PROTOBUF_LIMIT", 100_000)
    monkeypatch.setattr("snpc.targets.onnxruntime.PROTOBUF_LIMIT", 100_000)
    built = snpc.build(digits / "half.onnx", "ort", tmp_path / "out.onnx")
    assert [re.sub("[0-9a-f]{16}", "DIGEST", file.name) for file in built.files] == ["out.onnx", "out.onnx.DIGEST.data"]
    ready = snpc.build(digits / "half.onnx", "trt", tmp_path / "t.onnx", options=BuildOptions(emit_script=True))
    names = [re.sub("[0-9a-f]{16}", "DIGEST", file.name) for file in ready.files]
    assert names == ["t.onnx", "t.onnx.DIGEST.data", "t.sh"]
    expected = reference(digits / "half.onnx", images(digits))["logits"]
    for artifact in (built, ready):
        assert artifact.path.stat().st_size < 0.5 * artifact.bytes
        np.testing.assert_allclose(reference(artifact.path, images(digits))["logits"], expected, atol=1e-3)


def test_an_fp16_file_for_the_cpu_keeps_its_half_weights(digits: Path, tmp_path: Path) -> None:
    built = snpc.build(digits / "half.onnx", "ort", tmp_path / "out.onnx", precision="fp16")
    onnx.checker.check_model(built.path)
    assert built.bytes < 0.65 * (digits / "half.onnx").stat().st_size
    assert built.drift[0].relative < 0.01
    with pytest.raises(UserError, match="bfloat16"):
        snpc.build(digits / "half.onnx", "ort", tmp_path / "b.onnx", precision="bf16")


# -- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int8_after_pruning_keeps_accuracy_and_is_smaller(digits: Path, tmp_path: Path) -> None:
    data = calibration(digits)
    built = snpc.build(digits / "half.onnx", "ort", tmp_path / "out.onnx", precision="int8", calibration=data)
    assert built.path.stat().st_size < 0.5 * (digits / "half.onnx").stat().st_size
    assert accuracy(built.path, digits) > accuracy(digits / "half.onnx", digits) - 0.02
    assert 0 < built.drift[0].relative < 0.1


def with_outliers(path: Path, tmp_path: Path, factor: float) -> Path:
    """x -> LayerNorm -> MatMul, with two columns ``factor`` times the others; what they add up to matters as well."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17]>
        m (float[batch, 8, 64] x) => (float[batch, 8, 64] y) {
            n = LayerNormalization <axis = -1> (x, gain, bias)
            h = MatMul (n, w)
            y = Add (h, n)
        }"""
    )
    rng = np.random.default_rng(0)
    gain = np.ones(64, np.float32)
    gain[[5, 40]] = factor
    weights = {"gain": gain, "bias": np.zeros(64, np.float32), "w": rng.normal(size=(64, 64)).astype(np.float32)}
    weights["w"][[5, 40]] /= factor
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    onnx.save(model, path)
    np.savez(tmp_path / "x.npz", x=rng.normal(size=(32, 8, 64)).astype(np.float32))
    return path


def test_outlier_columns_stay_in_float_where_that_is_closer(tmp_path: Path) -> None:
    path = with_outliers(tmp_path / "m.onnx", tmp_path, 60.0)
    model = snpc.load(path)
    data = snpc.load_calibration(str(tmp_path / "x.npz"), model.inputs, samples=32)
    (outliers,) = find_outliers(model, tmp_path, list(data.batches())).values()
    assert outliers.columns.tolist() == [5, 40]
    built = snpc.build(path, "ort", tmp_path / "out.onnx", precision="int8", calibration=data)
    note = next(n for n in built.notes if n.startswith("int8"))
    assert "2 outlier columns of 1 activations in float" in note and note.endswith("kept") and "not kept" not in note
    even = with_outliers(tmp_path / "even.onnx", tmp_path, 1.0)
    assert find_outliers(snpc.load(even), tmp_path, list(data.batches())) == {}


def test_int8_needs_data(digits: Path) -> None:
    with pytest.raises(UserError, match="--calib"):
        snpc.build(digits / "half.onnx", "ort", precision="int8")


# -- openvino --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("fp16", 0.05), ("int8", 0.1)])
@pytest.mark.slow
def test_openvino_says_what_onnxruntime_says(digits: Path, tmp_path: Path, precision: Any, most: float) -> None:
    extra("openvino", "openvino")
    data = calibration(digits)
    built = snpc.build(digits / "half.onnx", "openvino", tmp_path / "out.xml", precision=precision, calibration=data)
    assert [file.name for file in built.files] == ["out.xml", "out.bin"]
    expected = reference(digits / "half.onnx", images(digits))["logits"]
    outputs = open_runner(built.path).run(images(digits))["logits"]
    assert np.abs(outputs - expected).max() / np.abs(expected).max() < most
    assert built.drift[0].relative < most


@pytest.mark.slow
def test_bench_compares_runtimes_and_their_outputs(digits: Path, tmp_path: Path) -> None:
    extra("openvino", "openvino")
    onnx_path = digits / "half.onnx"
    built = [snpc.build(onnx_path, "ort", tmp_path / name).path for name in ("a.onnx", "a.ort")]
    paths = [onnx_path, *built, snpc.build(onnx_path, "openvino", tmp_path / "b.xml").path]
    result = snpc.bench(paths, snpc.RandomInputs(batch=2), protocol=snpc.TimingProtocol(iterations=3, warmup=1))
    assert [t.model for t in result.timings] == ["half.onnx", "a.onnx", "a.ort", "b.xml"]
    assert all(
        s.largest_difference is not None
        and s.largest_difference.max_abs is not None
        and s.largest_difference.max_abs < 1e-3
        for s in result.speedups
    )
    assert result.machine.provider == "CPUExecutionProvider, OpenVINO CPU"


# -- TensorRT --------------------------------------------------------------------------------------------------------


def pruned(name: str, tmp_path: Path) -> tuple[Path, Path]:
    require(name)
    dense = export(name)
    decision = snpc.plan(snpc.analyze(snpc.load(dense)), snpc.Budget(ratio=0.5))
    snpc.apply(decision, tmp_path / "pruned.onnx")
    return dense, tmp_path / "pruned.onnx"


@pytest.mark.parametrize("name", ["vit_timm__ts17", "bert__ts17", "gpt2__ts17"])
@pytest.mark.slow
def test_rtx_weight_memory_shrinks_as_pruning_says(name: str, tmp_path: Path) -> None:
    extra("tensorrt_rtx", "trt-rtx")
    dense, narrow = pruned(name, tmp_path)
    before, after = (
        snpc.build(path, "trt-rtx", tmp_path / f"{k}.engine", options=BuildOptions(sm=(86,)))
        for k, path in enumerate((dense, narrow))
    )
    assert before.weight_bytes and after.weight_bytes
    saved = sum(i.size for i in floats(dense)) - sum(i.size for i in floats(narrow))
    assert before.weight_bytes - after.weight_bytes == pytest.approx(4 * saved, rel=0.1)
    assert after.path.stat().st_size > after.weight_bytes


def floats(path: Path) -> list[Array]:
    arrays = [onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer]
    return [a for a in arrays if a.dtype == np.float32]


@pytest.mark.slow
def test_rtx_half_precisions_halve_the_weights(digits: Path, tmp_path: Path) -> None:
    extra("tensorrt_rtx", "trt-rtx")
    weights = {}
    for precision in ("fp32", "fp16", "bf16"):
        path = tmp_path / f"{precision}.engine"
        weights[precision] = snpc.build(digits / "half.onnx", "trt-rtx", path, precision=precision).weight_bytes  # type: ignore[arg-type]
    assert weights["fp16"] == pytest.approx(weights["fp32"] / 2, rel=0.1)
    assert weights["bf16"] == pytest.approx(weights["fp16"], rel=0.01)


@pytest.mark.slow
def test_rtx_builds_for_what_is_asked_and_refuses_the_rest(digits: Path, tmp_path: Path) -> None:
    extra("tensorrt_rtx", "trt-rtx")
    one, three = (
        snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / f"{len(sm)}.engine", options=BuildOptions(sm=sm))
        for sm in ((86,), (86, 89, 120))
    )
    assert three.bytes > one.bytes
    with pytest.raises(UserError, match=r"--sm 33: .* builds for 75,80,86"):
        snpc.build(digits / "half.onnx", "trt-rtx", options=BuildOptions(sm=(33,)))


@pytest.mark.slow
def test_int8_builds_for_rtx(digits: Path, tmp_path: Path) -> None:
    extra("tensorrt_rtx", "trt-rtx")
    data = calibration(digits, 32)
    built = snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / "a.engine", precision="int8", calibration=data)
    full = snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / "b.engine")
    assert built.weight_bytes and full.weight_bytes and built.weight_bytes < 0.5 * full.weight_bytes


@pytest.mark.slow
def test_a_parse_error_names_the_node(tmp_path: Path) -> None:
    extra("tensorrt_rtx", "trt-rtx")
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17]>
        m (float[2, 3] x) => (float[2, 3] y) { h = Relu (x) y = Bernoulli (h) }"""
    )
    model.graph.node[1].name = "the_strange_one"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"does not parse it: Bernoulli the_strange_one"):
        snpc.build(tmp_path / "m.onnx", "trt-rtx", tmp_path / "m.engine")
    assert not (tmp_path / "m.engine").exists()


def test_without_tensorrt_one_line_says_what_to_do(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'snpc\[trt\]'.*trt-rtx.*--emit-script"):
        snpc.build(digits / "half.onnx", "trt")
    with pytest.raises(UserError, match=r"pip install 'snpc\[trt-rtx\]'"):
        snpc.build(digits / "half.onnx", "trt-rtx")


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_the_trt_target_takes_the_same_way(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself needs a GPU. Its interface is that of TensorRT for RTX, which stands in for it here."""
    rtx = extra("tensorrt_rtx", "trt-rtx")
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: rtx if name == "tensorrt" else real(name))
    options = BuildOptions(workspace=256, timing_cache=tmp_path / "cache")
    built = snpc.build(digits / "half.onnx", "trt", tmp_path / "a.engine", options=options)
    assert built.target == "trt" and built.weight_bytes and (tmp_path / "cache").is_file()
    assert (
        snpc.build(digits / "half.onnx", "trt", tmp_path / "b.engine", options=options).weight_bytes
        == built.weight_bytes
    )


# -- profiles, widths ------------------------------------------------------------------------------------------------


def test_profiles_come_from_dynamic_axes_or_from_the_user(digits: Path) -> None:
    path = digits / "half.onnx"
    (span,) = shape_ranges(path, BuildOptions()).values()
    assert (span.min, span.opt, span.max) == ((1, 1, 8, 8), (1, 1, 8, 8), (16, 1, 8, 8))
    (span,) = shape_ranges(path, BuildOptions(opt_shapes={"image": (4, 1, 8, 8)})).values()
    assert span.min == span.opt == span.max == (4, 1, 8, 8)
    for wrong in ({"image": (4, 1, 9, 8)}, {"picture": (1, 1, 8, 8)}, {"image": (0, 1, 8, 8)}):
        with pytest.raises(UserError):
            shape_ranges(path, BuildOptions(min_shapes={"image": (1, 1, 8, 8)}, max_shapes=wrong))


def test_auto_widths_follow_what_runs_the_model() -> None:
    assert dataclasses.astuple(widths_for_target("trt-rtx")) == (8, 16, None)
    assert dataclasses.astuple(widths_for_target(None, Execution(provider="cuda")))[:2] == (8, 16)
    assert widths_for_target(None) == widths_for_target("ort") == widths_for_target("openvino")


# -- nothing half done -----------------------------------------------------------------------------------------------


def test_a_failed_build_leaves_the_earlier_artefact(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "out.onnx"
    earlier.write_bytes(b"earlier")

    def wrong(job: BuildJob) -> BuildOutput:
        """Another model than was asked for."""
        shutil.copy(digits / "digits_vit.onnx", job.output)
        return BuildOutput((job.output,))

    def broken(job: BuildJob) -> BuildOutput:
        job.output.write_bytes(b"no model")
        return BuildOutput((job.output,))

    for make_it, error in ((wrong, CheckFailed), (broken, UserError)):
        monkeypatch.setitem(TARGETS, "ort", dataclasses.replace(ORT, build=make_it))
        with pytest.raises(error):
            snpc.build(digits / "half.onnx", "ort", earlier)
        assert earlier.read_bytes() == b"earlier"
        assert list(tmp_path.iterdir()) == [earlier]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "ncnn"], "choose from ort, trt, trt-rtx, openvino"),
        (["--target", "ort", "--sm", "86"], "--sm is not for --target ort"),
        (["--target", "ort", "-o", "x.engine"], "writes .onnx or .ort"),
        (["--target", "ort", "-o", "nowhere/x.onnx"], "does not exist"),
        (["--target", "ort", "--emit-script"], "--emit-script is not for --target ort"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(digits: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["build", str(digits / "half.onnx"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_latency_is_that_of_the_artifact(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    artifact = snpc.timed_artifact("ort", batch=4).build(digits / "half.onnx", tmp_path / "dense")
    assert artifact.parent == tmp_path / "dense"
    expected = reference(digits / "half.onnx", images(digits))["logits"]
    np.testing.assert_allclose(open_runner(artifact).run(images(digits))["logits"], expected, atol=1e-3)
    for target in ("trt", "trt-rtx"):
        with pytest.raises(UserError, match="does not run engines"):
            snpc.timed_artifact(target)


@pytest.mark.slow
def test_prune_and_build_in_one_step(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrow.onnx"
    arguments = ["prune", str(digits / "digits_vit.onnx"), "--ratio", "0.4", "--round-to", "auto", "-o", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--build", "ort", "--json", "-"])
    assert result.exit_code == 0, result.output
    built = json.loads(result.stdout)["build"]
    assert Path(built["path"]) == tmp_path / "narrow-ort.onnx" and built["drift"][0]["relative"] < 1e-4
    multiple = widths_for_target("ort").multiple
    kept = {g["kept"] for g in json.loads(result.stdout)["groups"] if g["kept"] != g["size"]}
    assert kept and all(width % multiple == 0 for width in kept)
    refused = CliRunner().invoke(main, [*arguments, "--precision", "fp16"])
    assert refused.exit_code == 2 and "--build" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--build", "trt"], "TensorRT is not installed"),
        (["--build", "ort", "--precision", "int8"], "--calib"),
        (["--build", "ort", "--sm", "86"], "--sm is not for"),
    ],
)
def test_prune_refuses_a_build_before_it_prunes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "narrow.onnx"
    arguments = ["prune", str(digits / "digits_vit.onnx"), "--ratio", "0.4", "-o", str(out), *flags]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_does_not_overwrite_the_model(digits: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(digits / "half.onnx", tmp_path / "x-ort.onnx"))
    before = model.read_bytes()
    arguments = ["prune", str(model), "--ratio", "0.4", "-o", str(tmp_path / "x.onnx"), "--build", "ort"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "x-ort.onnx" in result.stderr
    with pytest.raises(UserError, match=r"x-ort\.onnx"):
        snpc.build(model, "ort", model)
    assert model.read_bytes() == before


def test_int8_of_a_model_whose_first_constant_is_no_float(tmp_path: Path) -> None:
    """Types of activations are those of the weights that they meet."""
    language = Language(sharpness=3)
    onnx.save(language.model(), tmp_path / "model.onnx")
    assert language.model().graph.initializer[0].data_type == onnx.TensorProto.INT64
    data = snpc.load_calibration({"input_ids": language.sample(16, 8)}, snpc.load(tmp_path / "model.onnx").inputs)
    built = snpc.build(tmp_path / "model.onnx", "ort", tmp_path / "int8.onnx", precision="int8", calibration=data)
    assert built.drift[0].distance < 0.1
