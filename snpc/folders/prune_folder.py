"""The one call for folders: a folder in, a folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from snpc.errors import UserError
from snpc.folders.model_folder import find_model_folder
from snpc.folders.output_folder import PrunedFolder, open_output_folder
from snpc.pipeline import PruneOptions, prune
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution

if TYPE_CHECKING:
    from typing_extensions import Unpack


TOKENIZER_ADVICE = (
    "{folder}: its tokenizer gives the old ids, and no runtime maps them to those of a smaller vocabulary: prune the "
    "file alone (snpc prune {model} --vocabulary IDS), and map ids by its OUTPUT.vocabulary.json"
)


def prune_folder(
    folder: Path | str,
    path: Path | str,
    *,
    file: str | None = None,
    calibration: Calibration | Any = None,
    tokens: str | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    **options: Unpack[PruneOptions],
) -> PrunedFolder:
    """Prune the model of ``folder``, and write it to the new folder ``path`` with what goes with it: configurations
    that say its widths, tokenizer, other models.

    ``file``: the model that is cut, by its path in the folder; None: the one that genai_config.json names, or the only
    one. Decoders with the same weights, with and without a past, are cut by one plan. Everything else is as in
    ``prune``, but that companions are found, and that caches may get narrower where the folder has a genai_config.json,
    which says their width (``prune_kv_cache=False`` keeps them).

    Raises UserError where there are several models and none is named, and where ``path`` is not empty.
    """
    source = find_model_folder(Path(folder), file)
    if options.get("vocabulary") is not None:
        raise UserError(TOKENIZER_ADVICE.format(folder=source.path, model=source.model_path))
    options.setdefault("prune_kv_cache", source.says_cache_widths)
    if "companions" in options:
        raise UserError("companions are for files: those of a folder are found")
    options["companions"] = source.companion_paths
    with open_output_folder(source, Path(path)) as place:
        result = prune(
            source.model_path,
            place.model_path,
            calibration=calibration,
            tokens=tokens,
            execution=execution,
            **options,
        )
        return place.publish(result, execution)
