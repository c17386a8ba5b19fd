"""Hidden layers that are normalized inside: what is found, and that slicing equals masking."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.closed_forms import tensor_values
from tests.models.exports import export
from tests.models.families import FAMILIES
from tests.models.hidden_norms import HIDDEN, HIDDEN_NORMS, POINTS
from tests.oracle import (
    TOLERANCE,
    Array,
    analysis_of,
    cut,
    cuts_of,
    feeds_of,
    prunable,
    random_cuts,
    random_removal,
    relative_error,
    run,
)

NAMES = list(HIDDEN_NORMS)
FOUND = {
    "matcher": {("ffn", 2 * POINTS, "LayerNormalization"): 2},
    "sublayer_norm": {("ffn", HIDDEN, "LayerNormalization"): 3},
    # per channel and over four groups of channels nothing changes for those that stay
    "conv_norms": {("ffn", HIDDEN, "one group"): 1, ("conv", HIDDEN, "one group"): 1},
}


@pytest.mark.parametrize("name", NAMES)
def test_they_are_found_and_said_to_be_approximate(name: str) -> None:
    analysis, model = analysis_of(name), name.partition("__")[0]
    inside = [g for g in prunable(analysis.groups) if g.approximate and g.role != "residual"]
    per_weight = 2 if name == "matcher__dyn20" else 1  # that exporter copies a layer for each of its two streams
    expected = Counter({(role, size): n * per_weight for (role, size, _), n in FOUND[model].items()})
    assert Counter((g.role, g.size) for g in inside) == expected
    assert all("normalized inside" in g.freedom_reason for g in inside)


def test_norms_of_single_channels_and_of_groups_of_channels_are_exact() -> None:
    for name in ("conv_norms__ts17", "conv_norms__ts14", "conv_norms__dyn21"):
        exact = {g.id: g.size for g in prunable(analysis_of(name).groups, "ffn") if not g.approximate}
        assert exact == {"instance.ffn": HIDDEN, "groups.ffn": 4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_slicing_equals_masking(name: str, seed: int) -> None:
    """At another size than the analysis', with onnxruntime's fusions and without; the statistics are of what stays."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    groups = prunable(analysis.groups, "ffn", "conv") if seed else prunable(analysis.groups)
    pair = cut(analysis, random_cuts([g for g in groups if g.role != "head"], seed, 0.5))
    assert relative_error(run(export(name), feeds), run(pair.masked, feeds)) > 1e-3
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


@pytest.mark.parametrize("name", ["mobilevitv2__dyn20_sdpa", "eva02__ts17", "pvt__dyn20_sdpa"])
def test_streams_and_hidden_layers_of_real_models(name: str) -> None:
    assert name in FAMILIES
    analysis, feeds = analysis_of(name), feeds_of(name)
    groups = [g for g in prunable(analysis.groups) if g.approximate]
    assert groups
    pair = cut(analysis, random_cuts(groups, 1, 0.25))
    for level in ("off", "all"):
        assert pair.error(feeds, level) < 2 * TOLERANCE


def test_one_group_of_channels_is_normalized_over_those_that_stay() -> None:
    """By the definition, written out."""
    name, tensors = "conv_norms__ts17", ["/whole/up/Conv_output_0", "/whole/norm/Add_output_0"]
    analysis, feeds = analysis_of(name), feeds_of(name)
    group = analysis.group("whole.ffn")
    removed = random_removal(group, np.random.default_rng(0))
    made, normed = tensor_values(export(name).read_bytes(), tensors, feeds)
    kept_made, kept_normed = tensor_values(cut(analysis, cuts_of([(group, removed)])).sliced, tensors, feeds)
    kept = ~removed[0]
    np.testing.assert_allclose(kept_made, made[:, kept], atol=1e-4)
    rows, outputs = channels_first(normal(made)[:, kept]), channels_first(normed[:, kept])
    for channel in range(int(kept.sum())):
        gain, bias = np.polyfit(rows[channel], outputs[channel], 1)
        expected = gain * normal(kept_made)[:, channel] + bias
        np.testing.assert_allclose(kept_normed[:, channel], expected, atol=1e-4)


def channels_first(array: Array) -> Array:
    return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)


def normal(array: Array) -> Array:
    """Every sample with mean 0 and variance 1."""
    axes = (1, 2, 3)
    return (array - array.mean(axes, keepdims=True)) / np.sqrt(array.var(axes, keepdims=True) + 1e-5)
