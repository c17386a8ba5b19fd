"""Calibration data: from the forms that users have it in to batches that fit the model.

    source -open-> parts (shapes known, no values read) -choose samples, plan batches-> Calibration -batches()-> feeds

| source | one part is |
|---|---|
| ``calib.npz``: keys are input names, leading axis = samples | the file |
| ``calib.npy``: the same, for a model with one input | the file |
| folder of ``.npz`` or ``.npy``, each one sample or a batch | a file |
| folder of pictures (also in sub-folders), for a model with one image input | a picture |
| ``.txt``: one long text, cut into windows of tokens | the file |
| ``.jsonl``: a text per line, under ``text`` or another field | the file |
| ``.json``: Polygraphy's ``List[Dict[str, ndarray]]``, or plain lists of numbers | a dict of the list |
| ``test_data_set_*/input_N.pb``: the folder of them, or one | a ``test_data_set`` |
| a URL (``s3://bucket/calib.npz``) of any of these, through fsspec | as there |
| ``file.py:function``, which runs that code | a dict that it yields |
| Python: dicts, a function giving them, an onnxruntime ``CalibrationDataReader``, or one dict of arrays | a dict |

Of files, ``samples`` are drawn at random by ``seed`` and fed in the order they are stored: folders are often sorted by
class. Of code, the first ``samples`` are kept in memory: it runs once, may be endless, and every pass sees the same.
Other samples are held out (``Calibration.held_out``): nothing is fitted to them, and quality is measured on them.
Of a text model's inputs, token ids are enough: what follows from them is filled in (``text_inputs``). Nothing is ever
unpickled.

Files
  dataset         Calibration data as batches: samples are chosen, batches planned from rows of parts, and read when
                  they are due.
  encoder_decoder  Data for an encoder and the decoder that reads its states: the decoder's inputs are made by running
                  the encoder.
  file_sources    Calibration data in files: by the suffix or the contents; .npz, .npy, Polygraphy's JSON and
                  test_data_set_*.
  held_out        Samples that are held out: nothing is fitted to them, so that the quality of a result can be measured
                  on them.
  images          Pictures as calibration data: short side resized, center cropped, (value / 255 - mean) / std.
  kept_vocabulary  Token ids of data for a model with a smaller vocabulary: renumbered, and samples that hold other ids
                  left out.
  picture_labels  Classes of the pictures in a folder, from a table.
  python_sources  Calibration data from code: ``file.py:function``, iterables and callables, onnxruntime's
                  CalibrationDataReader.
  sources         The form of every source of calibration data: parts, whose shapes are known before their values are
                  read.
  text            Text as calibration data: a .txt in windows of tokens, a .jsonl with one sample per line.
  text_inputs     Inputs of a text model that follow from its token ids: filled in where the data has none of their
                  own.
  validation      Checks that arrays fit the model's inputs: names, types, ranks and sizes when opened, values when they
                  are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from snpc.errors import UserError
from snpc.remote import RemoteReader, is_url, local_copy
from snpc.runtime.calibration.dataset import (
    Calibration,
    DataPart,
    RowSelection,
    SampleRequest,
    calibration_from_source,
    pack_batches,
)
from snpc.runtime.calibration.encoder_decoder import EncoderDecoder
from snpc.runtime.calibration.file_sources import path_source
from snpc.runtime.calibration.held_out import MAX_HELD_OUT, count_held_out
from snpc.runtime.calibration.images import IMAGENET, PREPROCESS, ImageOptions
from snpc.runtime.calibration.kept_vocabulary import with_kept_vocabulary
from snpc.runtime.calibration.picture_labels import read_picture_labels
from snpc.runtime.calibration.python_sources import (
    CalibrationValue,
    find_script_function,
    load_script_function,
    script_source,
    value_source,
)
from snpc.runtime.calibration.sources import CalibrationPart, CalibrationSource, as_user_error, name_list
from snpc.runtime.calibration.text import PLAIN_TEXT, TextOptions, find_tokenizer, is_text
from snpc.runtime.calibration.text_inputs import describe_filled, find_ids, find_mask, with_filled_inputs
from snpc.runtime.calibration.validation import find_sample_axes
from snpc.types import TensorSpec

__all__ = [
    "MAX_HELD_OUT",
    "PREPROCESS",
    "Calibration",
    "DataPart",
    "EncoderDecoder",
    "ImageOptions",
    "RowSelection",
    "TextOptions",
    "as_user_error",
    "count_held_out",
    "describe_filled",
    "find_ids",
    "find_mask",
    "find_sample_axes",
    "find_script_function",
    "find_tokenizer",
    "is_text",
    "load_calibration",
    "load_script_function",
    "name_list",
    "pack_batches",
    "read_picture_labels",
]


def load_calibration(
    source: str | Path | CalibrationValue,
    inputs: Sequence[TensorSpec],
    *,
    samples: int = 128,
    batch: int = 8,
    images: ImageOptions = IMAGENET,
    seed: int = 0,
    held_out: int = MAX_HELD_OUT,
    text: TextOptions = PLAIN_TEXT,
) -> Calibration:
    """Open calibration data for a model with these ``inputs`` and check its first batches.

    ``source``: a path or ``file.py:function`` (str or Path), an iterable of dicts, a callable returning one, a
    ``CalibrationDataReader``, or one dict of arrays whose leading axis is samples. At most ``samples`` are used, in
    batches of at most ``batch``; a model with a static batch size gets batches of exactly that size. At most
    ``held_out`` other samples are kept apart to measure quality on (0: none): those that are left over, else a tenth.

    ``images``: how pictures become inputs. ``text``: how text becomes token ids; a .txt or .jsonl needs a tokenizer.
    Of a model with a smaller vocabulary, ``text.vocabulary`` says which ids of the data it has.

    Raises UserError when the data cannot be fed to the model: it says which file, input and sample, and what to do.
    An attention mask, positions, token types and empty caches are filled in where the data has token ids alone. What
    needs the values (NaN, overflow, an attention mask of zeros) is checked for the first batch here and for the
    others as they stream.
    """
    if samples < 1:
        raise UserError(f"{samples} calibration samples asked: at least one is needed (--calib-samples)")
    if batch < 1:
        raise UserError(f"calibration batch {batch}: at least one sample per batch is needed (--calib-batch)")
    if not inputs:
        raise UserError("the model has no inputs: calibration data has nowhere to go")
    request = SampleRequest(samples, batch, seed, held_out)
    opened = with_filled_inputs(_open_source(source, tuple(inputs), images, text))
    opened = with_kept_vocabulary(opened, text.vocabulary)
    calibration = calibration_from_source(opened, tuple(inputs), request)
    next(calibration.batches())
    if calibration.held_out is not None:
        next(calibration.held_out.batches())
    return calibration


def _open_source(
    source: str | Path | CalibrationValue, inputs: tuple[TensorSpec, ...], images: ImageOptions, text: TextOptions
) -> CalibrationSource:
    if not isinstance(source, str | Path):
        return value_source(source, inputs)
    if is_url(source):
        return url_source(str(source), inputs, images, text)
    script, colon, function = str(source).rpartition(":")
    if colon and script.endswith(".py"):
        return script_source(Path(script), function, inputs)
    return path_source(Path(source), inputs, images, text)


def url_source(url: str, inputs: tuple[TensorSpec, ...], images: ImageOptions, text: TextOptions) -> CalibrationSource:
    """The source at a URL. Each process that reads it makes its own copy."""
    copy = local_copy(url)
    source = path_source(copy, inputs, images, text)

    def elsewhere(part: CalibrationPart) -> CalibrationPart:
        read = RemoteReader(url, copy, part.read) if isinstance(part.read, partial) else part.read
        return replace(part, label=part.label.replace(str(copy), url, 1), read=read)

    return replace(source, label=url, parts=(elsewhere(part) for part in source.parts))
