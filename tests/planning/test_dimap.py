"""Widths from weights alone: thresholds on relative energy, checked against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main
from snpc.errors import UserError
from snpc.planning.dimap import relative_energy
from snpc.runtime.statistics.unit_weights import unit_weight_energies
from tests.oracle import analysis_of


def test_relative_energy_by_hand() -> None:
    found = relative_energy(np.array([[4.0, 1.0, 2.0], [0.0, 6.0, 1.0]]))  # by rank: 1 + 0, 2 + 1, 4 + 6
    assert np.allclose(found, [1 / 14, 3 / 13, 1.0])


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_scale_of_a_layer_does_not_matter(scale: float) -> None:
    energies = np.random.default_rng(0).random((3, 8))
    assert np.allclose(relative_energy(energies), relative_energy(scale * energies))


@pytest.mark.parametrize("name", ["swin_timm__ts17", "vit_timm__ts17"])
@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"target": "params=0.7"}])
def test_one_threshold_per_module(name: str, options: dict[str, float], tmp_path: Path) -> None:
    """Of every role, what goes has less relative energy than what stays, and no more goes than has to."""
    analysis = analysis_of(name)
    choice = snpc.Budget(**options, allocator="dimap")  # type: ignore[arg-type]
    decision = snpc.plan(analysis, choice)
    energies = unit_weight_energies(analysis, decision.groups)
    for role in ("qk", "vo", "ffn"):
        gone, left = [], []
        for group in (g for g in decision.groups if g.role == role):
            ranks = relative_energy(energies[group.id])
            cut = group.size - decision.slices.kept_width(group)
            gone += ranks[:cut].tolist()
            left += ranks[cut:-1].tolist()  # the last unit always stays
        assert gone and max(gone) <= min(left) + 1e-12
    result = snpc.apply(decision, tmp_path / "out.onnx")
    assert result.verification.equals_mask
    if "ratio" in options:
        for role in ("qk", "vo", "ffn"):
            mine = [g for g in decision.groups if g.role == role]
            share = sum(g.blocks * (g.size - decision.slices.kept_width(g)) for g in mine) / sum(
                g.blocks * g.size for g in mine
            )
            assert 0.4 - max(g.blocks for g in mine) / sum(g.blocks * g.size for g in mine) < share <= 0.4
    else:
        assert 0.6 < result.after.params / result.before.params <= 0.7


def test_widths_keep_to_their_multiples() -> None:
    analysis = analysis_of("swin_timm__ts17")
    decision = snpc.plan(analysis, snpc.Budget(0.5, allocator="dimap", round_to=4, min_width=4))
    kept = [decision.slices.kept_width(g) for g in decision.groups if decision.slices.kept_width(g) < g.size]
    assert kept and all(width % 4 == 0 for width in kept)


def test_the_command_line_and_refusals(tmp_path: Path) -> None:
    model = str(analysis_of("swin_timm__ts17").model.path)
    flags = ["--target", "params=0.8", "--allocator", "dimap", "-o", str(tmp_path / "out.onnx")]
    made = CliRunner().invoke(main, ["prune", model, *flags])
    assert made.exit_code == 0, made.output
    made = CliRunner().invoke(main, ["prune", model, *flags, "--uniform"])
    assert made.exit_code == 2
    with pytest.raises(UserError, match="weights alone"):
        snpc.Budget(max_drift=0.1, allocator="dimap")
    with pytest.raises(UserError, match="cannot be reached"):
        snpc.plan(analysis_of("swin_timm__ts17"), snpc.Budget(target="macs=0.01", allocator="dimap"))
    analysis = analysis_of("vit_timm__ts17")
    with pytest.raises(UserError, match="energies of weights"):
        snpc.make_slice_plan(snpc.score(analysis), snpc.Budget(0.5, allocator="dimap"))
