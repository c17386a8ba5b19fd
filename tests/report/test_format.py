"""What a result says of how its units were chosen and its weights were made."""

from __future__ import annotations

import pytest

import snpc
from snpc.report import describe_method
from tests.command_line import CALIB, VIT


@pytest.mark.parametrize(("tokens", "refitted"), [("merge:2", True), ("none", False)])
def test_weights_are_refitted_only_where_something_went(tokens: str, refitted: bool) -> None:
    """Rows that nothing reads are more than a tenth of the MACs, so no width goes."""
    data = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=16)
    result = snpc.prune(VIT, target="macs=0.9", roles=("qk",), calibration=data, tokens=tokens)
    assert not result.plan.keep
    said = describe_method(result)
    assert said.startswith("no widths cut") and ("weights refitted" in said) == refitted
