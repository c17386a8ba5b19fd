"""Bad input: one clear line, exit code 2, nothing written, nothing modified. Bugs would show their traceback."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import snpc
from snpc.errors import UserError
from tests.command_line import CALIB, VIT, invoke, write_tiny

Array = npt.NDArray[Any]
RATIO = ("--ratio", 0.5)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(autouse=True)
def nothing_changes(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it when the inputs are there: from then on the folder must stay as it is."""
    before: list[dict[str, str]] = []
    yield lambda: before.append(contents(tmp_path))
    assert not before or contents(tmp_path) == before[0]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.onnx")


def refused(words: str, *arguments: object, usage: bool = False) -> None:
    """The last line says why, and there is no other but notes, what goes, and the usage of click's own refusals."""
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    others = ("snpc: note:", "snpc: warning:", "snpc: plan:", "snpc: choosing ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    if usage:
        assert lines[0].startswith("Usage: ")
        assert lines[-1].startswith("Error: ")
    else:
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("snpc: ")
    assert len(lines[-1]) < 700
    assert re.search(words, lines[-1]), lines[-1]


# -- the model -------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not .*ONNX"),
    "text": (b"a letter to nobody\n" * 50, "not a readable ONNX file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(500), "not .*ONNX"),
    "zeros": (bytes(4096), "not .*ONNX"),
    "noise": (np.random.default_rng(0).bytes(5000), "not .*ONNX"),
    "begun": (VIT.read_bytes()[:10], "not .*ONNX"),
    "half": (VIT.read_bytes()[: VIT.stat().st_size // 2], "not a readable ONNX file.*truncated"),
    "almost": (VIT.read_bytes()[:-1], "not a readable ONNX file.*truncated"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "not an ONNX model .*no graph"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_models(kind: str, tmp_path: Path, nothing_changes: Callable[[], None]) -> None:
    data, words = BROKEN[kind]
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    nothing_changes()
    for verb in ("inspect", "prune", "plan"):
        refused(f"broken.onnx: {words}", verb, path, *(() if verb == "inspect" else RATIO))
    with pytest.raises(UserError, match=words):
        snpc.load(path)


def test_paths_that_are_no_files(tmp_path: Path, tiny: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("holds no .onnx file", "inspect", empty)
    refused("holds no .onnx file", "prune", empty, *RATIO)
    refused("no such file", "prune", tmp_path / "none.onnx", *RATIO)
    refused("no such file", "verify", tiny, tmp_path / "none.onnx")
    refused("no such file", "bench", tmp_path / "none.onnx")


def edited(path: Path, change: Callable[[onnx.GraphProto], object]) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return path


def initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(t for t in graph.initializer if t.name == name)


class TestMalformed:
    def test_weights_shorter_than_their_shape(self, tmp_path: Path, nothing_changes: Callable[[], None]) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(VIT.read_bytes())
        edited(path, lambda graph: initializer(graph, "blocks.0.mlp.fc1.bias").dims.__setitem__(0, 500))
        nothing_changes()
        refused(r"blocks\.0\.mlp\.fc1\.bias holds 1536 bytes, its shape needs 2000", "prune", path, *RATIO)

    def test_a_value_that_nothing_makes(self, tiny: Path) -> None:
        edited(tiny, lambda graph: graph.initializer.remove(initializer(graph, "fc1.bias")))
        result = invoke("prune", tiny, *RATIO, code=2)
        assert re.search(r"/fc1/Add reads fc1\.bias, which no node produces", result.stderr.splitlines()[-1])

    def test_a_cycle(self, tiny: Path) -> None:
        edited(tiny, lambda graph: graph.node[0].input.__setitem__(0, "d"))
        refused("malformed", "prune", tiny, *RATIO)

    def test_two_nodes_that_make_one_value(self, tiny: Path) -> None:
        edited(tiny, lambda graph: graph.node.append(graph.node[0]))
        refused("malformed", "inspect", tiny)


class TestExternalData:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write_tiny(tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)

    def test_missing(self, model: Path, nothing_changes: Callable[[], None]) -> None:
        (model.parent / "w.bin").unlink()
        nothing_changes()
        for verb in ("inspect", "prune", "plan"):
            refused(r"its weights are in w\.bin.*not beside it", verb, model, *(() if verb == "inspect" else RATIO))

    def test_a_folder_in_its_place(self, model: Path) -> None:
        (model.parent / "w.bin").unlink()
        (model.parent / "w.bin").mkdir()
        refused("not beside it", "inspect", model)

    @pytest.mark.parametrize("size", [0, 1000])
    def test_truncated(self, model: Path, size: int, nothing_changes: Callable[[], None]) -> None:
        data = model.parent / "w.bin"
        data.write_bytes(data.read_bytes()[:size])
        nothing_changes()
        refused(rf"w\.bin: too short for fc\S+ \(\d+ bytes needed, {size} there\).*truncated", "prune", model, *RATIO)

    @pytest.mark.parametrize("where", ["../w.bin", "/etc/hostname", "a/../../w.bin"])
    def test_outside_its_folder(self, model: Path, where: str) -> None:
        proto = onnx.load(model, load_external_data=False)
        for entry in (e for t in proto.graph.initializer for e in t.external_data if e.key == "location"):
            entry.value = where
        model.write_bytes(proto.SerializeToString())
        refused("outside its folder", "prune", model, *RATIO)

    def test_it_is_no_output(self, model: Path, nothing_changes: Callable[[], None]) -> None:
        nothing_changes()
        refused(r"w\.bin: is the input itself", "prune", model, *RATIO, "-o", model.parent / "w.bin")
        refused(r"w\.bin: is the input itself", "inspect", model, "--json", model.parent / "w.bin")

    def test_nor_is_the_data_of_an_output(self, model: Path, nothing_changes: Callable[[], None]) -> None:
        """An output called o.onnx names its weights so, and removes those of the model that it replaces."""
        name = "o.onnx.0123456789abcdef.data"
        proto = onnx.load(model)
        (model.parent / "w.bin").unlink()
        onnx.save_model(proto, model, save_as_external_data=True, location=name, size_threshold=0)
        nothing_changes()
        refused(rf"o\.onnx: the input has its weights in {name}", "prune", model, *RATIO, "-o", model.parent / "o.onnx")
        plan = snpc.make_slice_plan(snpc.score(snpc.analyze(snpc.load(model))), snpc.Budget(0.5))
        with pytest.raises(UserError, match="has its weights in"):
            snpc.apply(snpc.PruningPlan(plan), model.parent / "o.onnx")


# -- numbers that no result can come from ------------------------------------------------------------------------------


class TestNumbers:
    CALIBRATED = (*RATIO, "--calib", CALIB, "--calib-samples", 16)

    @pytest.mark.parametrize("number", [np.nan, np.inf])
    @pytest.mark.parametrize("flags", [RATIO, CALIBRATED], ids=["magnitude", "closed form"])
    def test_a_weight_that_would_be_cut(self, number: float, flags: tuple[object, ...], tmp_path: Path) -> None:
        def damaged(graph: onnx.GraphProto) -> None:
            tensor = next(t for t in graph.initializer if list(t.dims) == [96, 288])
            array = numpy_helper.to_array(tensor).copy()
            array[3, 5] = number
            tensor.CopyFrom(numpy_helper.from_array(array, "packed"))
            for node in graph.node:
                node.input[:] = ["packed" if name == old else name for name in node.input]

        old = next(t.name for t in onnx.load(VIT).graph.initializer if list(t.dims) == [96, 288])
        path = tmp_path / "m.onnx"
        path.write_bytes(VIT.read_bytes())
        edited(path, damaged)
        refused(rf"the weight packed of \S+ holds {number} at \[3, 5\] \(1 such entries\)", "prune", path, *flags)

    def test_inputs_whose_activations_cannot_be_squared(self, tmp_path: Path) -> None:
        images = np.load(CALIB)["image"][:16].astype(np.float32)
        images[9] = 3.4e38
        np.savez(tmp_path / "c.npz", image=images)
        refused(
            r"c\.npz: in samples (\d+, |\d+ to )*\b(9|[0-8] to 1\d)\b.*, activations of \S+ are not finite",
            "prune", VIT, *RATIO, "--calib", tmp_path / "c.npz", "-o", tmp_path / "o.onnx",
        )  # fmt: skip

    def test_statistics_that_no_data_gives(self, tmp_path: Path) -> None:
        stats = tmp_path / "s.npz"
        invoke("plan", VIT, *self.CALIBRATED, "-o", tmp_path / "p.json", "--save-stats", stats)
        arrays = dict(np.load(stats))
        header = arrays.pop("header")
        for name, change in {
            "turned": lambda a: -a,
            "mixed": lambda a: a * np.random.default_rng(0).normal(size=a.shape),
        }.items():
            path = tmp_path / f"{name}.npz"
            np.savez(path, header=header, **{k: change(a) for k, a in arrays.items()})
            refused(
                "negative sums of squares|cannot be solved|cannot score",
                "prune", VIT, *RATIO, "--load-stats", path, "-o", tmp_path / "o.onnx",
            )  # fmt: skip


# -- nothing to prune, and what is pinned ----------------------------------------------------------------------------


def build(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], **more: Any) -> Path:
    """x [n, 8] -> y [n, 8] with seeded weights."""
    rng = np.random.default_rng(1)
    held = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8]) for name in "xy"]
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in more.get("info", {}).items()]
    inputs = [ends[0], *more.get("inputs", ())]
    graph = helper.make_graph(nodes, "g", inputs, ends[1:], [*held, *more.get("held", ())], value_info=info)
    domains = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in more.get("domains", ()))]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
    return path


def mlp(x: str, y: str, hidden: str = "") -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [x, f"{hidden}up"], [f"{hidden}u"]),
        helper.make_node("Relu", [f"{hidden}u"], [f"{hidden}r"]),
        helper.make_node("MatMul", [f"{hidden}r", f"{hidden}down"], [y]),
    ]


def pins_of(path: Path) -> dict[str, str]:
    report = json.loads(invoke("inspect", path, "--json", "-").stdout)
    return {p["tensor"]: p["reason"] for p in report["pins"]}


FFN = {"up": (8, 32), "down": (32, 8)}


class TestPinned:
    def test_a_model_without_weights(self, tmp_path: Path) -> None:
        path = build(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
        refused("nothing to prune in the roles qk, vo, ffn", "prune", path, *RATIO)

    def test_a_role_that_is_not_there(self, tiny: Path) -> None:
        refused("nothing to prune in the roles conv.*inspect", "prune", tiny, *RATIO, "--roles", "conv")

    def test_only_pinned(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("LpNormalization", ["h"], ["y"])]
        path = build(tmp_path / "m.onnx", nodes, {"w": (8, 8)})
        refused(r"nothing to prune .*for example \w+ axis 1: .+", "prune", path, *RATIO, "--roles", "ffn,other")

    @pytest.mark.parametrize("domain, operator", [("my.operators", "Foo"), ("com.microsoft", "Inverse")])
    def test_what_a_custom_operator_reads(self, tmp_path: Path, domain: str, operator: str) -> None:
        custom = helper.make_node(operator, ["h"], ["f"], domain=domain)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), custom, *mlp("f", "y")]
        path = build(tmp_path / "m.onnx", nodes, {"w": (8, 8), **FFN}, info={"f": ["n", 8]}, domains=[domain])
        assert re.search(operator, pins_of(path)["h"])
        invoke("plan", path, *RATIO)
        groups = json.loads((tmp_path / "m.plan.json").read_text())["groups"]
        assert [(g["role"], g["kept"]) for g in groups if g["size"] == 32] == [("ffn", 16)]

    def test_only_a_custom_operator(self, tmp_path: Path) -> None:
        custom = helper.make_node("Foo", ["u"], ["r"], domain="my.operators")
        nodes = [mlp("x", "y")[0], custom, mlp("x", "y")[2]]
        path = build(tmp_path / "m.onnx", nodes, FFN, domains=["my.operators"])
        refused(r"u axis 1: .*my\.operators\.Foo", "prune", path, *RATIO)

    def branches(self, then: str, other: str) -> dict[str, onnx.GraphProto]:
        def branch(operator: str, name: str) -> onnx.GraphProto:
            out = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8])
            return helper.make_graph([helper.make_node(operator, ["h"], [name])], name, [], [out])

        return {"then_branch": branch(then, "t"), "else_branch": branch(other, "e")}

    def test_what_an_if_reads(self, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["flag"], ["f"], **self.branches("Relu", "Neg")),
            *mlp("f", "y"),
        ]
        flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
        path = build(tmp_path / "m.onnx", nodes, {"w": (8, 8), **FFN}, info={"f": ["n", 8]}, inputs=[flag])
        assert "control flow" in pins_of(path)["h"]
        report = json.loads(invoke("prune", path, *RATIO, "--json", "-").stdout)
        assert [g["kept"] for g in report["groups"] if g["size"] == 32] == [16]
        assert report["verify"]["max_abs_diff"] < 1e-4

    def test_what_a_loop_reads(self, tmp_path: Path) -> None:
        ends = [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", onnx.TensorProto.FLOAT, ["n", 8]),
        ]
        steps = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Tanh", ["v"], ["v2"])]
        body = helper.make_graph(steps, "body", ends[:3], ends[3:])
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Loop", ["count", "always", "h"], ["f"], body=body),
            *mlp("f", "y"),
        ]
        held = [numpy_helper.from_array(np.array(3), "count"), numpy_helper.from_array(np.array(True), "always")]
        path = build(tmp_path / "m.onnx", nodes, {"w": (8, 8), **FFN}, info={"f": ["n", 8]}, held=held)
        assert "control flow" in pins_of(path)["h"]
        report = json.loads(invoke("prune", path, *RATIO, "--json", "-").stdout)
        assert [g["kept"] for g in report["groups"] if g["size"] == 32] == [16]

    def test_only_what_an_if_reads(self, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["flag"], ["y"], **self.branches("Relu", "Neg")),
        ]
        flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
        path = build(tmp_path / "m.onnx", nodes, {"w": (8, 8)}, inputs=[flag])
        refused("nothing to prune .*h axis 1: control flow", "prune", path, *RATIO)


# -- options ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, tuple[object, ...]]] = {
    "ratio one": (r"ratio 1 is not in \[0, 1\)", ("--ratio", 1.0)),
    "ratio negative": (r"ratio -0\.1 is not in", ("--ratio", -0.1)),
    "ratio large": (r"ratio 50 is not in", ("--ratio", 50)),
    "ratio nan": (r"ratio nan is not in", ("--ratio", "nan")),
    "ratio infinite": (r"ratio inf is not in", ("--ratio", "inf")),
    "round-to": ("--round-to and --min-width must be at least 1", ("--round-to", 0)),
    "min-width": ("--round-to and --min-width must be at least 1", ("--min-width", 0)),
    "include no regex": (r"'\(' is not a regular expression", ("--include", "(")),
    "exclude no regex": (r"'\*' is not a regular expression", ("--exclude", "*")),
    "include nothing": ("--include/--exclude leave no group", ("--include", "nowhere")),
    "exclude all": ("--include/--exclude leave no group", ("--exclude", ".")),
    "criterion": ("no criterion 'importance'.*magnitude", ("--criterion", "importance")),
    "criterion close": (r"did you mean magnitude\?", ("--criterion", "magnitud")),
    "method": ("--method auto .*give --calib", ("--method", "auto")),
    "ratio and target": ("give either --ratio R or --target", ("--target", "macs=0.5")),
    "criterion option": ("'snp' has no option 'term': it has terms", ("--criterion", "snp:term=3")),
    "criterion value": ("norm=l3 is not one of l1, l2", ("--criterion", "magnitude:norm=l3")),
    "criterion number": ("terms=-1 is negative", ("--criterion", "snp:terms=-1")),
    "criterion syntax": ("is not key=value", ("--criterion", "random:7")),
    "criterion without data": ("needs calibration data for ffn: give --calib", ("--criterion", "activation")),
    "provider": ("provider 'tpu' is not in this onnxruntime.*CPUExecutionProvider", ("--provider", "tpu")),
    "dim-param": ("--dim-param seq: no such dynamic dimension; there is n", ("--dim-param", "seq=3")),
    "dim-param zero": ("--dim-param 'n=0': must look like", ("--dim-param", "n=0")),
    "dim-param words": ("--dim-param 'n': must look like", ("--dim-param", "n")),
    "image flags": ("describe calibration images: give --calib", ("--image-mean", "0.5")),
}

USAGE: dict[str, tuple[str, tuple[object, ...]]] = {
    "ratio words": ("'--ratio': 'half' is not a valid float", ("--ratio", "half")),
    "roles": ("'--roles': heads: choose from qk, vo, ffn, head", ("--roles", "qk,heads")),
    "no roles": ("'--roles': nothing: choose from", ("--roles", " , ")),
    "seed": ("'--seed': -1 is not in the range", ("--seed", -1)),
    "method word": ("'--method': 'rotate' is not one of", ("--method", "rotate")),
    "image-layout": ("'--image-layout': 'chw' is not one of", ("--image-layout", "chw")),
    "unknown": ("No such option:? .*--ratios", ("--ratios", 1)),
}


@pytest.mark.parametrize("verb", ["prune", "plan"])
@pytest.mark.parametrize("case", [*OPTIONS, *USAGE])
def test_options(case: str, verb: str, tiny: Path, nothing_changes: Callable[[], None]) -> None:
    words, flags = {**OPTIONS, **USAGE}[case]
    nothing_changes()
    refused(words, verb, tiny, *(() if flags[0] == "--ratio" else RATIO), *flags, usage=case in USAGE)


def test_needed_arguments(tiny: Path) -> None:
    for verb in ("prune", "plan"):
        refused("say how much goes: --target macs=R", verb, tiny)
    refused("Missing argument 'MODEL'", "inspect", usage=True)
    refused("Missing argument 'PLAN_FILE'", "apply", tiny, usage=True)


def test_an_empty_criterion(tiny: Path) -> None:
    refused("there is no criterion ''", "prune", tiny, *RATIO, "--criterion", "")


@pytest.mark.parametrize(
    "target, words",
    [
        ("macs", "must look like macs=0.6"), ("macs=", "must look like"), ("size=0.5", "must look like"),
        ("macs=0", "must look like"), ("macs=1.5", "must look like"), ("params=nan", "must look like"),
        ("macs=0.001", r"cannot be reached.* the least is macs=0\.\d+"),
    ],
)  # fmt: skip
def test_targets(target: str, words: str, tiny: Path, nothing_changes: Callable[[], None]) -> None:
    nothing_changes()
    for verb in ("prune", "plan"):
        refused(words, verb, tiny, "--target", target)


def test_a_plan_that_refits_needs_its_data(tiny: Path, nothing_changes: Callable[[], None]) -> None:
    data = tiny.with_name("data.npz")
    np.savez(data, x=np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32))
    invoke("plan", tiny, *RATIO, "--calib", data, "-o", tiny.with_name("plan.json"))
    nothing_changes()
    refused("method auto.*give --calib", "apply", tiny, tiny.with_name("plan.json"))


@pytest.mark.parametrize("verb", ["apply", "verify", "bench"])
def test_providers_of_the_other_commands(verb: str, tiny: Path) -> None:
    refused("provider 'cuda5' is not in this onnxruntime", verb, tiny, tiny, "--provider", "cuda5")


def test_max_drift(tiny: Path) -> None:
    refused("'--max-drift': -1.0 is not in the range", "verify", tiny, tiny, "--max-drift", -1, usage=True)


def test_choice_in_python() -> None:
    for options, words in (({"ratio": 1.0}, "ratio"), ({"ratio": 0.5, "roles": ()}, "role"),
                           ({"ratio": 0.5, "roles": ("heads",)}, "role 'heads'"),
                           ({"ratio": 0.5, "include": "["}, "regular expression")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            snpc.Budget(**options)  # type: ignore[arg-type]


# -- calibration data ------------------------------------------------------------------------------------------------

IMAGES: Array = np.load(CALIB)["image"][:12]


def with_nan(images: Array) -> Array:
    images = images.copy()
    images[1, 0, 0, 0] = np.nan
    return images


DATA: dict[str, tuple[dict[str, Array], str]] = {
    "name": ({"picture": IMAGES}, "no data for input image; it holds picture"),
    "shape": ({"image": IMAGES[:, :, :7]}, r"input 'image' takes \[batch,1,8,8\], the data is \[12,1,7,8\]"),
    "rank": ({"image": IMAGES[:, 0]}, "input 'image' has 4 axes .*, the data 3"),
    "text": ({"image": np.full((4, 1, 8, 8), "a")}, "input 'image' takes float32, the data is <U1"),
    "complex": ({"image": IMAGES.astype(np.complex64)}, "input 'image' takes float32, the data is complex64"),
    "objects": ({"image": np.array([None], dtype=object)}, "pickles, which snpc never loads"),
    "NaN": ({"image": with_nan(IMAGES)}, "input 'image' holds NaN in sample 1"),
    "infinity": ({"image": np.full_like(IMAGES, -np.inf)}, "'image' holds infinity in sample 0"),
    "no samples": ({"image": IMAGES[:0]}, "no samples"),
    "no arrays": ({}, "no data for input image; it holds nothing"),
}


class TestCalibration:
    @pytest.mark.parametrize("case", DATA)
    def test_data_that_does_not_fit(self, case: str, tmp_path: Path, nothing_changes: Callable[[], None]) -> None:
        arrays, words = DATA[case]
        path = tmp_path / "data.npz"
        np.savez(path, allow_pickle=True, **arrays)
        nothing_changes()
        refused(rf"data\.npz: .*{words}", "prune", VIT, *RATIO, "--calib", path, "-o", tmp_path / "out.onnx")

    def test_found_only_on_the_way(self, tmp_path: Path, nothing_changes: Callable[[], None]) -> None:
        """Only the first batch is read before scoring begins."""
        images = np.repeat(IMAGES, 2, 0)
        images[20, 0, 0, 0] = np.nan
        np.savez(tmp_path / "data.npz", image=images)
        nothing_changes()
        target = ("-o", tmp_path / "out.onnx", "--plan", tmp_path / "plan.json", "--json", tmp_path / "report.json")
        refused("NaN in sample 20", "prune", VIT, *RATIO, "--calib", tmp_path / "data.npz", *target)

    def test_files_that_are_no_data(self, tmp_path: Path) -> None:
        (tmp_path / "cut.npz").write_bytes(CALIB.read_bytes()[:3000])
        (tmp_path / "data.txt").write_text("1 2 3")
        (tmp_path / "data.csv").write_text("1,2,3")
        (tmp_path / "data.json").write_text("{")
        (tmp_path / "empty").mkdir()
        (tmp_path / "make.py").write_text("def broken():\n    raise RuntimeError('no data today')\n")
        for name, words in {
            "none.npz": r"none\.npz does not exist",
            "cut.npz": r"cut\.npz: .*broken",
            "data.txt": "it holds text, and none of the model's inputs",
            "data.csv": r"unknown kind of file '\.csv'",
            "data.json": r"data\.json: JSONDecodeError",
            "empty": "nothing to calibrate on",
            "make.py:broken": "raised RuntimeError: no data today",
            "make.py:other": "other",
            "none.py:f": r"none\.py does not exist",
        }.items():
            refused(words, "prune", VIT, *RATIO, "--calib", tmp_path / name, "-o", tmp_path / "out.onnx")
            refused(words, "verify", VIT, VIT, "--data", tmp_path / name)

    def test_numbers(self) -> None:
        calib = ("--calib", CALIB, "--dry-run")
        refused("0 calibration samples.*at least one", "prune", VIT, *RATIO, *calib, "--calib-samples", 0)
        refused("calibration batch 0.*at least one", "prune", VIT, *RATIO, *calib, "--calib-batch", 0)
        for flag, text, counts in (
            ("--image-size", "8", "2"),
            ("--image-size", "8,8,8", "2"),
            ("--image-size", "a,b", "2"),
            ("--image-size", ",", "2"),
            ("--image-size", "", "2"),
            ("--image-mean", "0.5,0.5", "1 or 3 or 4"),
            ("--image-std", "one", "1 or 3 or 4"),
        ):
            refused(f"{flag} '{text}': {counts} numbers", "prune", VIT, *RATIO, *calib, flag, text)
        refused("height and width are at least 1", "prune", VIT, *RATIO, *calib, "--image-size", "0,8")
        refused("one positive number", "prune", VIT, *RATIO, *calib, "--image-std", "0")

    def test_too_few_for_a_static_batch(self, tmp_path: Path) -> None:
        model = onnx.load(VIT)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
        onnx.save(model, tmp_path / "static.onnx")
        np.savez(tmp_path / "three.npz", image=IMAGES[:3])
        words = "the model's batch is 4, but there are only 3 samples"
        refused(words, "prune", tmp_path / "static.onnx", *RATIO, "--calib", tmp_path / "three.npz")
        words = "the model's batch is 4, but only 2 of 256 samples are asked for"
        refused(words, "prune", tmp_path / "static.onnx", *RATIO, "--calib", CALIB, "--calib-samples", 2)


# -- outputs ---------------------------------------------------------------------------------------------------------


class TestOutputs:
    def test_the_input_by_any_name(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch, nothing_changes: Callable[[], None]
    ) -> None:
        folder = tiny.parent
        (folder / "soft.onnx").symlink_to(tiny)
        (folder / "hard.onnx").hardlink_to(tiny)
        (folder / "sub").mkdir()
        monkeypatch.chdir(folder / "sub")
        nothing_changes()
        for name in (tiny, "../tiny.onnx", folder / "sub" / ".." / "tiny.onnx", folder / "soft.onnx",
                     folder / "hard.onnx"):  # fmt: skip
            refused("is the input itself", "prune", tiny, *RATIO, "-o", name)
            refused("is the input itself", "plan", tiny, *RATIO, "-o", name)
        refused("is the input itself", "prune", folder / "soft.onnx", *RATIO, "-o", tiny)
        refused("is the input itself", "prune", "../tiny.onnx", *RATIO, "-o", tiny)

    def test_no_input_of_any_command_is_an_output(self, tiny: Path, nothing_changes: Callable[[], None]) -> None:
        folder = tiny.parent
        data, plan, pruned = folder / "data.npz", folder / "plan.json", folder / "pruned.onnx"
        np.savez(data, x=np.ones((4, 8), np.float32))
        invoke("prune", tiny, *RATIO, "--plan", plan, "-o", pruned)
        nothing_changes()
        words = "is the input itself"
        for flag in ("-o", "--plan", "--json"):
            refused(words, "prune", tiny, *RATIO, "--calib", data, flag, data)
            refused(words, "prune", tiny, *RATIO, flag, tiny)
        refused(words, "plan", tiny, *RATIO, "--calib", data, "-o", data)
        for path in (tiny, plan, data):
            refused(words, "apply", tiny, plan, "--calib", data, "-o", path)
            refused(words, "apply", tiny, plan, "--calib", data, "--json", path)
            refused(words, "verify", tiny, pruned, "--plan", plan, "--data", data, "--json", path)
        refused(words, "verify", tiny, pruned, "--json", pruned)
        refused(words, "inspect", tiny, "--json", tiny)
        refused(words, "bench", pruned, tiny, "--json", tiny)

    def test_one_name_for_two_outputs(self, tiny: Path, nothing_changes: Callable[[], None]) -> None:
        path = tiny.parent / "o"
        nothing_changes()
        for flags in (("-o", "--json"), ("-o", "--plan"), ("--plan", "--json")):
            named = [part for flag in flags for part in (flag, path)]
            refused("is the name of two outputs", "prune", tiny, *RATIO, *named)

    @pytest.mark.parametrize("flag", ["-o", "--plan", "--json"])
    def test_places_that_cannot_be_written(self, flag: str, tiny: Path, nothing_changes: Callable[[], None]) -> None:
        nothing_changes()
        refused("the folder .*missing does not exist", "prune", tiny, *RATIO, flag, tiny.parent / "missing" / "o")
        refused("is a folder", "prune", tiny, *RATIO, flag, tiny.parent)
        refused("tiny.onnx does not exist|cannot write", "prune", tiny, *RATIO, flag, tiny / "o")
        if flag == "-o" and Path("/proc/self").is_dir():
            refused("/proc.*cannot write it", "prune", tiny, *RATIO, flag, "/proc/o.onnx")

    def test_a_folder_without_permission(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda path, mode, **_: mode != os.W_OK)  # root may write everywhere
        refused("is not writable", "prune", tiny, *RATIO, "-o", tiny.parent / "o.onnx")

    def test_an_empty_name(self, tiny: Path) -> None:
        refused("is a folder", "prune", tiny, *RATIO, "-o", "")

    def test_the_other_commands(self, tiny: Path) -> None:
        missing = tiny.parent / "missing" / "x"
        refused("does not exist", "plan", tiny, *RATIO, "-o", missing)
        refused("does not exist", "inspect", tiny, "--json", missing)
        refused("does not exist", "verify", tiny, tiny, "--json", missing)
        refused("does not exist", "bench", tiny, "--json", missing)
        refused("no example 'mnist'.*digits", "example", "mnist", tiny.parent)
        refused("cannot write example", "example", "digits", tiny)


# -- plans -----------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def first(plan: dict[str, Any]) -> list[list[int]]:
    rows: list[list[int]] = plan["groups"][0]["keep"]
    return rows


PLANS: dict[str, tuple[Change, str]] = {
    "too large": (lambda p: first(p)[0].__setitem__(0, 24), "different positions from 0 to 23"),
    "negative": (lambda p: first(p)[0].__setitem__(0, -1), "different positions from 0 to 23"),
    "twice": (lambda p: first(p)[0].__setitem__(0, first(p)[0][1]), "different positions"),
    "fraction": (lambda p: first(p)[0].__setitem__(0, 1.0), "different positions"),
    "truth": (lambda p: first(p)[0].__setitem__(0, True), "different positions"),
    "text": (lambda p: first(p)[0].__setitem__(0, "1"), "different positions"),
    "empty rows": (lambda p: p["groups"][0].update(keep=[[]] * 4), "at least one"),
    "unequal rows": (lambda p: first(p)[2].pop(), "every block must keep the same number"),
    "row missing": (lambda p: first(p).pop(), 'needs 4 lists in "keep"'),
    "row too many": (lambda p: first(p).append(first(p)[0]), 'needs 4 lists in "keep"'),
    "no lists": (lambda p: p["groups"][0].update(keep=[1, 2, 3, 4]), 'needs 4 lists in "keep"'),
    "no keep": (lambda p: p["groups"][0].pop("keep"), 'needs 4 lists in "keep"'),
    "unknown group": (lambda p: p["groups"][0].update(id="blocks.9.attn.qk"), r"unknown group.*blocks\.9"),
    "list as id": (lambda p: p["groups"][0].update(id=[1]), "unknown group"),
    "group of text": (lambda p: p.update(groups=["blocks.0.attn.qk"]), "unknown group"),
    "group twice": (lambda p: p["groups"].append(p["groups"][0]), "listed twice"),
    "pinned group": (lambda p: p["groups"][0].update(id="head.other"), "head.other is pinned"),
    "groups a number": (lambda p: p.update(groups=5), "groups"),
    "no groups": (lambda p: p.pop("groups"), "groups"),
    "options a list": (lambda p: p.update(options=[]), "options"),
    "another model": (lambda p: p.update(digest="0" * 64), "another model.*make a new plan"),
    "no digest": (lambda p: p.pop("digest"), "another model"),
    "another version": (lambda p: p.update(snpc_plan=99), "not a snpc plan"),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    invoke("plan", VIT, *RATIO, "--roles", "qk", "-o", path)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


class TestPlans:
    @pytest.mark.parametrize("case", PLANS)
    def test_edited(self, case: str, plan: dict[str, Any], tmp_path: Path, nothing_changes: Callable[[], None]) -> None:
        change, words = PLANS[case]
        edited_plan = json.loads(json.dumps(plan))
        change(edited_plan)
        file = tmp_path / "edited.json"
        file.write_text(json.dumps(edited_plan))
        nothing_changes()
        refused(f"edited.json: .*{words}", "apply", VIT, file, "-o", tmp_path / "out.onnx")

    @pytest.mark.parametrize(
        "text, words",
        [("{", "not JSON"), ("", "not JSON"), ("[]", "not a snpc plan"), ("null", "not a snpc plan"),
         ("[" * 100_000, "nested"), ('{"snpc_plan": 1}', "another model")],
        ids=["brace", "empty", "list", "null", "deep", "bare"],
    )  # fmt: skip
    def test_no_plan(self, text: str, words: str, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_text(text)
        refused(words, "apply", VIT, tmp_path / "p.json", "-o", tmp_path / "out.onnx")

    def test_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_bytes(b"\xff\xfe{")
        for path in (tmp_path / "p.json", tmp_path, tmp_path / "none.json", VIT):
            refused("cannot be read", "apply", VIT, path, "-o", tmp_path / "out.onnx")
            refused("cannot be read", "verify", VIT, VIT, "--plan", path)

    def test_of_another_model(self, tiny: Path, nothing_changes: Callable[[], None]) -> None:
        invoke("plan", tiny, *RATIO)
        nothing_changes()
        plan = tiny.with_name("tiny.plan.json")
        target = ("-o", tiny.parent / "out.onnx")
        refused(r"made for another model \(tiny\.onnx.*not for digits_vit\.onnx", "apply", VIT, plan, *target)
        refused("made for another model", "verify", VIT, VIT, "--plan", plan)


# -- requests that no one means --------------------------------------------------------------------------------------


class TestAbsurdRequests:
    @pytest.mark.parametrize("blocks", ["0-99999999999", "0-" + "9" * 5000, "7"])
    def test_blocks_that_the_model_does_not_have(self, blocks: str) -> None:
        refused("--tokens: not after block [79]+ of 4; it is possible after 1, 2, 3", "prune", VIT, *RATIO, "--tokens",
                f"merge:4@{blocks}")  # fmt: skip

    @pytest.mark.parametrize("size", ["²", "0", "-1", "9" * 5000])
    def test_sizes_of_dimensions(self, size: str, tiny: Path) -> None:
        refused("--dim-param 'n=.*must look like batch=1", "inspect", tiny, "--dim-param", f"n={size}")

    @pytest.mark.parametrize("size", ["9" * 400 + "T", "9" * 40, "0", "2 XB"])
    def test_sizes_in_bytes(self, size: str, tiny: Path) -> None:
        refused("is no size in bytes", "prune", tiny, *RATIO, "--memory-limit", size)

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ('"snpc_plan": 1', '"snpc_plan": ' + "1" * 5000, "not a snpc plan .*4300 digits"),
            ("magnitude", r"\ud800", "half of a surrogate pair"),
        ],
    )
    def test_plans_that_are_no_text(self, old: str, new: str, words: str, tiny: Path, tmp_path: Path) -> None:
        plan = tmp_path / "p.json"
        invoke("plan", tiny, *RATIO, "-o", plan)
        plan.write_text(plan.read_text().replace(old, new))
        refused(words, "apply", tiny, plan)

    def test_pipes_for_files(self, tiny: Path, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        refused("not a file", "inspect", pipe)
        refused("cannot be read .not a file.", "apply", tiny, pipe)
        refused("not a regular file", "prune", tiny, *RATIO, "--load-stats", pipe)

    def test_names_that_are_not_utf8(self, tiny: Path) -> None:
        odd = tiny.with_name(os.fsdecode(b"a\xff.onnx"))
        tiny.rename(odd)
        refused(r"a\\udcff\.onnx: its name is not UTF-8", "inspect", odd)

    def test_files_that_may_not_be_read(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", denied)
        refused(r"tiny\.onnx: cannot be read \(Permission denied\)", "inspect", tiny)
        monkeypatch.setattr(Path, "is_file", denied)
        refused(r"tiny\.onnx: cannot be read \(Permission denied\)", "inspect", tiny)
