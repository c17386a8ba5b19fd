"""Names in a model may hold anything: they are shown as they are, in one line, and no terminal acts on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import snpc
from snpc.cli.tables import printable
from tests.command_line import invoke, write_tiny

HOSTILE = {
    "[/x]": "[/x]",
    "[bold]": "[bold]",
    "[link=file:///]a[/link]": "[link=file:///]a[/link]",
    ":smile:": ":smile:",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\r\nb": r"a\r\nb",
    "\u202eabc": r"\u202eabc",
    "\x9b31m": r"\x9b31m",
    "a\u2028b": r"a\u2028b",
    "é日本": "é日本",
}


def renamed(path: Path, name: str) -> Path:
    """A tiny model whose output and whose pinned value are called so."""
    model = onnx.load(write_tiny(path))
    model.graph.output[0].name = name
    for node in model.graph.node:
        node.output[:] = [name if out == "y" else out for out in node.output]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_pipe_are_escaped(name: str, tmp_path: Path) -> None:
    result = invoke("inspect", renamed(tmp_path / "m.onnx", name), "--pins")
    assert HOSTILE[name] in result.stdout
    assert not set(result.stdout) & {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2028"}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_on_a_terminal_are_no_markup(name: str, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    path = renamed(tmp_path / "m.onnx", name)
    words = [sys.executable, "-m", "snpc.cli", "inspect", str(path), "--pins"]
    environment = {**os.environ, "PYTHONPATH": str(Path(snpc.__file__).parents[1]), "COLUMNS": "250", "TERM": "xterm",
                   "PYTHONIOENCODING": "utf-8"}  # fmt: skip
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                shown += chunk
        except OSError:  # how the end of a pseudo-terminal reads on Linux
            pass
        os.close(ours)
    assert process.returncode == 0, shown.decode()
    assert HOSTILE[name] in shown.decode()
    assert b"]0;title\x07" not in shown


def test_refusals_are_one_line_whatever_the_name(tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path / "a\x1b[31m\nb.onnx", code=2)
    assert result.stderr == f"snpc: {tmp_path}/a\\x1b[31m b.onnx: no such file\n"


def test_what_a_stream_cannot_encode_is_escaped(tmp_path: Path) -> None:
    path = renamed(tmp_path / "m.onnx", "é")
    environment = {**os.environ, "PYTHONPATH": str(Path(snpc.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "snpc.cli", "inspect", str(path), "--pins"]
    result = subprocess.run(words, capture_output=True, env=environment, check=True)
    assert b"\\xe9" in result.stdout


def test_surrogates_are_escaped() -> None:
    assert printable("a\udcffb") == r"a\udcffb"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    environment = {**os.environ, "PYTHONPATH": str(Path(snpc.__file__).parents[1])}
    words = [sys.executable, "-m", "snpc.cli", "prune", str(path), "--ratio", "0.5"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("snpc: stdout cannot be written (No space left on device)")
    assert (tmp_path / "m-pruned.onnx").is_file()


def test_a_closed_stdout_does_not_matter(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    environment = {**os.environ, "PYTHONPATH": str(Path(snpc.__file__).parents[1])}
    line = f"exec {sys.executable} -m snpc.cli prune {path} --ratio 0.5 >&-"
    result = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
