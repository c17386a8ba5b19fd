"""Text as calibration data: a .txt in windows of tokens, a .jsonl with one sample per line.

A .txt is one long text. Its tokens are cut into windows of equal length, without padding; what does not fill the last
one is left out. Samples of a .jsonl are cut at the length and padded on the right, where the model takes a mask; a
model without a mask gets windows of the samples one after another. Tokens that the tokenizer puts around a text
(``[CLS]``, ``<s>``) are around every window.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.sources import CalibrationSource, as_user_error, name_list, part_in_memory
from snpc.runtime.calibration.text_inputs import find_ids, find_mask
from snpc.types import AnyArray, IntArray, TensorSpec

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
DEFAULT_SEQ_LEN = 128
BLOCK_BYTES = 1 << 20  # of text that is tokenized at once: an encoding takes far more memory than its text
MAX_TEXT_BYTES = 64 << 20  # of a file that are read: some ten million tokens
PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
READ_TEXT_ADVICE = "it cannot be read as UTF-8; save it so"


@dataclass(frozen=True)
class TextOptions:
    """How text becomes token ids. Raises UserError for impossible values.

    ``tokenizer``: a ``tokenizer.json``, or a folder that holds one. ``seq_len``: tokens of a sample, those that the
    tokenizer adds included; None takes the model's static axis, else 128. ``field``: that of a .jsonl with the text.
    ``vocabulary``: [kept] ids that a restricted model has, ascending (``Restriction.vocabulary``): the ids of data,
    text or arrays, become positions in it, and samples that hold others are left out.
    """

    tokenizer: Path | str | None = None
    seq_len: int | None = None
    field: str = "text"
    vocabulary: IntArray | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 2:
            raise UserError(f"--seq-len {self.seq_len}: a sample has at least two tokens")
        if not self.field:
            raise UserError("--text-field: name a field of the .jsonl")


PLAIN_TEXT = TextOptions()


def is_text(source: object) -> bool:
    """Is it a path or URL of text?"""
    return isinstance(source, str | Path) and str(source).lower().endswith((".txt", ".jsonl"))


def find_tokenizer(model: Path) -> Path | None:
    """The ``tokenizer.json`` in the folder of a model, or in the one above, as of ``onnx/model.onnx``."""
    places = (folder / TOKENIZER_FILE for folder in model.absolute().parents[:2])
    return next((path for path in places if path.is_file()), None)


def text_source(path: Path, inputs: tuple[TensorSpec, ...], options: TextOptions) -> CalibrationSource:
    """The file as one part: ids [samples, tokens], and a mask where samples are padded."""
    ids = find_ids(inputs)
    if ids is None:
        raise UserError(
            f"{path}: it holds text, and none of the model's inputs ({name_list(spec.name for spec in inputs)}) is "
            "known to take token ids: an integer input [batch, tokens], called input_ids where there are several"
        )
    length = sequence_length(ids, options)
    tokenizer, file = open_tokenizer(path, options, length)
    mask = find_mask(inputs)
    lines = path.suffix.lower() == ".jsonl"
    if lines and mask is not None:
        static = ids.shape[1] if isinstance(ids.shape[1], int) else None
        encodings = map(tokenizer.encode, read_samples(path, options.field))
        rows = [encoding.ids for encoding in encodings if has_text(encoding)]
        arrays = dict(zip((ids.name, mask.name), padded(rows, static, pad_id(tokenizer)), strict=True))
        words = f"texts of up to {length} tokens, padded"
    else:
        blocks = joined_lines(read_samples(path, options.field)) if lines else read_blocks(path)
        rows, tokens = cut_windows(tokenizer, blocks, length)
        if not rows and tokens:
            raise UserError(
                f"{path}: its {tokens} tokens do not fill a window of {length}: give more text, or a smaller --seq-len"
            )
        arrays = {ids.name: np.array(rows, np.int64)}
        words = f"windows of {length} tokens"
    if not rows:
        raise UserError(f"{path}: it holds no text: at least one sample is needed")
    part = part_in_memory(str(path), arrays)
    return CalibrationSource(str(path), [part], inputs, allow_single_sample=False, token_format=f"{words}, by {file}")


def sequence_length(ids: TensorSpec, options: TextOptions) -> int:
    """Tokens of a sample, as the model or the user says."""
    static, asked = ids.shape[1], options.seq_len
    if not isinstance(static, int):
        return asked or DEFAULT_SEQ_LEN
    if asked not in (None, static):
        raise UserError(f"--seq-len {asked}: input '{ids.name}' takes {static} tokens; leave it out")
    return static


def open_tokenizer(text: Path, options: TextOptions, length: int) -> tuple[Tokenizer, Path]:
    """The tokenizer, which cuts at ``length``, and its file."""
    if options.tokenizer is None:
        raise UserError(
            f"{text}: text needs the model's tokenizer: give its {TOKENIZER_FILE}, or the folder that holds it "
            "(--tokenizer)"
        )
    file = Path(options.tokenizer)
    if file.is_dir():
        file /= TOKENIZER_FILE
        if not file.is_file():
            raise UserError(
                f"{file.parent}: it holds no {TOKENIZER_FILE}; transformers writes one: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
    if not file.is_file():
        raise UserError(f"{file} does not exist: --tokenizer names a {TOKENIZER_FILE}, or a folder that holds one")
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("reading text needs tokenizers: pip install snpc[text]") from error
    with as_user_error(str(file), f"it is no {TOKENIZER_FILE} of the package tokenizers", Exception):  # it has no other
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    added = tokenizer.num_special_tokens_to_add(False)
    if length <= added:
        raise UserError(f"--seq-len {length}: the tokenizer adds {added} tokens to every sample; give more")
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer, file


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of padding. Any would do: the mask hides it."""
    known = (tokenizer.token_to_id(token) for token in PAD_TOKENS)
    return next((number for number in known if number is not None), 0)


def has_text(encoding: Encoding) -> bool:
    """Is there a token that the tokenizer did not add?"""
    return len(encoding.ids) > sum(encoding.special_tokens_mask)


def cut_windows(tokenizer: Tokenizer, blocks: Iterator[str], length: int) -> tuple[list[list[int]], int]:
    """Ids of the windows that are full, and how many tokens the text has."""
    rows: list[list[int]] = []
    tokens = 0
    for block in blocks:
        encoding = tokenizer.encode(block)
        pieces = [piece.ids for piece in (encoding, *encoding.overflowing) if has_text(piece)]
        rows += [piece for piece in pieces if len(piece) == length]
        tokens += sum(map(len, pieces))
    return rows, tokens


def padded(rows: Sequence[Sequence[int]], length: int | None, pad: int) -> tuple[AnyArray, AnyArray]:
    """[samples, tokens] each: ids, and a mask that is 0 behind the end of a sample. ``length``: None is the longest."""
    tokens = length or max(map(len, rows), default=0)
    ids, mask = np.full((len(rows), tokens), pad, np.int64), np.zeros((len(rows), tokens), np.int64)
    for row, (numbers, shown) in zip(rows, zip(ids, mask, strict=True), strict=True):
        numbers[: len(row)], shown[: len(row)] = row, 1
    return ids, mask


# -- files -----------------------------------------------------------------------------------------------------------


def read_blocks(path: Path) -> Iterator[str]:
    """The text, in pieces that end at the ends of lines."""
    with as_user_error(str(path), READ_TEXT_ADVICE, OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
        read = 0
        while read < MAX_TEXT_BYTES and (lines := file.readlines(BLOCK_BYTES)):
            block = "".join(lines)
            read += len(block)
            yield block


def joined_lines(texts: Iterator[str]) -> Iterator[str]:
    """The texts one after another, each on lines of its own, in pieces of about a block."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size > BLOCK_BYTES:
            yield "\n".join(held)
            held, size = [], 0
    yield "\n".join(held)


def read_samples(path: Path, field: str) -> Iterator[str]:
    """The texts of a .jsonl. UserError names the line that has none."""
    number = 0
    for block in read_blocks(path):
        for line in block.splitlines():
            number += 1
            if line.strip():
                yield sample_text(f"{path}, line {number}", line, field)


def sample_text(label: str, line: str, field: str) -> str:
    with as_user_error(label, 'every line is an object such as {"text": "..."}', ValueError, RecursionError):
        sample: Any = json.loads(line)
    if not isinstance(sample, dict):
        raise UserError(f'{label}: it is a {type(sample).__name__}: every line is an object such as {{"text": "..."}}')
    if field not in sample:
        raise UserError(f"{label}: it has no field '{field}', but {name_list(sample)}: name one (--text-field)")
    text = sample[field]
    if not isinstance(text, str):
        raise UserError(f"{label}: field '{field}' holds a {type(text).__name__}, not a text (--text-field)")
    return text
