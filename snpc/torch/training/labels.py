"""Labels of calibration data: one whole number, or a row of them, per sample of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration, as_user_error, name_list
from snpc.types import AnyArray, IntArray

LABELS_KEY = "labels"
ACCEPTED_LABEL_FILES = ".npy, .npz (key 'labels', or the only one), or text with one whole number per line"


def load_labels(source: Path | AnyArray, data: Calibration) -> IntArray:
    """[samples of the whole source, ...]: the class of each sample, or of each position; negative: no class.

    ``source``: an array, or a file: .npy, .npz, or text with a number per line. Raises UserError for anything else, and
    where the numbers of labels and samples differ.
    """
    label = str(source) if isinstance(source, Path) else "labels"
    array = _read_label_file(source) if isinstance(source, Path) else np.asarray(source)
    if array.ndim == 0 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{label}: it holds {array.dtype} of shape {list(array.shape)}: labels are whole numbers")
    samples = data.available
    if samples is None:
        samples = 1 + max(int(rows.sample_ids.max()) for batch in data.batch_plan for rows in batch)
        mismatch = len(array) < samples
    else:
        mismatch = len(array) != samples
    if mismatch:
        raise UserError(
            f"{label}: {len(array)} labels for {samples} samples in {data.source}: give one for each, in order"
        )
    return array.astype(np.int64)


def _read_label_file(path: Path) -> AnyArray:
    if not path.is_file():
        raise UserError(f"{path}: no such file; labels are {ACCEPTED_LABEL_FILES}")
    with as_user_error(str(path), f"labels are {ACCEPTED_LABEL_FILES}", OSError, ValueError, EOFError):
        if path.suffix == ".npy":
            array: AnyArray = np.load(path, allow_pickle=False)
            return array
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                names = list(arrays)
                name = LABELS_KEY if LABELS_KEY in names else names[0] if len(names) == 1 else None
                if name is None:
                    raise UserError(f"{path}: no array is called '{LABELS_KEY}'; it holds {name_list(names)}")
                labels: AnyArray = arrays[name]
                return labels
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
