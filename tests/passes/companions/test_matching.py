"""Groups that two models can cut alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import snpc
from snpc.passes.companions.matching import GroupMatch
from tests.models.decoder_pairs import LAYERS, pair_paths


def roles(analysis: snpc.Analysis) -> list[str]:
    return sorted(group.role for group in analysis.groups if group.prunable and group.role in ("qk", "vo", "ffn"))


@pytest.mark.parametrize(("cross", "attentions"), [(True, 2), (False, 1)])
def test_every_group_is_found_in_both(cross: bool, attentions: int) -> None:
    first, second = pair_paths(cross)
    analysis = snpc.analyze(snpc.load(first, companions=[second]), prune_kv_cache=True)
    (companion,) = analysis.companions
    assert roles(analysis) == LAYERS * ["ffn"] + LAYERS * attentions * ["qk"] + LAYERS * attentions * ["vo"]
    assert {group.id for group in analysis.groups if group.prunable} <= set(companion.matches)


def test_caches_stay_unless_they_may_get_narrower() -> None:
    first, second = pair_paths()
    analysis = snpc.analyze(snpc.load(first, companions=[second]))
    assert roles(analysis) == LAYERS * ["ffn"]
    assert any("--prune-kv-cache" in pin.reason for pin in analysis.pins)


def test_what_one_of_two_cannot_cut_stays_in_both(tmp_path: Path) -> None:
    """The second decoder returns the hidden units of a layer."""
    first, second = pair_paths()
    model = onnx.load(second)
    hidden = next(node for node in model.graph.node if node.op_type == "Erf").input[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "second.onnx")
    analysis = snpc.analyze(snpc.load(first, companions=[tmp_path / "second.onnx"]), prune_kv_cache=True)
    assert roles(analysis).count("ffn") == LAYERS - 1
    (pinned,) = [group for group in analysis.groups if group.role == "ffn" and group.pins]
    assert pinned.pins[0].reason == "second.onnx cannot be cut alike: it is a graph output"


def test_units_of_another_order_are_translated() -> None:
    first, second = pair_paths()
    (companion,) = snpc.analyze(snpc.load(first, companions=[second]), prune_kv_cache=True).companions
    match = next(match for match in companion.matches.values() if match.group.role == "qk")
    turned = GroupMatch(match.group, match.units.reshape(3, 8)[::-1, ::-1].reshape(-1))
    assert match.keep([[0, 1], [2, 3], [4, 5]], 8) == ((0, 1), (2, 3), (4, 5))
    assert turned.keep([[0, 1], [2, 3], [4, 5]], 8) == ((2, 3), (4, 5), (6, 7))


def test_a_tie_is_cut_in_both_or_in_none() -> None:
    from snpc.passes.companions.matching import restrict_groups

    first, second = pair_paths()
    groups = snpc.analyze(snpc.load(first, companions=[second]), prune_kv_cache=True).groups
    tied = [replace(group, tie="tie.1") if group.role in ("qk", "vo") else group for group in groups]
    one = next(group.id for group in tied if group.tie)
    restricted = restrict_groups(tied, {one: "no"}, "other")
    assert all(group.pins for group in restricted if group.tie)
    assert all(group.prunable for group in restricted if group.role == "ffn")
