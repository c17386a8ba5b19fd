"""Workers of an executor, of ``concurrent.futures`` or of Dask: how many they are, and tasks near their data."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from concurrent.futures import as_completed as pool_completed
from threading import Event
from typing import Any, NamedTuple, Protocol

from snpc.errors import UserError
from snpc.runtime.execution.machine import available_cores

MERGED_AT_ONCE = 4  # results that one task of a reduction takes
WATCH_SECONDS = 0.2  # between two looks at which workers live


class LostWorker(Exception):
    """Workers died, and what they held is gone. ``tasks``: numbers of the tasks that they were to run."""

    def __init__(self, tasks: Collection[int]) -> None:
        super().__init__(f"the workers of tasks {', '.join(map(str, tasks))} are gone")
        self.tasks = frozenset(tasks)


class Reduction(NamedTuple):
    """``merge`` takes the results of neighboring tasks, in their order, and then what was merged; ``finish`` takes the
    last one."""

    merge: Callable[..., Any]
    finish: Callable[[Any], Any]


class Workers(Protocol):
    """``count``: workers. ``on_each_machine``: tasks that run on one machine at once. ``shares_files``: may they find
    files where this process puts them?"""

    count: int
    on_each_machine: int
    shares_files: bool

    def send(self, value: Any) -> Any:
        """A handle that stands for ``value`` as an argument of tasks, for all workers."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        reduction: Reduction,
        advance: Callable[[int], None],
    ) -> Any:
        """The reduced results of one task for each of ``arguments``. Task k always prefers the same worker.
        ``advance(k)`` hears that task k is done.

        Raises what a task raises, and LostWorker.
        """
        ...

    def broadcast(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function once on every worker that can be told to."""
        ...


def workers_of(executor: Executor) -> Workers:
    """The workers of an executor. UserError: there are none."""
    distributed = sys.modules.get("distributed")  # who has such an executor has imported it
    if distributed is not None and isinstance(executor, distributed.cfexecutor.ClientExecutor):
        return DaskWorkers(executor._client)
    return PoolWorkers(executor)


class PoolWorkers:
    """Any executor of ``concurrent.futures``; tasks run wherever it puts them."""

    shares_files = True

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.count = int(getattr(executor, "_max_workers", 0) or available_cores())
        self.on_each_machine = self.count

    def send(self, value: Any) -> Any:
        return value

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        reduction: Reduction,
        advance: Callable[[int], None],
    ) -> Any:
        try:
            futures = [self.executor.submit(function, *task) for task in arguments]
            try:
                return reduction.finish(self.merged(futures, reduction.merge, advance))
            finally:
                for future in futures:
                    future.cancel()
        except BrokenExecutor as error:
            raise UserError(
                "a worker process ended (killed, or out of memory), and its executor starts no other: use fewer "
                "workers, or those of Dask, which run lost tasks again (--cluster local:N)"
            ) from error

    def merged(self, futures: list[Future[Any]], merge: Callable[..., Any], advance: Callable[[int], None]) -> Any:
        """Results are merged in order as soon as those before them are there."""
        numbers = {future: number for number, future in enumerate(futures)}
        waiting: dict[int, Any] = {}
        merged, next_number = None, 0
        for future in pool_completed(futures):
            waiting[numbers[future]] = future.result()
            advance(numbers[future])
            while next_number in waiting:
                result = waiting.pop(next_number)
                merged = result if next_number == 0 else merge(merged, result)
                next_number += 1
        return merged

    def broadcast(self, function: Callable[..., Any], *arguments: Any) -> None:
        """A pool cannot be told to run a task on each worker."""


class DaskWorkers:
    """The workers of a Dask client. Task k runs where it ran before, as long as that worker lives; neighbors run on the
    same worker, and results are merged on workers."""

    shares_files = False

    def __init__(self, client: Any) -> None:
        self.client = client
        self.places: dict[int, str] = {}
        info = self.described()
        self.count = sum(int(worker["nthreads"]) for worker in info.values())
        hosts = [worker["host"] for worker in info.values() for _ in range(int(worker["nthreads"]))]
        if not self.count:
            raise UserError(
                f"{client.scheduler.address}: the scheduler has no workers: start some "
                f"(dask worker {client.scheduler.address}), with snpc installed"
            )
        self.on_each_machine = max(map(hosts.count, hosts))

    def described(self) -> dict[str, Any]:
        """Address -> what the scheduler knows of the worker."""
        info: dict[str, Any] = self.client.scheduler_info(n_workers=-1)["workers"]
        return dict(sorted(info.items()))

    def send(self, value: Any) -> Any:
        # As the result of a task, which Dask runs again where a worker that has it dies; scattered data is lost then.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            return self.client.submit(passed_on, value, pure=False)

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        reduction: Reduction,
        advance: Callable[[int], None],
    ) -> Any:
        self.place(len(arguments))
        futures = [
            self.client.submit(function, *task, pure=False, workers=[self.places[number]])
            for number, task in enumerate(arguments)
        ]
        result = self.client.submit(reduction.finish, self.merged(futures, reduction.merge), pure=False)
        finished = Event()
        result.add_done_callback(lambda future: finished.set())
        reported: set[int] = set()
        while not finished.wait(WATCH_SECONDS):
            done = {number for number, future in enumerate(futures) if future.done()}
            for number in sorted(done - reported):
                advance(number)
            reported |= done
            self.check_places(len(arguments))
        found = result.result()
        for number in sorted(set(range(len(futures))) - reported):
            advance(number)
        return found

    def place(self, tasks: int) -> None:
        """Give each task without a living worker one: neighbors the same at first, later whoever has fewest."""
        addresses = list(self.described())
        if not addresses:
            raise UserError(f"{self.client.scheduler.address}: all workers are gone: look at their logs")
        if not self.places:
            self.places = {number: addresses[number * len(addresses) // tasks] for number in range(tasks)}
        for number in range(tasks):
            if self.places.get(number) not in addresses:
                taken = Counter(self.places.values())
                self.places[number] = min(addresses, key=lambda address: taken[address])

    def check_places(self, tasks: int) -> None:
        """Raise LostWorker where a task would wait for a worker that is gone."""
        alive = self.described()
        lost = [number for number in range(tasks) if self.places[number] not in alive]
        if lost:
            raise LostWorker(lost)

    def merged(self, futures: list[Any], merge: Callable[..., Any]) -> Any:
        """A tree of merges over neighbors; Dask runs each where most of what it takes lies."""
        while len(futures) > 1:
            futures = [
                self.client.submit(merge, *neighbors, pure=False) if len(neighbors) > 1 else neighbors[0]
                for neighbors in chunks(futures, MERGED_AT_ONCE)
            ]
        return futures[0]

    def broadcast(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.client.run(function, *arguments, on_error="ignore")


def passed_on(value: Any) -> Any:
    return value


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
