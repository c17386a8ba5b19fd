"""Trials on the workers of an executor: each worker holds the segments of the model and the samples, so that a trial
moves the weights that it changes, and one number comes back."""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from snpc.errors import UserError
from snpc.runtime.evaluation import OutputMetrics
from snpc.runtime.execution import (
    Advance,
    Execution,
    LostWorker,
    Reduction,
    RunFunction,
    SpillableStore,
    available_cores,
    ignore_advance,
    memory_budget,
    open_run,
    workers_of,
)
from snpc.runtime.sensitivity.segmented_model import SavedSegment, SegmentedModel, SegmentSession
from snpc.runtime.statistics import TokenMask
from snpc.temporary import TemporaryFolder
from snpc.types import AnyArray, Feeds

TRIALS_AT_ONCE = 4  # per worker: the weights of so many are on their way or wait
MAX_TRIAL_RUNS = 4  # of the same trials, where workers die
MAX_MODELS = 2  # whose sessions a process keeps
TRIAL_WEIGHTS_FILE = "weights.pickle"


@dataclass(frozen=True)
class TrialSamples:
    """One batch that trials run on, which tokens of its outputs count, and how these are judged."""

    feeds: Feeds
    token_masks: Mapping[str, TokenMask]
    metrics: OutputMetrics


@dataclass(frozen=True)
class Trial:
    """New contents ``arrays`` of constants that are used in the segments from ``first`` to ``last``, on the samples of
    pool number ``pool``."""

    first: int
    last: int
    pool: int
    arrays: Mapping[str, AnyArray]


@dataclass(frozen=True)
class TrialModel:
    """What a worker needs for all trials. ``folder``: of the driver. ``on_each_machine``: trials that run on one
    machine at once."""

    key: str
    folder: str
    segments: tuple[SavedSegment, ...]
    outputs: tuple[str, ...]
    pools: tuple[tuple[TrialSamples, ...], ...]
    execution: Execution
    on_each_machine: int


class TrialWorkers:
    """Runs trials on the workers of an executor."""

    def __init__(
        self,
        executor: Executor,
        model: SegmentedModel,
        folder: Path,
        pools: tuple[tuple[TrialSamples, ...], ...],
        execution: Execution,
    ) -> None:
        self.executor = executor
        workers = workers_of(executor)
        weights = [dict(session.weights) for session in model.segments]
        (folder / TRIAL_WEIGHTS_FILE).write_bytes(pickle.dumps(weights, protocol=5))
        alone, on_each_machine = execution.alone, workers.on_each_machine
        sent = TrialModel(uuid4().hex, str(folder), model.saved, model.outputs, pools, alone, on_each_machine)
        self.sent_model = workers.send(sent)
        self.sent_files = None if workers.shares_files else workers.send(read_files(folder))

    def changes(self, trials: Sequence[Trial], advance: Advance = ignore_advance) -> list[float]:
        """The change of the outputs in each trial: the mean over its samples."""
        workers = workers_of(self.executor)
        # Neighbors go to one worker. Trials of early groups run longer, so each worker takes early and late ones.
        order = [k for first in range(workers.count) for k in range(first, len(trials), workers.count)]
        tasks = [(self.sent_model, self.sent_files, trials[k]) for k in order]
        for _ in range(MAX_TRIAL_RUNS):
            try:
                found = workers.run(run_trials, tasks, Reduction(joined_lists, list), lambda number: advance(1))
            except LostWorker:
                workers = workers_of(self.executor)
                continue
            return [change for _, change in sorted(zip(order, found, strict=True))]
        raise UserError(f"workers were lost {MAX_TRIAL_RUNS} times in the same trials: do they run out of memory?")

    @property
    def at_once(self) -> int:
        """How many trials should be given to ``changes`` at a time."""
        return TRIALS_AT_ONCE * workers_of(self.executor).count


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def joined_lists(*lists: list[float]) -> list[float]:
    return [item for items in lists for item in items]


def can_be_sent(value: Any) -> bool:
    """A function of the user's may not be known elsewhere."""
    try:
        pickle.dumps(value)
    except Exception:  # pickle raises many kinds
        return False
    return True


# -- on the worker ---------------------------------------------------------------------------------------------------


def run_trials(model: TrialModel, files: Mapping[str, bytes] | None, trial: Trial) -> list[float]:
    """The change of the outputs in one trial, as a list of one."""
    return [model_in_process(model, files).change(trial)]


def model_in_process(model: TrialModel, files: Mapping[str, bytes] | None) -> LoadedTrialModel:
    """The sessions of this process."""
    with _MODELS_LOCK:
        if model.key not in _MODELS:
            _MODELS[model.key] = LoadedTrialModel(model, files)
        _MODELS.move_to_end(model.key)
        while len(_MODELS) > MAX_MODELS:
            _MODELS.popitem(last=False)
        return _MODELS[model.key]


class LoadedTrialModel:
    """The segments as sessions, and the dense model's values for each pool, which are computed when they are needed."""

    def __init__(self, model: TrialModel, files: Mapping[str, bytes] | None) -> None:
        self.temporary, folder = None, Path(model.folder)
        if files is not None:
            self.temporary = TemporaryFolder()
            folder = self.temporary.path
            for name, content in files.items():
                (folder / name).write_bytes(content)
        elif not (folder / TRIAL_WEIGHTS_FILE).is_file():
            raise UserError(f"a worker does not see {folder}: workers on other machines are those of Dask (--cluster)")
        threads = model.execution.threads or max(available_cores() // model.on_each_machine, 1)
        self.model, self.execution = model, replace(model.execution, threads=threads)
        weights: list[dict[str, AnyArray]] = pickle.loads((folder / TRIAL_WEIGHTS_FILE).read_bytes())
        sessions = tuple(self.session(folder, saved, w) for saved, w in zip(model.segments, weights, strict=True))
        self.segments = SegmentedModel(sessions, {}, model.outputs)
        self.store = SpillableStore(memory_budget(model.execution.memory_limit) // model.on_each_machine)
        self.states: dict[int, list[list[dict[str, AnyArray]]]] = {}
        self.lock = threading.Lock()

    def session(self, folder: Path, saved: SavedSegment, weights: Mapping[str, AnyArray]) -> SegmentSession:
        def run_of(name: str) -> RunFunction:
            return open_run(folder / name, execution=self.execution, memory="shared")

        fixed = run_of(saved.fixed)
        return SegmentSession(saved.segment, fixed, run_of(saved.variable) if saved.variable else fixed, weights)

    def change(self, trial: Trial) -> float:
        changes: list[float] = []
        with self.lock:
            if trial.pool not in self.states:
                feeds = (samples.feeds for samples in self.model.pools[trial.pool])
                self.states[trial.pool] = [self.segments.dense_states(each, self.store) for each in feeds]
        for samples, states in zip(self.model.pools[trial.pool], self.states[trial.pool], strict=True):
            outputs = self.segments.outputs_between(states, trial.first, trial.last, trial.arrays)
            changes.append(samples.metrics.change(states[-1], outputs, samples.token_masks))
        return float(np.mean(changes))


_MODELS_LOCK = threading.Lock()
_MODELS: OrderedDict[str, LoadedTrialModel] = OrderedDict()
