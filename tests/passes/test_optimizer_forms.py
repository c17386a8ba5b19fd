"""Fused operators in opsets that the standard does not have them in, and other forms of old exporters: all are cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

import snpc
from snpc.passes.analyze import Analysis, analyze
from snpc.runtime.io.load import load
from tests.models.group_kinds import Kinds, attention, ffn, kinds_in, without
from tests.models.optimizer_forms import HEAD, HEADS, HIDDEN, OPTIMIZER_FORMS, Form
from tests.oracle import TOLERANCE, cut, prunable, random_cuts, relative_error, run

STACKED_PAST = ("decoder", "fused_decoder", "megatron")


def analysis_in(folder: Path, form: Form, kv_cache: bool = False) -> Analysis:
    path = folder / "model.onnx"
    onnx.save(form.model, path)
    return analyze(load(path), prune_kv_cache=kv_cache)


def expected_kinds(name: str, kv_cache: bool) -> Kinds:
    layers = 2 if name.startswith("fused_encoder") else 1
    if not name.startswith(STACKED_PAST):
        return attention(HEADS, HEAD, layers) + ffn(HIDDEN, layers)
    # Keys and values are one tensor of the cache: they keep the same positions.
    cached: Kinds = Counter({("qk", HEADS, HEAD): 1, ("head", 1, HEADS): 1})
    return ffn(HIDDEN, layers) + (cached if kv_cache else Counter())


@pytest.mark.parametrize("name", OPTIMIZER_FORMS)
def test_every_shape_is_known_and_slicing_equals_masking(name: str, tmp_path: Path) -> None:
    form = OPTIMIZER_FORMS[name]()
    analysis = analysis_in(tmp_path, form)
    assert not [pin for pin in analysis.pins if "the shape of" in pin.reason]
    assert without(kinds_in(analysis), "residual") == expected_kinds(name, kv_cache=False)
    groups = [g for g in prunable(analysis.groups) if g.role != "residual"]
    pair = cut(analysis, random_cuts(groups, 5, 0.5))
    original = run(form.model.SerializeToString(), form.feeds)
    assert relative_error(original, pair.expected(form.feeds)) > 1e-3, "the mask silences nothing"
    assert pair.error(form.feeds) < TOLERANCE
    assert pair.error(form.feeds, "all") < TOLERANCE


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_FORMS if name.startswith(STACKED_PAST)])
def test_a_past_in_one_tensor_is_narrowed_on_request(name: str, tmp_path: Path) -> None:
    analysis = analysis_in(tmp_path, OPTIMIZER_FORMS[name](), kv_cache=True)
    assert kinds_in(analysis) == expected_kinds(name, kv_cache=True)


@pytest.mark.parametrize("name", OPTIMIZER_FORMS)
def test_half_of_everything_goes_without_data(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    onnx.save(OPTIMIZER_FORMS[name]().model, source)
    pruned = snpc.prune(source, target, ratio=0.5, method="select")
    assert pruned.after.params < 0.9 * pruned.before.params
    assert pruned.verification.equals_mask
