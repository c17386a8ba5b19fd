"""The named values of every calibration batch, and programs that run on them one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from snpc.runtime.batches.program import BatchProgram, BatchSums
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
    MemoryMode,
    SpillableStore,
    memory_budget,
    model_weights,
    session_bytes,
    temporary_session,
)
from snpc.runtime.io import StoredStage
from snpc.types import AnyArray, FloatArray

if TYPE_CHECKING:
    from snpc.runtime.batches.distributed import DistributedBatchValues

HELD_ONCE_SHARE = 8  # weights that take more than one part in so many of the memory are held once only
DENSE_ENTRY = "values of the dense model"


class BatchValues(Protocol):
    """Values by name, for every batch; wherever they lie."""

    def run(self, program: BatchProgram) -> BatchSums:
        """Run a program on every batch. Raises SessionLoadError where its model does not load."""
        ...


class LocalBatchValues:
    """Values in this process: in memory up to half of ``execution.memory_limit``, the others in temporary files.

    ``batches``: the values that each batch begins with.
    """

    def __init__(self, batches: Iterable[Mapping[str, AnyArray]], execution: Execution = DEFAULT_EXECUTION) -> None:
        self.execution = execution
        self.budget = memory_budget(execution.memory_limit)
        self.store = SpillableStore(self.budget // 2)
        self.batches = [{name: self.store.keep(array) for name, array in values.items()} for values in batches]

    def run(self, program: BatchProgram) -> BatchSums:
        """See ``BatchValues``. No program with ``observe`` runs here: it names samples, which are not known."""
        assert program.observe is None
        sums = BatchSums()
        large = HELD_ONCE_SHARE * session_bytes(model_weights(program.model)) > self.budget
        memory: MemoryMode = "least" if large else "shared"
        with temporary_session(program.model, execution=self.execution, memory=memory, external=large) as run:
            for number, values in enumerate(self.batches):
                outputs = run(values)
                half = sums.odd if number % 2 else sums.even
                for name in program.sums:
                    add_up(half, name, outputs[name])
                self.batches[number] = self.advance(values, outputs, program)
        return sums

    def advance(
        self, values: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray], program: BatchProgram
    ) -> dict[str, AnyArray]:
        """The values of a batch after the program."""
        kept = {name: self.store.keep(outputs[output]) for output, name in program.kept.items()}
        if program.derive is not None:
            kept |= {name: self.store.keep(array) for name, array in program.derive(outputs).items()}
        after = {**values, **kept}
        return after if program.live is None else {name: a for name, a in after.items() if name in program.live}


def add_up(sums: dict[str, FloatArray], name: str, array: AnyArray) -> None:
    """Add to a sum in float64, in place and without a float64 copy of ``array``."""
    if name in sums:
        np.add(sums[name], array, out=sums[name])
    else:
        sums[name] = array.astype(np.float64)


class DenseValues:
    """Values of the dense model at ``names``, for every batch of the pass that measured them: the layer-wise fit reads
    them again. ``calibration``: the data of that pass. Beyond ``limit`` bytes they lie in files. Where workers measured
    them they stay: ``on_workers``."""

    def __init__(self, names: tuple[str, ...], calibration: Calibration, limit: int) -> None:
        self.names, self.calibration = names, calibration
        self.store = SpillableStore(limit)
        self.batches: list[dict[str, AnyArray]] = []
        self.on_workers: DistributedBatchValues | None = None

    def put(self, number: int, values: Mapping[str, AnyArray]) -> None:
        """Values of the batch of this number: all, or some."""
        self.take(number, {dense_name(name): self.store.keep(array) for name, array in values.items()})

    def take(self, number: int, batch: Mapping[str, AnyArray]) -> None:
        """Values under the names that batches keep them by."""
        self.batches += [{} for _ in range(number + 1 - len(self.batches))]
        self.batches[number] |= batch

    def batches_of(self, names: Collection[str]) -> list[dict[str, AnyArray]]:
        """Of every batch, the values of these names."""
        wanted = {dense_name(name) for name in names}
        return [{name: array for name, array in batch.items() if name in wanted} for batch in self.batches]

    def keep_in(self, stage: StoredStage) -> None:
        """Store them with the statistics that were measured beside them."""
        stage.put_batches(DENSE_ENTRY, self.batches)

    def restore(self, stage: StoredStage, batches: int) -> bool:
        """Take the values that were stored, mapped from their file. False where they are missing."""
        found = stage.get_batches(DENSE_ENTRY, batches)
        self.batches = found or []
        return found is not None


def dense_name(name: str) -> str:
    """The name under which a batch keeps the dense model's value ``name``."""
    return f"{name}__dense"
