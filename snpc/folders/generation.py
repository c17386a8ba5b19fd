"""Generation from a written folder: its runtime must make the tokens that its model stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snpc.errors import CheckFailed, UserError
from snpc.folders.model_folder import ModelFolder
from snpc.runtime.evaluation import RunningDecoder, decoder_interface, likelihood_gap
from snpc.runtime.execution import Execution, file_session
from snpc.runtime.io import load
from snpc.targets import generate_tokens, has_genai

PROMPT_IDS, GENERATED = (3, 5, 7, 9, 11, 2), 8  # ids that every vocabulary has, and tokens behind them
GAP_TOLERANCE = 1e-2  # of the logits' size: by how much a generated token may miss the most likely one


def check_generation(source: ModelFolder, written: Path, execution: Execution) -> str:
    """What onnxruntime-genai generates from the folder ``written`` against onnxruntime, in words; "" where it is not
    installed, or the folder is not one of its. Raises CheckFailed where it makes other tokens, or does not run the
    folder, but does so with the original one."""
    if not (source.says_cache_widths and has_genai()):
        return ""
    reason = generation_fault(written, written / source.model, execution)
    if not reason:
        return "onnxruntime-genai generates the tokens that onnxruntime finds most likely"
    original = generation_fault(source.path, source.model_path, execution)
    if original:
        return f"generation was not compared: of the original folder too, {original}"
    raise CheckFailed(f"{written}: {reason}; the original folder generates")


def generation_fault(folder: Path, model: Path, execution: Execution) -> str:
    """Why tokens that are generated from the folder are not those of its model; "" where they are."""
    interface = decoder_interface(load(model))
    if interface is None:
        return "its inputs are of unknown kinds"
    try:
        tokens: Sequence[int] = generate_tokens(folder, PROMPT_IDS, GENERATED)
        with file_session(model, execution) as run:
            gap = likelihood_gap(RunningDecoder(interface, run), PROMPT_IDS, tokens)
    except UserError as error:
        return str(error)
    return "" if gap <= GAP_TOLERANCE else f"onnxruntime-genai generates {list(tokens)}, which onnxruntime does not"
