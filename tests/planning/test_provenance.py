"""A written file says how it was made, and whatever is made of it goes on saying so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.planning import (
    ProvenanceStep,
    layers_of,
    options_of,
    provenance_in,
    pruning_of,
    read_provenance,
    widths_of,
)
from snpc.types import Precision
from tests.command_line import invoke, reported, write_tiny
from tests.models.decoder_pairs import MERGED, write_merged
from tests.models.quantized import dynamically


def entries(path: Path) -> dict[str, str]:
    """As runtimes show them."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(session.get_modelmeta().custom_metadata_map)


def steps_of(path: Path) -> tuple[ProvenanceStep, ...]:
    return read_provenance(snpc.load(path).graph)


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
    assert "made by snpc: pruned to 50 % of the MACs" in shown
    assert f"prune by snpc {snpc.__version__} from dense.onnx: sha256" in shown and "target macs=0.5" in shown
    (step,) = reported("inspect", folder / "half.onnx")["provenance"]
    assert step["target"] == "macs=0.5"
    assert "made by snpc" not in invoke("inspect", folder / "dense.onnx").stdout
    assert reported("inspect", folder / "dense.onnx")["provenance"] == []


def test_a_file_that_is_cut_again_keeps_what_it_said(folder: Path) -> None:
    result = snpc.prune(folder / "half.onnx", folder / "quarter.onnx", ratio=0.5)
    first, second = steps_of(folder / "quarter.onnx")
    assert (first,) == steps_of(folder / "half.onnx")
    assert second["source"] == "half.onnx" and second["producer"] == "exporter 2.0"
    assert result.provenance == (first, second)
    assert snpc.json_report(result)["provenance"] == [first, second]


@pytest.mark.parametrize(
    "name, precision",
    [
        ("plain.onnx", "fp32"),
        ("plain.ort", "fp32"),
        ("small.onnx", "fp16"),
        ("int8.onnx", "int8"),
        ("int8.ort", "int8"),
    ],
)
def test_build_keeps_it_and_adds_a_step(folder: Path, name: str, precision: Precision) -> None:
    data = snpc.load_calibration({"x": np.ones((4, 8), np.float32)}, snpc.load(folder / "half.onnx").inputs)
    snpc.build(folder / "half.onnx", "ort", folder / name, precision=precision, calibration=data)
    pruned, built = provenance_in(entries(folder / name))
    assert (pruned,) == steps_of(folder / "half.onnx") and entries(folder / name)["author"] == "someone"
    assert (built["step"], built["runtime"], built["precision"]) == ("build", "ort", precision)
    assert built["source"] == "half.onnx" and built["source_sha256"] == snpc.load(folder / "half.onnx").digest
    assert built.get("calibration", "") == (data.describe() if precision == "int8" else "")


def test_steps_are_one_flat_list(folder: Path) -> None:
    """However many there are: nested, the backslashes before quotes would double with every step."""
    source, lengths = folder / "half.onnx", []
    for number in range(4):
        target = folder / f"rebuilt{number}.onnx"
        snpc.build(source, "ort", target)
        lengths.append(len(entries(target)["snpc.previous"]))
        source = target
    assert len(steps_of(source)) == 5
    assert lengths[3] - lengths[2] == lengths[2] - lengths[1]


def test_what_is_not_ours_in_the_entries_is_left_out(folder: Path) -> None:
    step = steps_of(folder / "half.onnx")[0]
    written = {f"snpc.{name}": value for name, value in step.items()}
    assert provenance_in(written) == (step,)
    for previous in ("[", "{}", "[1]", '[{"no": "step"}]', "[" * 100_000):
        assert provenance_in({**written, "snpc.previous": previous}) == (step,)
    assert provenance_in({"snpc.other": "1", "author": "someone"}) == ()
    for text in ("[", "[1]", '{"a": 1}', '{"a": [1, "b"]}', '{"a": [1]}'):
        assert widths_of({**step, "widths": text}) == {}
    assert options_of({"step": "prune", "options": "[1]"}) == {} and layers_of({"step": "prune", "layers": "1"}) == ()


def test_the_step_that_cut_the_original_is_found_behind_steps_that_cut_nothing(folder: Path) -> None:
    digest = snpc.load(folder / "dense.onnx").digest
    (cut,) = steps_of(folder / "half.onnx")
    for later in ("finetune", "build", "convert"):
        assert pruning_of([cut, {"step": later}], digest) is cut
    for others in ([{"step": "dequantize"}, cut], [cut]):
        assert pruning_of(others, digest) is cut
    for others in ([cut, {"step": "restrict"}], [cut, {**cut, "source": "half.onnx"}], []):
        assert pruning_of(others, digest) is None
    assert pruning_of([cut], "another") is None


def test_a_dequantized_file_says_both_steps(folder: Path, tmp_path: Path) -> None:
    dynamically(folder / "dense.onnx", tmp_path / "int8.onnx", {})
    snpc.dequantize(tmp_path / "int8.onnx", tmp_path / "float.onnx")
    snpc.prune(tmp_path / "float.onnx", tmp_path / "half.onnx", ratio=0.5)
    assert [step["step"] for step in steps_of(tmp_path / "half.onnx")] == ["dequantize", "prune"]


def test_a_merged_decoder_says_it_too(tmp_path: Path) -> None:
    source = write_merged(tmp_path / MERGED, cross=False)
    snpc.prune(source, tmp_path / "half.onnx", ratio=0.5, method="select", criterion="magnitude")
    found = entries(tmp_path / "half.onnx")
    assert found["snpc.source"] == MERGED and found["snpc.target"] == "ratio=0.5"
