"""``snpc sweep``: the texts of its options."""

from __future__ import annotations

import pytest

from snpc.cli.commands.sweep import parse_target_list
from snpc.errors import UserError


def test_targets_are_read_as_written() -> None:
    assert parse_target_list("macs=0.9, 0.8,params=0.5") == ["macs=0.9", "macs=0.8", "params=0.5"]
    with pytest.raises(UserError, match="must look like"):
        parse_target_list("0.9")
