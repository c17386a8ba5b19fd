"""Names of a decoder's inputs and outputs, by which exporters and runtimes know them: the one place that knows them.

| input | its name |
|---|---|
| token ids | has ``input_ids``, and no word in front of it |
| mask, 0 at padding | has ``attention_mask`` or ``input_mask``, or is ``mask`` |
| mask of the encoder's states | ``encoder_attention_mask`` |
| positions | has ``position_ids`` or ``cache_position`` |
| types | has ``token_type_ids`` or ``segment_ids`` |
| cache | has ``past``, or ``cache`` with a key or value |
| cache of a cross attention, made once of the encoder's states | a cache with ``encoder`` |
| states of an encoder | ``encoder_hidden_states`` |
| switch of a merged decoder | ``use_cache_branch`` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

DecoderInput = Literal[
    "ids", "mask", "encoder_mask", "positions", "types", "cache", "encoder_cache", "encoder_states", "branch"
]

BRANCH_INPUT = "use_cache_branch"

CACHE_WORDS = r"past|cache.*(key|value|\.k|\.v|_k|_v)"
INPUT_NAMES: Mapping[DecoderInput, re.Pattern[str]] = {
    "branch": re.compile(rf"^{BRANCH_INPUT}$"),
    "encoder_cache": re.compile(rf"({CACHE_WORDS}).*(?<![a-z])(encoder|cross)"),
    "cache": re.compile(CACHE_WORDS),
    "encoder_mask": re.compile(r"^encoder_attention_mask"),
    "mask": re.compile(r"(?<!global_)attention_mask|input_mask|^mask$"),
    "positions": re.compile(r"position_ids|cache_position"),
    "types": re.compile(r"token_type_ids|segment_ids"),
    "encoder_states": re.compile(r"^encoder_hidden_states"),
    "ids": re.compile(r"(?<![a-z_])input_ids"),
}  # the first that fits


def decoder_input(name: str) -> DecoderInput | None:
    """What an input is, by its name; None of a name that says nothing."""
    lower = name.lower()
    return next((kind for kind, pattern in INPUT_NAMES.items() if pattern.search(lower)), None)


def is_cache_name(name: str) -> bool:
    return decoder_input(name) in ("cache", "encoder_cache")


def present_names(past: str) -> Sequence[str]:
    """Names that exporters give to the output that continues the cache ``past``."""
    return tuple(past.replace(word, "present") for word in ("past_key_values", "past_key_value", "past"))


def find_presents(pasts: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Past input -> the output that continues it, of those that have one."""
    known = set(outputs)
    return {past: name for past in pasts for name in present_names(past) if name in known}
