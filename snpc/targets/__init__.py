"""What a runtime loads fastest: optimised graphs and engines, built, loaded again and compared.

A target is one file with one ``Target`` value, listed in ``make.TARGETS``.
"""

from snpc.targets.base import PRECISIONS, Build, Options, Precision
from snpc.targets.build import TARGETS, artefact, build, target_of
from snpc.targets.preferred_widths import Widths, widths_for

__all__ = [
    "PRECISIONS",
    "TARGETS",
    "Build",
    "Options",
    "Precision",
    "Widths",
    "artefact",
    "build",
    "target_of",
    "widths_for",
]
