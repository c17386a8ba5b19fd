"""MODEL, and its analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, argument, option, subgroup
from snpc.cli.arguments.output import DumpArguments
from snpc.cli.arguments.parsers import parse_dim_sizes
from snpc.errors import UserError
from snpc.graph import PassObserver
from snpc.runtime.io import model_files


@dataclass(frozen=True)
class ModelArguments(ArgumentGroup):
    """The model."""

    path: Path = argument(metavar="MODEL", type=FILE_PATH)

    def files(self) -> set[Path]:
        """The model and the files of its weights, none of which may be overwritten."""
        return model_files(self.path)

    def load(self) -> snpc.Analysis:
        return load_and_analyze(self.path)

    def sibling(self, ending: str) -> Path:
        """A path beside the model: its name without the suffix, and ``ending``."""
        return self.path.with_name(f"{self.path.stem}{ending}")


@dataclass(frozen=True)
class PrunableModelArguments(ModelArguments):
    """The model, and whether its caches may get narrower."""

    kv_cache: bool = option(
        "--prune-kv-cache",
        is_flag=True,
        section="What to cut",
        help="Also prune key/value caches: past inputs and present outputs of the model get narrower together.",
    )

    def load(self) -> snpc.Analysis:
        return load_and_analyze(self.path, kv_cache=self.kv_cache)


@dataclass(frozen=True)
class SizedModelArguments(PrunableModelArguments):
    """The model at sizes of its dynamic dimensions, watched between passes."""

    dims: tuple[str, ...] = option(
        "--dim-param",
        multiple=True,
        metavar="NAME=SIZE",
        section="Running",
        help="Size of a dynamic dimension, at which MACs are counted; repeatable.",
    )

    dump: DumpArguments = subgroup()

    def load(self, observer: PassObserver | None = None) -> snpc.Analysis:
        """``observer``: called after each graph pass."""
        return load_and_analyze(self.path, parse_dim_sizes(self.dims), kv_cache=self.kv_cache, observer=observer)


def load_and_analyze(
    path: Path,
    dim_sizes: Mapping[str, int] | None = None,
    *,
    kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> snpc.Analysis:
    """The analysis of the model in ``path``. UserError for a dimension that none of its inputs has."""
    model = snpc.load(path, observer)
    names = {dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)}
    unknown = sorted(set(dim_sizes or {}) - names)
    if unknown:
        raise UserError(
            f"--dim-param {unknown[0]}: no such dynamic dimension; there is {', '.join(sorted(names)) or 'none'}"
        )
    return snpc.analyze(model, dim_sizes or {}, prune_kv_cache=kv_cache, observer=observer)
