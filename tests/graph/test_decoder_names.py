"""Names of decoders' inputs and outputs."""

from __future__ import annotations

import pytest

from snpc.graph.decoder_names import DecoderInput, decoder_input, find_presents, is_cache_name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("input_ids", "ids"),
        ("decoder_input_ids", None),
        ("attention_mask", "mask"),
        ("decoder_attention_mask", "mask"),
        ("global_attention_mask", None),
        ("encoder_attention_mask", "encoder_mask"),
        ("position_ids", "positions"),
        ("cache_position", "positions"),
        ("token_type_ids", "types"),
        ("encoder_hidden_states", "encoder_states"),
        ("use_cache_branch", "branch"),
        ("past_key_values.0.key", "cache"),
        ("past_key_values.0.decoder.value", "cache"),
        ("past_key_values.0.encoder.key", "encoder_cache"),
        ("cache.0.k", "cache"),
        ("pixel_values", None),
    ],
)
def test_a_name_says_what_an_input_is(name: str, kind: DecoderInput | None) -> None:
    assert decoder_input(name) == kind
    assert is_cache_name(name) == (kind in ("cache", "encoder_cache"))


def test_presents_continue_pasts() -> None:
    pasts = ["past_key_values.0.key", "past_0", "past_key_values.0.encoder.key"]
    assert find_presents(pasts, ["logits", "present.0.key", "present_0"]) == {
        "past_key_values.0.key": "present.0.key",
        "past_0": "present_0",
    }
