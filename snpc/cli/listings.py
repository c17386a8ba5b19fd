"""``snpc criteria`` and ``snpc example``: what ships with snpc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import snpc
from snpc.cli import tables
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, argument, command
from snpc.criteria import describe


@dataclass(frozen=True)
class ExampleArguments(ArgumentGroup):
    name: str = argument()
    folder: Path = argument(type=FILE_PATH)


@command("example")
def example_command(example: ExampleArguments) -> None:
    """Write a shipped example into FOLDER: NAME is `digits`, a trained ViT with calibration and evaluation data."""
    for path in snpc.write_example(example.name, example.folder):
        tables.print_line(str(path))


@command("criteria")
def criteria_command() -> None:
    """List the criteria and their options."""
    tables.print_criteria(describe())
