"""Build sdist and wheel, and prune the example with the wheel in an empty environment: scripts/built_wheel.py [FOLDER]

Both are left in FOLDER, if one is given. The wheel is built from the sdist, as an index would have it. Exits with 1
where a step fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = (
    ("snpc", "--version"),
    ("snpc", "example", "digits", "."),
    ("snpc", "prune", "digits_vit.onnx", "--ratio", "0.5", "-o", "half.onnx"),
    ("python", "-c", "import snpc; snpc.prune('digits_vit.onnx', ratio=0.5)"),
)


def check(folder: Path) -> str | None:
    """Build into ``folder``; the command that failed with what it printed, or None."""
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name)
        programs = empty / "venv" / "bin"
        build = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
        make = [sys.executable, "-m", "venv", str(empty / "venv")]
        failure = failed(build, empty) or failed(make, empty)
        if failure:
            return failure
        (wheel,) = folder.glob("snpc-*.whl")
        steps = [[str(programs / "pip"), "install", "--quiet", str(wheel)]]
        steps += [[str(programs / program), *words] for program, *words in RUNS]
        return next((found for step in steps if (found := failed(step, empty))), None)


def failed(step: list[str], folder: Path) -> str | None:
    done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
    return f"failed: {' '.join(step)}\n{done.stdout}{done.stderr}" if done.returncode else None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        failure = check(target)
        print(failure or f"built and run: {', '.join(sorted(path.name for path in target.iterdir()))}")
    sys.exit(failure is not None)
