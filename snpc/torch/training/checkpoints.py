"""Checkpoints: the state of a run in one file, replaced atomically, so that a kill leaves a whole one."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration
from snpc.runtime.io import atomic_write
from snpc.torch.training.sampling import sample_ids

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True)
class CheckpointOptions:
    """Write a checkpoint into ``folder`` after every ``every`` steps; ``resume``: begin with the one that is there, if
    there is one."""

    folder: Path
    every: int = 50
    resume: bool = False


@dataclass(frozen=True)
class CheckpointFile:
    """The checkpoint in ``folder``, written after every ``every`` steps. ``run_id`` is the fingerprint of all that
    decides the result: a checkpoint of another run is refused."""

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
        """The saved state, None if there is none. Raises UserError for a file that is broken or of another run."""
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise invalid_checkpoint_error(self.path, error) from None
        if state.get("run") != self.run_id:
            raise other_run_error(self.path)
        return state


def open_checkpoint(options: CheckpointOptions, run_id: str) -> CheckpointFile:
    """The checkpoint file of a run; its folder is made. Raises UserError where one exists and ``resume`` is not set."""
    make_checkpoint_folder(options)
    file = CheckpointFile(options.folder, run_id, options.every)
    if file.path.is_file() and not options.resume:
        raise unexpected_checkpoint_error(file.path)
    return file


def make_checkpoint_folder(options: CheckpointOptions) -> None:
    if options.every < 1:
        raise UserError(f"checkpoint every {options.every} steps: must be at least 1")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{options.folder}: cannot make this folder for checkpoints ({error.strerror})") from None


def run_fingerprint(data: Calibration, *parts: object) -> str:
    """A digest of all that decides a run's result: which samples of ``data``, and ``parts`` by their repr."""
    ids = np.concatenate(sample_ids(data))
    return hashlib.sha256(repr((data.source, *parts)).encode() + ids.tobytes()).hexdigest()


# -- what is refused -------------------------------------------------------------------------------------------------


def unexpected_checkpoint_error(path: Path) -> UserError:
    return UserError(f"{path}: there is a checkpoint already; go on from it with --resume, or remove it")


def invalid_checkpoint_error(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a checkpoint ({error}); remove it to start again")


def other_run_error(path: Path) -> UserError:
    return UserError(f"{path}: it is of a run with other models, data or options; give those, or another folder")
