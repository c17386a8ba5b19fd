"""What a runtime target is built with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import click

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option, subgroup
from snpc.cli.arguments.parsers import parse_numbers, parse_target_name
from snpc.errors import UserError
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import TimedArtifact
from snpc.runtime.execution import Execution, parse_shapes
from snpc.targets import check_build
from snpc.types import PRECISIONS, Precision


@dataclass(frozen=True)
class BuildArguments(ArgumentGroup):
    """Options of a build, some of which only some targets understand."""

    section: ClassVar[str] = "Building"

    precision: Precision | None = option(
        "--precision", type=click.Choice(PRECISIONS), help="Precision of the artifact.  [default: fp32]"
    )
    min_shapes: tuple[str, ...] = option(
        "--min-shapes", multiple=True, metavar="NAME:1,3,224,224", help="trt: smallest shape of an input; repeatable."
    )
    opt_shapes: tuple[str, ...] = option(
        "--opt-shapes", multiple=True, metavar="NAME:8,3,224,224", help="trt: shape that the engine is tuned for."
    )
    max_shapes: tuple[str, ...] = option(
        "--max-shapes", multiple=True, metavar="NAME:16,3,224,224", help="trt: largest shape of an input."
    )
    sm: str | None = option(
        "--sm", metavar="86,89,120", help="trt-rtx: compute capabilities.  [default: 8.0 and later]"
    )
    workspace: int | None = option(
        "--workspace", type=click.IntRange(1), metavar="MIB", help="trt: memory that tactics may use."
    )
    timing_cache: Path | None = option(
        "--timing-cache", type=FILE_PATH, help="trt: measured times of tactics; read if it is there, and written."
    )

    def load(self, *, emit_script: bool = False) -> snpc.BuildOptions:
        """The options as ``snpc.build`` takes them."""
        return snpc.BuildOptions(
            min_shapes=parse_shapes(self.min_shapes),
            opt_shapes=parse_shapes(self.opt_shapes),
            max_shapes=parse_shapes(self.max_shapes),
            sm=parse_numbers(self.sm, "--sm", int, range(1, 17)) or (),
            workspace=self.workspace,
            timing_cache=self.timing_cache,
            emit_script=emit_script,
        )

    def check_unused(self) -> None:
        """Refuse options of a build where nothing is built."""
        used = [item.name for item in fields(self) if getattr(self, item.name)]
        if used:
            raise UserError(f"--{used[0].replace('_', '-')} is for a build: give --build TARGET too, or leave it out")


@dataclass(frozen=True)
class PruneBuildArguments(ArgumentGroup):
    """A build of the pruned model."""

    section: ClassVar[str] = "Building"

    build: str | None = option(
        "--build",
        metavar="TARGET",
        callback=parse_target_name,
        help="Also build the pruned model for a runtime, see `snpc build --help`.",
    )
    options_of_build: BuildArguments = subgroup()

    def check(self, model: Path, execution: Execution, calibrated: bool) -> list[Path]:
        """The artifact that a build of ``model`` will write, if any. UserError: it cannot be built here."""
        arguments = self.options_of_build
        if self.build is None:
            arguments.check_unused()
            return []
        precision = arguments.precision or "fp32"
        return [check_build(model, self.build, None, precision, execution, calibrated, arguments.load())]

    def timed_artifact(
        self, execution: Execution, calibration: Calibration | None, batch: int | None
    ) -> TimedArtifact | None:
        """What a latency is measured on: the artifact that will be built, None for the model itself."""
        if self.build is None:
            return None
        return snpc.timed_artifact(
            self.build,
            precision=self.options_of_build.precision or "fp32",
            execution=execution,
            calibration=calibration,
            batch=batch or 1,
            options=self.options_of_build.load(),
        )

    def load(
        self, model: Path, execution: Execution, calibration: Calibration | None, batch: int | None
    ) -> snpc.BuildResult | None:
        """Build ``model``, where --build says so."""
        if self.build is None:
            return None
        return snpc.build(
            model,
            self.build,
            precision=self.options_of_build.precision or "fp32",
            execution=execution,
            calibration=calibration,
            batch=batch or 1,
            options=self.options_of_build.load(),
        )
