"""What a runtime loads fastest: optimised graphs and engines, built, loaded again and compared.

A target is one file with one ``Target`` value, listed in ``make.TARGETS``.
"""

from snpc.targets.base import PRECISIONS, BuildOptions, BuildResult, Precision
from snpc.targets.build import TARGETS, build, find_target, timed_artifact
from snpc.targets.preferred_widths import PreferredWidths, widths_for_target

__all__ = [
    "PRECISIONS",
    "TARGETS",
    "BuildOptions",
    "BuildResult",
    "Precision",
    "PreferredWidths",
    "build",
    "find_target",
    "timed_artifact",
    "widths_for_target",
]
