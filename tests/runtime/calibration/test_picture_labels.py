"""Classes from a table are in the order in which the pictures are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from snpc.errors import UserError
from snpc.runtime.calibration import ImageOptions, load_calibration, read_picture_labels
from snpc.types import TensorSpec
from tests.command_line import DATA, VIT, invoke

SHADES = {"img10.png": 10, "img2.png": 2, "img1.png": 1, "img33.png": 33}


def folder_of_pictures(folder: Path) -> Path:
    folder.mkdir()
    for name, shade in SHADES.items():
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(folder / name)
    return folder


def table(path: Path, rows: dict[str, int], heading: str = "file,label\n") -> Path:
    path.write_text(heading + "".join(f"{name},{label}\n" for name, label in rows.items()))
    return path


@pytest.mark.parametrize("heading", ["file,label\n", ""])
def test_labels_follow_the_pictures(heading: str, tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures")
    labels = read_picture_labels(folder, table(folder / "labels.csv", {**SHADES, "other.png": 7}, heading))
    inputs = (TensorSpec("x", np.dtype(np.uint8), ("N", 3, 8, 8)),)
    read = load_calibration(folder, inputs, samples=4, images=ImageOptions(size=(8, 8)), held_out=0)
    shades = np.concatenate([batch["x"] for batch in read.batches()])[:, 0, 0, 0]
    assert labels.tolist() == shades.tolist() == [1, 2, 10, 33]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("img1.png,1\n", "has no class of img2.png \\(3 of 4 pictures"),
        ("img1.png,1\nimg2.png,two\n", "row 2 is not a file name and a class"),
    ],
)
def test_tables_that_are_refused(rows: str, said: str, tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures")
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(UserError, match=said):
        read_picture_labels(folder, tmp_path / "labels.csv")
    with pytest.raises(UserError, match="no folder of pictures"):
        read_picture_labels(tmp_path / "labels.csv", tmp_path / "labels.csv")


def test_prune_scores_a_folder_of_pictures(tmp_path: Path) -> None:
    with np.load(DATA / "eval.npz") as arrays:
        images, labels = arrays["image"][:24, 0], arrays["labels"][:24]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(folder / f"{number}.png")
    pixels = np.rint(255 * images[:, None]).astype(np.float32) / 255
    (logits,) = ort.InferenceSession(VIT).run(None, {"image": pixels})
    right = float((logits.argmax(-1) == labels).mean())
    classes = {f"{number}.png": int(label) for number, label in enumerate(labels)}
    shown = invoke(
        *("prune", VIT, "--ratio", 0.1, "--roles", "ffn", "--method", "select", "-o", tmp_path / "small.onnx"),
        *("--calib", folder, "--image-mean", 0, "--image-std", 1),
        *("--eval", folder, "--labels", table(tmp_path / "classes.csv", classes)),
    ).stdout
    assert right > 0.8 and f"top-1 accuracy: {100 * right:.4g} -> " in shown
