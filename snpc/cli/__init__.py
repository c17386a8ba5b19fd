"""The command line: each command parses, calls one verb, prints.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be served; 128 and the signal's number after a signal (130
after Ctrl-C).

arguments  the options, as groups
inspect, prune, plan, verify, build, bench, card, dequantize, sweep, finetune, listings  the commands
tables     what is printed
advice     what is said before the long part, and what to try next
progress   what is under way

Files
  advice/        Advice: what a request is likely to do, said before it is done, and commands to try next.
  arguments/     Argument groups: a frozen dataclass for each subject, with its click options and the values that they
                 describe.
  bench          ``snpc bench``: latency of models, side by side.
  build          ``snpc build``: what a runtime loads fastest.
  card           ``snpc card``: a model card for the Hugging Face hub.
  dequantize     ``snpc dequantize``: the float model of a quantized file.
  finetune       ``snpc finetune`` and ``snpc export-torch``: what needs torch.
  inspect        ``snpc inspect``: what a model can lose, and why not the rest.
  interruption   Interruptions: SIGTERM and SIGHUP end a command as Ctrl-C does, so that its temporary files are
                 removed.
  listings       ``snpc passes``, ``snpc criteria`` and ``snpc example``: what ships with snpc.
  plan           ``snpc plan`` and ``snpc apply``: pruning in two steps, with a file in between that can be read and
                 edited.
  progress/      Progress on stderr: one bar for a run on a terminal, lines in a pipe.
  prune          ``snpc prune``: score, plan, write and verify in one step.
  sweep          ``snpc sweep``: one model at several sizes, and which of them are worth having.
  tables         Results as text: rich tables on a terminal, plain aligned lines in a pipe.
  verify         ``snpc verify``: a pruned file against its original.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from snpc.cli.bench import bench_command
from snpc.cli.build import build_command
from snpc.cli.card import card_command
from snpc.cli.dequantize import dequantize_command
from snpc.cli.finetune import export_torch_command, finetune_command
from snpc.cli.inspect import inspect_command
from snpc.cli.interruption import Interrupted, interruptible
from snpc.cli.listings import criteria_command, example_command, passes_command
from snpc.cli.plan import apply_command, plan_command
from snpc.cli.prune import prune_command
from snpc.cli.sweep import sweep_command
from snpc.cli.tables import print_error
from snpc.cli.verify import verify_command
from snpc.errors import CheckFailed, SnpcError
from snpc.runtime.io import recorded_publications

__all__: list[str] = []


class ErrorReportingGroup(click.Group):
    """Turns snpc's own errors into one line and an exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
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


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snpc")
def main() -> None:
    """Make exported attention models small and fast: structured pruning of ONNX files, without training code."""


for _command in (
    inspect_command,
    prune_command,
    plan_command,
    apply_command,
    verify_command,
    build_command,
    dequantize_command,
    bench_command,
    sweep_command,
    finetune_command,
    export_torch_command,
    card_command,
    example_command,
    criteria_command,
    passes_command,
):
    main.add_command(_command)
