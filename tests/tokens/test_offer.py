"""Token schedules that are offered without data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import snpc
from snpc.tokens import TokenOffer, offer_tokens
from tests.command_line import CALIB, VIT, invoke, write_tiny
from tests.models.encoders import Encoder
from tests.oracle import analysis_of


def test_the_share_is_that_of_the_written_file(tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    offer = offer_tokens(analysis)
    assert isinstance(offer, TokenOffer) and offer.spec == "guided:2@1-3"
    result = snpc.prune(VIT, tmp_path / "out.onnx", tokens=offer.spec)
    assert result.after.macs / result.before.macs == pytest.approx(1 - offer.saved)
    assert offer.saved > 0.3
    assert offer_tokens(snpc.reduce_tokens(analysis, offer.spec)) is None  # they are merged already


def test_it_changes_no_answer_of_the_example(tmp_path: Path) -> None:
    offer = offer_tokens(snpc.analyze(snpc.load(VIT)))
    assert offer is not None
    calibration = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=128)
    result = snpc.prune(VIT, tmp_path / "out.onnx", tokens=offer.spec, calibration=calibration)
    assert result.quality.grade == "good"


def test_models_whose_tokens_stay_get_none(tmp_path: Path) -> None:
    assert offer_tokens(snpc.analyze(snpc.load(write_tiny(tmp_path / "tiny.onnx")))) is None


@pytest.mark.parametrize(("fused", "method"), [(False, "guided"), (True, "guided")])
def test_deep_models_keep_their_first_and_last_blocks(fused: bool, method: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(Encoder(depth=6, patches=32, fused=fused, opset=23 if fused else 17).model().SerializeToString())
    offer = offer_tokens(snpc.analyze(snpc.load(path)))
    assert offer is not None and offer.spec == f"{method}:4@2-4"


ANY_LENGTH = Encoder(exit="all", depth=6, longest=40)


@pytest.mark.parametrize(
    ("encoder", "spec"),
    [
        (ANY_LENGTH, "guided:0.88@2-4"),
        (replace(ANY_LENGTH, exit="mean"), "guided:0.88@2-4"),
        (replace(ANY_LENGTH, fused=True, opset=23), "guided:0.88@2-4"),
    ],
)
def test_inputs_of_any_length_get_a_share(encoder: Encoder, spec: str, tmp_path: Path) -> None:
    onnx.save(encoder.model(), tmp_path / "encoder.onnx")
    offer = offer_tokens(snpc.analyze(snpc.load(tmp_path / "encoder.onnx")))
    assert offer is not None and offer.spec == spec and offer.merges
    result = snpc.prune(tmp_path / "encoder.onnx", tmp_path / "out.onnx", tokens=offer.spec)
    assert result.after.macs / result.before.macs == pytest.approx(1 - offer.saved)


def test_where_a_mask_has_an_entry_per_token_some_are_dropped(tmp_path: Path) -> None:
    analysis = analysis_of("bert_class__ts17")
    offer = offer_tokens(analysis)
    assert offer is not None and offer.spec == "topk:0.88@1-2" and not offer.merges
    result = snpc.prune(analysis.model.path, tmp_path / "out.onnx", tokens=offer.spec)
    assert result.after.macs / result.before.macs == pytest.approx(1 - offer.saved)
    assert "by dropping tokens that get little attention" in invoke("inspect", analysis.model.path).stdout
