"""One export for each family of architectures: what is found, why the rest stays, and that slicing equals masking.

The numbers follow from the sizes that ``families.py`` configures each model with.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter

import numpy as np
import pytest

import snpc
from tests.closed_forms import calibration_of, pruned_bytes, random_feeds, relative_change
from tests.models.exports import export
from tests.models.families import FAMILIES
from tests.models.group_kinds import Kinds, attention, ffn, kinds_in, without
from tests.oracle import TOLERANCE, analysis_of, cut, feeds_of, prunable, random_cuts, relative_error, run

WIDTHS = ("qk", "vo", "ffn", "conv", "residual")
RATIOS = {"qk": 0.5, "vo": 0.34, "ffn": 0.6, "conv": 0.4, "residual": 0.25, "head": 0.3}


def rotary(heads: int, beside: int = 0) -> Kinds:
    """Two layers that share the rotary tables: pairs go in each key head with its query heads. ``beside``: channels of
    a head that do not turn. Of one key head, the four query heads may go."""
    turned = Counter({("qk", heads, (12 - beside) // 2): 2}) + Counter({("qk", heads, beside): 2} if beside else {})
    whole = {("head", 1, heads if heads > 1 else 4): 2}
    return turned + without(attention(heads, 12, 2), "qk", "head") + Counter(whole)


KINDS: dict[str, Kinds] = {
    "deit": attention(3, 16, 2) + ffn(192, 2),
    "beit": attention(3, 16, 2) + ffn(192, 2),
    # The four networks that make the bias tables have 512 hidden units.
    "swinv2": without(attention(2, 12, 2) + attention(4, 12, 2), "qk") + ffn(96, 2) + ffn(192, 2) + ffn(512, 4),
    "maxvit": attention(2, 8, 2) + attention(4, 8, 2) + ffn(64, 2) + ffn(128, 2),
    "mvit": Counter({("qk", 1, 12): 2}) + ffn(48, 1) + ffn(96, 1),  # norms on the heads of query and key
    # One query over all heads' mixing matrices: four heads are mixed by two layers, and not by the last.
    "cait": attention(4, 12, 3) + ffn(192, 3) + ffn(4, 2),
    "xcit": attention(4, 12, 1) + without(attention(4, 12, 2), "qk") + ffn(192, 3),
    # Values are two or four times as wide as keys.
    "levit": Counter({("qk", n, 8): 1 for n in (2, 3, 4)})
    + Counter({("vo", 2, 16): 1, ("vo", 3, 16): 1, ("vo", 4, 32): 1})
    + Counter({("head", 1, n): 1 for n in (2, 3, 4)})
    + ffn(64, 1)
    + ffn(96, 2),
    "efficientformer": Counter({("qk", 8, 16): 1, ("qk", 8, 32): 2, ("vo", 8, 64): 1, ("vo", 8, 128): 2})
    + Counter({("head", 1, 8): 3})
    + ffn(8, 2),  # two layers mix the heads
    "pvt": without(attention(1, 8, 1), "head") + attention(2, 8, 2) + attention(3, 8, 1) + ffn(16, 1) + ffn(32, 2)
    + ffn(48, 1),
    "twins": without(attention(1, 16, 2), "head") + attention(2, 16, 2) + ffn(32, 2) + ffn(64, 2),
    "eva02": Counter({("qk", 3, 8): 2, ("vo", 3, 16): 2, ("head", 1, 3): 2}) + ffn(96, 2),
    # Pointwise convolutions in front of others, and two layers of the classifier.
    "efficientvit": ffn(8, 1) + ffn(16, 1) + ffn(48, 1) + ffn(32, 1),
    "mobilevit": attention(4, 16, 2) + attention(4, 20, 4) + attention(4, 24, 3) + ffn(128, 2) + ffn(160, 4)
    + ffn(192, 3) + ffn(320, 1),  # the last in front of the classifier
    # Feed-forward layers and values of separable attention, and pointwise convolutions around the blocks.
    "mobilevitv2": ffn(128, 2) + ffn(192, 4) + ffn(256, 3) + ffn(64, 2) + ffn(96, 4) + ffn(128, 3)
    + Counter({("ffn", 1, size): 1 for size in (32, 128, 192, 256)}),
    "segformer": without(attention(1, 16, 1), "head") + attention(2, 16, 1) + ffn(32, 1) + ffn(64, 1) + ffn(24, 3),
    "dinov2": attention(4, 12, 2) + ffn(64, 2),
    "dinov3": rotary(4) + ffn(96, 2),
    # All heads read the same relative positions, and so with the same channels.
    "sam": Counter({("qk", 1, 12): 2, ("vo", 4, 12): 2, ("head", 1, 4): 2}) + ffn(96, 2),
    "clip": attention(4, 12, 2) + ffn(96, 2),
    "siglip": attention(4, 12, 3) + ffn(96, 3),
    # The feed-forward layers of encoder and decoder, the small networks that make boxes and positions, and
    # pointwise convolutions of the neck.
    # Two layers sample values at positions of each head: their channels go, whole heads stay.
    "rtdetr": attention(4, 8, 3) + Counter({("vo", 4, 8): 2}) + ffn(48, 3) + ffn(32, 9) + ffn(64, 1),
    "detr": attention(4, 12, 5) + ffn(64, 3),
    "wav2vec2": attention(4, 12, 2) + ffn(96, 2),
    "whisper": attention(4, 12, 5) + ffn(96, 3),
    # Heads of masked language models are a layer with a norm inside.
    "roberta": attention(4, 12, 2) + ffn(96, 2) + ffn(48, 1),
    "distilbert": attention(4, 12, 2) + ffn(96, 2) + ffn(48, 1),
    "deberta": without(attention(4, 12, 2), "head") + ffn(96, 2) + ffn(48, 1),
    "modernbert": rotary(4) + ffn(96, 2) + ffn(48, 1),
    "gemma2": rotary(2) + ffn(96, 2),
    "phi": rotary(4, beside=6) + ffn(96, 2),
    "neox": rotary(4, beside=8) + ffn(96, 2),
    "moe": ffn(40, 2),  # the same units of every expert
    "qwen2": rotary(2) + ffn(96, 2),
    "mistral": rotary(2) + ffn(96, 2),
    "gemma": rotary(1) + ffn(96, 2),
    "falcon": rotary(1) + ffn(96, 2),
    # Heads are taken apart for their norms, and joined again: their axis is then nobody's.
    "stablelm": Counter({("qk", 1, 6): 2, ("vo", 2, 12): 2}) + ffn(96, 2),
}  # fmt: skip

# (role, what a pin of it must say): true reasons why something that looks like attention stays.
PINNED = {
    "swinv2": [("qk", "reduced over")],  # query and key are divided by their lengths
    "xcit": [("qk", "summed over")],  # the score matrix has the width of query and key
    "efficientvit": [("qk", "cut independently"), ("vo", "cut independently")],
    "deberta": [("head", "indices")],
    "stablelm": [("qk", "element-wise"), ("head", "no weight produces this axis")],
}


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_follow_from_the_configuration(name: str) -> None:
    roles = ("qk", "vo", "head", "ffn")
    kinds = Counter({kind: n for kind, n in kinds_in(analysis_of(name)).items() if kind[0] in roles})
    assert kinds == KINDS.get(name, KINDS.get(FAMILIES[name].model))


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].model in PINNED])
def test_what_stays_says_why(name: str) -> None:
    stuck = [g for g in analysis_of(name).groups if not g.prunable]
    for role, reason in PINNED[FAMILIES[name].model]:
        assert any(g.role == role and any(re.search(reason, pin.reason) for pin in g.pins) for g in stuck), role


@pytest.mark.parametrize("name", FAMILIES)
def test_slicing_equals_masking(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    original = run(export(name), feeds)
    for roles in (WIDTHS, (*WIDTHS, "head")):
        pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), seed_of(name), RATIOS))
        masked = run(pair.masked, feeds)
        assert relative_error(original, masked) > 1e-3
        for level in ("off", "all"):
            assert relative_error(masked, run(pair.sliced, feeds, level)) < TOLERANCE, (roles, level)


CLOSED = [
    "deit__ts17_sdpa",
    "beit__ts17",
    "cait__dyn20",
    "pvt__dyn20_sdpa",
    "twins__ts17",
    "segformer__ts17_sdpa",
    "dinov2__dyn20_sdpa",
    "sam__dyn20_sdpa",
    "clip__ts17",
    "whisper__dyn20_sdpa",
    "roberta__dyn20_sdpa",
    "deberta__dyn20",
    "modernbert__dyn20_sdpa",
    "qwen2__dyn20_sdpa",
    "phi__dyn20_sdpa",
    "falcon__ts17",
]


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_move_outputs_less_than_magnitude(name: str) -> None:
    """Half of every query/key, value/output and feed-forward width, on data that was not calibrated on."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    data, before = calibration_of(analysis, random_feeds(name, 24), 8), run(export(name), feeds)
    choice = snpc.Budget(0.5)
    after = run(pruned_bytes(snpc.plan(analysis, choice, calibration=data)), feeds)
    assert all(np.isfinite(array).all() for array in after)
    plain = snpc.plan(analysis, choice, method="select", criterion="magnitude")
    assert relative_change(before, after) < relative_change(before, run(pruned_bytes(plain), feeds))
