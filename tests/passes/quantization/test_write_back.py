"""Quantized files in, quantized files out. The oracle: the stored file with the codes of dropped units at their zero
points, everything else as it is, says what the written file says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic

import snpc
from snpc.ops import Layout, QuantizedArray, write_stored
from snpc.passes.analyze import Analysis
from snpc.planning import cuts_of
from tests.models.experts import fused_model, quantized_experts
from tests.models.exports import export, load_feeds
from tests.models.optimizer_forms import fused_encoder
from tests.models.quantized import FORMS, statically
from tests.oracle import run
from tests.patching import patch
from tests.quantized_oracle import relative, silenced

Array = npt.NDArray[Any]
MODEL = "llama__dyn20"
BLOCK = 32
BY_BLOCKS = sorted(name for name in FORMS if "blocks" in name)
BY_TENSOR = sorted(set(FORMS) - set(BY_BLOCKS))
SELECT: dict[str, Any] = {"method": "select", "criterion": "random"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The forms of one model, written when they are asked for."""
    folder = tmp_path_factory.mktemp("quantized")

    class Files(dict[str, Path]):
        def __missing__(self, form: str) -> Path:
            self[form] = folder / f"{form}.onnx"
            FORMS[form](export(MODEL), self[form], load_feeds(MODEL))
            return self[form]

    return Files()


# -- the oracle ------------------------------------------------------------------------------------------------------


def whole_blocks_plan(analysis: Analysis) -> snpc.PruningPlan:
    """A plan that takes whole blocks of hidden layers, and any pairs of queries and keys."""
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.3, roles=("qk", "ffn")), **SELECT)
    ffn = {g.id: (tuple(k for k in range(g.size) if k // BLOCK != 1),) for g in analysis.groups if g.role == "ffn"}
    return replace(plan, slices=replace(plan.slices, keep={**plan.slices.keep, **ffn}))


@pytest.mark.parametrize("form", ["uint4_blocks", "int4_blocks_pairs"])
def test_pieces_of_blocks_keep_their_codes_in_smaller_blocks(
    form: str, files: Mapping[str, Path], tmp_path: Path
) -> None:
    """Each new block has the scale of the one around it, where no new block holds parts of two."""
    plan = whole_blocks_plan(snpc.analyze(snpc.load(files[form])))
    pieces = {name: tuple(k for k in range(max(*kept[0], 63) + 1) if k // 16 % 3 != 1)
              for name, kept in plan.slices.keep.items() if name.startswith("ffn")}  # fmt: skip
    keep = {**plan.slices.keep, **{name: (kept,) for name, kept in pieces.items()}}
    result, error = apply_and_silence(files[form], replace(plan, slices=replace(plan.slices, keep=keep)), tmp_path)
    assert result.verification.requantization is not None
    assert result.verification.requantization.requantized == 0
    assert error < 1e-6
    blocks = Counter(a.i for n in onnx.load(result.path).graph.node for a in n.attribute if a.name == "block_size")
    assert set(blocks) == {16, 32}
    assert blocks[16] == len(pieces)


def apply_and_silence(path: Path, plan: snpc.PruningPlan, folder: Path) -> tuple[snpc.PrunedModel, float]:
    """The result, and how far its outputs are from those of the silenced file."""
    result = snpc.apply(plan, folder / "pruned.onnx")
    masked = silenced(path, plan.analysis, plan.slices, folder / "masked.onnx")
    feeds = load_feeds(MODEL)
    pruned, expected, dense = (run(file, feeds)[0] for file in (result.path, masked, path))
    assert relative(pruned, dense) > 1e-2
    return result, relative(pruned, expected)


@pytest.mark.parametrize("form", BY_TENSOR)
def test_any_units_are_cut_bit_for_bit(form: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    plan = snpc.plan(snpc.analyze(snpc.load(files[form])), snpc.Budget(ratio=0.3), **SELECT)
    result, error = apply_and_silence(files[form], plan, tmp_path)
    assert result.verification.requantization is not None
    assert result.verification.requantization.requantized == 0
    assert error < 1e-6
    assert result.after.bytes < result.before.bytes
    assert result.after.quantized_params / result.after.params > 0.85


@pytest.mark.parametrize("form", BY_BLOCKS)
def test_whole_blocks_are_cut_bit_for_bit(form: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    plan = whole_blocks_plan(snpc.analyze(snpc.load(files[form])))
    result, error = apply_and_silence(files[form], plan, tmp_path)
    assert result.verification.requantization is not None
    assert result.verification.requantization.requantized == 0
    assert error < 1e-6
    assert result.after.bytes < result.before.bytes


EXPERTS = {"rows": ("swiglu", 4, 0, False), "blocks": ("silu", 4, 16, True), "two_bits": ("relu", 2, 0, True)}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_cut_as_their_float_model(name: str, tmp_path: Path) -> None:
    """Hidden units, in blocks whole blocks, and whole experts: codes are the file's, the result that of the float model
    that is cut alike."""
    activation, bits, block, zero_points = EXPERTS[name]
    model = quantized_experts(fused_model(activation, width=32, hidden=64), bits, block, zero_points)
    onnx.save(model, tmp_path / "q.onnx")
    analysis = snpc.analyze(snpc.load(tmp_path / "q.onnx"))
    as_float = snpc.analyze(snpc.dequantize(tmp_path / "q.onnx", tmp_path / "float.onnx"))
    feeds = {"x": np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)}
    assert relative(run(tmp_path / "q.onnx", feeds)[0], run(tmp_path / "float.onnx", feeds)[0]) < 1e-6
    (hidden,) = (g for g in analysis.groups if g.size == 64)
    (experts,) = (g for g in analysis.groups if g.role == "experts")
    assert hidden.step == (block or 8 // bits)
    kept = np.arange(64)[np.arange(64) // 16 != 1] if block else np.arange(0, 64, 2)
    keep = {hidden.id: (tuple(map(int, kept)),), experts.id: ((0, 2, 3, 5),)}
    results = []
    for source, target in ((analysis, "cut.onnx"), (as_float, "float_cut.onnx")):
        plan = snpc.plan(source, snpc.Budget(ratio=0.5, roles=("ffn", "experts")), **SELECT)
        plan = replace(plan, slices=replace(plan.slices, keep=keep))
        results.append(snpc.apply(plan, tmp_path / target))
    record = results[0].verification.requantization
    assert record is not None and (record.sliced, record.requantized) == (2, 0)
    cut, expected, dense = (run(path, feeds)[0] for path in (*(r.path for r in results), tmp_path / "q.onnx"))
    assert relative(cut, expected) < 1e-6
    assert relative(cut, dense) > 1e-2
    assert results[0].after.params == results[1].after.params
    assert results[0].after.quantized_params < results[0].before.quantized_params


def test_experts_that_may_be_laid_out_for_a_device_stay(tmp_path: Path) -> None:
    """Files for CUDA in half precision hold other bytes in the same shapes, and need not say so."""
    model = quantized_experts(fused_model("relu", width=32, hidden=64), 4)
    (node,) = (n for n in model.graph.node if n.op_type == "QMoE")
    for layout, found in ((None, True), (0, True), (1, False)):
        if layout is not None:
            node.attribute.append(onnx.helper.make_attribute("weights_prepacked", layout))
        onnx.save(model, tmp_path / "q.onnx")
        analysis = snpc.analyze(snpc.load(tmp_path / "q.onnx"))
        assert any(g.role == "experts" and g.prunable for g in analysis.groups) == found
        if layout is not None:
            node.attribute.pop()


def test_fused_attention_keeps_one_width(tmp_path: Path) -> None:
    """QAttention reads queries, keys and values as three equal parts of its columns; each loses channels of its own."""
    encoder, path = fused_encoder(17), tmp_path / "q.onnx"
    onnx.save(encoder.model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", path, per_channel=True, extra_options={"DefaultTensorType": 1})
    analysis = snpc.analyze(snpc.load(path))
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.4), **SELECT)
    widths = {g.id: plan.slices.kept_width(g) for g in analysis.groups}
    assert widths["qk.0"] == widths["vo.0"] < 8
    assert plan.slices.keep["qk.0"] != plan.slices.keep["vo.0"]
    result = snpc.apply(plan, tmp_path / "cut.onnx")
    masked = silenced(path, analysis, plan.slices, tmp_path / "masked.onnx")
    cut, expected, dense = (run(file, encoder.feeds)[0] for file in (result.path, masked, path))
    assert relative(cut, expected) < 1e-6
    assert relative(cut, dense) > 1e-2
    record = result.verification.requantization
    assert record is not None and record.requantized == 0
    counts = [Counter(n.op_type for n in onnx.load(p).graph.node) for p in (path, result.path)]
    assert counts[0] == counts[1] and counts[1]["QAttention"] == 2
    with pytest.raises(snpc.UserError, match="is as wide as"):
        snpc.plan(analysis, snpc.Budget(ratio=0.4, roles=("vo",)), **SELECT)


# -- refitted weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    np.savez(path, **load_feeds(MODEL))
    return path


REFITTED = ["dynamic", "operators", "qdq_per_channel", "qdq_optimized", "uint4_blocks", "int4_blocks_pairs"]


@pytest.mark.parametrize("form", REFITTED)
def test_refitted_weights_are_quantized_in_the_same_scheme(
    form: str, files: Mapping[str, Path], data: Path, tmp_path: Path
) -> None:
    result = snpc.prune(files[form], tmp_path / "out.onnx", calibration=data, ratio=0.3)
    selected = snpc.prune(files[form], tmp_path / "selected.onnx", calibration=data, ratio=0.3, **SELECT)
    assert result.quality.drift < 0.5 * selected.quality.drift
    record = result.verification.requantization
    assert record is not None
    assert record.sliced > 0 < record.requantized
    assert 0 < record.relative < 0.2
    before, after = (onnx.load(path) for path in (files[form], result.path))
    assert stored_types(after) == stored_types(before)
    counts = [Counter(n.op_type for n in model.graph.node if "Mat" in n.op_type) for model in (before, after)]
    assert counts[0] == counts[1]
    blocks = [
        {(a.name, a.i) for n in m.graph.node for a in n.attribute if a.name == "block_size"} for m in (before, after)
    ]
    assert blocks[0] == blocks[1]


def stored_types(model: onnx.ModelProto) -> dict[str, int]:
    """Type of each weight, by name."""
    return {t.name: t.data_type for t in model.graph.initializer if len(t.dims) > 1}


def test_weights_that_are_only_sliced_keep_their_codes(files: Mapping[str, Path], data: Path, tmp_path: Path) -> None:
    """Of a refitted feed-forward layer these are the ones in front."""
    result = snpc.prune(files["dynamic"], tmp_path / "out.onnx", calibration=data, ratio=0.3, roles=("ffn",))
    form = result.plan.analysis.model.quantized
    assert form is not None
    before, after = ({t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
                     for path in (files["dynamic"], result.path))  # fmt: skip
    produced = [s for g in result.plan.analysis.groups for s in g.sites if g.role == "ffn" and s.kind == "produce"]
    cuts = cuts_of(result.plan)
    assert len(produced) >= 4
    for site in produced:
        codes = form.constants[site.tensor].parts["codes"]
        kept = before[codes].compress(~cuts[site.tensor, site.axis], site.axis)
        np.testing.assert_array_equal(after[codes], kept)


# -- what can go wrong -----------------------------------------------------------------------------------------------


def test_wrong_codes_are_found_out(files: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rolled_codes(layout: Layout, array: QuantizedArray, *rest: Any) -> dict[str, Array]:
        return write_stored(layout, replace(array, codes=np.roll(array.codes, 1, -1)), *rest)

    patch(monkeypatch, "snpc.passes.quantization.cut_constants.write_stored", rolled_codes)
    with pytest.raises(snpc.CheckFailed, match="differs from its masked original"):
        snpc.prune(files["dynamic"], tmp_path / "out.onnx", ratio=0.3, **SELECT)
    assert not (tmp_path / "out.onnx").exists()


# -- other models ----------------------------------------------------------------------------------------------------

OTHERS = ("bert__ts17_sdpa", "vit_timm__ts17", "gpt2__ts17", "bart__ts17")  # packed projections, Gemm, two outputs


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dynamic", "qdq_per_channel", "qdq_optimized", "operators", "uint4_blocks"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str, form: str, tmp_path: Path) -> None:
    FORMS[form](export(name), tmp_path / "q.onnx", load_feeds(name))
    analysis = snpc.analyze(snpc.load(tmp_path / "q.onnx"))
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.3), **SELECT)
    result = snpc.apply(plan, tmp_path / "pruned.onnx")  # sliced equals masked is checked by itself
    dense = snpc.analyze(snpc.load(export(name)))
    assert [(g.role, g.blocks, g.size) for g in analysis.groups] == [(g.role, g.blocks, g.size) for g in dense.groups]
    record = result.verification.requantization
    assert record is not None
    assert form == "uint4_blocks" or record.requantized == 0
    if not record.requantized:
        masked = silenced(tmp_path / "q.onnx", analysis, plan.slices, tmp_path / "masked.onnx")
        feeds = load_feeds(name)
        assert max(map(relative, run(result.path, feeds), run(masked, feeds))) < 1e-6


ALL_OPERATORS: dict[str, Any] = {"op_types_to_quantize": None}
BYTES_ONLY = {**ALL_OPERATORS, "quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8}


@pytest.mark.parametrize("options", [ALL_OPERATORS, BYTES_ONLY], ids=["pairs", "operators"])
def test_packed_projections_among_bytes_are_cut_apart(options: dict[str, Any], tmp_path: Path) -> None:
    """What splits query, key and value works on floats then: movement between them has no codes to move."""
    name, path = "vit_timm__ts17", tmp_path / "q.onnx"
    statically(export(name), path, load_feeds(name), **options)
    analysis = snpc.analyze(snpc.load(path))
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.3), **SELECT)
    assert len({plan.slices.kept_width(g) for g in analysis.groups if g.role in ("qk", "vo")}) > 1
    result = snpc.apply(plan, tmp_path / "pruned.onnx")
    masked = silenced(path, analysis, plan.slices, tmp_path / "masked.onnx")
    assert relative(run(result.path, load_feeds(name))[0], run(masked, load_feeds(name))[0]) < 1e-6
    counts = [Counter(n.op_type for n in onnx.load(p).graph.node if "MatMul" in n.op_type) for p in (path, result.path)]
    assert counts[0] == counts[1]
