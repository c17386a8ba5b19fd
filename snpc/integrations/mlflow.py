"""Runs of MLflow: what a sweep or a finetuning was asked, what came of it, and its files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME

from snpc.errors import UserError
from snpc.pipeline import SweepPoint, SweepResult
from snpc.runtime.execution import first_lines
from snpc.version import __version__

EXPERIMENT = "snpc"  # where MLFLOW_EXPERIMENT_NAME names none
NOT_IN_NAMES = re.compile(r"[^\w\-. /]")  # what names of metrics may not hold

LOGGED_STEPS = 100  # of a training, spread over it
Numbers: TypeAlias = Mapping[str, "float | int | None"]


class TrainingStep(Protocol):
    """See ``snpc.torch.TrainingProgress``."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def drift(self) -> float | None: ...


@dataclass(frozen=True)
class TrackedRun:
    """A run on a tracking server or in a store. Raises UserError where MLflow does not take what is logged."""

    client: MlflowClient
    experiment: str
    id: str

    def log_numbers(self, numbers: Numbers, step: int = 0) -> None:
        """Metrics by name; those that are None are left out."""
        with naming_store():
            metrics = [
                Metric(NOT_IN_NAMES.sub("_", name), float(value), 0, step)
                for name, value in numbers.items()
                if value is not None
            ]
            self.client.log_batch(self.id, metrics=metrics)

    def log_step(self, now: TrainingStep) -> None:
        """A step of training: what ``snpc.torch.finetune`` takes as ``on_progress``. About a hundred are logged."""
        if now.step % max(now.steps // LOGGED_STEPS, 1) == 0 or now.step == now.steps:
            self.log_numbers({"loss": now.loss, "lr": now.lr, "held_out_drift": now.drift}, now.step)

    def log_report(self, report: Mapping[str, Any], name: str = "report.json") -> None:
        """A report as it is written by ``--json``: an artifact, and every number in it a metric (``after.macs``)."""
        self.log_numbers(numbers_in(report))
        with naming_store():
            self.client.log_dict(self.id, dict(report), name)

    def log_files(self, *paths: Path) -> None:
        """Files as artifacts, under their names."""
        with naming_store():
            for path in paths:
                self.client.log_artifact(self.id, str(path))

    def log_sweep(self, result: SweepResult, *, models: bool = False) -> None:
        """A run inside this one for every point, with its size, quality and latency. ``models``: with the files of
        those on the front."""
        self.log_numbers({"points": len(result.points), "on front": sum(point.front for point in result.points)})
        for point in result.points:
            with self.part(point.name, {"target": point.name, "tokens": point.tokens}) as part:
                part.log_numbers(point_numbers(point))
                if models and point.front:
                    part.log_files(*point.files)

    @contextmanager
    def part(self, name: str, params: Mapping[str, Any]) -> Iterator[TrackedRun]:
        """A run inside this one."""
        with started_run(self.client, self.experiment, name, params, {MLFLOW_PARENT_RUN_ID: self.id}) as run:
            yield run


@contextmanager
def tracked_run(
    uri: str, name: str, params: Mapping[str, Any] | None = None, experiment: str | None = None
) -> Iterator[TrackedRun]:
    """A run that is open while the block runs, and failed where that raises.

        with tracked_run("http://localhost:5000", "sweep vit", {"targets": "macs=0.8,0.6"}) as run:
            run.log_sweep(snpc.sweep(...))

    ``uri``: of a tracking server, or of a store as MLflow takes it ("sqlite:///runs.db"). ``params``: what was asked,
    by name. ``experiment``: by default that of MLFLOW_EXPERIMENT_NAME, else "snpc"; it is made where there is none.

    Raises UserError where the server or the store cannot be used.
    """
    with naming_store(uri):
        client = MlflowClient(tracking_uri=uri)
        wanted = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = client.get_experiment_by_name(wanted)
        place = found.experiment_id if found is not None else client.create_experiment(wanted)
    with started_run(client, place, name, params or {}, {}) as run:
        yield run


@contextmanager
def started_run(
    client: MlflowClient, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[TrackedRun]:
    with naming_store():
        own = {**tags, MLFLOW_SOURCE_NAME: "snpc", "snpc.version": __version__}
        run = TrackedRun(client, experiment, client.create_run(experiment, tags=own, run_name=name).info.run_id)
        client.log_batch(run.id, params=[Param(key, str(value)) for key, value in params.items()])
    try:
        yield run
    except BaseException as error:
        reason = first_lines(error) if isinstance(error, Exception) else ""
        with naming_store():
            client.log_batch(run.id, tags=[RunTag("snpc.error", f"{type(error).__name__}: {reason}")])
            client.set_terminated(run.id, "FAILED")
        raise
    with naming_store():
        client.set_terminated(run.id)


@contextmanager
def naming_store(uri: str = "") -> Iterator[None]:
    """MLflow's refusals as UserErrors."""
    try:
        yield
    except MlflowException as error:
        place = f"MLflow at {uri}" if uri else "MLflow"
        raise UserError(f"{place}: {first_lines(error)}") from None


def point_numbers(point: SweepPoint) -> Numbers:
    return {
        "macs": point.macs,
        "params": point.params,
        "bytes": point.bytes,
        "drift": point.drift,
        "agreement": point.agreement,
        "accuracy": point.accuracy,
        "perplexity": point.perplexity,
        "latency_ms": point.latency,
        "speedup": point.speedup,
        "front": int(point.front),
    }


def numbers_in(report: Any, name: str = "") -> dict[str, float]:
    """The numbers of a report by their path in it; those in lists of others are left out."""
    if isinstance(report, bool) or report is None:
        return {}
    if isinstance(report, int | float):
        return {name: float(report)}
    if not isinstance(report, Mapping):
        return {}
    return {
        path: value
        for key, inner in report.items()
        for path, value in numbers_in(inner, f"{name}.{key}" if name else str(key)).items()
    }
