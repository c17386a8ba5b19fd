"""A model for TensorRT and the shell script that builds its engine on another machine, profiles and compares it."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snpc.runtime.io import publish_files
from snpc.targets.base import BuildJob, BuildOptions, BuildOutput
from snpc.targets.engines.attention_kernels import KERNEL
from snpc.targets.engines.shape_profile import ShapeRange, shape_ranges
from snpc.types import Precision

PARITY: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}
"""The mean difference of outputs, absolute and relative, above which the script fails."""

SCRIPT = """\
#!/bin/sh
# Builds the engine on the machine with the GPU, times its layers, and compares its outputs with onnxruntime's.
set -e
cd "$(dirname "$0")"
{build}
{count}
if command -v polygraphy > /dev/null; then
  {compare}
else
  echo "outputs are not compared: pip install polygraphy onnxruntime"
fi
"""


@dataclass(frozen=True)
class EngineTool:
    """The command line tool of one runtime. ``package``: its Python package, which tells the version."""

    command: str
    package: str
    strong_types_until: int
    """Up to this version a flag is needed to keep the types of the graph."""
    environment: str = ""


TRTEXEC = EngineTool("trtexec", "tensorrt", strong_types_until=10)
TENSORRT_RTX = EngineTool(
    "tensorrt_rtx", "tensorrt_rtx", strong_types_until=0, environment="POLYGRAPHY_USE_TENSORRT_RTX=1 "
)


def write_engine_script(job: BuildJob, tool: EngineTool) -> BuildOutput:
    """Write the model for ``tool``, and a script beside it that builds, profiles and compares the engine."""
    publish_files([job.source], job.output)
    ranges = shape_ranges(job.output, job.options)
    major = installed_major(tool)
    strong = tool.strong_types_until > 0 and (major is None or major <= tool.strong_types_until)
    build = shlex.join(build_words(job.output, ranges, job.options, tool, strong))
    compare = shlex.join(compare_words(job.output, ranges, job.precision, strong))
    count = count_line(job, tool)
    shell = job.output.with_suffix(".sh")
    shell.write_text(SCRIPT.format(build=build, count=count, compare=tool.environment + compare), encoding="utf-8")
    shell.chmod(0o755)
    version = f"{tool.command} {major}" if major else f"{tool.command} (none is installed here)"
    return BuildOutput((job.output, shell), (f"for {version}: {build}",), runnable=False)


def installed_major(tool: EngineTool) -> int | None:
    try:
        return int(importlib.import_module(tool.package).__version__.split(".")[0])
    except ImportError:
        return None


def build_words(
    model: Path, ranges: dict[str, ShapeRange], options: BuildOptions, tool: EngineTool, strong: bool
) -> list[str]:
    """The command that builds the engine and times its layers."""
    stem = model.stem
    words = [tool.command, f"--onnx={model.name}", f"--saveEngine={stem}.engine"]
    if ranges:
        words += [f"--{bound}Shapes={','.join(shapes_of(ranges, bound, ':', 'x'))}" for bound in ("min", "opt", "max")]
    if strong:
        words.append("--stronglyTyped")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}")
    if options.sm:
        words.append(f"--computeCapabilities={','.join(map(str, options.sm))}")
    if tool is TRTEXEC:  # TensorRT for RTX times nothing while it builds
        words.append(f"--timingCacheFile={options.timing_cache or f'{stem}.timing.cache'}")
    words += ["--profilingVerbosity=detailed", f"--exportLayerInfo={stem}.layers.json"]
    return [*words, f"--exportProfile={stem}.profile.json"]


def compare_words(model: Path, ranges: dict[str, ShapeRange], precision: Precision, strong: bool) -> list[str]:
    """The command that compares the outputs of TensorRT with those of onnxruntime on the same file."""
    words = ["polygraphy", "run", model.name, "--trt", "--onnxrt"]
    for bound in ("min", "opt", "max") if ranges else ():
        words += [f"--trt-{bound}-shapes", *shapes_of(ranges, bound, ":[", ",", "]")]
    if ranges:
        words += ["--input-shapes", *shapes_of(ranges, "opt", ":[", ",", "]")]
    if strong:
        words.append("--strongly-typed")
    tolerance = f"{PARITY[precision]:g}"
    return [*words, "--atol", tolerance, "--rtol", tolerance, "--check-error-stat", "mean", "--seed", "42"]


def shapes_of(ranges: dict[str, ShapeRange], bound: str, start: str, between: str, end: str = "") -> Iterator[str]:
    for name, span in ranges.items():
        yield f"{name}{start}{between.join(map(str, getattr(span, bound)))}{end}"


def count_line(job: BuildJob, tool: EngineTool) -> str:
    """Prints how many layers hold a whole attention, and how many attentions there are."""
    attentions = len(job.prepared.attentions) if job.prepared is not None else 0
    count = f'$(grep -o \'"Name": *"[^"]*{KERNEL}\' {shlex.quote(job.output.stem)}.layers.json | wc -l)'
    return f'echo "attention: one kernel in {count} of {attentions} places"'
