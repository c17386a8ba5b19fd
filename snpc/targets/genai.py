"""onnxruntime-genai, where it is installed: the tokens that it generates from a folder."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from snpc.errors import UserError

GENAI_MODULE = "onnxruntime_genai"


def has_genai() -> bool:
    """Is onnxruntime-genai installed (extra ``genai``)?"""
    return importlib.util.find_spec(GENAI_MODULE) is not None


def generate_tokens(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely tokens behind ``prompt``, one after the other, by the model in ``folder``; fewer where
    the text ends. Raises UserError with the runtime's reason where it does not load or run the folder."""
    genai = importlib.import_module(GENAI_MODULE)
    try:
        model = genai.Model(str(folder))
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < count:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
    except RuntimeError as error:
        raise UserError(f"{folder}: onnxruntime-genai does not run it: {error}") from None
    return tokens
