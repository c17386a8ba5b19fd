"""Merged decoders, taken apart and put together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from snpc.passes.companions.branches import merge_branches, split_branches
from snpc.runtime.io import read_model, save
from tests.models.decoder_pairs import pair_data, pair_paths, write_merged
from tests.oracle import analysis_of


@pytest.mark.parametrize("cross", [True, False])
def test_the_branches_are_the_decoders_that_were_merged(cross: bool, tmp_path: Path) -> None:
    branches = split_branches(read_model(write_merged(tmp_path / "merged.onnx", cross)))
    assert branches is not None
    for branch, path in zip(branches, pair_paths(cross), strict=True):
        own = read_model(path).graph
        assert {v.name for v in branch.graph.inputs} == {v.name for v in own.inputs}, "and no other"
        assert [v.name for v in branch.graph.outputs] == [v.name for v in own.outputs], "no constant in their place"
        assert [node.op_type for node in branch.graph] == [node.op_type for node in own]


@pytest.mark.parametrize("cross", [True, False])
def test_put_together_they_do_what_they_did(cross: bool, tmp_path: Path) -> None:
    path = write_merged(tmp_path / "merged.onnx", cross)
    merged = read_model(path)
    branches = split_branches(merged)
    assert branches is not None
    save(merge_branches(merged, *branches), tmp_path / "again.onnx")
    onnx.checker.check_model(tmp_path / "again.onnx", full_check=True)
    assert (tmp_path / "again.onnx").stat().st_size < 1.1 * path.stat().st_size, "weights are stored once"
    sessions = [
        ort.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in (path, tmp_path / "again.onnx")
    ]
    rng = np.random.default_rng(0)
    for cached in (False, True):
        given = pair_data(2, cross)
        for spec in sessions[0].get_inputs():
            if spec.name.startswith("past"):
                length = 7 if "encoder" in spec.name else 4
                given[spec.name] = rng.standard_normal((2, spec.shape[1], length, spec.shape[3])).astype(np.float32)
        before, after = (session.run(None, {**given, "use_cache_branch": np.array([cached])}) for session in sessions)
        for expected, found in zip(before, after, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_other_models_have_no_branches() -> None:
    assert split_branches(read_model(analysis_of("llama_cached__dyn20").model.path)) is None
