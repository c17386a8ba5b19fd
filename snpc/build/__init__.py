"""What a runtime loads fastest: optimised graphs and engines, built, loaded again and compared.

A target is one file with one ``Target`` value, listed in ``make.TARGETS``.
"""

from snpc.build.base import PRECISIONS, Build, Options, Precision
from snpc.build.make import TARGETS, build

__all__ = ["PRECISIONS", "TARGETS", "Build", "Options", "Precision", "build"]
