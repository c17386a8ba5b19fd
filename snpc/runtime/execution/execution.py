"""The settings of everything that runs a model, as one value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Literal

from snpc.graph import PassObserver
from snpc.runtime.execution.progress import SILENT, ItemT, Progress, track
from snpc.runtime.io import NOT_STORED, StoredStage, WorkFolder

AlgebraName = Literal["numpy", "torch"]


@dataclass(frozen=True)
class Execution:
    """How models are run.

    ``provider``: onnxruntime's execution provider, in short (``cpu``, ``cuda``, ``cuda:1``) or by its full name.
    ``threads``: intra-op threads; None leaves the number to the runtime. ``memory_limit``: bytes of statistics and
    activations in memory, the others lie in temporary files, and of the weights in a session, beyond which a model is
    run segment by segment; None: half of the free memory. ``progress`` hears
    of every stage that may take long. ``observer`` is called after each graph pass over a model that is
    written or built. ``executor``: workers that passes over calibration data, trials and targets are spread over, as of
    ``concurrent.futures`` or Dask (``Client.get_executor()``); None: this process does all. ``work`` holds the results
    of finished stages, for a run that is killed and started again. ``algebra`` solves the closed forms:
    numpy, or torch (on a GPU where torch finds one), which has to be imported as ``snpc.torch``.
    """

    provider: str = "cpu"
    threads: int | None = None
    memory_limit: int | None = None
    progress: Progress = field(default=SILENT, repr=False)
    observer: PassObserver | None = field(default=None, repr=False)
    executor: Executor | None = field(default=None, repr=False)
    work: WorkFolder | None = None
    algebra: AlgebraName = "numpy"

    @property
    def on_cpu(self) -> bool:
        return self.provider.lower() in ("cpu", "cpuexecutionprovider")

    @property
    def alone(self) -> Execution:
        """The same in this process alone, silent: what a worker is sent."""
        return replace(self, progress=SILENT, observer=None, executor=None, work=None)

    def track(self, name: str, batches: Iterable[ItemT], total: float) -> Iterator[ItemT]:
        """The same batches, ``total`` of them, as a stage of ``progress`` that advances by one after each."""
        return track(self.progress, name, batches, total)

    def stored_stage(self, name: str, *depends: object) -> StoredStage:
        """The results of a stage that depends on these values and on how models are run: see ``WorkFolder.stage``. The
        memory limit is left out, so that a run that took too much memory resumes with a lower one."""
        if self.work is None:
            return NOT_STORED
        return self.work.stage(name, self.provider, self.threads, self.algebra, *depends)


DEFAULT_EXECUTION = Execution()
