"""Files that are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option
from snpc.cli.tables import print_text
from snpc.errors import UserError
from snpc.passes import DumpAfter
from snpc.pipeline import write_json
from snpc.runtime.io import check_target

STDOUT = "-"


@dataclass(frozen=True)
class JsonArguments(ArgumentGroup):
    """The result as JSON."""

    section: ClassVar[str] = "Output"

    json_path: Path | None = option(
        "--json",
        type=FILE_PATH,
        metavar="PATH",
        help="Also write the result as JSON; -: to stdout, in place of the tables.",
    )

    @property
    def replaces_tables(self) -> bool:
        return str(self.json_path) == STDOUT

    def write(self, data: Mapping[str, object]) -> None:
        if self.replaces_tables:
            print_text(json.dumps(data, indent=1))
        elif self.json_path is not None:
            write_json(data, self.json_path)


@dataclass(frozen=True)
class DumpArguments(ArgumentGroup):
    """Graphs between passes."""

    section: ClassVar[str] = "Output"

    dump_after: tuple[str, Path] | None = option(
        "--dump-after",
        type=(str, FILE_PATH),
        metavar="PASS DIR",
        help="Write the graph as ONNX text into DIR after each run of PASS, without large weights. `snpc passes` lists "
        "the passes; all: after every pass.",
    )

    def load(self) -> DumpAfter | None:
        """The observer that writes the graphs. It counts its files, so make one for a command."""
        return DumpAfter(*self.dump_after) if self.dump_after is not None else None


def check_output_paths(outputs: Sequence[Path | None], *inputs: Path | str | None) -> None:
    """Refuse outputs that are an input, that are each other, or that cannot be written."""
    paths = [path for path in outputs if path is not None and str(path) != STDOUT]
    for index, path in enumerate(paths):
        check_target(path, *(Path(source) for source in inputs if source is not None))
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise UserError(f"{path}: is the name of two outputs; give each its own")
