"""``snpc.dequantize`` and ``--dequantize``: the float model is written, compared, and pruned as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import snpc
from snpc.passes.quantization.dequantize import quantized_operators
from tests.command_line import VIT, invoke
from tests.models.exports import export, load_feeds
from tests.models.quantized import FORMS


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    path = tmp_path / "q.onnx"
    FORMS["int4_blocks_and_table"](export("llama__dyn20"), path, {})
    return path


def test_the_model_lives_in_a_temporary_file_without_a_path(quantized: Path, tmp_path: Path) -> None:
    before = quantized.read_bytes()
    model = snpc.dequantize(quantized)
    assert model.path != quantized
    assert model.source == quantized
    assert snpc.load(snpc.dequantize(quantized, tmp_path / "float.onnx").path).digest == model.digest
    assert quantized.read_bytes() == before
    folder = model.path.parent
    del model
    assert not folder.exists()


def test_what_was_done_is_recorded(quantized: Path) -> None:
    record = snpc.dequantize(quantized).dequantization
    assert record is not None
    assert record.replaced == {"MatMulNBits": 15, "GatherBlockQuantized": 1}
    assert record.compared == "random inputs"
    assert [d.output for d in record.differences] == ["logits"]
    assert max(d.relative for d in record.differences) < 1e-5


def test_it_is_compared_on_the_data(quantized: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **load_feeds("llama__dyn20"))
    data = snpc.load_calibration(tmp_path / "data.npz", snpc.load(quantized).inputs)
    record = snpc.dequantize(quantized, calibration=data).dequantization
    assert record is not None
    assert "data.npz" in record.compared


def test_external_weights_stay_external(quantized: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(quantized), outside, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    model = snpc.dequantize(outside, tmp_path / "float.onnx")
    assert model.external
    assert model.dequantization is not None
    assert max(d.relative for d in model.dequantization.differences) < 1e-5


def test_models_in_memory(quantized: Path) -> None:
    result = snpc.prune(onnx.load(quantized), ratio=0.3, method="select", criterion="magnitude", dequantize=True)
    assert isinstance(result.model, onnx.ModelProto)
    assert result.after.params < 0.85 * result.before.params


def test_the_model_of_a_folder(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    quantized.rename(folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    written = snpc.prune_folder(
        folder, tmp_path / "out", ratio=0.3, method="select", criterion="magnitude", dequantize=True
    )
    assert not quantized_operators(snpc.load(written.path / "model.onnx").graph)
    assert (written.path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("form", ["dynamic", "qdq_per_channel", "qdq_optimized", "operators", "uint4_blocks"])
def test_every_form_is_cut_as_its_float_model_is(form: str, tmp_path: Path) -> None:
    """Sliced equals masked is checked by the prune itself."""
    source, amount = export("llama__dyn20"), {"ratio": 0.3, "method": "select", "criterion": "random", "uniform": True}
    FORMS[form](source, tmp_path / "q.onnx", load_feeds("llama__dyn20"))
    made = snpc.prune(tmp_path / "q.onnx", tmp_path / "a.onnx", dequantize=True, **amount)  # type: ignore[arg-type]
    dense = snpc.prune(source, tmp_path / "b.onnx", **amount)  # type: ignore[arg-type]
    assert made.verification.equals_mask
    assert made.after.macs == dense.after.macs < dense.before.macs
    widths, expected = (
        sorted((g.role, g.size, result.plan.kept_width(g)) for g in result.plan.analysis.groups)
        for result in (made, dense)
    )
    assert widths == expected


def test_a_weight_that_the_graph_quantizes_is_taken_as_it_is_stored(tmp_path: Path) -> None:
    """As quantization-aware training exports it."""
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"]),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    held = {"w": weight, "s": np.asarray(0.02, np.float32), "z": np.asarray(0, np.int8)}
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, k]) for n, k in (("x", 8), ("y", 4))]
    constants = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    (value,) = snpc.dequantize(tmp_path / "m.onnx").graph.graph.initializers.values()
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), weight)


def test_float_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(snpc.UserError, match="nothing in it is quantized"):
        snpc.dequantize(VIT)
    assert "nothing in it is quantized" in invoke("prune", VIT, "--dequantize", "--ratio", 0.3, code=2).stderr


def test_what_no_rule_knows_is_said(quantized: Path, tmp_path: Path) -> None:
    """A second product, of random weights packed in a way that no rule knows."""
    model = onnx.load(quantized)
    (node,) = [n for n in model.graph.node if n.op_type == "MatMulNBits"][-1:]
    node.attribute.append(helper.make_attribute("weight_prepacked", 1))
    onnx.save(model, tmp_path / "other.onnx")
    record = snpc.dequantize(tmp_path / "other.onnx").dequantization
    assert record is not None
    assert record.left == {"MatMulNBits": 1}
    shown = invoke("inspect", tmp_path / "other.onnx", "--dequantize").stdout
    assert "left quantized, as no rule fits: 1 MatMulNBits" in shown


def test_damaged_scales_are_refused_in_one_line(quantized: Path, tmp_path: Path) -> None:
    model = onnx.load(quantized)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    scales = next(t for t in model.graph.initializer if t.name == node.input[2])
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales).reshape(-1)[:-1].copy(), scales.name))
    onnx.save(model, tmp_path / "m.onnx")
    said = invoke("dequantize", tmp_path / "m.onnx", "-o", tmp_path / "float.onnx", code=2).stderr
    assert "do not fit a weight of shape" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "float.onnx").exists()


def test_branches_are_not_looked_into(tmp_path: Path) -> None:
    """As in the merged decoders of optimum: with and without a cache."""
    out = [helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [2])]
    read = helper.make_node("DequantizeLinear", ["q", "s"], ["f"])
    branch = helper.make_graph([read], "branch", [], out)
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    held = [
        numpy_helper.from_array(np.ones(2, np.int8), "q"),
        numpy_helper.from_array(np.asarray(0.5, np.float32), "s"),
    ]
    graph = helper.make_graph([node], "g", [flag], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(snpc.UserError, match="no rule fits its 2 DequantizeLinear; loops and branches are not looked"):
        snpc.dequantize(tmp_path / "m.onnx")


def test_the_command_writes_the_float_model(quantized: Path, tmp_path: Path) -> None:
    output = tmp_path / "float.onnx"
    shown = invoke("dequantize", quantized, "-o", output, "--json", tmp_path / "r.json").stdout
    assert "dequantized q.onnx: 15 MatMulNBits, 1 GatherBlockQuantized became float" in shown
    assert json.loads((tmp_path / "r.json").read_text())["replaced"]["MatMulNBits"] == 15
    assert not quantized_operators(snpc.load(output).graph)
    assert "is the input itself" in invoke("dequantize", quantized, "-o", quantized, code=2).stderr


def test_prune_plan_and_apply_agree(quantized: Path, tmp_path: Path) -> None:
    """One step and two give the file that pruning the written float model gives, but for what it says of its source."""
    amount = ("--ratio", 0.3, "--method", "select", "--criterion", "magnitude")
    report = invoke("prune", quantized, "--dequantize", *amount, "-o", tmp_path / "a.onnx", "--json", "-").stdout
    invoke("plan", quantized, "--dequantize", *amount, "-o", tmp_path / "p.json")
    invoke("apply", quantized, tmp_path / "p.json", "--dequantize", "-o", tmp_path / "b.onnx")
    invoke("dequantize", quantized, "-o", tmp_path / "float.onnx")
    invoke("prune", tmp_path / "float.onnx", *amount, "-o", tmp_path / "c.onnx")
    written = [onnx.load(tmp_path / f"{name}.onnx") for name in "abc"]
    for model in written:
        model.ClearField("metadata_props")
    assert written[0] == written[1] == written[2]
    found = json.loads(report)
    assert found["model"] == str(quantized)
    assert found["dequantized"]["replaced"] == {"MatMulNBits": 15, "GatherBlockQuantized": 1}
    assert found["params"]["after"] < 0.85 * found["params"]["before"]
