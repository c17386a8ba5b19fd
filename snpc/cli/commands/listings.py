"""``snpc passes``, ``snpc criteria`` and ``snpc example``: what ships with snpc."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import snpc
from snpc.cli import tables
from snpc.cli.advice import print_next
from snpc.cli.arguments import FILE_PATH, ArgumentGroup, JsonArguments, argument, command
from snpc.criteria import describe
from snpc.passes import PASSES


@dataclass(frozen=True)
class ExampleArguments(ArgumentGroup):
    """Which example, and where it goes."""

    name: str = argument()
    folder: Path = argument(type=FILE_PATH)


@command("example")
def example_command(example: ExampleArguments) -> None:
    """Write a shipped example into FOLDER: NAME is `digits`, a trained ViT with calibration and evaluation data."""
    paths = snpc.write_example(example.name, example.folder)
    for path in paths:
        tables.print_line(str(path))
    print_next(f"snpc inspect {shlex.quote(str(next(path for path in paths if path.suffix == '.onnx')))}")


@command("passes")
def passes_command(json: JsonArguments) -> None:
    """List the graph passes in the order in which they run."""
    rows = [{"name": p.name, "stage": p.stage, "what": p.what, "why_here": p.why_here} for p in PASSES]
    json.write({"snpc_passes": 1, "passes": rows})
    if not json.replaces_tables:
        header = ("pass", "stage", "what it does", "why here")
        tables.print_table("graph passes", header, [tuple(row.values()) for row in rows])


@command("criteria")
def criteria_command() -> None:
    """List the criteria and their options."""
    tables.print_criteria(describe())
