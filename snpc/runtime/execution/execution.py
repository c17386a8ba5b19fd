"""The settings of everything that runs a model, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from snpc.graph import PassObserver
from snpc.types import Feeds

BatchProgress = Callable[[Iterable[Feeds]], Iterable[Feeds]]  # yields the same batches, and shows how many were read

AlgebraName = Literal["numpy", "torch"]


@dataclass(frozen=True)
class Execution:
    """How models are run.

    ``provider``: onnxruntime's execution provider, in short (``cpu``, ``cuda``, ``trt``) or by its full name.
    ``threads``: intra-op threads; None leaves the number to the runtime. ``memory_limit``: bytes of statistics and
    activations in memory, the others lie in temporary files; None: half of the free memory. ``progress`` wraps the
    batches of each pass over calibration data. ``observer`` is called after each graph pass over a model that is
    written or built. ``algebra`` solves the closed forms: numpy, or torch (on a GPU where torch finds one), which has to
    be imported as ``snpc.torch``.
    """

    provider: str = "cpu"
    threads: int | None = None
    memory_limit: int | None = None
    progress: BatchProgress | None = field(default=None, repr=False)
    observer: PassObserver | None = field(default=None, repr=False)
    algebra: AlgebraName = "numpy"

    @property
    def on_cpu(self) -> bool:
        return self.provider.lower() in ("cpu", "cpuexecutionprovider")

    def track(self, batches: Iterable[Feeds]) -> Iterable[Feeds]:
        """The same batches, shown by ``progress`` as they go by."""
        return batches if self.progress is None else self.progress(batches)


DEFAULT_EXECUTION = Execution()
