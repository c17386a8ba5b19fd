"""Widths in configurations."""

from __future__ import annotations

import json

from snpc.folders.runtime_config import WidthChange, updated_config

HEADS = WidthChange("heads of caches", ("head_size", "head_dim"), 64, (48, 48))


def test_a_width_that_is_the_same_in_all_layers_is_set_wherever_it_stands() -> None:
    config = {"model": {"decoder": {"head_size": 64, "window": 64}}, "head_dim": 64, "other": [64]}
    found = updated_config(config, [HEADS])
    assert json.loads(found.text) == {
        "model": {"decoder": {"head_size": 48, "window": 64}}, "head_dim": 48, "other": [64],
    }  # fmt: skip
    assert found.changed == ("head_size 64 -> 48", "head_dim 64 -> 48") and not found.unsaid


def test_a_width_that_differs_between_layers_stays_and_is_named() -> None:
    found = updated_config({"head_dim": 64}, [WidthChange("heads of caches", ("head_dim",), 64, (48, 32))])
    assert json.loads(found.text) == {"head_dim": 64}
    assert found.unsaid == ("head_dim stays 64: heads of caches are 32 to 48 wide now",)


def test_other_values_under_the_same_key_stay() -> None:
    found = updated_config({"head_dim": 128, "encoder": {"head_dim": True}}, [HEADS])
    assert json.loads(found.text) == {"head_dim": 128, "encoder": {"head_dim": True}}
    assert not found.changed
