"""Where runs are logged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from snpc.cli.arguments.group import ArgumentGroup, option
from snpc.cli.arguments.typed import TypedCommand
from snpc.errors import UserError

if TYPE_CHECKING:
    from snpc.integrations import TrackedRun

MISSING_MLFLOW = "--mlflow needs MLflow, which is not installed: pip install 'snpc[mlflow]'"
OWN_FLAGS = ("--mlflow", "--mlflow-models")


@dataclass(frozen=True)
class TrackingArguments(ArgumentGroup):
    """A run of MLflow."""

    section: ClassVar[str] = "Output"

    mlflow: str | None = option(
        "--mlflow", metavar="URI", help="Log options, results and files as a run of MLflow, on this server or store."
    )
    models: bool = option("--mlflow-models", is_flag=True, help="With --mlflow: upload the written models too.")

    @contextmanager
    def run(self) -> Iterator[TrackedRun | None]:
        """A run with the options of the command; None without --mlflow, and in all but the first of several processes.

        UserError where MLflow is missing or refuses.
        """
        if self.models and self.mlflow is None:
            raise UserError("--mlflow-models is for --mlflow URI: give it too, or leave it out")
        if self.mlflow is None or os.environ.get("RANK", "0") != "0":
            yield None
            return
        try:
            from snpc.integrations import tracked_run
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "mlflow":
                raise
            raise UserError(MISSING_MLFLOW) from None
        typed = TypedCommand.current().without(*OWN_FLAGS)
        params = {words[0].lstrip("-"): " ".join(words[1:]) or "yes" for words in typed.options}
        name = " ".join((typed.name, *typed.arguments))
        with tracked_run(self.mlflow, name, {"model": " ".join(typed.arguments), **params}) as run:
            yield run
