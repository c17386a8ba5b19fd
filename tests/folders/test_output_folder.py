"""The folder that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from snpc.errors import CheckFailed, UserError
from snpc.folders.model_folder import find_model_folder
from snpc.folders.output_folder import open_output_folder
from tests.models.folders import write_folder


def test_a_block_that_publishes_nothing_leaves_nothing(tmp_path: Path) -> None:
    source = find_model_folder(write_folder(tmp_path / "llama"))
    with (
        pytest.raises(CheckFailed, match=rf"{tmp_path / 'out' / 'model.onnx'}: is wrong"),
        open_output_folder(source, tmp_path / "out") as place,
    ):
        place.model_path.write_text("half a model")
        raise CheckFailed(f"{place.model_path}: is wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("target", ["llama", "llama/out", "full", "file", "none/out"])
def test_places_that_are_no_new_folder_are_refused(target: str, tmp_path: Path) -> None:
    source = find_model_folder(write_folder(tmp_path / "llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match=target), open_output_folder(source, tmp_path / target):
        pass
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep"
