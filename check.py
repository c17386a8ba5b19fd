"""Check all of snpc: python3 check.py [--fast | --docs] [arguments of pytest]

Sets up an environment in .venv, then runs ruff, mypy --strict and the test suite, builds the documentation, runs snpc
with the oldest versions of its dependencies, and builds the wheel and runs it in an empty environment. Without
arguments this is what .ci/run runs: everything. --fast leaves out the last three checks, and tests that are slow, need
torch or compare times: for the loop between two edits. --docs only builds the documentation into build/docs; warnings
and broken internal links are errors. Other arguments go to pytest in place of its usual ones. Exits with 1 if any of
the checks fails.
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
    ("installing snpc and the tools of its tests; torch makes this some minutes", ["--editable", ".[dev,docs]"]),
    # timm's image models are used, not its data pipeline: torchvision, which only that needs, stays away.
    ("installing timm", ["--no-deps", "timm>=1.0.20"]),
]
SOURCES = ["snpc", "tests", "benchmarks", "examples", "scripts", "docs/conf.py", "check.py", "demo.py"]
HELPERS = (
    "-p tests.models -m tests.oracle -m tests.command_line -m tests.closed_forms -m tests.golden -m tests.patching"
)
# One worker per core. Tests of one export stay together, and so do the others of a file: see tests/conftest.py.
PARALLEL = ["-n", "auto", "--dist", "loadgroup"]
FAST = "--fast"
DOCS = "--docs"
DOCS_CHECK = ("docs", ["-m", "sphinx", "--builder", "html", "--quiet", "--fail-on-warning", "docs", "build/docs"])
FAST_TESTS = ["-m", "not slow and not torch and not timing"]


def checks(arguments):
    """(name, arguments of python) of every check."""
    if arguments == [DOCS]:
        return [DOCS_CHECK]
    fast = [*PARALLEL, *FAST_TESTS] if FAST in arguments else []
    given = [word for word in arguments if word != FAST]
    return [
        ("ruff", ["-m", "ruff", "check", "."]),
        ("ruff format", ["-m", "ruff", "format", "--check", *SOURCES]),
        ("mypy --strict", ["-m", "mypy", "--strict", "-p", "snpc", *HELPERS.split()]),
        ("mypy, example", ["-m", "mypy", "--strict", "examples/prune_digits.py"]),
        ("pytest", ["-m", "pytest", *(fast + given or PARALLEL)]),
        *(
            []
            if arguments
            else [
                DOCS_CHECK,
                ("oldest versions", ["scripts/oldest_dependencies.py"]),
                ("wheel", ["scripts/built_wheel.py"]),
            ]
        ),
    ]


if __name__ == "__main__":
    python = environment.prepare("check", STEPS)
    rows = []
    for name, arguments in checks(sys.argv[1:]):
        print("\n== " + name, flush=True)
        start = time.monotonic()
        code = subprocess.call([str(python), *arguments], cwd=str(environment.ROOT))
        rows.append((name, code, time.monotonic() - start))
    print()
    for name, code, seconds in rows:
        print(f"{name:15} {'passed' if code == 0 else 'FAILED':7} {seconds:6.0f} s")
    sys.exit(any(code for _, code, _ in rows))
