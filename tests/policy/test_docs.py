"""The documentation says what is so: its code runs, prints what it says, its links lead somewhere, its flags exist."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import click
import pytest

from snpc.cli import main
from snpc.ops import lookup, operator_table
from tests.command_line import COMMANDS, invoke
from tests.models.language import Language, as_text, write_language_folder

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "skills").glob("*/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.name


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return BLOCK.findall(page.read_text())


def run_page(page: Path, given: dict[str, object], skip: int = 0) -> None:
    """Run the Python blocks in order in one namespace; a text block that follows one is what it must print."""
    parts = blocks(page)[skip:]
    for (language, source), (following, expected) in zip(parts, [*parts[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(source, f"{page.name}: {source.splitlines()[0]}", "exec"), given)
        if following == "text":
            assert [line.rstrip() for line in printed.getvalue().splitlines()] == expected.splitlines()


@pytest.mark.slow
def test_how_it_works_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "how-it-works.md", {})


@pytest.mark.slow
def test_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md", {})


@pytest.mark.slow
def test_the_reference_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "api.md", {})


@pytest.mark.slow
def test_finetuning_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "finetuning.md", {})


def test_the_commands_for_text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    write_language_folder(tmp_path / "decoder")
    ids = Language(sharpness=3).sample(40, 32)
    (tmp_path / "book.txt").write_text(as_text(ids[:32]))
    lines = [json.dumps({"body": text}) for text in as_text(ids[32:]).splitlines()]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    (tmp_path / "ids.txt").write_text(" ".join(map(str, range(20))))
    commands = documented_commands(ROOT / "docs" / "text.md")
    assert commands
    for words in commands:
        invoke(*words)
    run_page(ROOT / "docs" / "text.md", {})


@pytest.mark.slow
def test_the_tutorial_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in their order, then its Python, which prints what is there."""
    monkeypatch.chdir(tmp_path)
    for words in documented_commands(ROOT / "docs" / "tutorial.md"):
        invoke(*words, *(["--effort", "quick"] if words[0] == "prune" else []))
    run_page(ROOT / "docs" / "tutorial.md", {})


def test_files_are_as_their_schemas_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    monkeypatch.chdir(tmp_path)
    invoke("example", "digits", "digits")
    options = ("--ratio", "0.5", "--method", "select", "--calib", "digits/calib.npz", "--calib-samples", "16")
    invoke(
        "prune", "digits/digits_vit.onnx", *options, "--json", "report.json", "--plan", "plan.json", "-o", "half.onnx"
    )
    for name in ("report", "plan"):
        schema = json.loads((ROOT / "docs" / "_static" / "schemas" / f"{name}-1.json").read_text())
        written = json.loads(Path(f"{name}.json").read_text())
        jsonschema.validate(written, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**written, f"snpc_{name}": 2}, schema)


def test_other_tools_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polygraphy")
    pytest.importorskip("onnx_graphsurgeon")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "integrations.md", {})


def test_calibration_data_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "calibration-data.md", {})


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Each heading of a message is a part of a string in the source."""
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 15
    source = "\n".join(
        "".join(part.value for part in node.values if isinstance(part, ast.Constant))
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in (ROOT / "snpc").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )
    assert [heading for heading in headings if heading not in source] == []


def test_the_documented_pass_works_as_printed() -> None:
    run_page(ROOT / "docs" / "adding-a-pass.md", {})


@pytest.fixture
def fresh_table() -> Iterator[dict[tuple[str, str], object]]:
    """The operator table, put back afterwards."""
    before = dict(operator_table())
    lookup.cache_clear()
    yield operator_table()  # type: ignore[misc]
    operator_table().clear()
    operator_table().update(before)
    lookup.cache_clear()


def test_the_documented_operators_work_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_table: dict[tuple[str, str], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "adding-an-operator.md"
    given: dict[str, object] = {"__name__": "acme_operators"}
    (_, source) = blocks(page)[0]
    exec(compile(source, "acme.py", "exec"), given)
    for spec in given["entries"]():  # type: ignore[operator]
        assert (spec.domain, spec.name) not in fresh_table
        fresh_table[spec.domain, spec.name] = spec
    run_page(page, {}, skip=1)


def test_without_an_entry_the_documented_operators_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import snpc

    monkeypatch.chdir(tmp_path)
    given: dict[str, object] = {}
    exec(blocks(ROOT / "docs" / "adding-an-operator.md")[1][1], given)
    reasons = {pin.reason for pin in snpc.analyze(snpc.load("acme.onnx")).pins}
    assert "no entry for acme.SplitHeads in the operator table" in reasons


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text())
    for target in LINK.findall(prose):
        if not target.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_other_sites_are_whole(page: Path) -> None:
    """Nothing is fetched: encrypted, a host with a domain, no punctuation of the sentence at the end."""
    prose = re.sub("`[^`]*`", "", BLOCK.sub("", page.read_text()))
    for target in re.findall(r"\bhttps?:[^\s)>\"|]*", prose):
        assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./#~-]*)?", target.rstrip(".,;:")), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_absolute_paths_and_nothing_unfinished(page: Path) -> None:
    text = page.read_text()
    for word in (r"(?<![\w.])/(work|tmp|root|home)\b", r"\bTODO\b", r"\bFIXME\b", r"\bXXX\b", "—"):
        assert not re.search(word, text), f"{page.name} holds {word}"


def documented_commands(page: Path) -> list[list[str]]:
    """``snpc ...`` lines of the page's shell blocks, continuation lines joined, comments dropped."""
    commands = []
    for language, content in blocks(page):
        if language in ("sh", "bash", "console"):
            for line in content.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].removeprefix("$ ").split()
                if words[:1] == ["snpc"]:
                    commands.append(words[1:])
    return commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_flags_exist(page: Path) -> None:
    for words in documented_commands(page):
        assert isinstance(main, click.Group)
        command = COMMANDS.get(words[0])
        assert command is not None, f"snpc {words[0]}"
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if word.startswith("-") and word != "-":
                assert word.split("=")[0] in flags, f"snpc {' '.join(words)}: no {word}"


def test_every_command_is_shown() -> None:
    shown = {words[0] for page in PAGES for words in documented_commands(page)}
    assert shown == set(COMMANDS)


def public_names(package: str) -> set[str]:
    """``__all__`` of a package with the package in front, without an import: that of torch takes seconds."""
    folder = ROOT / package.replace(".", "/")
    listing = folder / "__init__.pyi"  # of a package that imports its names when they are first used
    tree = ast.parse((listing if listing.exists() else folder / "__init__.py").read_text())
    [names] = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return {f"{package}.{name}" for name in ast.literal_eval(names)}


def test_the_reference_has_every_public_name() -> None:
    entries = re.findall(
        r"^(?:   |\.\. py:data:: )(snpc\.[\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
    )
    assert len(entries) == len(set(entries))
    assert set(entries) == public_names("snpc") | public_names("snpc.torch")


def test_every_page_is_in_the_contents() -> None:
    """Sphinx says so, too, where it is installed."""
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {
        name
        for block in re.findall(r"^```{toctree}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE)
        for name in block.splitlines()
        if name and not name.startswith(":")
    }
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


@pytest.mark.parametrize("module", sorted((ROOT / "snpc").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(module: Path) -> None:
    source = module.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def tracked() -> list[Path]:
    """Files of the repository; what git knows, where there is git."""
    try:
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_nothing_refers_to_pages_that_are_not_here() -> None:
    names = {path.name for path in tracked()}
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml") and path != Path(__file__):
            for page in re.findall(r"\b[\w-]+\.md\b", path.read_text()):
                assert page in names, f"{path.relative_to(ROOT)} names {page}"


@pytest.mark.parametrize("launcher", ["demo.py", "check.py"])
def test_launchers_can_be_read_by_an_old_python(launcher: str) -> None:
    """So that it can say that it is too old: f-strings, but nothing newer."""
    source = (ROOT / launcher).read_text()
    ast.parse(source, feature_version=(3, 6))
    refusal, use = source.index("sys.version_info <"), source.index("from scripts")
    assert refusal < use


def test_launchers_need_the_standard_library_only() -> None:
    for path in (ROOT / "demo.py", ROOT / "check.py", ROOT / "scripts" / "environment.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "scripts"}, f"{path.name} imports {name}"
