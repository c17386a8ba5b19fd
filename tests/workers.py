"""Worker processes for tests: a pool, and a Dask cluster on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from snpc.runtime.execution.cluster import start_workers

PRELOADED = ["snpc.runtime.batches.block_worker"]  # imported once, by the server that forks the workers


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share nothing with this one but files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        yield executor


@contextmanager
def local_client(workers: int) -> Iterator[Any]:
    """A client of Dask workers, one process each. Skipped where Dask is not installed."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        start_workers(distributed, workers) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client
