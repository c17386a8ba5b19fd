"""Checkpoints: the state of a run in one file, replaced in one go, so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snpc.errors import UserError
from snpc.runtime.model_io import replacing

FILE = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints in ``folder``, one ``every`` so many steps. ``run`` names all that decides the result: a checkpoint
    of another run is refused."""

    folder: Path
    run: str
    every: int = 50

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def write(self, state: dict[str, Any]) -> None:
        with replacing(self.path) as temporary:
            torch.save({"run": self.run, **state}, temporary)

    def latest(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved, None if nothing was. Raises UserError for a file that is broken or of another run."""
        if not self.path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path}: not a checkpoint ({error}); remove it to start again") from None
        if found.get("run") != self.run:
            raise UserError(
                f"{self.path}: it is of a run with other models, data or options; give those, or another folder"
            )
        return found


def opened(folder: Path, run: str, every: int, resume: bool) -> Checkpoints:
    """Checkpoints in ``folder``, which is made. Raises UserError where one is there that was not asked for."""
    if every < 1:
        raise UserError(f"checkpoint every {every} steps: must be at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make this folder for checkpoints ({error.strerror})") from None
    found = Checkpoints(folder, run, every)
    if found.path.is_file() and not resume:
        raise UserError(f"{found.path}: there is a checkpoint already; go on from it with --resume, or remove it")
    return found
