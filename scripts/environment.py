"""What ``demo.py`` and ``check.py`` share: a virtual environment in ``.venv`` of this checkout, set up once.

Standard library only. What was installed is noted inside the environment, so a second run goes straight to work.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
PYTHON = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]

Step = tuple[str, list[str]]  # what people read, what goes behind "pip install"


def prepare(name: str, steps: Sequence[Step]) -> Path:
    """The Python of an environment in which ``steps`` are done; exits with a message where one fails."""
    if not FOLDER.exists():
        command = [sys.executable, "-m", "venv", str(FOLDER)]
        run("making a virtual environment in .venv", command, "on Debian and Ubuntu install the package python3-venv")
    if not PYTHON.exists() or subprocess.run([*PIP, "--version"], capture_output=True, check=False).returncode:
        stop(f"{FOLDER} holds no working Python with pip; remove that folder and run this again")
    note = FOLDER / f"snpc-{name}.txt"
    wanted = fingerprint(steps)
    if not note.is_file() or note.read_text() != wanted:
        for text, arguments in steps:
            run(text, [*PIP, "install", "--quiet", *arguments], "without a network, set up once with one")
        note.write_text(wanted)
    return PYTHON


def fingerprint(steps: Sequence[Step]) -> str:
    """Changes when an installation would come out differently: other requirements, or a moved checkout."""
    text = "\n".join([str(ROOT), repr([arguments for _, arguments in steps]), (ROOT / "pyproject.toml").read_text()])
    return hashlib.sha256(text.encode()).hexdigest()


def run(text: str, command: Sequence[str], hint: str) -> None:
    """One step of the set-up, with its time."""
    print(f"set-up: {text} ...", end=" ", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print("failed")
        stop(f"{done.stdout.strip()}\n\nthis failed: {' '.join(command)}\n({hint})")
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def stop(message: str) -> None:
    sys.stdout.flush()
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")
