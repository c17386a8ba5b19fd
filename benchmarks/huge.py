"""Prune a model larger than memory: seconds and peak memory of each command on a Llama of seven billion parameters.

    python benchmarks/huge.py FOLDER [--layers 32] [--ratio 0.25] [--memory-limit 4GB] [--keep]

Writes FOLDER/model.onnx with weights.bin beside it (13 GB at 32 layers, half precision; three quarters of it again for
the pruned model) unless they are there, and runs ``snpc inspect`` and ``snpc prune`` in processes of their own. "peak"
is anonymous memory, sampled; pages of mapped files, which the system takes back when it needs them, are shown apart.
Beyond the memory limit the model is run segment by segment to be verified. ``seven_billion.py`` does it with data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIGABYTE = 1 << 30


def status(pid: int) -> dict[str, int]:
    """Bytes by name, of a process that runs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {k: int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile") if k in fields}


def watched(words: list[str]) -> tuple[float, int, int, str]:
    """(seconds, peak of anonymous memory, peak of mapped file pages, what it printed)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    anonymous = mapped = 0
    while child.poll() is None:
        try:
            now = status(child.pid)
        except OSError:
            break
        anonymous, mapped = max(anonymous, now.get("RssAnon", 0)), max(mapped, now.get("RssFile", 0))
        time.sleep(0.01)
    printed, _ = child.communicate()
    if child.returncode:
        sys.exit(f"{' '.join(words[2:4])} ended with {child.returncode}:\n{printed[-3000:]}")
    return time.perf_counter() - start, anonymous, mapped, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--memory-limit", default="4GB")
    parser.add_argument("--keep", action="store_true", help="leave the pruned model there")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.models.layouts import Llama, write_llama

    model, target = arguments.folder / "model.onnx", arguments.folder / "pruned.onnx"
    needed = arguments.layers * 2 * (4 * 4096**2 + 3 * 4096 * 11008) * 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not model.is_file():
        if shutil.disk_usage(arguments.folder).free < needed:
            sys.exit(f"{arguments.folder}: {needed / GIGABYTE:.0f} GiB are needed; give fewer --layers")
        write_llama(arguments.folder, Llama(layers=arguments.layers))
    size = sum(p.stat().st_size for p in (model, model.with_name("weights.bin")))
    print(f"{size / GIGABYTE:.2f} GiB, {arguments.layers} layers")
    snpc = [sys.executable, "-m", "snpc.cli"]
    report = arguments.folder / "report.json"
    flags = ["--method", "select", "--criterion", "magnitude", "--ratio", str(arguments.ratio)]
    flags += ["--memory-limit", arguments.memory_limit]
    for verb, words in (
        ("inspect", [str(model), "--no-pins"]),
        ("prune", [str(model), *flags, "-o", str(target), "--json", str(report)]),
        ("inspect", [str(target), "--no-pins"]),
    ):
        seconds, anonymous, mapped, printed = watched([*snpc, verb, *words])
        print(f"{verb:8s} {Path(words[0]).name:12s} {seconds:7.1f} s  peak {anonymous / GIGABYTE:5.2f} GiB "
              f"(mapped file pages {mapped / GIGABYTE:5.2f} GiB)", flush=True)  # fmt: skip
        if verb == "prune":
            print(printed)
            print("seconds:", json.loads(report.read_text())["seconds"])
    if not arguments.keep:
        for path in (target, target.with_name(f"{target.name}.data")):
            path.unlink()


if __name__ == "__main__":
    main()
