"""Checkpoints: the state of a run in one file, replaced in one go, so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snpc.errors import UserError
from snpc.runtime.calibration.dataset import Calibration
from snpc.runtime.io.atomic import atomic_write
from snpc.torch.training.sampling import sample_ids

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True)
class CheckpointOptions:
    """Where checkpoints go, one ``every`` so many steps: ``resume`` goes on from the one in ``folder``, if there is
    one."""

    folder: Path
    every: int = 50
    resume: bool = False


@dataclass(frozen=True)
class CheckpointFile:
    """Checkpoints in ``folder``, one ``every`` so many steps. ``run`` names all that decides the result: a checkpoint
    of another run is refused."""

    folder: Path
    run_id: str
    every: int = 50

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT_FILE

    def write(self, state: dict[str, Any]) -> None:
        with atomic_write(self.path) as temporary:
            torch.save({"run": self.run_id, **state}, temporary)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved, None if nothing was. Raises UserError for a file that is broken or of another run."""
        if not self.path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise invalid_checkpoint_error(self.path, error) from None
        if found.get("run") != self.run_id:
            raise other_run_error(self.path)
        return found


def open_checkpoint(saved: CheckpointOptions, run: str) -> CheckpointFile:
    """Checkpoints in a folder, which is made. Raises UserError where one is there that was not asked for."""
    make_checkpoint_folder(saved)
    found = CheckpointFile(saved.folder, run, saved.every)
    if found.path.is_file() and not saved.resume:
        raise unexpected_checkpoint_error(found.path)
    return found


def make_checkpoint_folder(saved: CheckpointOptions) -> None:
    if saved.every < 1:
        raise UserError(f"checkpoint every {saved.every} steps: must be at least 1")
    try:
        saved.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{saved.folder}: cannot make this folder for checkpoints ({error.strerror})") from None


def run_fingerprint(data: Calibration, *parts: object) -> str:
    """Names a run by all that decides its result: which samples of ``data``, and ``parts``, which say what they are."""
    ids = np.concatenate(sample_ids(data))
    return hashlib.sha256(repr((data.source, *parts)).encode() + ids.tobytes()).hexdigest()


# -- what is refused -------------------------------------------------------------------------------------------------


def unexpected_checkpoint_error(path: Path) -> UserError:
    return UserError(f"{path}: there is a checkpoint already; go on from it with --resume, or remove it")


def invalid_checkpoint_error(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a checkpoint ({error}); remove it to start again")


def other_run_error(path: Path) -> UserError:
    return UserError(f"{path}: it is of a run with other models, data or options; give those, or another folder")
