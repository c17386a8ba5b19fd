"""Exports with dynamic sizes that are not free, though no file says so.

Decoders with key-value caches: the mask's length is a symbol of its own, ``total``, and must be ``past`` +
``sequence``. Lengths that must be multiples of a window, or that constants fix. Names and the cache are those of
exports.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.models.exports import (
    ALL,
    VOCABULARY,
    WIDTH,
    Built,
    Export,
    Exports,
    Model,
    _causal_axes,
    _causal_inputs,
    _ids,
    _randomize,
    _tensor_output,
    register,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

DECODERS: Exports = {}
CONSTRAINED: Exports = {}

ODD_HEADS = 3  # for an even number, and for ReLU, torch has a fused path that TorchScript cannot export
LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 2, 4, 2, 12
PAST_LENGTH = 5  # differs from both lengths of exports.py


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


@register("ts14 ts17_sdpa dyn20_sdpa dyn23", "transformers", into=DECODERS, source=__file__)
def _build_gpt2_cached(attention: str) -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **_options(attention))
    return _cached_decoder(GPT2LMHeadModel(config), HEADS)


@register("ts14_sdpa ts17 dyn20 dyn23", "transformers", into=DECODERS, source=__file__)
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


# -- lengths that the graph fixes ------------------------------------------------------------------------------------


@register("ts17 dyn20", into=CONSTRAINED, source=__file__)
def _build_torch_encoder(attention: str) -> Model:
    """torch's own encoder: TorchScript writes the example's length into a Reshape, behind an axis called dynamic."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(WIDTH, ODD_HEADS, 96, activation=torch.tanh, batch_first=True)
    return _plain(nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False))


@register("ts17", into=CONSTRAINED, source=__file__)
def _build_window_attention(attention: str) -> Model:
    """Attention inside windows of four positions: the length is a multiple of four."""
    import torch
    from torch import nn

    class WindowAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            windows = self.qkv(x).reshape(batch, length // 4, 4, 3, HEADS, HEAD_WIDTH)
            query, key, value = windows.permute(3, 0, 1, 4, 2, 5).unbind(0)
            context = torch.softmax(query @ key.transpose(-1, -2) * HEAD_WIDTH**-0.5, -1) @ value
            result: torch.Tensor = x + self.out(context.transpose(2, 3).reshape(batch, length, width))
            return result

    return _plain(WindowAttention())


@register("ts17", into=CONSTRAINED, source=__file__)
def _build_added_positions(attention: str) -> Model:
    """Learned positions that are added without being cut to the length."""
    import torch
    from torch import nn

    class AddedPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 8, WIDTH))
            self.layer = nn.TransformerEncoderLayer(WIDTH, ODD_HEADS, 96, activation=torch.tanh, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layer(x + self.positions)
            return result

    return _plain(AddedPositions())


@register("ts17", "transformers", into=CONSTRAINED, source=__file__)
def _build_longformer(attention: str) -> Model:
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=96,
        max_position_embeddings=600,
        attention_window=[8] * LAYERS,
    )
    model = LongformerModel(config, add_pooling_layer=False)
    _randomize(model)
    module = _tensor_output(model, ["input_ids", "attention_mask"], "last_hidden_state")

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return _causal_inputs(batch, 8 * length, generator)

    return Model(module, inputs, "last_hidden_state", _causal_axes("last_hidden_state"))


def _plain(module: nn.Module) -> Model:
    """A module from x [batch, length, width] to y of that shape, whose feeds have the example's length."""
    _randomize(module)

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"x": torch.randn(batch, 8, WIDTH, generator=generator)}

    axes = {0: "batch", 1: "length"}
    return Model(module, inputs, "y", {"x": axes, "y": axes})
