"""Sessions and the inputs made for them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import check_feeds, parse_shapes, random_feeds
from snpc.runtime.execution.session import (
    ORT_DTYPES,
    PROVIDERS,
    MemoryMode,
    first_lines,
    open_session,
    prepare_run,
    provider_chain,
    resolve_provider,
    run_session,
    session_inputs,
    session_outputs,
)
from snpc.types import Feeds, TensorSpec

IDENTITY = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3, ?] x, int64[batch, seq] ids, bool flag) => (float[batch, 3, ?] y, int64[batch, seq] z, bool f) {
    y = Identity(x)
    z = Identity(ids)
    f = Not(flag)
}
"""


def model_bytes(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(text).SerializeToString())


def cast_bytes(source: int, target: int, shape: Sequence[int | str]) -> bytes:
    """The text format has no float8, so this one is built."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=target)],
        "g",
        [helper.make_tensor_value_info("x", source, shape)],
        [helper.make_tensor_value_info("y", target, shape)],
    )
    opset = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


def spec(name: str, dtype: object, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)  # type: ignore[call-overload]


class TestOpen:
    def test_importing_the_module_does_not_import_onnxruntime(self) -> None:
        modules = "snpc.runtime.execution.session, snpc.runtime.evaluation.bench"
        code = f"import sys, {modules}; sys.exit('onnxruntime' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_a_file_and_its_bytes_give_the_same_result(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(model_bytes(IDENTITY))
        feeds: Feeds = {"x": np.ones((2, 3, 4), np.float32), "ids": np.ones((2, 5), np.int64), "flag": np.array(True)}
        for model in (path, path.read_bytes()):
            outputs = run_session(open_session(model), feeds)
            assert list(outputs) == ["y", "z", "f"]
            np.testing.assert_array_equal(outputs["y"], feeds["x"])
            assert outputs["f"].shape == ()
            assert not outputs["f"]

    @pytest.mark.parametrize("memory", ["shared", "least"])
    def test_where_its_memory_comes_from_changes_nothing(self, memory: MemoryMode) -> None:
        feeds: Feeds = {"x": np.ones((2, 3, 4), np.float32), "ids": np.ones((2, 5), np.int64), "flag": np.array(True)}
        expected = run_session(open_session(model_bytes(IDENTITY)), feeds)
        sessions = [open_session(model_bytes(IDENTITY), memory=memory) for _ in range(3)]
        for session in sessions:
            outputs = run_session(session, feeds)
            assert list(outputs) == list(expected)
            for name, array in outputs.items():
                np.testing.assert_array_equal(array, expected[name])

    def test_inputs_and_outputs_keep_names_sizes_and_unknowns(self) -> None:
        session = open_session(model_bytes(IDENTITY))
        assert session_inputs(session) == (
            spec("x", np.float32, "batch", 3, ""),
            spec("ids", np.int64, "batch", "seq"),
            spec("flag", np.bool_),
        )
        assert [output.name for output in session_outputs(session)] == ["y", "z", "f"]

    @pytest.mark.parametrize(("level", "name"), [("all", "ENABLE_ALL"), ("basic", "ENABLE_BASIC"), ("off", "DISABLE_")])
    def test_options_reach_the_session(self, level: str, name: str) -> None:
        session = open_session(model_bytes(IDENTITY), execution=Execution(threads=2), optimization=level)  # type: ignore[arg-type]
        options = session.get_session_options()
        assert options.intra_op_num_threads == 2
        assert options.log_severity_level == 4
        assert name in str(options.graph_optimization_level)
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nope\.onnx: no such file"):
            open_session(tmp_path / "nope.onnx")

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="not a file"):
            open_session(tmp_path)

    def test_a_broken_file_is_refused_in_onnxruntimes_words(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.onnx"
        path.write_bytes(b"not a model")
        with pytest.raises(UserError, match=r"bad\.onnx: onnxruntime does not load it: .*INVALID_PROTOBUF") as refusal:
            open_session(path)
        assert "\n" not in str(refusal.value)

    def test_broken_bytes_are_refused(self) -> None:
        with pytest.raises(UserError, match="the model in memory: onnxruntime does not load it"):
            open_session(b"not a model")

    def test_negative_threads_are_refused(self) -> None:
        with pytest.raises(UserError, match="threads -1 is negative"):
            open_session(model_bytes(IDENTITY), execution=Execution(threads=-1))

    def test_the_first_lines_of_a_message(self) -> None:
        assert first_lines(RuntimeError("\n  what \n where")) == "what"
        assert first_lines(RuntimeError("\n  what \n where\n stack"), 2) == "what where"
        assert first_lines(RuntimeError()) == "RuntimeError"


@pytest.fixture
def every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that has providers for other hardware, too."""
    names = [*PROVIDERS.values(), "OpenVINOExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)


def has_entry(options: ort.SessionOptions, name: str) -> bool:
    try:
        return bool(options.get_session_config_entry(name) == "1")
    except RuntimeError:  # there is no such entry
        return False


class TestProvider:
    @pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
    def test_short_and_full_names(self, name: str) -> None:
        assert resolve_provider(name) == ("CPUExecutionProvider", {})
        assert open_session(model_bytes(IDENTITY), execution=Execution(provider=name)).get_providers() == [
            "CPUExecutionProvider"
        ]

    def test_an_absent_one_is_refused_with_those_there_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(UserError, match=r"'cuda' is not in .*: it has CPUExecutionProvider \(in short: cpu\)"):
            open_session(model_bytes(IDENTITY), execution=Execution(provider="cuda"))

    @pytest.mark.parametrize(
        ("text", "name", "device"),
        [
            ("cuda:1", "CUDAExecutionProvider", {"device_id": "1"}),
            ("tensorrt:0", "TensorrtExecutionProvider", {"device_id": "0"}),
            ("OpenVINO:GPU.1", "OpenVINOExecutionProvider", {"device_type": "GPU.1"}),
            ("openvinoexecutionprovider", "OpenVINOExecutionProvider", {}),
        ],
    )
    def test_a_device_is_named_after_a_colon(
        self, text: str, name: str, device: dict[str, str], every_provider: None
    ) -> None:
        assert resolve_provider(text) == (name, device)

    @pytest.mark.parametrize(
        ("text", "refusal"),
        [
            ("cpu:1", "provider 'cpu:1': cpu takes no device; leave out ':1'"),
            ("cuda:one", "provider 'cuda:one': 'one' names no device; write it as cuda:1"),
            ("cuda:", "provider 'cuda:': '' names no device; write it as cuda:1"),
            ("openvino:", "provider 'openvino:': '' names no device; write it as openvino:GPU"),
        ],
    )
    def test_what_is_no_device_is_refused(self, text: str, refusal: str, every_provider: None) -> None:
        with pytest.raises(UserError, match=re.escape(refusal)):
            resolve_provider(text)

    def test_measuring_is_in_full_precision_and_compiles_no_engines(self, every_provider: None) -> None:
        """TF32 has 10 bits of mantissa, and TensorRT takes minutes to compile an engine for a session of few runs."""
        cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
        for name in ("cuda:1", "trt:1"):
            chain = provider_chain(Execution(provider=name), measuring=True)
            assert [name for name, _ in chain] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
            assert chain[0][1].items() >= {"device_id": "1", "use_tf32": "0"}.items()
        assert provider_chain(Execution(provider="trt:1"), measuring=False) == [
            ("TensorrtExecutionProvider", {"device_id": "1"}), ("CUDAExecutionProvider", {"device_id": "1"}), cpu,
        ]  # fmt: skip
        exact = provider_chain(Execution(provider="openvino", threads=3), measuring=True)
        assert exact == [("OpenVINOExecutionProvider", {"num_of_threads": "3", "precision": "ACCURACY"}), cpu]
        assert provider_chain(Execution(), measuring=True) == [cpu]

    @pytest.mark.parametrize(("provider", "shared"), [("cuda", False), ("cpu", True)])
    def test_only_the_cpu_allocates_from_the_shared_pool(
        self, provider: str, shared: bool, every_provider: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[ort.SessionOptions] = []

        class Recorder:
            def __init__(self, _: object, options: ort.SessionOptions, providers: list[str], **__: object) -> None:
                opened.append(options)
                self.providers = providers

            def get_providers(self) -> list[str]:
                return self.providers

        monkeypatch.setattr("onnxruntime.InferenceSession", Recorder)
        open_session(b"", execution=Execution(provider=provider), memory="least")
        for entry in ("session.use_env_allocators", "session.disable_prepacking"):
            assert has_entry(opened[0], entry) == shared

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(UserError, match="'abacus' is not in this onnxruntime"):
            resolve_provider("abacus")

    def test_one_that_does_not_start_is_not_replaced_by_the_cpu_unsaid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class OnCpu:
            def __init__(self, *_: object, **__: object) -> None: ...

            def get_providers(self) -> list[str]:
                return ["CPUExecutionProvider"]

        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: list(PROVIDERS.values()))
        monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)
        monkeypatch.setattr("onnxruntime.InferenceSession", OnCpu)
        with pytest.raises(UserError, match="TensorrtExecutionProvider did not start"):
            open_session(b"", execution=Execution(provider="trt"))


class TestTypes:
    @pytest.mark.parametrize("element", sorted(set(ORT_DTYPES) - {"complex64", "complex128"}))  # unknown to onnxruntime
    def test_every_type_goes_in_and_comes_out(self, element: str) -> None:
        dtype = ORT_DTYPES[element]
        proto = TensorProto.STRING if element == "string" else helper.np_dtype_to_tensor_dtype(dtype)
        session = open_session(cast_bytes(proto, proto, ["n", 2]))
        assert session_inputs(session) == (TensorSpec("x", dtype, ("n", 2)),)
        array = np.array([["1", "0"]] * 3, object) if element == "string" else np.array([[1, 0]] * 3).astype(dtype)
        result = run_session(session, {"x": array})["y"]
        assert result.dtype == dtype
        assert result.tolist() == array.tolist()

    def test_float_to_bfloat16_and_empty(self) -> None:
        session = open_session(cast_bytes(TensorProto.FLOAT, TensorProto.BFLOAT16, ["n"]))
        for array in (np.array([1.5, -2.0], np.float32), np.zeros(0, np.float32)):
            result = run_session(session, {"x": array})["y"]
            assert result.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(result.astype(np.float32), array)

    def test_a_sequence_is_refused(self) -> None:
        text = (
            '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }'
        )
        session = open_session(model_bytes(text))
        with pytest.raises(UserError, match=r"output 'y' is seq\(tensor\(float\)\): snpc cannot run it"):
            session_outputs(session)


class TestRun:
    def test_a_strided_input_is_read_right(self) -> None:
        session = open_session(cast_bytes(TensorProto.FLOAT, TensorProto.FLOAT, [3, 2]))
        array = np.arange(6, dtype=np.float32).reshape(2, 3).T
        np.testing.assert_array_equal(run_session(session, {"x": array})["y"], array)

    @pytest.mark.parametrize(
        ("array", "words"),
        [(np.zeros((2, 2), np.float32), "Got: 2 Expected: 3"), (np.zeros((3, 2), np.float64), "Unexpected input data")],
    )
    def test_what_does_not_run_is_refused_with_the_models_name(self, array: np.ndarray, words: str) -> None:
        session = open_session(cast_bytes(TensorProto.FLOAT, TensorProto.FLOAT, [3, 2]))
        with pytest.raises(UserError, match=rf"^a\.onnx: onnxruntime does not run it on these inputs: .*{words}"):
            prepare_run(session, {"x": array}, name="a.onnx")()

    def test_a_missing_input_is_refused(self) -> None:
        session = open_session(cast_bytes(TensorProto.FLOAT, TensorProto.FLOAT, [3, 2]))
        with pytest.raises(UserError, match="Required inputs"):
            run_session(session, {})


class TestParseShapes:
    @pytest.mark.parametrize(
        "text",
        [
            "x:1,3,224,224",
            "x:1x3x224x224",
            "x:[1,3,224,224]",
            "x:[1x3x224x224]",
            " x:[ 1, 3 , 224,224 ] ",
            "x:1, 3,224,224",
        ],
    )
    def test_every_spelling(self, text: str) -> None:
        assert parse_shapes([text]) == {"x": (1, 3, 224, 224)}

    def test_several(self) -> None:
        shapes = parse_shapes(["a:1,2 b:3x4", "c:[5, 6] in:0:7", "s:[]", "past:1,8,0,64"])
        assert shapes == {"a": (1, 2), "b": (3, 4), "c": (5, 6), "in:0": (7,), "s": (), "past": (1, 8, 0, 64)}
        assert parse_shapes([]) == {}

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (["1,3,224"], "names no input; write it as name:1,3,224,224"),
            ([":1,3"], "names no input"),
            (["x:"], "is not a list of sizes; write it as x:1,3,224,224"),
            (["x:1,-1"], "'1,-1' is not a list of sizes"),
            (["x:1,seq"], "is not a list of sizes"),
            (["x:1,,2"], "is not a list of sizes"),
            (["x:[1,2"], "is not a list of sizes"),
            (["x:1,2", "x:1,2"], "'x' has a shape already"),
        ],
    )
    def test_refusals(self, texts: list[str], words: str) -> None:
        with pytest.raises(UserError, match=words):
            parse_shapes(texts)


class TestRandomFeeds:
    def test_values_by_kind(self) -> None:
        inputs = [
            spec("pixels", np.float32, "n", 3, 64, 64),
            spec("half", ml_dtypes.bfloat16, 100),
            spec("ids", np.int64, "n", "seq"),
            spec("types", np.int32, "n", "seq"),
            spec("attention_mask", np.int64, "n", "seq"),
            spec("Mask2", np.float16, "n"),
            spec("flag", np.bool_),
        ]
        feeds = random_feeds(inputs, batch=4, dim_sizes={"seq": 200}, id_limits={"ids": 1000})
        assert {name: array.dtype for name, array in feeds.items()} == {i.name: i.dtype for i in inputs}
        assert feeds["pixels"].shape == (4, 3, 64, 64)
        assert abs(float(feeds["pixels"].mean())) < 0.05
        assert abs(float(feeds["pixels"].std()) - 1) < 0.05
        assert len(set(feeds["half"].tolist())) > 50
        assert feeds["ids"].shape == (4, 200)
        assert 500 < feeds["ids"].max() < 1000
        assert feeds["ids"].min() >= 0
        assert set(feeds["types"].ravel().tolist()) == {0, 1}
        assert (feeds["attention_mask"] == 1).all()
        assert (feeds["Mask2"] == 1).all()
        assert feeds["flag"].shape == ()
        assert bool(feeds["flag"])

    def test_the_seed_and_the_name_decide(self) -> None:
        a, b = spec("a", np.float32, 8), spec("b", np.float32, 8)
        first = random_feeds([a, b], seed=1)
        again = random_feeds([b, a], seed=1)
        np.testing.assert_array_equal(first["a"], again["a"])
        np.testing.assert_array_equal(first["b"], again["b"])
        assert not np.array_equal(first["a"], first["b"])
        assert not np.array_equal(first["a"], random_feeds([a], seed=2)["a"])

    @pytest.mark.parametrize("element", ["int8", "uint8", "uint64"])
    def test_ids_stay_inside_their_type(self, element: str) -> None:
        ids = random_feeds([spec("ids", element, 500)], id_limits={"ids": 10**30})["ids"]
        assert ids.min() >= 0
        assert ids.dtype == element

    def test_a_decoder(self) -> None:
        """Names as optimum exports them: the past is empty and the mask covers past and new."""
        inputs = [
            spec("input_ids", np.int64, "batch_size", "sequence_length"),
            spec("attention_mask", np.int64, "batch_size", "past_sequence_length + sequence_length"),
            spec("position_ids", np.int64, "sequence_length"),
            spec("past_key_values.0.key", np.float32, "batch_size", 8, "past_sequence_length", 64),
            spec("past_key_values.0.value", np.float32, "batch_size", 8, "", 64),
        ]

        def shapes(**options: object) -> list[tuple[int, ...]]:
            return [array.shape for array in random_feeds(inputs, **options).values()]  # type: ignore[arg-type]

        assert shapes(batch=2) == [(2, 16), (2, 16), (16,), (2, 8, 0, 64), (2, 8, 0, 64)]
        sizes = {"sequence_length": 4, "past_sequence_length": 6}
        assert shapes(dim_sizes=sizes) == [(1, 4), (1, 10), (4,), (1, 8, 6, 64), (1, 8, 0, 64)]
        feeds = {"input_ids": (3, 5)}
        assert shapes(shapes=feeds) == [(3, 5), (3, 5), (5,), (3, 8, 0, 64), (3, 8, 0, 64)]

    def test_a_number_in_a_sum(self) -> None:
        feeds = random_feeds([spec("mask", np.int64, "batch", "past + 1"), spec("past.k", np.float32, 1, "past")])
        assert feeds["mask"].shape == (1, 1)
        assert feeds["past.k"].shape == (1, 0)

    def test_unnamed_axes_get_the_batch_and_the_default(self) -> None:
        assert random_feeds([spec("x", np.float32, "", 3, "")], batch=5)["x"].shape == (5, 3, 16)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"shapes": {"z": (1,)}}, "a shape is given for 'z', but the inputs are 'x', 'y'"),
            ({"shapes": {"x": (1, 4)}}, r"input 'x': shape \[1,4\] does not fit \[n,3\]"),
            ({"shapes": {"x": (1, 3, 1)}}, "does not fit"),
            ({"shapes": {"x": (1, 3), "y": (2,)}}, "axis 'n' is 2 here and 1 elsewhere"),
            ({"shapes": {"x": (1, 3)}, "dim_sizes": {"n": 2}}, "axis 'n' is 1 here and 2 elsewhere"),
            ({"dim_sizes": {"n": -1}}, "size -1 of dynamic axis 'n' is negative"),
            ({"id_limits": {"y": 0}}, r"input 'y': no id is in \[0, 0\)"),
            ({"batch": 0}, "batch 0 is not positive"),
            ({"seed": -1}, "seed -1 is negative"),
        ],
    )
    def test_refusals(self, options: dict[str, object], words: str) -> None:
        inputs = [spec("x", np.float32, "n", 3), spec("y", np.int64, "n")]
        with pytest.raises(UserError, match=words):
            random_feeds(inputs, **options)  # type: ignore[arg-type]

    def test_strings_are_refused(self) -> None:
        with pytest.raises(UserError, match="input 'text' is object, which has no random values"):
            random_feeds([spec("text", object, 1)])


class TestCheckFeeds:
    inputs = (spec("x", np.float32, "n", 3),)

    def test_what_the_model_does_not_read_is_left_out(self) -> None:
        feeds = check_feeds(self.inputs, {"labels": np.zeros(2), "x": np.zeros((2, 3), np.float32)})
        assert list(feeds) == ["x"]

    @pytest.mark.parametrize(
        ("feeds", "words"),
        [
            ({"y": np.zeros(1)}, "the data has no 'x'; it has 'y'"),
            ({"x": np.zeros((2, 3))}, "input 'x': the data is float64, the model takes float32"),
            ({"x": np.zeros((2, 4), np.float32)}, r"shape \[2,4\] does not fit \[n,3\]"),
        ],
    )
    def test_refusals(self, feeds: dict[str, np.ndarray], words: str) -> None:
        with pytest.raises(UserError, match=words):
            check_feeds(self.inputs, feeds)
