"""Two decoders that are pruned by one plan, and decode together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.passes.companions import GroupMatch
from tests.command_line import invoke, reported
from tests.models.decoder_pairs import (
    HEAD_WIDTH,
    PROMPT,
    SECOND,
    logits_at_once,
    logits_in_steps,
    pair_data,
    pair_paths,
)
from tests.oracle import analysis_of

Array = npt.NDArray[Any]


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("caches", [True, False])
def test_a_pruned_pair_decodes_as_its_first_decoder_does_at_once(
    cross: bool, fitted: bool, caches: bool, tmp_path: Path
) -> None:
    """Selected units, and weights that are fitted with biases that are added."""
    first, second = pair_paths(cross)
    data = pair_data(cross=cross)
    found = snpc.prune(
        first,
        tmp_path / "first.onnx",
        companions=[second],
        ratio=0.4,
        uniform=True,
        prune_kv_cache=caches,
        calibration=data if fitted else None,
    )
    (companion,) = found.companions
    assert companion.path == tmp_path / SECOND and companion.path.is_file()
    assert "sliced equals masked" in companion.holds
    assert "decoding step by step through the caches equals decoding at once" in companion.holds
    assert companion.holds in found.verification.structure
    expected = logits_at_once(found.path, data)[:, PROMPT:]
    steps = logits_in_steps(found.path, companion.path, data)
    assert np.abs(steps - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected - logits_at_once(first, data)[:, PROMPT:]).max() > 1e-3, "something was cut"
    widths = {spec.shape[3] for spec in companion.inputs if "past" in spec.name}
    assert all(isinstance(width, int) and width < HEAD_WIDTH for width in widths) == caches
    before, after = found.cache_bytes
    assert (after < before) == caches


def test_residual_width_goes_in_both(tmp_path: Path) -> None:
    """Normalizations are refitted, and so are the weights behind them."""
    first, second = pair_paths()
    data = pair_data()
    found = snpc.prune(
        first, tmp_path / "first.onnx", companions=[second], ratio=0.2, roles=("residual",), calibration=data
    )
    expected = logits_at_once(found.path, data)[:, PROMPT:]
    steps = logits_in_steps(found.path, found.companions[0].path, data)
    assert np.abs(steps - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_companion_with_other_units_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliced equals masked in each of the two; only decoding with both shows it."""

    def last_units(match: GroupMatch, rows: Any, size: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(size - len(row), size)) for row in rows)

    monkeypatch.setattr(GroupMatch, "keep", last_units)
    first, second = pair_paths()
    with pytest.raises(CheckFailed, match=r"decoder_with_past_model\.onnx: decoding step by step .* differs"):
        snpc.prune(first, tmp_path / "first.onnx", companions=[second], ratio=0.4, prune_kv_cache=True)
    assert not list(tmp_path.iterdir())


def test_companions_are_given_by_an_option(tmp_path: Path) -> None:
    first, second = pair_paths()
    options = ("--ratio", 0.4, "--method", "select", "--criterion", "magnitude", "--prune-kv-cache")
    report = reported("prune", first, "--companion", second, *options, "-o", tmp_path / "out.onnx")
    assert any(check.startswith(f"{SECOND}: sliced equals masked") for check in report["verify"]["structure"])
    assert (tmp_path / SECOND).is_file()
    refused = invoke("prune", first, "--companion", second, *options, "-o", second.parent / "out.onnx", code=2)
    assert f"{SECOND}: is the input itself" in refused.stderr
    with pytest.raises(UserError, match="dequantize is for one model"):
        snpc.prune(first, companions=[second], ratio=0.4, dequantize=True)
    refused = invoke("prune", first, "--companion", second, *options, "--last-logits", code=2)
    assert "restrict both first" in " ".join(refused.stderr.split())
    refused = invoke("prune", first, "--companion", second, *options, "--dequantize", code=2)
    assert "--dequantize is for one model" in refused.stderr


def test_tokens_of_companions_stay(tmp_path: Path) -> None:
    """Of two copies of a classifier, whose tokens can get fewer."""
    first = analysis_of("vit_timm__ts17").model.path
    second = tmp_path / "second.onnx"
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"tokens cannot be reduced: second\.onnx is cut alike, in widths only"):
        snpc.prune(first, tmp_path / "x.onnx", companions=[second], tokens="merge:1@0")
