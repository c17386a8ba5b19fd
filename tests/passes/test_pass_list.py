"""The list of passes is the one that is run, and its graphs can be dumped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.graph.pass_manager import GraphPass, run_passes
from snpc.passes.canonicalization.canonicalize import CANONICALIZATION_PASSES, canonicalize
from snpc.passes.canonicalization.finalize import FINALIZATION_PASSES, finalize
from snpc.passes.pass_list import ANALYSIS_PASSES, MAX_PRINTED_ELEMENTS, PASS_NAMES, PASSES, DumpAfter, graph_text
from snpc.passes.slicing.rewrite import REWRITE_PASSES, rewrite_model
from snpc.runtime.io.load import load
from tests.models.exports import export


def names(passes: tuple[GraphPass, ...]) -> list[str]:
    return [entry.name for entry in passes]


def test_every_pass_has_a_name_of_its_own_and_says_what_it_does() -> None:
    assert len(set(PASS_NAMES)) == len(PASSES)
    for entry in PASSES:
        assert entry.what and entry.why_here and entry.name == entry.name.lower()


def test_each_stage_runs_what_the_list_says() -> None:
    seen: list[str] = []
    model = load(export("vit_timm__ts17"), lambda name, _: seen.append(name))
    assert seen == names(CANONICALIZATION_PASSES)
    seen.clear()
    analysis = snpc.analyze(model, observer=lambda name, _: seen.append(name))
    assert seen == names(ANALYSIS_PASSES)
    seen.clear()
    site = next(s for g in analysis.groups if g.prunable for s in g.sites)
    cut = {(site.tensor, site.axis): site.units == 0}
    rewritten = rewrite_model(analysis.traced_graph, cut, lambda name, _: seen.append(name))
    assert seen == names(REWRITE_PASSES)
    seen.clear()
    finalize(rewritten.model, lambda name, _: seen.append(name))
    assert seen == names(FINALIZATION_PASSES)


def test_a_canonical_graph_is_not_modified_again() -> None:
    model = load(export("vit_timm__ts17")).graph.clone()
    assert not run_passes(model, CANONICALIZATION_PASSES).modified


def test_what_a_pass_leaves_can_be_dumped(tmp_path: Path) -> None:
    dump = DumpAfter("name-nodes", tmp_path / "dumps")
    load(export("vit_timm__ts17"), dump)
    (path,) = dump.files
    assert path == tmp_path / "dumps" / "01-name-nodes.txt"
    again = onnx.parser.parse_model(path.read_text())
    canonical = load(export("vit_timm__ts17")).graph
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in canonical.graph]
    sizes = [int(np.prod(t.dims)) for t in again.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sizes and max(sizes) <= MAX_PRINTED_ELEMENTS
    every = DumpAfter("all", tmp_path / "every")
    load(export("vit_timm__ts17"), every)
    assert [f.name[3:-4] for f in every.files] == names(CANONICALIZATION_PASSES)


def test_small_constants_are_printed_and_large_ones_are_not() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        agraph (float[N, 2] x) => (float[N, 2] y)
        <float[2] bias = {1.5, -2.25}> { y = Add(x, bias) }"""
    import onnx_ir as ir

    model = canonicalize(ir.from_proto(onnx.parser.parse_model(text)))
    assert "1.5" in graph_text(model) and "-2.25" in graph_text(model)
    big = ir.Tensor(np.full(MAX_PRINTED_ELEMENTS + 2, 1.5, np.float32), name="bias")
    model.graph.initializers["bias"].const_value = big
    assert "1.5" not in graph_text(model)
    assert model.graph.initializers["bias"].const_value is big


def test_an_unknown_pass_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean expand-einsum"):
        DumpAfter("expand-einsums", tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written there"):
        load(export("vit_timm__ts17"), DumpAfter("all", tmp_path / "file" / "folder"))
