"""Attention becomes one kernel of TensorRT: what engines say, and that outputs stay."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import snpc
from snpc.passes.pass_list import ENGINE_PASSES
from snpc.targets.base import BuildOptions
from snpc.targets.engines.attention_kernels import attention_kernels, kernel_notes, whole_attentions
from tests.passes.text_graphs import text_model

LAYERS = """Layers:
Name: /q/MatMul_myl0_0, LayerType: gemm, Inputs: [ { Name: x } ], StreamId: 0, Metadata: [ONNX Layer: /q/MatMul]
Name: _gemm_mha_v2_myl0_4, LayerType: kgen, TacticName: 0x1, Metadata: [ONNX Layer: /MatMul_1][ONNX Layer: /Softmax]
Name: __myl_MaxrSub_myl0_5, LayerType: kgen, TacticName: 0x2, Metadata: [ONNX Layer: /Softmax_1]
"""


def test_the_layers_of_an_engine_tell_which_attention_is_one_kernel() -> None:
    names = ("/Softmax", "/Softmax_1")
    after = whole_attentions(LAYERS, names)
    assert after == {"/Softmax"}
    assert whole_attentions("Bindings: x", names) is None
    kernels = attention_kernels(names, after, frozenset())
    assert [(k.one_kernel, k.one_kernel_before) for k in kernels] == [(True, False), (False, False)]
    assert kernel_notes(kernels, "fp16") == (
        "attention: one kernel in 1 of 2 places, 0 of 2 before it was rewritten",
        "attention: not one kernel: /Softmax_1",
    )
    assert "fp16" in kernel_notes(kernels, "fp32")[1]
    assert attention_kernels(names, None, None) == () == kernel_notes((), "fp16")


@pytest.mark.slow
def test_pruned_attention_becomes_one_kernel_in_half_precision(digits: Path, tmp_path: Path) -> None:
    """Widths of keys and values were cut apart, which TensorRT has no kernel for; zeros bring it back."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'snpc[trt-rtx]'")
    options = BuildOptions(sm=(86,))
    built = snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / "a.engine", precision="fp16", options=options)
    assert [k.one_kernel for k in built.attentions] == [True] * 4
    assert not all(k.one_kernel_before for k in built.attentions)
    assert any("differ by" in note for note in built.notes)
    full = snpc.build(digits / "half.onnx", "trt-rtx", tmp_path / "b.engine", options=options)
    assert not any(k.one_kernel for k in full.attentions), "there is no such kernel in fp32"
    assert any("--precision fp16" in note for note in full.notes)


def test_an_attention_node_that_tensorrt_refuses_is_built(tmp_path: Path) -> None:
    """Values narrower than keys, as pruning leaves them."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'snpc[trt-rtx]'")
    text = """m (float[2, 2, 32, 32] q, float[2, 2, 32, 32] k, float[2, 2, 32, 24] v) => (float[2, 2, 32, 24] y) {
        a = Attention (q, k, v)
        y = Relu (a)
    }"""
    onnx.save(text_model(text, {}, version=23), tmp_path / "m.onnx")
    options = BuildOptions(sm=(86,))
    built = snpc.build(tmp_path / "m.onnx", "trt-rtx", tmp_path / "a.engine", precision="fp16", options=options)
    (kernel,) = built.attentions
    assert kernel.one_kernel and kernel.one_kernel_before is None
    assert any("is refused" in note for note in built.notes)


def test_a_rewritten_graph_with_other_outputs_is_not_built(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snpc.targets.engines.attention_kernels.max_relative", lambda differences: 0.5)
    seen: list[str] = []
    execution = snpc.Execution(observer=lambda name, _: seen.append(name))
    options = BuildOptions(emit_script=True)
    built = snpc.build(
        digits / "half.onnx", "trt", tmp_path / "m.onnx", precision="fp16", options=options, execution=execution
    )
    assert seen[-2:] == [entry.name for entry in ENGINE_PASSES]
    assert "attention is left as it is: outputs would differ by 5.0e-01" in built.notes
    kinds = [node.op_type for node in onnx.load(built.path).graph.node]
    assert kinds.count("Mul") + kinds.count("Div") > 0
