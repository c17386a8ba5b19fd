"""How models are run, and the workload of a latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import click

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option, subgroup
from snpc.cli.arguments.parsers import parse_algebra, parse_cluster_address, parse_memory_size, parse_provider
from snpc.cli.progress import command_progress
from snpc.cli.tables import QUIET_KEY, print_step
from snpc.runtime.evaluation import TimedArtifact
from snpc.runtime.execution import AlgebraName, Execution, open_cluster
from snpc.runtime.io import WorkFolder
from snpc.types import Shape


def remember_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Remember --quiet for whatever prints while the command runs."""
    context.meta[QUIET_KEY] = value
    return value


@dataclass(frozen=True)
class QuietArguments(ArgumentGroup):
    """What is printed while the command runs."""

    section: ClassVar[str] = "Running"

    quiet: bool = option(
        "-q",
        "--quiet",
        is_flag=True,
        is_eager=True,
        callback=remember_quiet,
        help="Print results, warnings and errors only: no progress, no remarks.",
    )


@dataclass(frozen=True)
class ExecutionArguments(ArgumentGroup):
    """How models are run."""

    section: ClassVar[str] = "Running"

    provider: str = option(
        "--provider",
        default="cpu",
        show_default=True,
        callback=parse_provider,
        help="onnxruntime execution provider: cpu, cuda, trt or another that it has; cuda:1 names a device.",
    )
    printing: QuietArguments = subgroup()

    def load(self) -> Execution:
        return Execution(provider=self.provider, progress=command_progress())


@dataclass(frozen=True)
class SpreadExecutionArguments(ExecutionArguments):
    """How models are run and closed forms are solved, and on how many machines."""

    algebra: AlgebraName = option(
        "--algebra",
        type=click.Choice(["numpy", "torch"]),
        default="numpy",
        show_default=True,
        callback=parse_algebra,
        help="What solves the closed forms: numpy, or torch, on a GPU where it finds one.",
    )
    cluster: str | None = option(
        "--cluster",
        metavar="ADDRESS|local:N",
        callback=parse_cluster_address,
        help="Run passes over the data, trials and targets on the workers of a Dask scheduler (tcp://host:8786), or on "
        "N worker processes of this machine (needs snpc[cluster]). Workers read the data themselves, from a shared "
        "path or a URL.",
    )

    def load(self) -> Execution:
        """Connects to the cluster until the command ends."""
        execution = replace(super().load(), algebra=self.algebra)
        if self.cluster is None:
            return execution
        executor = click.get_current_context().with_resource(open_cluster(self.cluster))
        return replace(execution, executor=executor)


@dataclass(frozen=True)
class LimitedExecutionArguments(SpreadExecutionArguments):
    """How models are run, how much memory that may take, and where the results of finished stages are kept."""

    memory_limit: int | None = option(
        "--memory-limit",
        metavar="SIZE",
        callback=parse_memory_size,
        help="Memory for statistics and cached activations: 2GB, 512MiB. A lower limit takes more passes over the "
        "data, and temporary files. A model whose weights take more is run segment by segment.  [default: half of the "
        "free memory]",
    )

    work: Path | None = option(
        "--work",
        type=FILE_PATH,
        metavar="DIR",
        help="Keep the results of finished stages in this folder: a run that is killed and started again goes on from "
        "them, to the same bytes. Runs with other inputs may share it.",
    )

    def load(self) -> Execution:
        folder = WorkFolder(self.work) if self.work is not None else None
        if folder is not None:  # a run that fails says it, too
            click.get_current_context().call_on_close(lambda: print_step(folder.describe()))
        return replace(super().load(), memory_limit=self.memory_limit, work=folder)


@dataclass(frozen=True)
class WorkloadArguments(ArgumentGroup):
    """What is run to measure a latency."""

    section: ClassVar[str] = "Running"

    batch: int | None = option(
        "--batch", type=click.IntRange(1), help="Size of the batch axis for latency measurements.  [default: 1]"
    )
    threads: int | None = option(
        "--threads",
        type=click.IntRange(0),
        help="Threads for latency measurements; 0: onnxruntime chooses.  [default: 0]",
    )

    def load(
        self, artifact: TimedArtifact | None = None, shapes: Mapping[str, Shape] | None = None
    ) -> snpc.Workload | None:
        """What is timed, in place of the model the ``artifact`` made of it; None where no flag says anything.

        ``shapes``: of inputs, where a latency is wanted."""
        if self.batch is None and not shapes and self.threads is None and artifact is None:
            return None
        return snpc.Workload(
            batch=self.batch or 1,
            shapes=shapes or None,
            threads=self.threads or 0,
            artifact=artifact,
        )
