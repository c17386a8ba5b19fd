"""Clusters of Dask workers: those of a scheduler, or processes of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from snpc.errors import UserError
from snpc.runtime.execution.workers import DaskWorkers

CONNECT_SECONDS = 10
LOCAL = "local"
SCHEMES = ("tcp", "tls", "ucx", "ws", "wss", "inproc")


def parse_cluster(text: str) -> int | str:
    """``local:4`` -> 4 worker processes; ``tcp://host:8786`` stays as it is. UserError: it is neither."""
    scheme, colon, rest = text.partition(":")
    if scheme == LOCAL and rest.isascii() and rest.isdigit() and 1 <= int(rest) <= 1024:
        return int(rest)
    if scheme in SCHEMES and colon and rest.startswith("//") and len(rest) > 2:
        return text
    raise UserError(f"cluster {text!r}: give the address of a Dask scheduler (tcp://host:8786), or local:N processes")


@contextmanager
def open_cluster(text: str) -> Iterator[Executor]:
    """The executor of a cluster, for ``Execution.executor``: ``tcp://host:8786`` is the address of a Dask scheduler,
    ``local:4`` starts that many worker processes on this machine.

    UserError: Dask is not installed, the scheduler does not answer, or it has no workers that have snpc.
    """
    place, distributed = parse_cluster(text), import_distributed()
    if isinstance(place, int):
        with (
            start_workers(distributed, place) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client.get_executor()
        return
    with connected(place, distributed) as client:
        check_workers(client)
        yield client.get_executor()


@contextmanager
def start_workers(distributed: Any, count: int) -> Iterator[Any]:
    """A cluster of so many worker processes on this machine, of one thread each. Several clusters can run at once.

    Dask writes what its workers get into the environment of this process, such as one thread for BLAS; afterwards the
    environment is as it was.
    """
    with (
        restored_environment(),
        distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,  # --memory-limit bounds what snpc holds
            dashboard_address="127.0.0.1:0",  # any free port: the scheduler serves its state over HTTP in any case
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


@contextmanager
def restored_environment() -> Iterator[None]:
    """The variables of this process's environment are afterwards what they were before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def import_distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise UserError("clusters need Dask: pip install snpc[cluster]") from None
    return distributed


@contextmanager
def connected(address: str, distributed: Any) -> Iterator[Any]:
    """A client of the scheduler at ``address``."""
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{address}: no Dask scheduler answers there ({reason}): start one with `dask scheduler`, or look at "
            "the address and the firewall"
        ) from None
    with client:
        yield client


def check_workers(client: Any) -> None:
    """Raise UserError where there are no workers, or where they cannot run snpc."""
    DaskWorkers(client)
    try:
        versions = client.run(worker_version)
    except Exception as error:  # unpickling fails on the worker in whatever way its environment makes it
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"workers cannot run snpc ({reason}): install the same snpc there as here") from None
    other = {address: version for address, version in versions.items() if version != worker_version()}
    if other:
        address, version = next(iter(other.items()))
        raise UserError(f"{address} has snpc {version}, here is {worker_version()}: install the same on every worker")


def worker_version() -> str:
    """The version of snpc in this process."""
    from importlib.metadata import version

    return version("snpc")
