"""MODEL, and its analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import click

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, argument, option, subgroup
from snpc.cli.arguments.output import DumpArguments
from snpc.cli.arguments.parsers import parse_dim_sizes
from snpc.cli.progress import command_progress
from snpc.errors import UserError
from snpc.folders import TOKENIZER_ADVICE, ModelFolder, find_model_folder, main_model
from snpc.graph import PassObserver
from snpc.remote import copied_from, is_url
from snpc.runtime.execution import check_shape, parse_shapes
from snpc.runtime.io import local_model, model_files
from snpc.types import Shape, TensorSpec


@dataclass(frozen=True)
class SizeArguments(ArgumentGroup):
    """Sizes of dynamic dimensions, by name or by the shape of an input."""

    section: ClassVar[str] = "Running"

    dims: tuple[str, ...] = option(
        "--dim-param",
        multiple=True,
        metavar="NAME=SIZE",
        help="Size of a dynamic dimension: MACs are counted at it, and random inputs have it; repeatable.",
    )
    shapes: tuple[str, ...] = option(
        "--input-shapes",
        multiple=True,
        metavar="NAME:1,3,224,224",
        help="Shape of an input, instead of --dim-param for each of its axes; repeatable.",
    )

    def sizes(self, inputs: Sequence[TensorSpec]) -> dict[str, int]:
        """Size by name of a dimension. UserError: a name or a shape that no input has, or two sizes of one name."""
        return named_sizes(inputs, self.dim_sizes(), self.input_shapes())

    def dim_sizes(self) -> dict[str, int]:
        return parse_dim_sizes(self.dims)

    def input_shapes(self) -> dict[str, Shape]:
        return parse_shapes(self.shapes)


class ModelPath(click.Path):
    """A path, or a URL whose file is copied. ``folders``: a folder stays one; else its model is taken."""

    def __init__(self, folders: bool = False) -> None:
        super().__init__(path_type=Path, readable=False)
        self.folders = folders

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(value):
            return local_model(value)
        path = Path(str(super().convert(value, param, ctx)))
        return main_model(path) if path.is_dir() and not self.folders else path


@dataclass(frozen=True)
class ModelArguments(ArgumentGroup):
    """The model."""

    path: Path = argument(metavar="MODEL", type=ModelPath())
    at: SizeArguments = subgroup()

    def files(self) -> set[Path]:
        """The model and the files of its weights, none of which may be overwritten."""
        return model_files(self.path)

    def load(self) -> snpc.Analysis:
        return load_and_analyze(self.path, self.at)

    def sibling(self, ending: str) -> Path:
        """A path beside the model: its name without the suffix, and ``ending``. For one from a URL, in the current
        folder."""
        if copied_from(self.path) is not None:
            return Path(f"{self.path.stem}{ending}")
        return self.path.with_name(f"{self.path.stem}{ending}")


@dataclass(frozen=True)
class QuantizedModelArguments(ModelArguments):
    """The model, which may be quantized."""

    dequantize: bool = option(
        "--dequantize",
        is_flag=True,
        section="What to cut",
        help="MODEL is quantized: prune the float model that its numbers stand for.",
    )

    def read(self, observer: PassObserver | None = None) -> snpc.Model:
        """``observer``: called after each graph pass."""
        if not self.dequantize:
            return snpc.load(self.path, observer)
        return snpc.dequantize(self.path, execution=snpc.Execution(observer=observer))


@dataclass(frozen=True)
class PrunableModelArguments(QuantizedModelArguments):
    """The model, and whether its caches may get narrower."""

    kv_cache: bool = option(
        "--prune-kv-cache",
        is_flag=True,
        section="What to cut",
        help="Also prune key/value caches: past inputs and present outputs of the model get narrower together.",
    )

    def load(self) -> snpc.Analysis:
        return analyze_loaded(self.read, self.at, kv_cache=self.kv_cache)


@dataclass(frozen=True)
class WatchedModelArguments(PrunableModelArguments):
    """The model, watched between passes."""

    dump: DumpArguments = subgroup()

    def load(self, observer: PassObserver | None = None) -> snpc.Analysis:
        """``observer``: called after each graph pass."""
        return analyze_loaded(self.read, self.at, kv_cache=self.kv_cache, observer=observer)


@dataclass(frozen=True)
class PrunedModelArguments(WatchedModelArguments):
    """The model that is pruned, or a folder that holds it."""

    path: Path = argument(metavar="MODEL", type=ModelPath(folders=True))
    file: str | None = option(
        "--file",
        metavar="NAME",
        section="What to cut",
        help="Where MODEL is a folder of several models: the one to cut, such as encoder_model.onnx. The others are "
        "copied.",
    )
    companions: tuple[Path, ...] = option(
        "--companion",
        multiple=True,
        type=FILE_PATH,
        metavar="MODEL",
        section="What to cut",
        help="A model with the same weights, such as decoder_with_past_model.onnx: it is cut alike, and written beside "
        "the output under its own name. Of a folder it is found; repeatable.",
    )
    keep_kv_cache: bool = option(
        "--keep-kv-cache",
        is_flag=True,
        section="What to cut",
        help="Of a folder with a genai_config.json: leave key/value caches as they are. Otherwise they get narrower, "
        "and the configuration says their width.",
    )

    vocabulary: Path | None = option(
        "--vocabulary",
        type=FILE_PATH,
        metavar="IDS",
        section="What to cut",
        help="Keep these entries of the vocabulary only: a .json list of token ids, or a .txt. Embeddings and logits "
        "of the others go, ids are numbered anew, and the mapping is written to OUTPUT.vocabulary.json. Data has the "
        "old ids; samples that hold others are left out. Alone, it cuts nothing else.",
    )

    last_logits: bool = option(
        "--last-logits",
        is_flag=True,
        section="What to cut",
        help="Logits of the last position only, and no rows that only others need. It is position -1, padding or not, "
        "so pad on the left. There is no perplexity then. Alone, it cuts nothing else.",
    )

    @property
    def restricts(self) -> bool:
        """Does the pruned model say less than MODEL?"""
        return self.vocabulary is not None or self.last_logits

    def of_folder(self, source: ModelFolder) -> PrunedModelArguments:
        """The model of the folder in place of the folder."""
        if self.vocabulary is not None:
            raise UserError(TOKENIZER_ADVICE.format(folder=source.path, model=source.model_path))
        narrows = self.kv_cache or (source.says_cache_widths and not self.keep_kv_cache)
        return replace(self, path=source.model_path, kv_cache=narrows, companions=source.companion_paths)

    def files(self) -> set[Path]:
        """The models and the files of their weights, and that of the vocabulary: none may be overwritten."""
        named = {self.vocabulary} if self.vocabulary is not None else set[Path]()
        return named.union(*map(model_files, (self.path, *self.companions)))

    def read(self, observer: PassObserver | None = None) -> snpc.Model:
        """The model, with what is left of its vocabulary and logits. ``observer``: called after each graph pass."""
        model = self.read_whole(observer)
        if not self.restricts:
            return model
        execution = snpc.Execution(observer=observer)
        return snpc.restrict(model, vocabulary=self.vocabulary, last_logits=self.last_logits, execution=execution)

    def read_whole(self, observer: PassObserver | None = None) -> snpc.Model:
        """``observer``: called after each graph pass."""
        if not self.companions:
            return super().read(observer)
        if self.dequantize:
            raise UserError(
                f"--dequantize is for one model, and {self.companions[0]} goes with it: snpc dequantize both first"
            )
        return snpc.load(self.path, observer, companions=self.companions)

    def folder(self) -> ModelFolder | None:
        """The contents of MODEL where it is a folder."""
        if self.keep_kv_cache and self.kv_cache:
            raise UserError("--keep-kv-cache and --prune-kv-cache say the opposite: give one of the two")
        if self.path.is_dir() and self.companions:
            raise UserError("--companion is for files: those of a folder are found")
        if self.path.is_dir():
            return find_model_folder(self.path, self.file)
        if self.keep_kv_cache:
            raise UserError(
                "--keep-kv-cache is for folders: caches of a file stay as they are without --prune-kv-cache"
            )
        if self.file is not None:
            raise UserError(f"--file names a model of a folder, and {self.path} is none")
        return None


def load_and_analyze(path: Path, at: SizeArguments | None = None) -> snpc.Analysis:
    """The analysis of the model in ``path``. UserError for a dimension that none of its inputs has."""
    return analyze_loaded(partial(snpc.load, path), at)


def analyze_loaded(
    read: Callable[[PassObserver | None], snpc.Model],
    at: SizeArguments | None = None,
    *,
    kv_cache: bool = False,
    observer: PassObserver | None = None,
) -> snpc.Analysis:
    """The analysis of what ``read`` reads. UserError for a dimension that none of its inputs has."""
    with command_progress().stage("analysis", 2) as advance:
        model = read(observer)
        advance(1)
        sizes = at.sizes(model.inputs) if at is not None else {}
        analysis = snpc.analyze(model, sizes, prune_kv_cache=kv_cache, observer=observer)
        advance(1)
    return analysis


def named_sizes(
    inputs: Sequence[TensorSpec], dim_sizes: Mapping[str, int], shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """``dim_sizes`` and those that ``shapes`` give; an axis without a name is called INPUT.AXIS."""
    dims = {spec.name: [dim or f"{spec.name}.{axis}" for axis, dim in enumerate(spec.shape)] for spec in inputs}
    names = {dim for axes in dims.values() for dim in axes if isinstance(dim, str)}
    unknown = sorted(set(dim_sizes) - names)
    if unknown:
        raise UserError(
            f"--dim-param {unknown[0]}: no such dynamic dimension; there is {', '.join(sorted(names)) or 'none'}"
        )
    specs = {spec.name: spec for spec in inputs}
    sizes = dict(dim_sizes)
    for name, shape in shapes.items():
        if name not in specs:
            raise UserError(f"--input-shapes {name}: no such input; there is {', '.join(specs) or 'none'}")
        check_shape(specs[name], shape)
        for dim, size in zip(dims[name], shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise UserError(f"--input-shapes {name}: axis {dim!r} is {size} here and {sizes[dim]} elsewhere")
    return sizes
