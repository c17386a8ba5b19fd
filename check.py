"""Check all of snpc: python3 check.py [--fast | --docs] [arguments of pytest]

Sets up an environment in .venv. Runs ruff and mypy --strict, builds the documentation, runs snpc with the oldest
versions of its dependencies, and builds the wheel and runs it in an empty environment: these side by side, since each
uses one core. Then runs the test suite. Without arguments this is what .ci/run runs: everything. --fast leaves out the
documentation, the oldest versions and the wheel, and tests that are slow, need torch or compare times: for the loop
between two edits. --docs only builds the documentation into build/docs; warnings and broken internal links are errors.
Other arguments go to pytest in place of its usual ones. Exits with 1 if any of the checks fails.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

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
    "-p tests.models -m tests.oracle -m tests.command_line -m tests.closed_forms -m tests.golden -m tests.patching "
    "-m examples.prune_digits"
)
# One worker per core. Tests of one export stay together, and so do the others of a file: see tests/conftest.py.
PARALLEL = ["-n", "auto", "--dist", "loadgroup"]
FAST = "--fast"
DOCS = "--docs"
DOCS_CHECK = ("docs", ["-m", "sphinx", "--builder", "html", "--quiet", "--fail-on-warning", "docs", "build/docs"])
FAST_TESTS = ["-m", "not slow and not torch and not timing"]


def side_checks(arguments):
    """(name, arguments of python) of every check but the tests, the longest first."""
    if arguments == [DOCS]:
        return [DOCS_CHECK]
    return [
        *([] if arguments else [("oldest versions", ["scripts/oldest_dependencies.py"])]),
        ("mypy --strict", ["-m", "mypy", "--strict", "-p", "snpc", *HELPERS.split()]),
        *([] if arguments else [("wheel", ["scripts/built_wheel.py"]), DOCS_CHECK]),
        ("ruff", ["-m", "ruff", "check", "."]),
        ("ruff format", ["-m", "ruff", "format", "--check", *SOURCES]),
    ]


def test_arguments(arguments):
    """Arguments of pytest."""
    fast = [*PARALLEL, *FAST_TESTS] if FAST in arguments else []
    return (fast + [word for word in arguments if word != FAST]) or PARALLEL


def run(command, **options):
    """What a command returns, and the seconds that it takes. Compiled modules are kept: tests start many processes."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=str(environment.ROOT), env=variables, check=False, **options)
    return done, time.monotonic() - start


def run_side_checks(python, arguments):
    """(name, exit code, seconds) of each; what it prints is shown when it has ended."""

    def capture(check):
        name, words = check
        return name, *run([str(python), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    rows = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, done, seconds in pool.map(capture, side_checks(arguments)):
            print(f"\n== {name}\n{done.stdout}", end="", flush=True)
            rows.append((name, done.returncode, seconds))
    return rows


if __name__ == "__main__":
    python = environment.prepare("check", STEPS)
    given = sys.argv[1:]
    rows = run_side_checks(python, given)
    if given != [DOCS]:
        print("\n== pytest", flush=True)
        tests, seconds = run([str(python), "-m", "pytest", *test_arguments(given)])
        rows.append(("pytest", tests.returncode, seconds))
    print()
    for name, code, seconds in rows:
        print(f"{name:15} {'passed' if code == 0 else 'FAILED':7} {seconds:6.0f} s")
    sys.exit(any(code for _, code, _ in rows))
