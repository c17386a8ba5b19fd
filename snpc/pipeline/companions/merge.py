"""Merged decoders: two pruned files as branches of one, which must do what the files do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import decoder_input
from snpc.passes.companions import merge_branches
from snpc.runtime.evaluation import decoder_interface
from snpc.runtime.execution import Execution, RunFunction, file_session
from snpc.runtime.io import load, read_model, save
from snpc.types import AnyArray, Model

TOKENS = 4  # that the branch without a past reads
BRANCH_TOLERANCE = 1e-4  # largest difference, of the largest entry: a runtime may fuse a branch in another way


def write_merged(original: Model, files: tuple[Path, Path], target: Path, execution: Execution) -> str:
    """Write two files, the decoder without a past and the one with, as branches of one to ``target``, as ``original``
    has them. Returned is what holds of it, in words.

    Raises CheckFailed where a branch makes other outputs than its file.
    """
    assert original.merged is not None
    target.parent.mkdir(exist_ok=True)
    merged = merge_branches(read_model(original.merged), *map(read_model, files))
    save(merged, target, original.external)
    first, second = map(load, files)
    holds = BranchCheck(target, list(merged.graph.inputs), first, second).run(execution)
    return f"{original.merged.name}: {holds}"


@dataclass(frozen=True)
class BranchCheck:
    """The file ``merged`` with its ``inputs``, and the models of its branches, which must make the same outputs."""

    merged: Path
    inputs: list[ir.Value]
    first: Model
    second: Model

    def run(self, execution: Execution) -> str:
        """What was compared, in words. Raises CheckFailed where outputs differ."""
        start, step = decoder_interface(self.first), decoder_interface(self.second)
        if start is None or step is None or not step.continues(start):
            return "not run, since its inputs are of unknown kinds"
        with ExitStack() as sessions:
            paths = (self.merged, self.first.path, self.second.path)
            merged, first, second = (sessions.enter_context(file_session(path, execution)) for path in paths)
            ids = np.arange(TOKENS)[None]
            feeds = start.feeds(ids, 0, start.empty_caches())
            outputs = first(feeds)
            self.compare(merged, feeds, outputs, cached=False)
            feeds = step.feeds(ids[:, -1:], TOKENS, step.caches_of(start, outputs))
            self.compare(merged, feeds, second(feeds), cached=True)
        return "both branches make the outputs of the verified files"

    def compare(
        self, run: RunFunction, feeds: Mapping[str, AnyArray], expected: Mapping[str, AnyArray], cached: bool
    ) -> None:
        """Run a branch on the inputs of its file; those that it does not read are zero."""
        found = run({**self.unread_inputs(), **feeds, self.switch: np.array([cached])})
        for name, array in expected.items():
            scale = float(np.abs(array).max(initial=0)) or 1.0
            same = found[name].shape == array.shape
            if not same or float(np.abs(found[name] - array).max(initial=0)) > BRANCH_TOLERANCE * scale:
                branch = "with" if cached else "without"
                raise CheckFailed(f"{self.merged}: its branch {branch} a past makes another {name} than its file")

    @property
    def switch(self) -> str:
        return next(str(value.name) for value in self.inputs if decoder_input(str(value.name)) == "branch")

    def unread_inputs(self) -> dict[str, AnyArray]:
        """Zeros for every input, of size 1 along dynamic axes."""
        return {
            str(value.name): np.zeros(
                [dim if isinstance(dim, int) else 1 for dim in value.shape or ()],
                value.dtype.numpy() if value.dtype else None,
            )
            for value in self.inputs
        }
