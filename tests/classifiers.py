"""Tiny text classifiers exported with the real exporters: encoders with padding of which one token is read.

As ``exports.py``, which says how; the code is that of transformers, the weights are random.
"""

from __future__ import annotations

import functools
from typing import Any

from exports import VOCABULARY, WIDTH, Axes, Exports, Model, _causal_inputs, _randomize, _tensor_output, register

CLASSIFIERS: Exports = {}

_register = functools.partial(register, into=CLASSIFIERS, source=__file__)
_TEXT = {0: "batch", 1: "sequence"}
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 160, "num_labels": 5}


def _classifier(attention: str, family: str, **options: Any) -> Model:
    import transformers

    config = getattr(transformers, f"{family}Config")(attn_implementation=attention, **_WORDS, **options)
    made = getattr(transformers, f"{family}ForSequenceClassification")(config)
    _randomize(made)
    axes: Axes = {"input_ids": _TEXT, "attention_mask": _TEXT, "logits": {0: "batch"}}
    return Model(_tensor_output(made, ["input_ids", "attention_mask"], "logits"), _causal_inputs, "logits", axes)


@_register("ts17 ts17_sdpa ts17_static dyn20 dyn20_sdpa dyn23_sdpa", "transformers")
def _build_bert_class(attention: str) -> Model:
    return _classifier(attention, "Bert", **_SIZES)


@_register("ts17_sdpa dyn20_sdpa", "transformers")
def _build_roberta_class(attention: str) -> Model:
    return _classifier(attention, "Roberta", **_SIZES, type_vocab_size=1, pad_token_id=0)


@_register("ts17 ts17_sdpa dyn20_sdpa", "transformers")
def _build_distilbert_class(attention: str) -> Model:
    sizes = {"dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}
    return _classifier(attention, "DistilBert", **sizes)
