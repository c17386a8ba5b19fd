"""Widths that a runtime is fast at, and heads that leave its fast kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import snpc
from snpc.runtime.execution import Execution
from snpc.targets.preferred_widths import DECODING_HEADS, slower_decoding_text, widths_for_target
from tests.command_line import invoke
from tests.models.builder_decoders import BuilderDecoder


def test_heads_that_leave_the_fast_kernel_are_named() -> None:
    assert "heads of 128 channels became 96" in slower_decoding_text(128, 96)
    assert slower_decoding_text(128, 64) == slower_decoding_text(96, 48) == slower_decoding_text(128, 128) == ""


@pytest.mark.parametrize(("width", "expected"), [(128, [128, 64]), (64, [48, 32])])
def test_heads_keep_to_the_fast_kernel_where_they_can(width: int, expected: list[int], tmp_path: Path) -> None:
    """Of 128 wide heads a GPU decodes fast with 64; 64 wide ones have no fast size below."""
    form = BuilderDecoder(width=width, rotary=width, heads=2, kv_heads=1)
    analysis = snpc.analyze(snpc.load(form.write(tmp_path / "decoder.onnx")), prune_kv_cache=True)
    widths = widths_for_target(None, Execution(provider="cuda"))
    assert widths.head_sizes == DECODING_HEADS
    found = []
    for ratio in (0.25, 0.5):
        budget = snpc.Budget(ratio, round_to=widths.multiple, min_width=widths.minimum, head_sizes=widths.head_sizes)
        plan = snpc.plan(analysis, budget, method="select")
        head_size = snpc.apply(plan).head_size
        found.append(width if head_size is None else head_size[1])
    assert found == expected


def test_the_result_says_that_the_fast_kernel_is_left(tmp_path: Path) -> None:
    path = BuilderDecoder(width=64, rotary=64, heads=2, kv_heads=1).write(tmp_path / "decoder.onnx")
    command = ("prune", path, "--ratio", 0.25, "--prune-kv-cache", "-o", tmp_path / "out.onnx")
    result = invoke(*command)
    assert "heads of 64 channels became 48" in " ".join((result.stdout + result.stderr).split())
    kept = invoke(*command, "--round-to", 64, "--json", "-")
    assert json.loads(kept.stdout)["head_size"] is None
    assert "became" not in kept.stderr
