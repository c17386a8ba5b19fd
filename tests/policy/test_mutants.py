"""Damaged models (see mutants.py): done, or refused in one line, with nothing left behind. A few of the many."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
from onnx import helper

from tests.command_line import VIT, invoke
from tests.models.mutants import MODES, trial
from tests.models.mutations import BASES, mutant

COUNT, SHARES = 500, 10


@pytest.mark.parametrize("base", range(len(BASES)))
@pytest.mark.slow
def test_whole_models_are_pruned(base: int, tmp_path: Path) -> None:
    """Otherwise the damaged ones would prove little."""
    path = tmp_path / "model.onnx"
    onnx.save(BASES[base], path)
    roles = ("--roles", "qk,vo,ffn,conv")
    invoke("prune", path, "--ratio", 0.5, "--method", "select", "--criterion", "magnitude", *roles)


@pytest.mark.parametrize("first", range(SHARES))
@pytest.mark.slow
def test_damaged_models(first: int, tmp_path: Path) -> None:
    complaints = []
    for seed in range(first, COUNT, SHARES):
        path, done = mutant(seed, tmp_path / "inner" / str(seed))
        complaints += [f"{seed} ({done}) {words}" for words in trial(path, MODES[seed % len(MODES)])]
    assert not complaints


# -- what the search found, one test per cause ------------------------------------------------------------------------


def saved(path: Path, change: object, base: int = 0) -> Path:
    model = onnx.ModelProto()
    model.CopyFrom(BASES[base])
    change(model)  # type: ignore[operator]
    onnx.save(model, path)
    return path


def refusal(path: Path, *verb: object) -> str:
    result = invoke(*(verb or ("inspect",)), path, code=2)
    (line,) = result.stderr.splitlines()
    return line


def test_the_reason_is_the_innermost_one(tmp_path: Path) -> None:
    def twice(model: onnx.ModelProto) -> None:
        model.graph.node[1].output[0] = model.graph.node[0].output[0]

    line = refusal(saved(tmp_path / "m.onnx", twice))
    assert "malformed" in line
    assert "Error calling" not in line


def test_a_name_with_a_line_break_stays_one_line(tmp_path: Path) -> None:
    def broken(model: onnx.ModelProto) -> None:
        model.graph.node[0].input[0] = "x\ny"

    assert "reads x y, which no node produces" in refusal(saved(tmp_path / "m.onnx", broken))


def test_data_outside_the_folder_of_a_constant_node(tmp_path: Path) -> None:
    """Weights may lie in attributes and subgraphs too."""

    def outside(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="../secret")
        model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))

    assert "outside its folder" in refusal(saved(tmp_path / "m.onnx", outside))


def test_data_of_a_constant_node_beside_the_model(tmp_path: Path) -> None:
    """What onnx writes with ``convert_attribute``."""
    text = "c (float[N, 8] x) => (float[N, 8] y) { w = Constant() h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    weight, rng = onnx.numpy_helper, __import__("numpy").random.default_rng(0)
    model.graph.node[0].attribute.append(
        helper.make_attribute("value", weight.from_array(rng.normal(size=(8, 64)).astype("f4"), "w"))
    )
    model.graph.initializer.append(weight.from_array(rng.normal(size=(64, 8)).astype("f4"), "v"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
    folder = Path.cwd()
    assert folder != tmp_path
    invoke("prune", path, "--ratio", 0.5, "-o", tmp_path / "out.onnx")


def test_sparse_weights_are_refused_by_name(tmp_path: Path) -> None:
    def sparse(model: onnx.ModelProto) -> None:
        values = helper.make_tensor("thin", 1, [1], [1.0])
        indices = helper.make_tensor("places", 7, [1], [3])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))

    assert "thin is a sparse weight" in refusal(saved(tmp_path / "m.onnx", sparse))


def test_text_constants_are_no_weights(tmp_path: Path) -> None:
    def labelled(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(helper.make_tensor("words", 8, [2], [b"yes", b"no"]))
        model.graph.node.append(helper.make_node("Identity", ["words"], ["classes"]))
        model.graph.output.append(helper.make_tensor_value_info("classes", 8, [2]))

    path = saved(tmp_path / "m.onnx", labelled, base=1)
    assert "358 parameters" in invoke("inspect", path).stdout


def test_an_input_too_large_to_draw_asks_for_data(tmp_path: Path) -> None:
    def wide(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 33

    path = saved(tmp_path / "m.onnx", wide)
    result = invoke("prune", path, "--ratio", 0.5, code=2)
    assert "too large for random values" in result.stderr


@pytest.mark.parametrize("number", [0, -1, 4, 5, 1 << 33])
def test_groups_that_do_not_divide_the_channels_are_refused(number: int, tmp_path: Path) -> None:
    def grouped(model: onnx.ModelProto) -> None:
        convolution = [node for node in model.graph.node if node.op_type == "Conv"][1]
        next(a for a in convolution.attribute if a.name == "group").i = number

    assert not trial(saved(tmp_path / "model.onnx", grouped, base=1))


@pytest.mark.parametrize("operator", ["Sum", "Concat"])
@pytest.mark.parametrize("distinct", [False, True])
def test_a_node_of_thousands_of_inputs_takes_seconds(operator: str, distinct: bool, tmp_path: Path) -> None:
    def crowded(model: onnx.ModelProto) -> None:
        names = [f"y_{k}" if distinct else "y" for k in range(1000)]
        model.graph.node.extend(helper.make_node("Neg", ["y"], [name]) for name in dict.fromkeys(names) if distinct)
        attributes = {"axis": -1} if operator == "Concat" else {}
        model.graph.node.append(helper.make_node(operator, names, ["crowd"], **attributes))
        model.graph.output.append(helper.make_tensor_value_info("crowd", 1, None))

    started = time.process_time()
    assert not trial(saved(tmp_path / "model.onnx", crowded, base=1))
    assert time.process_time() - started < 20


# -- operands that contradict each other ------------------------------------------------------------------------------

ATTENTIONS = [BASES.index(base) for base in BASES if any("Attention" in node.op_type for node in base.graph.node)]


@pytest.mark.parametrize("base", ATTENTIONS)
@pytest.mark.parametrize(
    "name, content",
    [
        ("num_heads", 0), ("num_heads", 7), ("num_heads", [4]), ("q_num_heads", 0),
        ("qkv_hidden_sizes", [24, 24]), ("qkv_hidden_sizes", [1, 2, 3]),
    ],
)  # fmt: skip
def test_attention_nodes_whose_numbers_make_no_sense(base: int, name: str, content: object, tmp_path: Path) -> None:
    def changed(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "Attention" in node.op_type)
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute(name, content))

    assert not trial(saved(tmp_path / "model.onnx", changed, base))


@pytest.mark.parametrize("base", ATTENTIONS)
def test_weights_of_attention_in_the_wrong_places(base: int, tmp_path: Path) -> None:
    def swapped(model: onnx.ModelProto) -> None:
        weights = {t.name for t in model.graph.initializer if len(t.dims) > 1}
        places = [(node, k) for node in model.graph.node for k, name in enumerate(node.input) if name in weights]
        names = [node.input[k] for node, k in places]
        for (node, k), name in zip(places, names[1:] + names[:1], strict=True):
            node.input[k] = name

    assert not trial(saved(tmp_path / "model.onnx", swapped, base))


def test_a_weight_that_is_an_output_while_curves_are_measured(tmp_path: Path) -> None:
    def shown(model: onnx.ModelProto) -> None:
        table = next(t for t in model.graph.initializer if len(t.dims) > 1)
        model.graph.output.append(onnx.helper.make_tensor_value_info(table.name, table.data_type, list(table.dims)))

    mode = ("--ratio", "0.5", "--calib", "random", "--calib-samples", "4", "--calib-batch", "2")
    assert not trial(saved(tmp_path / "model.onnx", shown, 0), mode)


@pytest.mark.parametrize("seed", [5499, 7184, 20224, 20665, 23104])
def test_mutants_that_were_tracebacks(seed: int, tmp_path: Path) -> None:
    path, _ = mutant(seed, tmp_path / "inner")
    assert not trial(path, MODES[seed % len(MODES)])


@pytest.mark.parametrize("suffix", ["__cut", "__parts", "__rows", "__rows_1_0_1"])
def test_names_that_end_like_those_of_snpc(suffix: str, tmp_path: Path) -> None:
    """Every second value is called like the one before it, with an ending that snpc gives to values of its own."""
    model = onnx.load(VIT)
    kept = {output.name for output in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name not in kept]
    names += [tensor.name for tensor in model.graph.initializer]
    new = {second: first + suffix for first, second in zip(names[::2], names[1::2], strict=False)}
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "m.onnx")
    assert "rewrite: correct" in invoke("prune", tmp_path / "m.onnx", "--ratio", 0.5).stdout
