"""Clusters: what they are given as, what is refused, and a prune on their workers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from snpc.errors import UserError
from snpc.runtime.execution import open_cluster, parse_cluster
from snpc.runtime.execution.cluster import start_workers
from tests.command_line import CALIB, VIT, arrays, invoke

PRUNE = ("prune", VIT, "--calib", CALIB, "--calib-samples", 24, "--calib-batch", 4, "--ratio", 0.5, "--uniform")


def test_clusters_as_text() -> None:
    assert parse_cluster("local:3") == 3
    assert parse_cluster("tcp://10.0.0.1:8786") == "tcp://10.0.0.1:8786"


@pytest.mark.parametrize("text", ["local", "local:", "local:0", "local:x", "host:8786", "tcp:", "tcp://", "8", ""])
def test_what_is_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="local:N"):
        parse_cluster(text)
    assert "local:N" in invoke(*PRUNE, "--cluster", text, code=2).output


def test_a_comparison_of_two_files_is_not_spread() -> None:
    assert "give --plan too" in invoke("verify", VIT, VIT, "--cluster", "local:2", code=2).output


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install snpc\[cluster\]"), open_cluster("local:2"):
        pass


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(sys.modules["snpc.runtime.execution.cluster"], "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="no Dask scheduler answers"), open_cluster("tcp://127.0.0.1:9"):
        pass


def test_a_scheduler_without_workers() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        start_workers(distributed, 0) as cluster,
        pytest.raises(UserError, match="has no workers"),
        open_cluster(cluster.scheduler_address),
    ):
        pass


def test_two_clusters_at_once() -> None:
    """Each of several runs on a machine has a cluster of its own: their ports must not meet."""
    distributed = pytest.importorskip("distributed")
    with start_workers(distributed, 0) as one, start_workers(distributed, 0) as other:
        assert one.scheduler_address != other.scheduler_address


def test_a_cluster_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask sets the threads of its workers in this process, too."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with start_workers(distributed, 1):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_prune_on_a_scheduler_gives_the_same_weights(tmp_path: Path) -> None:
    """``--cluster tcp://..`` with two worker processes that know nothing but the scheduler."""
    distributed = pytest.importorskip("distributed")
    here, there = tmp_path / "here.onnx", tmp_path / "there.onnx"
    invoke(*PRUNE, "-o", here)
    with start_workers(distributed, 2) as cluster:
        invoke(*PRUNE, "-o", there, "--cluster", cluster.scheduler_address)
    expected, found = arrays(here), arrays(there)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-9 * max(float(np.abs(array).max()), 1.0))
