"""What a worker does: it runs programs on blocks of batches, and keeps the values of these batches in files.

The files of a run lie in the driver's folder where the worker sees it, else in a temporary folder of the worker's
process. A worker that lacks the values of a block replays the programs before, if it was sent them; if not, it says so
(``StateMissing``), and the driver sends all.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from snpc.runtime.batches.pairwise_sum import PairwiseSum, SumNode
from snpc.runtime.batches.program import Derivation, Observer
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution, RunFunction, available_cores, open_run
from snpc.temporary import TemporaryFolder
from snpc.types import AnyArray, FloatArray

FileContents = Mapping[str, bytes]  # by file name
SumKey = tuple[str, int]  # name of the sum, 0 for even and 1 for odd batches

MODEL_FILE = "model.onnx"
MAX_RUNS = 2  # whose sessions and folders a process keeps
INLINE_BYTES = 4096  # smaller arrays lie in the file that lists the values of a block


class StateMissing(Exception):
    """This worker has neither the values of the block nor what it takes to compute them again."""


@dataclass(frozen=True)
class RunReference:
    """The run that a task belongs to. ``folder``: of the driver, None: not to be shared. ``on_each_machine``: tasks
    that run on one machine at once."""

    key: str
    folder: str | None
    execution: Execution
    on_each_machine: int


@dataclass(frozen=True)
class Block:
    """Neighboring batches, from number ``first`` of the whole data on. ``calibration``: these alone; not ``complete``:
    without what is in the driver's memory, which was sent before."""

    index: int
    first: int
    calibration: Calibration
    complete: bool = True

    def without_data(self) -> Block:
        """The same for a worker that has the values."""
        bare = self.calibration.without_data()
        return self if bare is self.calibration else replace(self, calibration=bare, complete=False)


@dataclass(frozen=True)
class ProgramReference:
    """A ``BatchProgram`` whose model lies in ``folder`` of the driver; its other fields as they are.

    ``before``: number of the program whose values it runs on, -1: those that the batches begin with. ``outdated``:
    number of a program whose values nothing reads any more; ``pinned``: those of programs that may be read later.
    """

    number: int
    before: int
    folder: str
    sums: tuple[str, ...]
    kept: Mapping[str, str]
    live: frozenset[str] | None
    observe: Observer | None
    derive: Derivation | None
    outdated: int | None
    pinned: frozenset[int]


@dataclass
class BlockSums:
    """The sums of some blocks, as far as neighbors are there to be added."""

    parts: dict[SumKey, PairwiseSum] = field(default_factory=dict)

    def add(self, key: SumKey, number: int, array: AnyArray) -> None:
        self.parts.setdefault(key, PairwiseSum()).push(SumNode(0, number, array))


def merge_sums(*neighbors: BlockSums) -> BlockSums:
    """The sums of neighboring blocks, in their order."""
    merged = neighbors[0]
    for other in neighbors[1:]:
        for key, part in other.parts.items():
            merged.parts.setdefault(key, PairwiseSum()).extend(part.nodes)
    return merged


def totals(merged: BlockSums) -> dict[SumKey, FloatArray]:
    """The sums of all blocks."""
    return {key: part.total() for key, part in merged.parts.items()}


def run_block(
    reference: RunReference,
    block: Block,
    programs: Sequence[ProgramReference],
    contents: Sequence[FileContents | None],
) -> BlockSums:
    """The sums of the last of ``programs`` over a block, whose values are kept for the next one.

    ``programs``: the last one alone, or all up to it. ``contents``: the files of each, None where the worker is
    expected to see the driver's folder. Raises StateMissing.
    """
    run = run_in_process(reference)
    start = next((k for k in range(len(programs) - 1, -1, -1) if run.has_values(block, programs[k].before)), None)
    if start is None:
        raise StateMissing(f"values of block {block.index} before program {programs[-1].number}")
    sums = BlockSums()
    for program, content in zip(programs[start:], contents[start:], strict=True):
        sums = run.execute(program, content, block)
    return sums


def forget_run(key: str) -> None:
    """Drop the sessions and files of a run that ended."""
    with _RUNS_LOCK:
        _RUNS.pop(key, None)


def run_in_process(reference: RunReference) -> WorkerRun:
    """What this process holds of a run."""
    with _RUNS_LOCK:
        run = _RUNS.get(reference.key) or WorkerRun(reference)
        _RUNS[reference.key] = run
        _RUNS.move_to_end(reference.key)
        while len(_RUNS) > MAX_RUNS:
            _RUNS.popitem(last=False)
        return run


class WorkerRun:
    """The sessions and values of one run in this process."""

    def __init__(self, reference: RunReference) -> None:
        shared = reference.folder is not None and Path(reference.folder).is_dir()
        self.temporary = None if shared else TemporaryFolder()
        self.folder = Path(reference.folder or "") if self.temporary is None else self.temporary.path
        threads = reference.execution.threads or max(available_cores() // reference.on_each_machine, 1)
        self.execution = replace(reference.execution, threads=threads)
        self.lock = threading.Lock()
        self.session: tuple[int, RunFunction] | None = None

    # -- programs

    def session_of(self, program: ProgramReference, content: FileContents | None) -> RunFunction:
        """The session of a program; the one before is closed as soon as no task uses it."""
        with self.lock:
            if self.session is None or self.session[0] != program.number:
                self.session = None
                path = self.model_path(program, content)
                self.session = program.number, open_run(path, execution=self.execution, memory="shared")
            return self.session[1]

    def model_path(self, program: ProgramReference, content: FileContents | None) -> Path:
        folder = Path(program.folder)
        if self.temporary is None and (folder / MODEL_FILE).is_file():
            return folder / MODEL_FILE
        own = self.folder / f"program-{program.number}"
        if not own.is_dir():
            if content is None:
                raise StateMissing(f"program {program.number}")
            own.mkdir()
            for name, data in content.items():
                (own / name).write_bytes(data)
        return own / MODEL_FILE

    def execute(self, program: ProgramReference, content: FileContents | None, block: Block) -> BlockSums:
        """Run one program on the values of a block that the program before left, and keep what it leaves."""
        session, sums, after = self.session_of(program, content), BlockSums(), []
        for number, values in enumerate(self.values(block, program.before)):
            feeds = {name: loaded(value) for name, value in values.items()}
            outputs = session(feeds)
            observed: Mapping[str, AnyArray] = {name: outputs[name] for name in program.sums}
            if program.observe is not None:
                observed = program.observe(outputs, block.calibration, number)
            whole = block.first + number
            for name, array in observed.items():
                sums.add((name, whole % 2), whole // 2, array)
            after.append(self.stored(advance(values, outputs, program), block, program.number))
        self.save_values(after, block, program)
        return sums

    # -- values: those that program number k leaves are listed in the file values-k of the block's folder

    def block_folder(self, block: Block) -> Path:
        return self.folder / f"block-{block.index}"

    def has_values(self, block: Block, number: int) -> bool:
        """Are there the values that program ``number`` leaves? -1: those that the batches begin with."""
        return block.complete if number < 0 else (self.block_folder(block) / f"values-{number}").is_file()

    def values(self, block: Block, number: int) -> Iterable[Values]:
        """By batch: the values that program ``number`` left."""
        if number < 0:
            return (dict(feeds) for feeds in block.calibration.batches())
        return read_list(self.block_folder(block) / f"values-{number}")

    def stored(self, values: Values, block: Block, number: int) -> Values:
        """The values in files; those that lie in one already stay there."""
        folder = self.block_folder(block)
        folder.mkdir(exist_ok=True)
        return {name: store(value, folder, number) for name, value in values.items()}

    def save_values(self, batches: Sequence[Values], block: Block, program: ProgramReference) -> None:
        """List the values that a program left, and delete outdated ones. Those of the program before stay: a worker
        that dies now leaves its task to another one."""
        folder = self.block_folder(block)
        write_list(batches, folder / f"values-{program.number}")
        old = folder / f"values-{program.outdated}"
        if old.is_file():
            lists = [folder / f"values-{k}" for k in (program.before, program.number, *program.pinned)]
            used = {path for listed in lists if listed.is_file() for path in paths_in(read_list(listed))}
            for path in set(paths_in(read_list(old))) - used:
                path.unlink(missing_ok=True)
            old.unlink(missing_ok=True)


_RUNS_LOCK = threading.Lock()
_RUNS: OrderedDict[str, WorkerRun] = OrderedDict()


def advance(values: Values, outputs: Mapping[str, AnyArray], program: ProgramReference) -> Values:
    """The values of a batch after the program."""
    kept = {name: outputs[output] for output, name in program.kept.items()}
    if program.derive is not None:
        kept |= program.derive(outputs)
    after: Values = {**values, **kept}
    return after if program.live is None else {name: value for name, value in after.items() if name in program.live}


# -- arrays in files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArray:
    """An array in a file."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def load(self) -> AnyArray:
        array: AnyArray = np.memmap(self.path, self.dtype, "r", shape=self.shape)
        return array


Stored = AnyArray | StoredArray
Values = dict[str, Stored]  # of one batch, by name


def store(value: Stored, folder: Path, number: int) -> Stored:
    """The array in a file of ``folder``; small ones and text as they are."""
    if isinstance(value, StoredArray) or value.nbytes < INLINE_BYTES or value.dtype.hasobject:
        return value
    path = folder / f"{number}-{uuid4().hex}"
    np.ascontiguousarray(value).tofile(path)
    return StoredArray(path, value.dtype, value.shape)


def loaded(value: Stored) -> AnyArray:
    return value.load() if isinstance(value, StoredArray) else value


def write_list(batches: Sequence[Values], path: Path) -> None:
    """All or nothing: another process may read it."""
    temporary = path.with_name(f"{path.name}-{uuid4().hex}")
    temporary.write_bytes(pickle.dumps(list(batches)))
    temporary.replace(path)


def read_list(path: Path) -> list[Values]:
    batches: list[Values] = pickle.loads(path.read_bytes())
    return batches


def paths_in(batches: Iterable[Values]) -> Iterator[Path]:
    return (value.path for batch in batches for value in batch.values() if isinstance(value, StoredArray))
