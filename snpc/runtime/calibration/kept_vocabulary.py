"""Token ids of data for a model with a smaller vocabulary: renumbered, and samples that hold other ids left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.sources import CalibrationPart, CalibrationSource, part_in_memory
from snpc.runtime.calibration.text_inputs import find_ids, find_mask
from snpc.runtime.calibration.validation import find_sample_axes
from snpc.types import AnyArray, IntArray


def with_kept_vocabulary(source: CalibrationSource, kept: IntArray | None) -> CalibrationSource:
    """The source for a model whose id k is the id ``kept[k]`` of the data; None: ids stay. All samples of files are
    read at once. Raises UserError where none is left."""
    ids = find_ids(source.inputs)
    if kept is None or ids is None:
        return source
    renumbering = VocabularyFilter(source, ids.name, kept)
    if source.length_unknown:
        return replace(source, parts=renumbering.parts(), token_format="samples of kept ids alone")
    parts = list(renumbering.parts())
    if not parts:
        raise UserError(
            f"{source.label}: each of its {renumbering.seen} samples holds ids that are not in the vocabulary: keep "
            "more ids, or give shorter samples (--seq-len)"
        )
    gone = renumbering.seen - renumbering.used
    words = f"samples of kept ids alone ({gone} of {renumbering.seen} hold others and are left out)"
    return replace(source, parts=parts, token_format=", ".join(filter(None, (source.token_format, words))))


class VocabularyFilter:
    """Renumbers the ids of a source; ``seen`` and ``used`` count its samples."""

    def __init__(self, source: CalibrationSource, ids: str, kept: IntArray) -> None:
        self.source, self.ids, self.kept = source, ids, kept
        mask = find_mask(source.inputs)
        self.mask = mask.name if mask is not None else ""
        self.sampled = find_sample_axes(source.inputs).inputs
        self.seen = self.used = 0

    def parts(self) -> Iterator[CalibrationPart]:
        """The parts with samples that can be used, in memory."""
        for part in self.source.parts:
            arrays = dict(part.read(list(part.headers)))
            stored = arrays.get(self.ids)
            if stored is None:  # whoever reads the part says what it lacks
                yield part
                continue
            rows, ids = self.renumbered(stored, arrays.get(self.mask))
            self.seen, self.used = self.seen + len(rows), self.used + int(rows.sum())
            if not rows.any():
                continue
            arrays[self.ids] = ids
            if stored.ndim > 1:
                arrays = {n: a[rows] if n in self.sampled and len(a) == len(rows) else a for n, a in arrays.items()}
            yield replace(part_in_memory(part.label, arrays), filled=part.filled)

    def renumbered(self, stored: AnyArray, mask: AnyArray | None) -> tuple[AnyArray, AnyArray]:
        """([samples] can it be used, the ids in the new numbers). Padding is 0, whatever its id was."""
        ids = np.asarray(stored)
        shown = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else np.asarray(mask) != 0
        places = np.minimum(np.searchsorted(self.kept, ids), len(self.kept) - 1)
        known = (self.kept[places] == ids) | ~shown
        return np.asarray(np.atleast_2d(known).all(1)), np.where(shown, places, 0).astype(ids.dtype)
