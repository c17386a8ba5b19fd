"""The folder with the pruned model: written beside its place, and renamed when everything is in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import CheckFailed, UserError
from snpc.folders.forms import conversion_command
from snpc.folders.generation import check_generation
from snpc.folders.model_folder import (
    CONFIGS,
    GENAI_CONFIG,
    ONNX_FOLDER,
    USUAL_NAME,
    ModelFolder,
    files_of,
    is_part,
    read_json,
)
from snpc.folders.parts import WholeVerdict
from snpc.folders.runtime_config import updated_config, width_changes
from snpc.passes.quantization import quantized_operators
from snpc.pipeline import PrunedModel
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.io import load, write_errors
from snpc.targets import WrittenPrecision, check_precisions, write_precisions
from snpc.temporary import TemporaryFolder


@dataclass(frozen=True)
class PrunedFolder:
    """A folder that was written. ``model``: the pruned model in it. ``copied``: files that are as they were;
    ``left_out``: those of the dense model in other precisions. ``changed`` and ``unsaid``: file -> what was set in a
    configuration, and what it cannot say any more. ``generation``: what its runtime generates, in words; "" where that
    was not compared. ``encoder`` and ``whole``: of a decoder whose encoder was cut too, and of both together.
    ``precisions``: files of the pruned models at other precisions. ``cache_offer``: of caches that stay, since nothing
    says their width to the runtime: bytes per token, and about what they would be with ``prune_kv_cache``."""

    path: Path
    model: PrunedModel
    copied: tuple[Path, ...]
    left_out: tuple[Path, ...]
    changed: dict[Path, tuple[str, ...]]
    unsaid: dict[Path, tuple[str, ...]]
    generation: str = ""
    encoder: PrunedModel | None = None
    whole: WholeVerdict | None = None
    cache_offer: tuple[int, int] | None = None
    precisions: tuple[WrittenPrecision, ...] = ()

    @property
    def conversions(self) -> dict[Path, str]:
        """Model that is left out, and not written at its precision -> the command that makes it of the pruned one."""
        parts = [part for part in (self.model, self.encoder) if part is not None]
        written = [path for part in parts for path in (part.path, *(c.path for c in part.companions))]
        models = [path.relative_to(self.path) for path in written]
        made = {written.path.relative_to(self.path) for written in self.precisions}
        forms = [file for file in self.left_out if file.suffix == ".onnx" and file not in made]
        return {form: conversion_command(self.path, form, models) for form in forms}

    def to_json(self) -> dict[str, Any]:
        words = {name: {str(f): list(w) for f, w in getattr(self, name).items()} for name in ("changed", "unsaid")}
        files = {name: [str(file) for file in getattr(self, name)] for name in ("copied", "left_out")}
        whole = {"whole": self.whole.to_json()} if self.whole is not None else {}
        offer = dict(zip(("now", "with_prune_kv_cache"), self.cache_offer, strict=True)) if self.cache_offer else None
        return {
            "path": str(self.path),
            **files,
            **words,
            "conversions": {str(form): command for form, command in self.conversions.items()},
            "precisions": [
                {
                    "path": str(written.path),
                    "precision": written.precision,
                    "bytes": written.path.stat().st_size,
                    "difference": written.difference,
                    "compared": written.compared,
                }
                for written in self.precisions
            ],
            "generation": self.generation,
            "cache_bytes_per_token": offer,
            **whole,
        }


@dataclass(frozen=True)
class OutputFolder:
    """A folder that becomes ``target``. ``staged``: where it lies until then. ``precisions``: at which the pruned
    models are written, too."""

    source: ModelFolder
    target: Path
    staged: Path
    precisions: tuple[str, ...] = ()

    @property
    def model_path(self) -> Path:
        """Where the pruned model is to be written."""
        return self.staged / self.place(self.source.model)

    @property
    def encoder_path(self) -> Path:
        """Where the pruned encoder is to be written, of a folder whose encoder is cut too."""
        assert self.source.encoder is not None
        return self.staged / self.place(self.source.encoder)

    def place(self, model: Path) -> Path:
        """Where a model, or a file of its weights, goes in the folder: where it was, or into ``onnx``, where
        transformers.js looks for models and their precisions. One model that is no part of another gets the name that
        tools look for."""
        if self.source.alone and not self.source.companions and not is_part(model):
            return Path(ONNX_FOLDER) / USUAL_NAME
        moves = (self.precisions or self.source.alone) and model.parent == Path()
        return Path(ONNX_FOLDER) / model if moves else model

    def publish(
        self,
        result: PrunedModel,
        execution: Execution = DEFAULT_EXECUTION,
        encoder: PrunedModel | None = None,
        whole: WholeVerdict | None = None,
    ) -> PrunedFolder:
        """Copy what goes with the model, bring the configurations to its widths, and give the folder its name.
        ``encoder``: that of the model where it was cut too; ``whole``: what holds of both.

        Raises UserError where that fails, CheckFailed where the folder's runtime generates other tokens than the model;
        then nothing is at ``target``.
        """
        changed, unsaid, copied = {}, {}, []
        results = {self.source.part: result, **({"encoder": encoder} if encoder is not None else {})}
        changes = width_changes(results)
        models = files_of(self.source.path, [file for file in self.source.others if file.suffix == ".onnx"])
        for file in self.source.others:
            place = self.staged / (self.place(file) if file in models else file)
            with write_errors(self.target):
                place.parent.mkdir(parents=True, exist_ok=True)
                if file.name in CONFIGS and changes:
                    update = updated_config(read_json(self.source.path / file), changes)
                    if update.changed:
                        place.write_text(update.text, encoding="utf-8")
                        changed[file] = update.changed
                    if update.unsaid:
                        unsaid[file] = update.unsaid
                if file not in changed:
                    shutil.copy2(self.source.path / file, place)
                    copied.append(file)
        precisions = [found for part in results.values() for found in self.write_precisions(part, execution)]
        generation = check_generation(self.source, self.staged, execution)
        check_output_folder(self.source, self.target)
        with write_errors(self.target):
            if self.target.is_dir():
                self.target.rmdir()
            self.staged.rename(self.target)
        return PrunedFolder(
            self.target,
            self.in_place(result),
            tuple(copied),
            tuple(self.place(form) for form in self.source.forms),
            changed,
            unsaid,
            generation,
            self.in_place(encoder) if encoder is not None else None,
            whole,
            None if self.source.says_cache_widths else cache_offer(result),
            tuple(replace(found, path=self.target / found.path.relative_to(self.staged)) for found in precisions),
        )

    def write_precisions(self, result: PrunedModel, execution: Execution) -> Iterator[WrittenPrecision]:
        """Those of a pruned model and of its companions."""
        for path in dict.fromkeys((result.path, *(companion.path for companion in result.companions))):
            yield from write_precisions(path, self.precisions, execution)

    def in_place(self, result: PrunedModel) -> PrunedModel:
        """The result with its paths in the folder that has its name."""
        place = self.target / result.path.parent.relative_to(self.staged)
        companions = tuple(replace(c, path=place / c.path.name) for c in result.companions)
        return replace(result, path=place / result.path.name, companions=companions)


def cache_offer(result: PrunedModel) -> tuple[int, int] | None:
    """Bytes per token of caches that stayed as wide as they were, and those of heads that lose the share of their
    channels that the plan takes of what it cuts; None where there are no such caches."""
    before, after = result.cache_bytes
    cut = {group.id: group.blocks * group.size for group in result.plan.analysis.groups if group.id in result.plan.keep}
    kept = sum(len(row) for name in cut for row in result.plan.keep[name])
    if not before or after < before or not sum(cut.values()):
        return None
    return before, round(before * kept / sum(cut.values()))


@contextmanager
def open_output_folder(source: ModelFolder, target: Path, precisions: Sequence[str] = ()) -> Iterator[OutputFolder]:
    """A folder beside ``target`` that ``publish`` renames. What the block leaves unpublished is deleted.

    Raises UserError where ``target`` is not empty, lies in the source, or cannot be made, or where models cannot be
    written at ``precisions``.
    """
    check_output_folder(source, target)
    if precisions:
        check_precisions(precisions)
        check_forms_fit(source)
    with write_errors(target):
        folder = TemporaryFolder(target.parent)
        place = OutputFolder(source, target, folder.path / target.name, tuple(precisions))
        staged = place.staged
        for model in source.cut:
            (staged / place.place(model)).parent.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except (CheckFailed, UserError) as error:  # the folder is gone when a user reads it
        raise type(error)(str(error).replace(str(staged), str(target))) from None
    finally:
        folder.delete()


def check_output_folder(source: ModelFolder, target: Path) -> None:
    """Raises UserError where no new folder can get this name."""
    if not source.alone and target.resolve().is_relative_to(source.path.resolve()):
        raise UserError(f"{target}: lies in the input itself; choose another folder with -o")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give the name of a new folder with -o")
    if target.exists() and any(target.iterdir()):
        name = "a file name, or " if source.alone else ""
        raise UserError(f"{target}: is a folder with other files in it; give {name}a new or empty folder with -o")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")


def check_forms_fit(source: ModelFolder) -> None:
    """Raises UserError where no tool would read other precisions beside the models, or these are quantized."""
    if source.says_cache_widths:
        raise UserError(f"{source.path / GENAI_CONFIG}: names the one file that is run: leave out --precisions")
    for model in source.cut:
        if quantized_operators(load(source.path / model).graph):
            raise UserError(f"{source.path / model}: is quantized: leave out --precisions, or give the float model")
