"""Slicing equals masking: for every group of every export, alone and all at once, by running both graphs.

By default one group of each kind (role, width, freedom) of an export is cut alone, and all of them together; with
`--exhaustive` every single one is cut alone.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from snpc.passes.analyze import Analysis
from snpc.types import Group
from tests.models.exports import EXPORTS, export
from tests.models.fused import fuse_attention_of
from tests.oracle import (
    TOLERANCE,
    Array,
    Cuts,
    Feeds,
    Pair,
    analysis_of,
    cut,
    feeds_of,
    outputs_of,
    prunable,
    random_cuts,
    relative_error,
    run,
    written,
)

NAMES = list(EXPORTS)
DYNAMIC = [name for name in NAMES if EXPORTS[name].dynamic]

# All different, so that a packed QKV has to come apart.
RATIOS = {"qk": 0.5, "vo": 0.34, "ffn": 0.6, "conv": 0.4, "residual": 0.25, "head": 0.3}
WIDTHS = ("qk", "vo", "ffn", "conv", "residual")


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


def silences(original: Sequence[Array], masked: Sequence[Array]) -> bool:
    """The mask does something: a cut that removes nothing would pass every comparison."""
    return relative_error(original, masked) > 1e-3


def one_of_each_kind(groups: Sequence[Group], seed: int) -> list[Group]:
    """A group for every role and width; which of the layers it is taken from depends on the seed."""
    kinds: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        kinds.setdefault((group.role, group.blocks, group.size, group.freedom), []).append(group)
    return [same[seed % len(same)] for same in kinds.values()]


def width_cuts(name: str) -> Cuts:
    return random_cuts(prunable(analysis_of(name).groups, *WIDTHS), seed_of(name), RATIOS)


@functools.lru_cache(maxsize=4)
def cut_widths(name: str) -> Pair:
    """An export with all widths cut: the tests of one export follow each other and share it."""
    return cut(analysis_of(name), width_cuts(name))


def cuts_everything(analysis: Analysis, cuts: Cuts) -> bool:
    return all(cuts[site.tensor, site.axis].any() for group in prunable(analysis.groups) for site in group.sites)


@pytest.mark.parametrize("name", NAMES)
def test_each_group_alone(name: str, request: pytest.FixtureRequest) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    groups = prunable(analysis.groups)
    if not request.config.getoption("--exhaustive"):
        groups = one_of_each_kind(groups, seed_of(name))
    assert groups
    original = outputs_of(name)
    wrong = []
    for group in groups:
        pair = cut(analysis, random_cuts([group], seed_of(name + group.id)))
        masked = run(pair.masked, feeds)
        error = relative_error(masked, run(pair.sliced, feeds))
        if error > TOLERANCE:
            wrong.append(f"{group.id}: sliced is {error:.1e} off the mask")
        if not silences(original, masked):
            wrong.append(f"{group.id}: the mask silences nothing")
        if len(pair.sliced) >= len(pair.masked) and group.params > 400:
            wrong.append(f"{group.id}: the sliced model is not smaller")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_all_widths_at_once(name: str) -> None:
    feeds, pair = feeds_of(name), cut_widths(name)
    masked = pair.expected(feeds)
    assert silences(outputs_of(name), masked)
    for level in ("off", "all"):
        assert relative_error(masked, run(pair.sliced, feeds, level)) < TOLERANCE, f"optimisation {level}"

    before, after = onnx.load(export(name)), onnx.load_from_string(pair.sliced)
    onnx.checker.check_model(after, full_check=True)
    onnx.shape_inference.infer_shapes(after, check_type=True, strict_mode=True, data_prop=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.graph.name == before.graph.name
    assert {o.domain: o.version for o in after.opset_import} == {o.domain: o.version for o in before.opset_import}
    assert list(after.metadata_props) == list(before.metadata_props)
    assert {n.op_type for n in after.graph.node} >= {"MatMul"} & {n.op_type for n in before.graph.node}


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_widths_at_once(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    if not prunable(analysis.groups, "head"):
        pytest.skip("no heads to cut: test_groups says why")
    cuts = random_cuts(prunable(analysis.groups), seed_of(name) + 1, RATIOS)
    assert cuts_everything(analysis, cuts)
    pair = cut(analysis, cuts)
    masked = run(pair.masked, feeds)
    for level in ("off", "all"):
        assert relative_error(masked, run(pair.sliced, feeds, level)) < TOLERANCE, f"optimisation {level}"
    onnx.checker.check_model(onnx.load_from_string(pair.sliced), full_check=True)


@pytest.mark.parametrize("name", DYNAMIC)
def test_any_batch(name: str) -> None:
    """The trace binds a batch of 2, the exports' feeds have 3."""
    feeds = feeds_of(name)
    pair = cut_widths(name)
    for size in (1, 5):
        batch: Feeds = {key: value[np.arange(size) % len(value)] for key, value in feeds.items()}
        assert pair.error(batch, "all") < TOLERANCE, f"batch {size}"


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__dyn20", "t5__ts17"])
def test_the_analysed_model_is_never_changed(name: str) -> None:
    analysis = analysis_of(name)
    before = written(analysis.model.graph.clone())
    cut(analysis, width_cuts(name))
    assert written(analysis.model.graph.clone()) == before


@pytest.mark.parametrize("name", ["swin_timm__ts17", "bert__ts17", "llama__ts17_sdpa"])
def test_no_cut_is_no_change(name: str) -> None:
    """An empty cut keeps every node, and every number the graph computes, bit for bit."""
    pair = cut(analysis_of(name), {})
    before, after = onnx.load(export(name)), onnx.load_from_string(pair.sliced)
    kept = Counter(n.op_type for n in after.graph.node)
    assert kept <= Counter(n.op_type for n in before.graph.node)
    feeds = feeds_of(name)
    for a, b in zip(run(export(name), feeds), run(pair.sliced, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


# -- onnxruntime's own transformer fusions ---------------------------------------------------------------------------

FUSED = [
    "bert__ts17",
    "bert__ts17_sdpa",
    "bert__ts17_static",
    "bert__dyn20_sdpa",
    "bert__dyn23_sdpa",
    "bert_zero_bias__ts17",
    "albert__ts17",
    "gpt2__ts17_static",
    "gpt2__dyn20_sdpa",
    "vit_hf__ts17",
    "vit_timm__ts17_sdpa",
    "vit_timm__dyn23_sdpa",
]


def fused_attentions(model: onnx.ModelProto) -> int:
    return sum(n.domain == "com.microsoft" and "Attention" in n.op_type for n in model.graph.node)


def kept(group: Group) -> int:
    return group.size - round(group.size * RATIOS[group.role])


@pytest.mark.parametrize("name", FUSED)
def test_survives_the_transformers_optimizer(name: str, tmp_path: Path) -> None:
    """Fusions throw the scale away and derive it again from the head size: it has to be 1/sqrt(head size) by then."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    groups = prunable(analysis.groups, "qk", "vo", "ffn")
    pair = cut(analysis, random_cuts(groups, seed_of(name), RATIOS))
    width = kept(next(g for g in groups if g.role == "qk"))
    fused = fuse_attention_of(pair.sliced, name, tmp_path, width)
    assert any(n.domain == "com.microsoft" for n in fused.graph.node)
    assert relative_error(run(pair.masked, feeds), run(fused.SerializeToString(), feeds)) < TOLERANCE


@pytest.mark.parametrize("name", ["bert__ts17", "bert__ts17_static", "bert__ts17_static1", "albert__ts17"])
def test_attention_still_fuses(name: str, tmp_path: Path) -> None:
    """Where the original's attention becomes one node, the cut model's does, with the cut widths."""
    analysis = analysis_of(name)
    groups = prunable(analysis.groups, "qk", "vo", "ffn")
    qk, vo = (next(g for g in groups if g.role == role) for role in ("qk", "vo"))
    expected = fused_attentions(fuse_attention_of(export(name).read_bytes(), name, tmp_path, qk.size))
    assert expected > 0
    pair = cut(analysis, random_cuts(groups, 0, RATIOS))
    fused = fuse_attention_of(pair.sliced, name, tmp_path, kept(qk))
    assert fused_attentions(fused) == expected
    widths = {
        tuple(attribute.ints)
        for node in fused.graph.node
        for attribute in node.attribute
        if attribute.name == "qkv_hidden_sizes"
    }
    assert widths == {tuple(g.blocks * kept(g) for g in (qk, qk, vo))}
