"""The model card: metadata that the hub reads, and the numbers of the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from snpc.errors import UserError
from snpc.report import CardOptions, model_card
from tests.command_line import CALIB, VIT, invoke


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    path = folder / "report.json"
    invoke(
        *("prune", VIT, "-o", folder / "small.onnx", "--ratio", 0.5, "--method", "parallel", "--calib", CALIB),
        *("--calib-samples", 32, "--json", path),
    )
    return path


def test_a_card_has_what_the_hub_reads_and_the_numbers_of_the_report(report: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    invoke("card", report, "--base-model", "owner/digits: vit", "--license", "apache-2.0", "-o", card)
    _, head, text = card.read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "owner/digits: vit",
        "base_model_relation": "finetune",
        "library_name": "onnx",
        "license": "apache-2.0",
        "tags": ["onnx", "pruned", "structured-pruning", "snpc"],
    }
    data = json.loads(report.read_text())
    share = 100 * data["macs"]["after"] / data["macs"]["before"]
    assert f"| {share:.1f} % |" in text and "| MACs | " in text
    cut = [group for group in data["groups"] if group["kept"] < group["size"]]
    rows = re.findall(r"^\| `(.+?)` \| (\w+) \| (\d+) x (\d+) \| \d+ x (\d+) \|", text, re.M)
    assert rows == [(g["id"], g["role"], *map(str, (g["blocks"], g["size"], g["kept"]))) for g in cut]
    (judged,) = [d for d in data["verify"]["quality"]["differences"] if d["metric"] != "none"]
    assert f"{judged['distance']:.3g}" in text and data["digest"] in text and data["calibration"]["text"] in text
    assert invoke("card", report).stdout.startswith("---\nlibrary_name: onnx\n")


def test_a_card_says_the_steps_where_there_were_several(report: Path) -> None:
    data: dict[str, Any] = json.loads(report.read_text())
    assert "Step by step" not in model_card(data)
    data["provenance"].insert(0, {"step": "dequantize"})
    assert "Step by step, the file was dequantized, then pruned by 50 % of the units." in model_card(data)
    del data["provenance"]  # of an older version
    assert "Step by step" not in model_card(data)


def test_names_that_are_markdown_stay_text(report: Path) -> None:
    data: dict[str, Any] = json.loads(report.read_text())
    cut = next(group for group in data["groups"] if group["kept"] < group["size"])
    cut["id"] = "a|b`c\n| d"
    assert "| `a/b'c / d` |" in model_card(data)


@pytest.mark.parametrize("text, words", [("{}", "`snpc prune --json` writes one"), ("[", "not JSON")])
def test_other_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert words in invoke("card", path, code=2).stderr
    assert "cannot be read" in invoke("card", tmp_path / "none.json", code=2).stderr
    with pytest.raises(UserError, match="not whole"):
        model_card({"snpc_report": 1})
    with pytest.raises(UserError, match="is not one of finetune"):
        CardOptions(relation="pruned")  # type: ignore[arg-type]
