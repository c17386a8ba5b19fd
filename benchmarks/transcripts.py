"""Words that a speech encoder lets its decoder write down right: greedy transcripts of recordings whose text is known.

Beside the dense encoder lie ``decoder_model.onnx`` (token ids [1, T] and the encoder's output -> logits [1, T, V]) and
the ``tokenizer.json`` of Whisper, as optimum writes them. The decoder is not pruned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
LONGEST = 200  # tokens of a transcript


def words_right(encoder: Path, beside: Path, feeds: Mapping[str, Array], labels: Array) -> float:
    """100 less the word error rate in per cent.

    ``feeds``: consecutive parts of one recording. ``labels``: what is said, from its start on; the transcript counts up
    to as many words.
    """
    truth = split_words(" ".join(map(str, np.atleast_1d(labels))))
    found = split_words(" ".join(transcripts(encoder, beside, feeds)))[: len(truth)]
    return 100 * (1 - edit_distance(truth, found) / len(truth))


def transcripts(encoder: Path, beside: Path, feeds: Mapping[str, Array]) -> list[str]:
    """The text of every sample."""
    one_thread = ort.SessionOptions()
    one_thread.intra_op_num_threads = 1  # the steps of a transcript are small
    encode, decode = (
        ort.InferenceSession(path, one_thread, providers=["CPUExecutionProvider"])
        for path in (encoder, beside / "decoder_model.onnx")
    )
    tokenizer = Tokenizer.from_file(str(beside / "tokenizer.json"))
    texts = []
    for number in range(len(next(iter(feeds.values())))):
        heard = encode.run(None, {name: values[number : number + 1] for name, values in feeds.items()})[0]
        texts.append(tokenizer.decode(greedy(decode, tokenizer, heard)))
    return texts


def greedy(decoder: ort.InferenceSession, tokenizer: Tokenizer, heard: Array) -> list[int]:
    """The likeliest next token, one after the other, without those of the prompt."""
    [tokens] = [spec.name for spec in decoder.get_inputs() if spec.type == "tensor(int64)"]
    [hidden] = [spec.name for spec in decoder.get_inputs() if spec.type != "tensor(int64)"]
    end = tokenizer.token_to_id(END)  # special tokens are behind it
    prompt = [tokenizer.token_to_id(token) for token in PROMPT]
    written: list[int] = []
    while len(written) < LONGEST:
        logits = decoder.run(None, {tokens: np.array([prompt + written], np.int64), hidden: heard})[0]
        best = int(logits[0, -1, : end + 1].argmax())
        if best == end:
            break
        written.append(best)
    return written


def split_words(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def edit_distance(truth: Sequence[str], found: Sequence[str]) -> int:
    """Words to put in, take out or replace (Levenshtein)."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(truth, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(found, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (word != other))
    return row[-1]
