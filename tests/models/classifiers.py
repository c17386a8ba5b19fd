"""Tiny text encoders exported with the real exporters: with padding, of which one token is read, or a mean is taken
that leaves padding out.

As ``exports.py``, which says how; the code is that of transformers, the weights are random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tests.models.exports import (
    VOCABULARY,
    WIDTH,
    Axes,
    Exports,
    Model,
    _causal_inputs,
    _randomize,
    _tensor_output,
    register,
)

CLASSIFIERS: Exports = {}
SENTENCES: Exports = {}

_register = functools.partial(register, into=CLASSIFIERS, source=__file__)
_register_sentence = functools.partial(register, into=SENTENCES, source=__file__)
_TEXT = {0: "batch", 1: "sequence"}
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 160, "num_labels": 5}


def _classifier(attention: str, family: str, **options: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{family}Config")(attn_implementation=attention, **_WORDS, **options)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    _randomize(model)
    axes: Axes = {"input_ids": _TEXT, "attention_mask": _TEXT, "logits": {0: "batch"}}
    return Model(_tensor_output(model, ["input_ids", "attention_mask"], "logits"), _causal_inputs, "logits", axes)


@_register("ts17 ts17_sdpa ts17_static dyn20 dyn20_sdpa dyn23_sdpa", "transformers")
def _build_bert_class(attention: str) -> Model:
    return _classifier(attention, "Bert", **_SIZES)


@_register("ts17_sdpa dyn20_sdpa", "transformers")
def _build_roberta_class(attention: str) -> Model:
    return _classifier(attention, "Roberta", **_SIZES, type_vocab_size=1, pad_token_id=0)


@_register("ts17 dyn20_sdpa", "transformers")
def _build_distilbert_class(attention: str) -> Model:
    sizes = {"dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}
    return _classifier(attention, "DistilBert", **sizes)


# -- sentence embeddings: the ways in which model cards and libraries spell the mean over what is no padding ----------


def _sentence(attention: str, family: str, pool: Callable[[Any, Any], Any], **options: Any) -> Model:
    import torch
    import transformers

    words = {k: v for k, v in _WORDS.items() if k != "num_labels"}
    config = getattr(transformers, f"{family}Config")(attn_implementation=attention, **words, **options)
    model = getattr(transformers, f"{family}Model")(config)
    _randomize(model)

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return pool(states, attention_mask)

    axes: Axes = {"input_ids": _TEXT, "attention_mask": _TEXT, "sentence": {0: "batch"}}
    return Model(Embedding().eval(), _causal_inputs, "sentence", axes)


def _expanded(states: Any, mask: Any) -> Any:
    """As the model cards of sentence-transformers spell it, and normalised."""
    import torch

    wide = mask.unsqueeze(-1).expand(states.size()).float()
    mean = torch.sum(states * wide, 1) / torch.clamp(wide.sum(1), min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1)


def _filled(states: Any, mask: Any) -> Any:
    """As the model cards of E5 spell it."""
    kept = states.masked_fill(~mask[..., None].bool(), 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1)[..., None]


def _multiplied(states: Any, mask: Any) -> Any:
    """As a product of matrices."""
    import torch

    weights = mask.to(states.dtype).unsqueeze(1)
    return torch.bmm(weights, states).squeeze(1) / weights.sum(-1)


@_register_sentence("ts17 ts17_static dyn20_sdpa dyn23_sdpa", "transformers")
def _build_bert_mean(attention: str) -> Model:
    return _sentence(attention, "Bert", _expanded, **_SIZES)


@_register_sentence("ts17_sdpa dyn20_sdpa", "transformers")
def _build_roberta_mean(attention: str) -> Model:
    return _sentence(attention, "Roberta", _filled, **_SIZES, type_vocab_size=1, pad_token_id=0)


@_register_sentence("ts17 dyn20_sdpa", "transformers")
def _build_distilbert_mean(attention: str) -> Model:
    return _sentence(attention, "DistilBert", _multiplied, dim=WIDTH, n_layers=3, n_heads=4, hidden_dim=96)
