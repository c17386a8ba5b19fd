"""Decoders with key-value caches, as the exporters write them: the mask covers past and new tokens.

The mask's length is a symbol of its own: no file says that ``total`` is ``past`` + ``sequence``. Feeds, names and the
cache are those of exports.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.models.exports import ALL, VOCABULARY, WIDTH, Built, Export, Exports, Model, _ids, _randomize, register

if TYPE_CHECKING:
    import torch
    from torch import nn

DECODERS: Exports = {}

LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 2, 4, 2, 12
PAST_LENGTH = 5  # differs from both lengths of exports.py

VARIANTS = "ts14 ts14_sdpa ts17 ts17_sdpa dyn20 dyn20_sdpa dyn23 dyn23_sdpa"


@dataclass(frozen=True)
class CachedExport(Export):
    """An export whose outputs are the logits and the caches."""

    def build(self) -> Built:
        built = super().build()
        present = [name.replace("past_key_values", "present") for name in built.input_names if "past" in name]
        axes = {name: {0: "batch", 2: "total"} for name in present}
        outputs = [*built.output_names, *present]
        return replace(built, output_names=outputs, dynamic_axes={**built.dynamic_axes, **axes})


def _cached_decoder(model: nn.Module, heads: int) -> Model:
    """The model with two caches per layer, past in and present out, each [batch, heads, length, width]."""
    from torch import nn
    from transformers import DynamicCache

    _randomize(model)

    class CachedDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            key0: torch.Tensor,
            value0: torch.Tensor,
            key1: torch.Tensor,
            value1: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=DynamicCache([(key0, value0), (key1, value1)]),
                use_cache=True,
            )
            caches = [cache for layer in result.past_key_values.layers for cache in (layer.keys, layer.values)]
            return (result.logits, *caches)

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        caches = {
            name: torch.randn(batch, heads, PAST_LENGTH, HEAD_WIDTH, generator=generator) for name in _cache_names()
        }
        mask = torch.ones(batch, PAST_LENGTH + length, dtype=torch.int64)
        return {"input_ids": _ids(batch, length, generator), "attention_mask": mask, **caches}

    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "logits": {0: "batch", 1: "sequence"},
        **{name: {0: "batch", 2: "past"} for name in _cache_names()},
    }
    return Model(CachedDecoder(), inputs, "logits", axes)


def _cache_names() -> list[str]:
    return [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]


def _options(attention: str) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "attn_implementation": attention}


@register(VARIANTS, "transformers", into=DECODERS, source=__file__)
def _build_gpt2_cached(attention: str) -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **_options(attention))
    return _cached_decoder(GPT2LMHeadModel(config), HEADS)


@register(VARIANTS, "transformers", into=DECODERS, source=__file__)
def _build_llama_cached(attention: str) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=64,
        **_options(attention),
    )
    return _cached_decoder(LlamaForCausalLM(config), KEY_VALUE_HEADS)


for _name, _export in list(DECODERS.items()):
    DECODERS[_name] = ALL[_name] = CachedExport(**vars(_export))
