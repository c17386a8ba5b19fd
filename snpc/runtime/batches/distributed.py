"""Batches whose values lie on the workers of an executor: what moves is programs and sums, never values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from snpc.errors import UserError
from snpc.runtime.batches.block_worker import (
    MODEL_FILE,
    Block,
    FileContents,
    ProgramReference,
    RunReference,
    StateMissing,
    SumKey,
    forget_run,
    merge_sums,
    run_block,
    totals,
)
from snpc.runtime.batches.program import BatchProgram, BatchSums
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Advance, Execution, LostWorker, Reduction, ignore_advance, save_runnable, workers_of
from snpc.temporary import TemporaryFolder
from snpc.types import FloatArray

BLOCKS_PER_WORKER = 4  # more blocks are spread more evenly, and cost more tasks
MAX_TRIES = 4  # of one program, where workers die


@dataclass
class Traffic:
    """Bytes that passed between this process and the workers: of the ``programs``, each counted once however many
    workers take it, and of the ``sums`` that came back. ``replays``: how often workers were sent all programs."""

    programs: int = 0
    sums: int = 0
    replays: int = 0


class DistributedBatchValues:
    """``BatchValues`` on the workers of ``execution.executor``: each keeps the values of its blocks of batches, in
    files, and its session. A program and what it adds up are all that moves. Sums do not depend on the workers.

    A block whose worker is gone is computed again from the first program on, by another one.
    """

    def __init__(self, calibration: Calibration, executor: Executor, execution: Execution) -> None:
        self.workers = workers_of(executor)
        self.execution = execution
        self.folder = TemporaryFolder()
        shared = str(self.folder.path) if self.workers.shares_files else None
        self.reference = RunReference(uuid4().hex, shared, execution.alone, self.workers.on_each_machine)
        self.blocks = split_into_blocks(calibration, self.workers.count)
        self.programs: list[ProgramReference] = []
        self.numbers = itertools.count()
        self.pinned: frozenset[int] = frozenset()
        self.traffic = Traffic()

    def branch(self) -> DistributedBatchValues:
        """Values that begin where these are, and go on without changing them."""
        if self.programs:
            self.pinned |= {self.programs[-1].number}
        other = copy(self)
        other.programs = list(self.programs)
        return other

    def run(self, program: BatchProgram, advance: Advance = ignore_advance) -> BatchSums:
        """See ``BatchValues``. ``advance`` hears how many batches more are done."""
        self.programs.append(self.write(program))
        anew: frozenset[int] = frozenset()
        for _ in range(MAX_TRIES):
            try:
                return by_parity(self.attempt(anew, advance))
            except LostWorker as lost:
                anew |= lost.tasks
            except StateMissing:
                anew = frozenset(range(len(self.blocks)))
            self.traffic.replays += 1
        raise UserError(
            f"workers were lost {MAX_TRIES} times in one step, and their work with them: look at their logs, and "
            "whether they run out of memory"
        )

    def write(self, program: BatchProgram) -> ProgramReference:
        """The program with its model in a file."""
        number, before = next(self.numbers), self.programs[-1] if self.programs else None
        folder = self.folder.path / f"program-{number}"
        folder.mkdir()
        save_runnable(program.model, folder / MODEL_FILE)
        outdated = before.before if before is not None and before.before not in self.pinned else None
        return ProgramReference(
            number,
            before.number if before is not None else -1,
            str(folder),
            program.sums,
            program.kept,
            program.live,
            program.observe,
            program.derive,
            outdated,
            self.pinned,
        )

    def attempt(self, anew: frozenset[int], advance: Advance) -> Mapping[SumKey, FloatArray]:
        """The sums of the last program. ``anew``: the blocks that are sent all that it takes to begin anew."""
        contents = {program.number: self.content(program, bool(anew)) for program in self.sent(bool(anew))}
        tasks = []
        for block in self.blocks:
            whole = block.index in anew
            programs = self.sent(whole)
            data = block if whole or len(self.programs) == 1 else block.without_data()
            tasks.append((self.reference, data, programs, [contents[program.number] for program in programs]))
        found: Mapping[SumKey, FloatArray] = self.workers.run(
            run_block,
            tasks,
            Reduction(merge_sums, totals),
            lambda number: advance(0 if anew else len(self.blocks[number].calibration.batch_plan)),
        )
        self.traffic.sums += sum(array.nbytes for array in found.values())
        return found

    def sent(self, whole: bool) -> list[ProgramReference]:
        """The programs that a task takes: the last one, or all."""
        return self.programs if whole else self.programs[-1:]

    def content(self, program: ProgramReference, again: bool) -> Any:
        """What workers are sent of a program's files; None where they are expected to find them."""
        if self.workers.shares_files and not again:
            return None
        files: FileContents = {path.name: path.read_bytes() for path in Path(program.folder).iterdir()}
        self.traffic.programs += sum(map(len, files.values()))
        return self.workers.send(files)

    def close(self) -> None:
        """Let workers drop what they keep."""
        self.workers.broadcast(forget_run, self.reference.key)
        self.folder.delete()


def by_parity(found: Mapping[SumKey, FloatArray]) -> BatchSums:
    """Those of even and of odd batches apart."""
    sums = BatchSums()
    for (name, odd), array in found.items():
        (sums.odd if odd else sums.even)[name] = array
    return sums


def split_into_blocks(calibration: Calibration, workers: int) -> list[Block]:
    """Blocks of neighboring batches, so many that each worker has several. Their number changes no sum: the sizes are
    powers of two, as the parts of a ``PairwiseSum``."""
    batches = len(calibration.batch_plan)
    size = 1 << int(math.log2(max(batches // (BLOCKS_PER_WORKER * workers), 1)))
    return [
        Block(index, first, calibration.slice(first, first + size))
        for index, first in enumerate(range(0, batches, size))
    ]
