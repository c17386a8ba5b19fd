"""The oracle: a sliced model must say what the original says with the removed units silenced.

No expected numbers are kept anywhere. A test chooses at random what goes, and compares the two graphs by running both.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from snpc.passes.analyze import Analysis, analyze
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import RewrittenModel, rewrite_model
from snpc.runtime.io.load import load
from snpc.runtime.io.save import save
from snpc.types import Group
from tests.models.exports import ALL, export, load_feeds

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Feeds = Mapping[str, Array]
Cuts = dict[tuple[str, int], Mask]
Level = Literal["off", "all"]

TOLERANCE = 1e-5  # of the largest absolute output

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def require(name: str) -> None:
    """Skip the test where the export is neither cached nor can be made."""
    missing = ALL[name].missing()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@functools.cache
def analysis_of(name: str) -> Analysis:
    require(name)
    return analyze(load(export(name)))


@functools.cache
def feeds_of(name: str) -> dict[str, Array]:
    require(name)
    return load_feeds(name)


def analysis_at(path: Path, proto: onnx.ModelProto) -> Analysis:
    """The analysis of a model made by a test."""
    onnx.save(proto, path)
    return analyze(load(path))


# -- what goes -------------------------------------------------------------------------------------------------------


def random_removal(group: Group, rng: np.random.Generator, ratio: float = 0.5) -> Mask:
    """[blocks, size], true where a unit goes: the same number in every block, but other ones; one step stays."""
    going = min(max(1, round(group.size * ratio)), group.size - 1)
    if group.tie:  # as many channels in every group of the tie
        kept = round(group.size * group.channels * (1 - ratio)) // group.channels
        going = group.size - max(kept // group.step, 1) * group.step
    removed = np.zeros((group.blocks, group.size), bool)
    for row in removed:
        row[rng.permutation(group.size)[:going]] = True
    return removed


def cuts_of(removals: Iterable[tuple[Group, Mask]]) -> Cuts:
    """The removed positions of every constant, from the removed units of every group."""
    cuts: Cuts = {}
    for group, removed in removals:
        flat = np.append(removed.reshape(-1), False)
        for site in group.sites:
            key = (site.tensor, site.axis)
            cuts[key] = cuts.get(key, np.zeros(len(site.units), bool)) | flat[site.units]
    return cuts


def prunable(groups: Sequence[Group], *roles: str) -> list[Group]:
    """The groups that can lose a unit, of the given roles (or of all)."""
    return [g for g in groups if g.prunable and g.size > 1 and (not roles or g.role in roles)]


def random_cuts(groups: Iterable[Group], seed: int, ratios: Mapping[str, float] | float = 0.5) -> Cuts:
    rng = np.random.default_rng(seed)
    return cuts_of(
        (g, random_removal(g, rng, ratios if isinstance(ratios, float) else ratios.get(g.role, 0.5))) for g in groups
    )


# -- running ---------------------------------------------------------------------------------------------------------


def open_session(model: bytes | Path, level: Level) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_in(session: ort.InferenceSession, feeds: Feeds) -> list[Array]:
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))


def run(model: bytes | Path, feeds: Feeds, level: Level = "off") -> list[Array]:
    """The outputs of a model for these inputs, in a session of its own."""
    return run_in(open_session(model, level), feeds)


@functools.cache
def outputs_of(name: str) -> list[Array]:
    """What an export gives for its feeds, run once per process."""
    return run(export(name), feeds_of(name))


def relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Largest difference over the outputs, each relative to its largest expected magnitude."""
    assert [a.shape for a in expected] == [a.shape for a in actual]
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / max(float(np.abs(a).max()), 1e-30))
        for a, b in zip(expected, actual, strict=True)
    )


def written(model: ir.Model) -> bytes:
    """The model as it is saved. Takes it over: the graph is tidied in place."""
    with tempfile.TemporaryDirectory(prefix="snpc-oracle-") as folder:
        path = Path(folder) / "model.onnx"
        save(finalize(model), path)
        return path.read_bytes()


@dataclass(frozen=True)
class Pair:
    """A cut model and its oracle, both as they would be saved."""

    rewritten: RewrittenModel
    sliced: bytes
    masked: bytes

    @functools.cached_property
    def masked_session(self) -> ort.InferenceSession:
        """The masked original always runs without optimization; its session serves every comparison."""
        return open_session(self.masked, "off")

    def expected(self, feeds: Feeds) -> list[Array]:
        """The outputs of the masked original."""
        return run_in(self.masked_session, feeds)

    def error(self, feeds: Feeds, level: Level = "off") -> float:
        """How far the cut model is from the masked original."""
        return relative_error(self.expected(feeds), run(self.sliced, feeds, level))


def cut(analysis: Analysis, cuts: Cuts) -> Pair:
    rewritten = rewrite_model(analysis.traced_graph, cuts)
    masked = mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)
    return Pair(rewritten, written(rewritten.model), written(masked))
