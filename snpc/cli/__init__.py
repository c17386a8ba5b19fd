"""The command line: each command parses, calls one verb, prints.

A command is imported when it is called: ``snpc --help`` answers at once.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be served; 128 and the signal's number after a signal (130
after Ctrl-C).

commands   a file for each command
arguments  the options, as groups
tables     what is printed
advice     what is said before the long part, and what to try next
progress   what is under way

Files
  advice/       Advice: what a request is likely to do, said before it is done, and commands to try next.
  arguments/    Argument groups: a frozen dataclass for each subject, with its click options and the values that they
                describe.
  commands/     The commands: each parses, calls one verb, prints.
  interruption  Interruptions: SIGTERM and SIGHUP end a command as Ctrl-C does, so that its temporary files are
                removed.
  progress/     Progress on stderr: one bar for a run on a terminal, lines in a pipe.
  tables        Results as text: rich tables on a terminal, plain aligned lines in a pipe.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

import click

from snpc.cli.interruption import Interrupted, interruptible
from snpc.errors import CheckFailed, SnpcError

__all__: list[str] = []


class CommandPlace(NamedTuple):
    """Where a command is defined, and the line about it in ``snpc --help``."""

    module: str
    function: str
    summary: str


COMMAND_PLACES = {
    "apply": CommandPlace("plan", "apply_command", "Apply a plan to a model, write the result and verify it."),
    "bench": CommandPlace("bench", "bench_command", "Time models side by side on the same inputs."),
    "build": CommandPlace("build", "build_command", "Make a model into what a runtime loads fastest."),
    "card": CommandPlace("card", "card_command", "Write a Hugging Face model card from a JSON report."),
    "criteria": CommandPlace("listings", "criteria_command", "List the criteria and their options."),
    "dequantize": CommandPlace("dequantize", "dequantize_command", "Write the float model of a quantized one."),
    "example": CommandPlace("listings", "example_command", "Write an example that ships with snpc into a folder."),
    "export-torch": CommandPlace(
        "finetune", "export_torch_command", "Write the weights as safetensors, and the widths as JSON."
    ),
    "finetune": CommandPlace(
        "finetune", "finetune_command", "Train a pruned model towards the outputs of the dense one."
    ),
    "inspect": CommandPlace("inspect", "inspect_command", "Show what can be made narrower, and why the rest cannot."),
    "passes": CommandPlace("listings", "passes_command", "List the graph passes in the order in which they run."),
    "plan": CommandPlace("plan", "plan_command", "Score a model and write a plan, which can be read and edited."),
    "prune": CommandPlace("prune", "prune_command", "Prune a model, verify the result, show before and after."),
    "report": CommandPlace("report", "report_command", "Show files beside their original: a page with charts."),
    "sweep": CommandPlace(
        "sweep", "sweep_command", "Prune a model to several sizes: a table, a plot, the best models."
    ),
    "verify": CommandPlace("verify", "verify_command", "Check a pruned model against its original."),
}


def command_named(name: str) -> click.Command:
    """The command of that name, imported now."""
    place = COMMAND_PLACES[name]
    command: click.Command = getattr(importlib.import_module(f"snpc.cli.commands.{place.module}"), place.function)
    return command


class LazyGroup(click.Group):
    """Imports a command when it is asked for: all of them take a second, and most need only one.

    Turns snpc's own errors into one line and an exit code; a bug keeps its traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMAND_PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_named(cmd_name) if cmd_name in COMMAND_PLACES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMAND_PLACES[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        from snpc.cli.tables import print_error
        from snpc.runtime.io import recorded_publications

        with recorded_publications() as written:
            try:
                with interruptible():
                    return super().invoke(ctx)
            except SnpcError as error:
                print_error(" ".join(str(error).split()))  # names in a model may hold line breaks
                sys.exit(1 if isinstance(error, CheckFailed) else 2)
            except Interrupted as interruption:
                done = f"after writing {', '.join(map(str, written))}" if written else "nothing written"
                print_error(f"interrupted, {done}")
                sys.exit(interruption.exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snpc")
def main() -> None:
    """Make exported attention models small and fast: structured pruning of ONNX files, without training code.

    \b
    snpc inspect model.onnx
    snpc prune model.onnx --target macs=0.5 --calib images/
    """
