"""Build targets: what one is, requests for a build, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from snpc.errors import UserError
from snpc.runtime.execution import Execution
from snpc.types import Difference, Feeds, Model, Precision, Shape

FP32_TOLERANCE = 1e-3  # relative difference of outputs that another runtime may have in fp32


@dataclass(frozen=True)
class BuildOptions:
    """Options of single targets; a target refuses those that it does not have.

    ``min_shapes``, ``opt_shapes``, ``max_shapes``: shapes of inputs by name: the range that an engine serves, and the
    shapes that it is tuned for. ``sm``: compute capabilities, 89 for 8.9. ``workspace``: MiB that the builder's tactics
    may use. ``timing_cache``: a file that is read if it is there, and written. ``emit_script``: write a model and a
    script that builds the engine on another machine, instead of building it. ``dim_sizes``: sizes of dynamic
    dimensions of the inputs that any target is tried on.
    """

    min_shapes: Mapping[str, Shape] = field(default_factory=dict)
    opt_shapes: Mapping[str, Shape] = field(default_factory=dict)
    max_shapes: Mapping[str, Shape] = field(default_factory=dict)
    sm: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    emit_script: bool = False
    dim_sizes: Mapping[str, int] = field(default_factory=dict)

    def given(self) -> list[str]:
        """Names of the options that are set, as on the command line."""
        names = [f.name for f in fields(self) if f.name != "dim_sizes" and getattr(self, f.name)]
        return [f"--{name.replace('_', '-')}" for name in names]


@dataclass(frozen=True)
class BuildRequest:
    """A request for a build, without the model: enough to see what cannot be built on this machine."""

    output: Path
    precision: Precision
    execution: Execution
    options: BuildOptions


@dataclass(frozen=True)
class BuildJob(BuildRequest):
    """One build: the target reads ``source``, the model at the requested precision, and writes ``output``.

    ``model`` is the file that the user named; outputs are compared with its outputs on ``feeds``. ``timing_feeds``: one
    batch to time on. ``plain``: the model at that precision without what the target rewrites beforehand; None where
    that is ``source``. ``prepared``: what was rewritten.
    """

    model: Path
    source: Path
    feeds: tuple[Feeds, ...]
    timing_feeds: Feeds
    plain: Path | None = None
    prepared: PreparedModel | None = None


@dataclass(frozen=True)
class PreparedModel:
    """A model as its target wants it. ``attentions``: names of the nodes that stand for its attentions (the softmax).

    ``rewritten``: it is not the model that was given. ``padded``: it computes more than that.
    """

    model: Model
    attentions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rewritten: bool = False
    padded: bool = False


@dataclass(frozen=True)
class AttentionKernel:
    """Whether an engine computes an attention in one kernel.

    ``name``: the node of its softmax, or the fused node. ``one_kernel_before``: whether it would if its graph were not
    rewritten; None where that engine was not built, or the graph is refused.
    """

    name: str
    one_kernel: bool
    one_kernel_before: bool | None = None


@dataclass(frozen=True)
class BuildOutput:
    """What a target wrote: ``files`` in one folder, first the one to load. ``runnable``: whether this machine can run
    it.

    ``weight_bytes``: bytes of weight memory, where the runtime reports them. ``attentions``: as of BuildResult.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    runnable: bool = True
    weight_bytes: int | None = None
    attentions: tuple[AttentionKernel, ...] = ()


@dataclass(frozen=True)
class BuildResult:
    """A built artifact. Where this machine can run it, it was loaded and compared.

    ``seconds``: duration of the build. ``bytes``: size of all files. ``drift``: its outputs against those of the model
    it was built from, in onnxruntime; empty where this machine cannot run it. ``attentions``: which attentions an
    engine computes in one kernel; empty for other targets, and where it does not tell.
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
    attentions: tuple[AttentionKernel, ...] = ()


@dataclass(frozen=True)
class BuildTarget:
    """One runtime to build for.

    ``build`` writes ``job.output`` and files beside it, whose suffixes are ``extra_suffixes``, or a script.
    ``graph_precisions``: the graph must be cast or quantized to these beforehand; the runtime makes the others of
    ``precisions`` itself.
    ``symmetric_activations``: int8 activations must be symmetric around zero. ``options``: flags of the BuildOptions
    that it has.
    """

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
    """Raises UserError for a request that this machine cannot build; called before anything is computed."""
    prepare: Callable[[Model, BuildJob, Path], PreparedModel] | None = None
    """Rewrites the model before it gets its precision; files may be left in the folder."""

    def paths(self, output: Path, options: BuildOptions) -> tuple[Path, ...]:
        """The files that a build of ``output`` writes, other than external data."""
        script = (".sh",) if options.emit_script else ()
        return (output, *(output.with_suffix(suffix) for suffix in (*self.extra_suffixes, *script)))

    def check_supported(self, precision: Precision, options: BuildOptions) -> None:
        """Raises UserError for a precision or an option that the target does not have."""
        if precision not in self.precisions:
            raise UserError(f"--precision {precision}: {self.name} takes {', '.join(self.precisions)}")
        for name in options.given():
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "no options of its own"
                raise UserError(f"{name} is not for --target {self.name}, which takes {known}")
