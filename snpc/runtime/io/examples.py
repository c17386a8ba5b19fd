"""The trained examples that ship inside the package, and how they reach a user's folder."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from snpc.errors import UserError
from snpc.runtime.io.atomic import staging_folder
from snpc.runtime.io.publish import publish_files

# Listed, not found by scanning: whatever else lies next to the data is never handed out, and a name opens no path.
EXAMPLES: dict[str, tuple[str, ...]] = {"digits": ("digits_vit.onnx", "calib.npz", "eval.npz")}


def write_example(name: str, folder: Path | str) -> tuple[Path, ...]:
    """Copy example ``name`` into ``folder``, made if missing; files of the same names there are replaced.

    Returned are the paths written. For ``"digits"``, a Vision Transformer trained on 8x8 images of handwritten digits:

    - ``digits_vit.onnx``: input ``image`` [N, 1, 8, 8] float32, gray levels in [0, 1]; output ``logits`` [N, 10]
      float32, unnormalized log-probabilities.
    - ``calib.npz``: ``image`` [256, 1, 8, 8] as above, training images without labels, to calibrate with.
    - ``eval.npz``: ``image`` [500, 1, 8, 8] and ``labels`` [500] int64 in 0..9, images the model was not trained on.

    All files are written in full beside their places before the first takes its place, so a crash or a full disk
    leaves no half-written file. Raises ``UserError`` for an unknown name or a folder that cannot be written.
    """
    contents, folder = _read_example(name), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _replace_all(folder, contents)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write example '{name}' to {folder}: {reason}; give a folder that you can write to"
        raise UserError(message) from error


def _read_example(name: str) -> dict[str, bytes]:
    """File name -> content of one shipped example."""
    if name not in EXAMPLES:
        known = ", ".join(f"'{known}'" for known in EXAMPLES)
        raise UserError(f"there is no example '{name}': snpc ships {known}; give one of these names")
    source = files("snpc") / "data" / name
    return {file: (source / file).read_bytes() for file in EXAMPLES[name]}


def _replace_all(folder: Path, contents: dict[str, bytes]) -> tuple[Path, ...]:
    """Write every file beside its place, then rename all of them."""
    names = list(contents)
    with staging_folder(folder / names[0]) as staging:
        for name, data in contents.items():
            (staging / name).write_bytes(data)
        return publish_files([staging / name for name in names], folder / names[0])
