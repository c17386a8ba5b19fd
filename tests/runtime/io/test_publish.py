"""A fault at any step of publishing leaves the old model or the new one, never one's head on the other's data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from snpc.runtime.io.publish import discard_model, publish_files
from tests.command_line import arrays, write_tiny


class Killed(BaseException):
    """Stands for a process that ends here: nothing after it runs."""


def staged(folder: Path, scale: float) -> Path:
    """A model with external data whose weights are all ``scale`` times those of ``write_tiny``."""
    folder.mkdir()
    path = write_tiny(folder / "inline.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * scale, tensor.name))
    path.unlink()
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    return folder / "m.onnx"


def scale_of(head: Path, original: Path) -> set[float]:
    before, after = arrays(original), arrays(head)
    return {float(np.round(np.median(after[name] / before[name]), 3)) for name in before}


def steps_of(monkeypatch: pytest.MonkeyPatch, kill_at: int | None) -> list[str]:
    """Records renames and removals; the one numbered ``kill_at`` is not done any more."""
    done: list[str] = []

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def step(path: Path, *arguments: Any, **options: Any) -> Any:
            if len(done) == kill_at:
                raise Killed
            done.append(f"{name} {path.name}")
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, name, step)

    for name in ("replace", "unlink"):
        counted(name)
    return done


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_kill_before_each_step(kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_tiny(tmp_path / "original.onnx")
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    publish_files([staged(tmp_path / "first", 2.0)], target)
    assert scale_of(target, original) == {2.0}
    second = staged(tmp_path / "second", 3.0)
    with monkeypatch.context() as patch:
        done = steps_of(patch, kill_at)
        if kill_at < 3:
            with pytest.raises(Killed):
                publish_files([second], target)
        else:
            publish_files([second], target)
    assert len(done) == kill_at
    assert scale_of(target, original) == ({3.0} if kill_at >= 2 else {2.0})  # the head is renamed second
    onnx.checker.check_model(str(target))
    if kill_at < 3:  # what was left of the killed run, and of the model before it, goes with the next one
        publish_files([staged(tmp_path / "third", 4.0)], target)
        assert scale_of(target, original) == {4.0}
    assert len(list(target.parent.iterdir())) == 2


def test_foreign_data_files_stay(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    (tmp_path / "m.onnx.data").write_bytes(b"of another program")
    files = publish_files([staged(tmp_path / "staged", 2.0)], target)
    assert (tmp_path / "m.onnx.data").read_bytes() == b"of another program"
    assert files[0] == target and files[1].is_file()
    discard_model(target)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["m.onnx.data"]


def test_the_same_content_has_the_same_name(tmp_path: Path) -> None:
    names = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        files = publish_files([staged(tmp_path / f"staged-{run}", 2.0)], tmp_path / run / "m.onnx")
        names.append((files[1].name, files[0].read_bytes()))
    assert names[0] == names[1]


def test_files_that_name_each_other_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO finds m.bin by the name of m.xml: a kill in between leaves no m.xml."""
    target = tmp_path / "m.xml"
    target.write_text("old")
    (tmp_path / "m.bin").write_text("old")
    folder = tmp_path / "staged"
    folder.mkdir()
    for name in ("m.xml", "m.bin"):
        (folder / name).write_text("new")
    with monkeypatch.context() as patch:
        steps_of(patch, 2)
        with pytest.raises(Killed):
            publish_files([folder / "m.xml", folder / "m.bin"], target)
    assert (tmp_path / "m.bin").read_text() == "new"
    assert not target.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_an_old_model_over_a_new_one_keeps_its_data(tmp_path: Path) -> None:
    """Publishing back and forth: what the present head refers to is there at the end of each."""
    original = write_tiny(tmp_path / "original.onnx")
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    for turn, scale in enumerate((2.0, 3.0, 2.0, 2.0)):
        publish_files([staged(tmp_path / str(turn), scale)], target)
        assert scale_of(target, original) == {scale}
        assert len(list(target.parent.iterdir())) == 2
