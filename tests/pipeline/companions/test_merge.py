"""Merged decoders are pruned as two decoders are, and written as one file again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import quantize_dynamic

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.pipeline.companions.merge import BranchCheck
from snpc.runtime.execution import DEFAULT_EXECUTION
from snpc.runtime.io import read_model
from tests.command_line import invoke
from tests.models.decoder_pairs import MERGED, pair_data, pair_paths, write_merged


@pytest.mark.parametrize("caches", [True, False])
def test_a_merged_decoder_is_cut_in_both_branches(caches: bool, tmp_path: Path) -> None:
    source = write_merged(tmp_path / MERGED)
    before = source.read_bytes()
    data = pair_data()
    found = snpc.prune(source, tmp_path / "half.onnx", ratio=0.5, uniform=True, prune_kv_cache=caches, calibration=data)
    assert source.read_bytes() == before
    checks = " ".join(found.verification.structure)
    assert f"{MERGED}: both branches make the outputs of the verified files" in checks
    assert "decoding step by step through the caches equals decoding at once" in checks
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([MERGED, "half.onnx"])
    assert found.after.bytes == found.path.stat().st_size < found.before.bytes == len(before)
    graph = onnx.load(found.path).graph
    assert [node.op_type for node in graph.node] == ["If"]
    assert [value.name for value in graph.input] == [value.name for value in onnx.load(source).graph.input]
    session = ort.InferenceSession(found.path, providers=["CPUExecutionProvider"])
    pasts = {spec.name: spec.shape for spec in session.get_inputs() if "past" in spec.name}
    assert {shape[3] for shape in pasts.values()} == ({4} if caches else {8})
    again = snpc.load(found.path)
    assert [spec.name for spec in again.inputs] == [spec.name for spec in snpc.load(pair_paths()[0]).inputs]
    assert again.merged == found.path and len(again.companions) == 1
    empty = {name: np.zeros((16, shape[1], 1, shape[3]), np.float32) for name, shape in pasts.items()}
    (logits,) = session.run(["logits"], {**data, **empty, "use_cache_branch": np.array([False])})
    (expected,) = ort.InferenceSession(again.path, providers=["CPUExecutionProvider"]).run(["logits"], data)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_quantized_merged_decoder_is_cut_as_it_is_stored(tmp_path: Path) -> None:
    """Its states are quantized in front of the branches, for the one that reads them."""
    source = tmp_path / "decoder_model_merged_quantized.onnx"
    quantize_dynamic(write_merged(tmp_path / MERGED), source, extra_options={"EnableSubgraph": True})
    assert [node.op_type for node in onnx.load(source).graph.node] == ["DynamicQuantizeLinear", "If"]
    found = snpc.prune(source, tmp_path / "half.onnx", ratio=0.5, uniform=True, method="select", criterion="magnitude")
    assert found.after.bytes < 0.8 * found.before.bytes
    checks = " ".join(found.verification.structure)
    assert "_with_past.onnx: sliced equals masked to 0.0e+00" in checks
    assert f"{source.name}: both branches make the outputs of the verified files" in checks
    branches = [attribute.g for node in onnx.load(found.path).graph.node for attribute in node.attribute]
    assert all("MatMulInteger" in {node.op_type for node in branch.node} for branch in branches)
    weights = {tuple(t.dims) for t in onnx.load(found.path).graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert (24, 16) in weights and (24, 32) not in weights, "the hidden layers' own weights"


def test_a_model_in_memory_comes_back_merged(tmp_path: Path) -> None:
    model = onnx.load(write_merged(tmp_path / MERGED, cross=False))
    found = snpc.prune(model, ratio=0.5, method="select", criterion="magnitude").model
    assert isinstance(found, onnx.ModelProto)
    assert [node.op_type for node in found.graph.node] == ["If"]
    assert found.ByteSize() < model.ByteSize()


def test_commands_take_merged_decoders(tmp_path: Path) -> None:
    source = write_merged(tmp_path / MERGED, cross=False)
    options = ("--ratio", 0.5, "--method", "select", "--criterion", "magnitude")
    invoke("prune", source, *options, "-o", tmp_path / "half.onnx")
    assert "ffn" in invoke("inspect", source).stdout
    verified = invoke("verify", source, tmp_path / "half.onnx")
    assert "decoding step by step" in " ".join(verified.stdout.split())


def test_commands_for_one_graph_refuse_two(tmp_path: Path) -> None:
    source = write_merged(tmp_path / MERGED, cross=False)
    for verb in (lambda: snpc.build(source, "ort", tmp_path / "x.onnx"), lambda: snpc.dequantize(source)):
        with pytest.raises(UserError, match="holds two decoders as branches"):
            verb()


def test_a_branch_that_makes_other_outputs_is_found(tmp_path: Path) -> None:
    """The second decoder has other weights than the branch."""
    source, (first, second) = write_merged(tmp_path / MERGED), pair_paths()
    model = onnx.load(second)
    weight = next(tensor for tensor in model.graph.initializer if tensor.dims == [24, 40])
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(model, tmp_path / "second.onnx")
    inputs = list(read_model(source).graph.inputs)
    right = BranchCheck(source, inputs, snpc.load(first), snpc.load(second))
    assert right.run(DEFAULT_EXECUTION) == "both branches make the outputs of the verified files"
    wrong = BranchCheck(source, inputs, snpc.load(first), snpc.load(tmp_path / "second.onnx"))
    with pytest.raises(CheckFailed, match="its branch with a past makes another logits than its file"):
        wrong.run(DEFAULT_EXECUTION)
