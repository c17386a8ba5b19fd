"""Prune the example with the oldest versions that snpc allows: python3 scripts/oldest_dependencies.py [PYTHON ...]

For each PYTHON, by default the one that runs this, a temporary environment gets the lower bounds in pyproject.toml, and
the commands that need no extra run on the example. Exits with 1 where one fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, CUT = "digits_vit.onnx", "selected.onnx"
DATA = ("--calib", "calib.npz", "--calib-samples", "16")
RUNS = (
    ("example", "digits", "."),
    ("inspect", MODEL, "--json", "inspected.json"),
    ("prune", MODEL, "--ratio", "0.5", "-o", CUT),
    ("prune", MODEL, "--target", "macs=0.8", *DATA, "--tokens", "none", "--plan", "plan.json", "-o", "refitted.onnx"),
    ("apply", MODEL, "plan.json", *DATA, "-o", "applied.onnx"),
    ("prune", MODEL, "--tokens", "merge:2", "-o", "merged.onnx"),
    ("build", CUT, "--target", "ort", "--precision", "int8", *DATA, "-o", "int8.onnx"),
    ("bench", MODEL, CUT, "--iterations", "5"),
    ("report", MODEL, CUT, *DATA, "-o", "report.html"),
)
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info")


def oldest_requirements() -> list[str]:
    """``numpy>=1.26; marker`` -> ``numpy==1.26; marker``, for every dependency."""
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    requirements = re.findall(r'^  [\'"](.*)[\'"],$', block, re.MULTILINE)
    assert all(">=" in requirement for requirement in requirements), requirements
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


def check(python: str) -> bool:
    """Whether snpc works in this Python with its oldest dependencies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Built in the checkout, snpc would have modules of an earlier build that are gone.
        source = shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
        requirements = folder / "oldest.txt"
        requirements.write_text("\n".join(oldest_requirements()))
        steps: list[list[str]] = [
            [python, "-m", "venv", str(folder / "venv")],
            [str(folder / "venv/bin/pip"), "install", "--quiet", str(source), "--requirement", str(requirements)],
            *([str(folder / "venv/bin/snpc"), *run] for run in RUNS),
        ]
        for step in steps:
            done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{python}: failed: {' '.join(step)}\n{done.stdout}{done.stderr}")
                return False
        print(f"{python}: works with {', '.join(installed_versions(folder / 'venv/bin/pip'))}")
    return True


def installed_versions(pip: Path) -> list[str]:
    """``numpy==1.26.0`` for every dependency, as pip lists it."""
    listed = subprocess.run([pip, "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    names = {name_of(requirement) for requirement in oldest_requirements()}
    return [line for line in listed.splitlines() if name_of(line) in names]


def name_of(requirement: str) -> str:
    """The name of a requirement as the index spells it."""
    return re.split(r"[^\w-]", requirement)[0].replace("_", "-").lower()


if __name__ == "__main__":
    results = [check(python) for python in sys.argv[1:] or [sys.executable]]
    sys.exit(not all(results))
