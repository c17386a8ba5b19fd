"""What a target is, what it is asked, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from snpc.errors import UserError
from snpc.runtime.execution.execution import Execution
from snpc.types import Difference, Feeds, Shape

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class BuildOptions:
    """What only some targets understand; a target that does not refuses it.

    ``min_shapes``, ``opt_shapes``, ``max_shapes``: shapes of inputs by name, the range an engine serves and what it is
    tuned for. ``sm``: compute capabilities, 89 for 8.9. ``workspace``: MiB that the builder's tactics may use.
    ``timing_cache``: a file that is read if it is there, and written. ``emit_script``: write what builds the engine
    elsewhere, instead of building it.
    """

    min_shapes: Mapping[str, Shape] = field(default_factory=dict)
    opt_shapes: Mapping[str, Shape] = field(default_factory=dict)
    max_shapes: Mapping[str, Shape] = field(default_factory=dict)
    sm: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    emit_script: bool = False

    def given(self) -> list[str]:
        """Names of the options that are set, as on the command line."""
        return [f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name)]


@dataclass(frozen=True)
class BuildRequest:
    """What is asked of a target, whatever the model."""

    output: Path
    precision: Precision
    execution: Execution
    options: BuildOptions


@dataclass(frozen=True)
class BuildJob(BuildRequest):
    """One build: ``source`` is the model at the wanted precision, ``output`` where the target must write.

    ``model`` is what the user named, and what outputs are compared with on ``feeds``; ``timing_feeds``: one batch to
    time on.
    """

    model: Path
    source: Path
    feeds: tuple[Feeds, ...]
    timing_feeds: Feeds


@dataclass(frozen=True)
class BuildOutput:
    """What a target wrote: ``files`` beside each other, the one that is loaded comes first. ``runs``: whether this
    machine can run it; ``weights``: bytes of weight memory, where the runtime reports them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    runnable: bool = True
    weight_bytes: int | None = None


@dataclass(frozen=True)
class BuildResult:
    """A built artefact, loaded and compared where this machine can run it.

    ``drift``: its outputs against onnxruntime on the model it was built from; empty where it cannot run here.
    """

    path: Path
    files: tuple[Path, ...]
    target: str
    precision: Precision
    seconds: float
    bytes: int
    notes: tuple[str, ...] = ()
    weight_bytes: int | None = None
    drift: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class BuildTarget:
    """One runtime. ``make`` writes ``job.output`` (and files beside it); ``in_graph``: precisions that it wants spelled
    out in the graph, others it makes itself; ``signed``: whether it wants int8 activations symmetric around zero;
    ``options`` are those of Options that it understands; ``beside``: suffixes of what is written beside the output."""

    name: str
    summary: str
    suffix: str
    build: Callable[[BuildJob], BuildOutput]
    precisions: tuple[Precision, ...]
    graph_precisions: tuple[Precision, ...] = ("fp16", "bf16", "int8")
    symmetric_activations: bool = False
    options: frozenset[str] = frozenset()
    extra_suffixes: tuple[str, ...] = ()
    check_request: Callable[[BuildRequest], None] | None = None
    """Refuse at once what cannot be built here: called before anything is computed."""

    def check_supported(self, precision: Precision, options: BuildOptions) -> None:
        if precision not in self.precisions:
            raise UserError(f"--precision {precision}: {self.name} takes {', '.join(self.precisions)}")
        for name in options.given():
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "no options of its own"
                raise UserError(f"{name} is not for --target {self.name}, which takes {known}")
