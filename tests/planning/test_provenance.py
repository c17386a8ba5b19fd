"""A written file says how it was made, and whatever is made of it goes on saying so."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.planning import read_provenance
from snpc.types import Precision
from tests.command_line import invoke, reported, write_tiny
from tests.models.decoder_pairs import MERGED, write_merged


def entries(path: Path) -> dict[str, str]:
    """As runtimes show them."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(session.get_modelmeta().custom_metadata_map)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense.onnx`` with an entry of its exporter, and ``half.onnx``, pruned."""
    folder = tmp_path_factory.mktemp("provenance")
    model = onnx.load(write_tiny(folder / "dense.onnx"))
    model.producer_name, model.producer_version = "exporter", "2.0"
    model.metadata_props.add(key="author", value="someone")
    onnx.save(model, folder / "dense.onnx")
    invoke("prune", folder / "dense.onnx", "-o", folder / "half.onnx", "--target", "macs=0.5")
    return folder


def test_a_pruned_file_says_how_it_was_made(folder: Path) -> None:
    found = entries(folder / "half.onnx")
    assert found["author"] == "someone"
    assert found["snpc.version"] == snpc.__version__
    assert found["snpc.source"] == "dense.onnx"
    assert found["snpc.source_sha256"] == snpc.load(folder / "dense.onnx").digest
    assert found["snpc.producer"] == "exporter 2.0"
    assert found["snpc.target"] == "macs=0.5" and json.loads(found["snpc.options"])["target"] == "macs=0.5"
    assert list(json.loads(found["snpc.widths"]).values()) == [[32, 16]]
    model = onnx.load(folder / "half.onnx")
    assert (model.producer_name, model.producer_version) == ("snpc", snpc.__version__)
    same = invoke("prune", folder / "dense.onnx", "-o", folder / "same.onnx", "--target", "macs=0.5")
    assert same.exit_code == 0 and (folder / "same.onnx").read_bytes() == (folder / "half.onnx").read_bytes()


def test_inspect_shows_it(folder: Path) -> None:
    shown = " ".join(invoke("inspect", folder / "half.onnx").stdout.split())
    assert f"made by snpc {snpc.__version__} (prune) from dense.onnx: sha256" in shown and "target macs=0.5" in shown
    assert reported("inspect", folder / "half.onnx")["provenance"]["target"] == "macs=0.5"
    assert "made by snpc" not in invoke("inspect", folder / "dense.onnx").stdout
    assert reported("inspect", folder / "dense.onnx")["provenance"] == {}


def test_a_file_that_is_cut_again_keeps_what_it_said(folder: Path) -> None:
    snpc.prune(folder / "half.onnx", folder / "quarter.onnx", ratio=0.5)
    found = read_provenance(snpc.load(folder / "quarter.onnx").graph)
    before = read_provenance(snpc.load(folder / "half.onnx").graph)
    assert found["source"] == "half.onnx" and found["producer"] == "exporter 2.0"
    assert json.loads(found["previous"]) == before


@pytest.mark.parametrize("name, precision", [("plain.onnx", "fp32"), ("plain.ort", "fp32"), ("small.onnx", "fp16")])
def test_build_keeps_it(folder: Path, name: str, precision: Precision) -> None:
    snpc.build(folder / "half.onnx", "ort", folder / name, precision=precision)
    assert entries(folder / name) == entries(folder / "half.onnx")


def test_a_merged_decoder_says_it_too(tmp_path: Path) -> None:
    source = write_merged(tmp_path / MERGED, cross=False)
    snpc.prune(source, tmp_path / "half.onnx", ratio=0.5, method="select", criterion="magnitude")
    found = entries(tmp_path / "half.onnx")
    assert found["snpc.source"] == MERGED and found["snpc.target"] == "ratio=0.5"
