"""The one call for folders: a folder in, a folder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snpc.errors import UserError
from snpc.folders.model_folder import ModelFolder, find_model_folder, single_model_folder
from snpc.folders.output_folder import OutputFolder, PrunedFolder, open_output_folder
from snpc.folders.parts import ModelParts
from snpc.pipeline import PrunedModel, PruneOptions, prune
from snpc.runtime.calibration import Calibration, TextOptions, find_tokenizer, load_calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution

if TYPE_CHECKING:
    from typing_extensions import Unpack


TOKENIZER_ADVICE = (
    "{folder}: its tokenizer gives the old ids, and no runtime maps them to those of a smaller vocabulary: prune the "
    "file alone (snpc prune {model} --vocabulary IDS), and map ids by its OUTPUT.vocabulary.json"
)

PART_ADVICE = "{folder}: {option} is for one model, and encoder and decoder are cut: name one (--file {encoder})"


def prune_folder(
    folder: Path | str,
    path: Path | str,
    *,
    file: str | None = None,
    calibration: Calibration | Any = None,
    tokens: str | None = None,
    precisions: Sequence[str] = (),
    execution: Execution = DEFAULT_EXECUTION,
    **options: Unpack[PruneOptions],
) -> PrunedFolder:
    """Prune the model of ``folder``, and write it to the new folder ``path`` with what goes with it: configurations
    that say its widths, tokenizer, other models.

    ``file``: the model that is cut, by its path in the folder; None: the one that genai_config.json names, or the only
    one, or an encoder and its decoder. Decoders with the same weights, with and without a past, are cut by one plan.
    Everything else is as in ``prune``, but that companions are found, and that caches may get narrower where the folder
    has a genai_config.json, which says their width (``prune_kv_cache=False`` keeps them).

    ``folder`` may be a model file: then what tools read beside it goes with it (config.json, the tokenizer), and the
    model becomes ``onnx/model.onnx``; one part of several keeps its name. ``precisions``: at which the pruned models
    are written, too, in the names of transformers.js: "fp16", "q8" (``model_quantized.onnx``), "int8", "uint8", "q4",
    "q4f16", "bnb4"; models lie in ``onnx`` then. Each file is run and compared
    (``PrunedFolder.precisions``).

    Encoder and decoder are cut one after the other, each by what ``options`` say of its own units, MACs or outputs.
    ``calibration`` has the encoder's inputs and ``decoder_input_ids``; the decoder is fitted to the states of the
    pruned encoder. ``PrunedFolder.whole`` says what holds of both together.

    Raises UserError where there are several models and none is named, and where ``path`` is not empty.
    """
    source = find_source(Path(folder), file, options)
    if options.get("vocabulary") is not None:
        raise UserError(TOKENIZER_ADVICE.format(folder=source.path, model=source.model_path))
    options.setdefault("prune_kv_cache", source.says_cache_widths)
    options["companions"] = source.companion_paths
    with open_output_folder(source, Path(path), precisions) as place:
        if source.encoder is not None:
            check_part_options(source, {"tokens": tokens, "last_logits": options.get("last_logits")})
            return prune_parts(source, place, calibration, execution, options)
        result = prune(
            source.model_path,
            place.model_path,
            calibration=calibration,
            tokens=tokens,
            execution=execution,
            **options,
        )
        return place.publish(result, execution)


def find_source(path: Path, file: str | None, options: PruneOptions) -> ModelFolder:
    """What ``path``, a folder or a model, holds. Raises UserError where ``file`` is given with a model, or companions
    with a folder."""
    if path.is_dir():
        if "companions" in options:
            raise UserError("companions are for files: those of a folder are found")
        return find_model_folder(path, file)
    if file is not None:
        raise UserError(f"--file names a model of a folder, and {path} is none")
    return single_model_folder(path, options.get("companions", ()))


def check_part_options(source: ModelFolder, options: Mapping[str, Any]) -> None:
    """Raises UserError where an option that is given is for one model, and encoder and decoder are cut."""
    given = next((name for name, value in options.items() if value not in (None, False, ())), None)
    if given is not None and source.encoder is not None:
        raise UserError(PART_ADVICE.format(folder=source.path, option=given, encoder=source.encoder))


def prune_parts(
    source: ModelFolder, place: OutputFolder, calibration: Any, execution: Execution, options: PruneOptions
) -> PrunedFolder:
    """``prune_folder`` of an encoder and its decoder."""
    parts = ModelParts.of(source)
    if calibration is not None and not isinstance(calibration, Calibration):
        text = TextOptions(find_tokenizer(source.model_path))
        calibration = load_calibration(calibration, parts.inputs, text=text)

    def prune_part(model: Path, path: Path, data: Calibration | None) -> PrunedModel:
        own: PruneOptions = {**options, "companions": source.companion_paths if model == source.model_path else ()}
        return prune(model, path, calibration=data, execution=execution, **own)

    if calibration is not None:
        parts.check(calibration)
    pruned = parts.prune(place.encoder_path, place.model_path, calibration, prune_part, execution)
    return place.publish(pruned.decoder, execution, pruned.encoder, pruned.whole)
