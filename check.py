"""Check all of snpc: python3 check.py [arguments of pytest]

Sets up an environment in .venv, then runs ruff, mypy --strict and the whole test suite. Without arguments this is what
.ci/run runs. Exits with 1 if any of the three fails.
"""

import subprocess
import sys
import time

if sys.version_info < (3, 10):  # noqa: UP036  whoever runs this may have an older one
    sys.exit(
        f"check.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}; for example: python3.12 check.py"
    )

from scripts import environment

STEPS = [
    ("installing snpc and the tools of its tests; torch makes this some minutes", ["--editable", ".[dev]"]),
    # timm's image models are used, not its data pipeline: torchvision, which only that needs, stays away.
    ("installing timm", ["--no-deps", "timm>=1.0.20"]),
]
CHECKS = [
    ("ruff", ["-m", "ruff", "check", "."]),
    ("mypy --strict", ["-m", "mypy", "--strict", "-p", "snpc"]),
    # One worker per core; files stay together, as their tests share models.
    ("pytest", ["-m", "pytest", *(sys.argv[1:] or ["-n", "auto", "--dist", "loadfile"])]),
]

if __name__ == "__main__":
    python = environment.prepare("check", STEPS)
    rows = []
    for name, arguments in CHECKS:
        print("\n== " + name, flush=True)
        start = time.monotonic()
        code = subprocess.call([str(python), *arguments], cwd=str(environment.ROOT))
        rows.append((name, code, time.monotonic() - start))
    print()
    for name, code, seconds in rows:
        print(f"{name:14} {'passed' if code == 0 else 'FAILED':7} {seconds:6.0f} s")
    sys.exit(any(code for _, code, _ in rows))
