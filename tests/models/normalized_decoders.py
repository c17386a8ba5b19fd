"""Tiny decoders with caches whose queries and keys are normalized, exported with the real exporters.

As ``dynamic_sizes.py``. ``qwen3_cached`` and ``gemma3_cached`` normalize each head, ``olmo2_cached`` all heads at once.
"""

from __future__ import annotations

from typing import Any

from tests.models.dynamic_sizes import HEAD_WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, CachedExport, _cached_decoder
from tests.models.exports import ALL, VOCABULARY, WIDTH, Exports, Model, register

NORMALIZED_DECODERS: Exports = {}
VARIANTS = "ts17 dyn20_sdpa"


def _options(attention: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }


@register(VARIANTS, "transformers", into=NORMALIZED_DECODERS, source=__file__)
def _build_qwen3_cached(attention: str) -> Model:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(head_dim=HEAD_WIDTH, **_options(attention))
    return _cached_decoder(Qwen3ForCausalLM(config), KEY_VALUE_HEADS)


@register(VARIANTS, "transformers", into=NORMALIZED_DECODERS, source=__file__)
def _build_gemma3_cached(attention: str) -> Model:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(head_dim=HEAD_WIDTH, layer_types=["full_attention"] * LAYERS, **_options(attention))
    return _cached_decoder(Gemma3ForCausalLM(config), KEY_VALUE_HEADS)


@register(VARIANTS, "transformers", into=NORMALIZED_DECODERS, source=__file__)
def _build_olmo2_cached(attention: str) -> Model:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return _cached_decoder(Olmo2ForCausalLM(Olmo2Config(**_options(attention))), KEY_VALUE_HEADS)


for _name, _export in list(NORMALIZED_DECODERS.items()):
    NORMALIZED_DECODERS[_name] = ALL[_name] = CachedExport(**vars(_export))
