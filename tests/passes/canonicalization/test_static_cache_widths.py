"""Caches whose width has a name get the number that fused attention takes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from snpc.cli import main
from snpc.passes.analyze import analyze
from snpc.runtime.io.load import load
from tests.models.builder_decoders import BuilderDecoder
from tests.oracle import prunable

MULTI_HEAD = """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    step (float[B, N, 16] x, float[B, 4, P, D] pk, float[B, 4, P, D] pv)
        => (float[B, N, 16] y, float[B, 4, T, D] nk, float[B, 4, T, D] nv)
    <float[16, 32] wq = {1}, float[16, 32] wk = {1}, float[16, 24] wv = {1}, float[24, 16] wo = {1}> {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, , , , pk, pv)
        y = MatMul(c, wo)
    }"""


@pytest.mark.parametrize("packed", [True, False])
def test_builder_form_has_static_caches(packed: bool, tmp_path: Path) -> None:
    model = load(BuilderDecoder(packed=packed).write(tmp_path / "decoder.onnx"))
    caches = [spec for spec in (*model.inputs, *model.outputs) if len(spec.shape) == 4]
    assert len(caches) == 8
    assert {spec.shape[3] for spec in caches} == {32}
    assert not prunable(analyze(model).groups, "qk", "vo")
    assert any("--prune-kv-cache" in pin.reason for pin in analyze(model).pins)
    assert prunable(analyze(model, prune_kv_cache=True).groups, "qk")


def test_keys_and_values_each_have_their_width(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    proto = parser.parse_model(MULTI_HEAD)
    for tensor, shape in zip(proto.graph.initializer, [(16, 32), (16, 32), (16, 24), (24, 16)], strict=True):
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, 1, shape, [0.5] * (shape[0] * shape[1])))
    onnx.save(proto, path)
    model = load(path)
    shapes = {spec.name: spec.shape for spec in (*model.inputs, *model.outputs)}
    assert [shapes[name][3] for name in ("pk", "nk", "pv", "nv")] == [8, 8, 6, 6]


@pytest.mark.parametrize("options", [(), ("--prune-kv-cache",)])
def test_builder_form_is_pruned_without_data(options: tuple[str, ...], tmp_path: Path) -> None:
    """Random inputs run: a past of the node's width, one sample, a mask of past and new tokens."""
    path, out = BuilderDecoder().write(tmp_path / "decoder.onnx"), tmp_path / "half.onnx"
    done = CliRunner().invoke(main, ["prune", str(path), "--ratio", "0.5", *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "sliced equals masked" in done.output
    widths = {v.type.tensor_type.shape.dim[3].dim_value for v in onnx.load(out).graph.input if "past" in v.name}
    assert widths == {16 if options else 32}
    checked = CliRunner().invoke(main, ["verify", str(path), str(out)])
    assert checked.exit_code == (1 if options else 0), checked.output


def test_rolling_caches_are_not_compared_behind_their_tokens(tmp_path: Path) -> None:
    """A cache as long as the window has rows that no kernel writes; runs need one that is long enough."""
    path, out = BuilderDecoder(window=24, rolling=True).write(tmp_path / "decoder.onnx"), tmp_path / "half.onnx"
    done = CliRunner().invoke(main, ["prune", str(path), "--ratio", "0.5", "--prune-kv-cache", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "not compared: present.0.key" in done.output
    assert "sliced equals masked" in done.output
