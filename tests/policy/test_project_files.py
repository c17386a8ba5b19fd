"""Files for the tools around a project say what is so: versions agree, scripts and paths that they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import snpc

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
NEEDED_IN_A_FORM = {"name", "description", "body"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def commands(workflow: Path) -> Iterator[str]:
    for job in read(workflow)["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


def test_the_citation_names_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (snpc.__version__, "Apache-2.0")


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(form: Path) -> None:
    written = read(form)
    assert written.keys() >= NEEDED_IN_A_FORM
    identifiers = [field["id"] for field in written["body"]]
    assert len(set(identifiers)) == len(identifiers) > 0
    assert all(field["attributes"]["label"] for field in written["body"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_there_is(workflow: Path) -> None:
    lines = list(commands(workflow))
    assert lines
    for line in lines:
        for script in re.findall(r"\b[\w/]+\.py\b", line):
            assert (ROOT / script).is_file(), f"{workflow.name}: {line}"


SCHEMAS = {"vendor.github-workflows": WORKFLOWS, "vendor.github-issue-forms": FORMS}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_github_takes_workflows_and_forms(schema: str, tmp_path: Path) -> None:
    """By the schemas that are published for them."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    subprocess.run([*check, *SCHEMAS[schema]], check=True, capture_output=True)
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(SCHEMAS[schema][0].read_text().replace("name:", "nmae:", 1))
    assert subprocess.run([*check, wrong], check=False, capture_output=True).returncode == 1


def test_workflows_take_the_versions_of_python_that_are_promised() -> None:
    tested = read(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tested == promised
    assert f'requires-python = ">={promised[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_container_copies_what_there_is() -> None:
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    copied = [name for words in lines for name in words[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert (ROOT / "examples" / "prune_digits.py").is_file()
