"""Build targets: optimized graphs and engines for a runtime, built, loaded again and compared.

A target is one file with one ``BuildTarget`` value, listed in ``build.TARGETS``.
"""

from snpc.targets.base import BuildOptions, BuildResult
from snpc.targets.build import TARGETS, build, find_target, timed_artifact
from snpc.targets.preferred_widths import PreferredWidths, widths_for_target

__all__ = [
    "TARGETS",
    "BuildOptions",
    "BuildResult",
    "PreferredWidths",
    "build",
    "find_target",
    "timed_artifact",
    "widths_for_target",
]
