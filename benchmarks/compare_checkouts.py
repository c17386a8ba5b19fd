"""Proves that two checkouts of snpc write the same models, byte for byte.

    python benchmarks/compare_checkouts.py OTHER_CHECKOUT [--only NAME]... [--folder FOLDER] [--ignore KEY]...

Twenty cases (exports, criteria, closed forms, tokens, targets) go through ``snpc prune`` twice: once with the package
of this checkout, once with that of the other. Both read the same model and calibration file and run in a folder of the
same name, so that even the paths in their reports agree. Every written file is compared by SHA-256. Reports and plans
are compared value by value, without what a clock says (``seconds``) and without ``--ignore KEY``, where the words of a
message have changed for a reason. The exit status is 1 if anything differs, and the differences are named.

The models are written by the exporters of this checkout's tests, which do not import snpc, so the package under
comparison has no part in its own inputs. With ``--folder`` they are kept, and results are used again as long as
neither the code of their checkout nor their case has changed. Needs what the tests need (torch, transformers, timm).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models import classifiers  # noqa: E402, F401  registers its exports in ALL
from tests.models.encoders import Encoder  # noqa: E402
from tests.models.exports import ALL, export, load_feeds  # noqa: E402
from tests.models.layouts import Llama, write_llama  # noqa: E402

Array = npt.NDArray[Any]

SAMPLES = 32
SHOWN = 8  # differences that are listed for a file
CLOCK = frozenset({"seconds"})
DIGITS = ROOT / "snpc" / "data" / "digits"

# Sums in another order give other last bits: the number of threads of the linear algebra, the order of sets and the
# memory that decides how data are divided are the same on both sides.
SETTINGS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "COLUMNS": "120"}
MEMORY = ["--memory-limit", "1GB"]

CACHED_ATTENTION = """
    <ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    step (float[B, N, 16] x, float[B, 4, P, 8] pk, float[B, 4, P, 8] pv)
      => (float[B, N, 16] y, float[B, 4, T, 8] nk, float[B, 4, T, 8] nv) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, bias, , , pk, pv)
        y = MatMul(c, wo)
    }"""
CACHED_WEIGHTS = {"wq": (16, 32), "wk": (16, 32), "wv": (16, 32), "bias": (96,), "wo": (32, 16)}


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@dataclass(frozen=True)
class Inputs:
    """A model file, and calibration data for it."""

    model: Path
    calibration: Path | None = None


def shipped_digits(folder: Path) -> Inputs:
    """The trained ViT that ships with snpc. The files are copied: both sides read those of this checkout."""
    model, data = (shutil.copy(DIGITS / name, folder) for name in ("digits_vit.onnx", "calib.npz"))
    return Inputs(Path(model), Path(data))


def exported(name: str, folder: Path) -> Inputs:
    """An export of the tests, and SAMPLES random samples of the sizes of its feeds."""
    model = Path(shutil.copy(export(name), folder / "model.onnx"))
    feeds = load_feeds(name)
    # A static export takes its own batch only; the samples are a multiple of it.
    batch = ALL[name].static_batch or 1
    return Inputs(model, save_samples(folder, feeds, SAMPLES // batch * batch))


def fused(name: str, kind: str, heads: int, width: int, folder: Path) -> Inputs:
    """As ``exported``, after onnxruntime.transformers.optimizer: attention is one node, and so are normalizations."""
    from onnxruntime.transformers import optimizer

    inputs = exported(name, folder)
    logging.disable(logging.WARNING)
    try:
        model = optimizer.optimize_model(
            str(inputs.model), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0
        ).model
    finally:
        logging.disable(logging.NOTSET)
    assert any(node.op_type == "Attention" for node in model.graph.node), f"no attention of {name} was fused"
    onnx.save(model, inputs.model)
    return inputs


def encoder(sizes: Encoder, folder: Path) -> Inputs:
    """A small encoder written node by node."""
    model = folder / "model.onnx"
    onnx.save(sizes.model(), model)
    return Inputs(model, save_samples(folder, sizes.feeds(batch=SAMPLES), SAMPLES))


def half_precision_llama(folder: Path) -> Inputs:
    """Weights of half precision in a file of their own; pruned without data."""
    return Inputs(write_llama(folder, Llama(2, 64, 4, 2, 96, 61, 32)))


def cached_attention(folder: Path) -> Inputs:
    """Attention in one node that reads and extends a cache of keys and values."""
    model = parser.parse_model(CACHED_ATTENTION)
    rng = np.random.default_rng(0)
    for name, shape in CACHED_WEIGHTS.items():
        weight = rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, folder / "model.onnx")
    return Inputs(folder / "model.onnx")


def save_samples(folder: Path, feeds: Mapping[str, Array], count: int) -> Path:
    """Random samples of the kinds of the feeds: noise for numbers, token ids for ids, masks as they are, repeated."""
    rng = np.random.default_rng(0)
    samples = {}
    for name, feed in feeds.items():
        shape = (count, *feed.shape[1:])
        if feed.dtype.kind == "f":
            samples[name] = rng.standard_normal(shape).astype(feed.dtype)
        elif feed.max() > 1:
            samples[name] = rng.integers(2, feed.max() + 1, shape).astype(feed.dtype)
        else:
            samples[name] = np.resize(feed, shape)
    path = folder / "calibration.npz"
    np.savez(path, allow_pickle=False, **samples)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """A model and the flags of ``snpc prune`` for it."""

    name: str
    write: Callable[[Path], Inputs]
    flags: str

    def words(self, inputs: Inputs) -> list[str]:
        """The arguments behind ``snpc``; results are named relative to the folder that it runs in."""
        data = ["--calib", str(inputs.calibration), "--calib-samples", "32"] if inputs.calibration else []
        results = ["-o", "pruned.onnx", "--json", "report.json", "--plan", "plan.json"]
        return ["prune", str(inputs.model), *self.flags.split(), *data, *MEMORY, *results]


FUSED = Encoder(fused=True, opset=23)

CASES = [
    # Closed forms, one layer after the other, on trained weights.
    Case("digits", shipped_digits, "--ratio 0.5"),
    Case("digits-token-plan", shipped_digits, "--tokens auto --target macs=0.5"),
    Case("digits-drift", shipped_digits, "--max-drift 0.05 --max-ratio ffn=0.7"),
    # Vision: packed projections, windows, convolutions, attention that is one node.
    Case("vit-packed", partial(exported, "vit_timm__ts17"), "--criterion magnitude --ratio 0.5 --uniform"),
    Case("vit-snp", partial(exported, "vit_timm__dyn20_sdpa"), "--criterion snp --ratio 0.4"),
    Case("vit-residual", partial(exported, "vit_hf__ts17_sdpa"), "--roles qk,vo,ffn,residual --ratio 0.25"),
    Case("swin", partial(exported, "swin_timm__ts17"), "--method parallel --target params=0.6"),
    Case("convnet", partial(exported, "convnet__ts17"), "--roles conv --criterion activation --ratio 0.5 --align 4"),
    Case("convchain", partial(exported, "convchain__dyn20"), "--roles conv --ratio 0.5"),
    Case("merged-tokens", partial(encoder, FUSED), "--tokens guided:2@1-3 --method parallel --ratio 0.25"),
    # Text: masks, whole heads, rotary positions with grouped heads, cross attention.
    Case("bert", partial(exported, "bert__ts17"), "--target macs=0.6 --max-ratio 0.75"),
    Case("bert-fused", partial(fused, "bert__ts17", "bert", 4, 48), "--method parallel --ratio 0.5"),
    Case(
        "bert-top-tokens", partial(exported, "bert_class__ts17"), "--tokens topk:0.7@1 --criterion mixed --ratio 0.25"
    ),
    Case("gpt2-heads", partial(exported, "gpt2__dyn20"), "--roles head,ffn --ratio 0.25"),
    Case("llama", partial(exported, "llama__ts17"), "--ratio 0.5"),
    Case("qwen3-gradients", partial(exported, "qwen3__dyn20"), "--criterion taylor --ratio 0.5"),
    Case("bart", partial(exported, "bart__dyn20_sdpa"), "--criterion mixed --allocator dimap --ratio 0.4"),
    Case("encoder-decoder", partial(exported, "encdec__ts17"), "--method parallel --target macs=0.6"),
    # Forms of files: weights of half precision in a file of their own, caches as inputs and outputs.
    Case("llama-half", half_precision_llama, "--criterion magnitude --ratio 0.25 --exclude layers.1.mlp"),
    Case("kv-cache", cached_attention, "--prune-kv-cache --criterion random:seed=3 --ratio 0.5"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Running


@dataclass(frozen=True)
class Checkout:
    """A folder with the package snpc in it; ``side`` is "this" or "other"."""

    side: str
    folder: Path
    digest: str

    @staticmethod
    def at(side: str, folder: Path) -> Checkout:
        folder = folder.resolve()
        sources = sorted((folder / "snpc").rglob("*.py"))
        if not sources:
            sys.exit(f"{folder}: no checkout of snpc: it has no snpc/*.py")
        checkout = Checkout(side, folder, digest_of(sources, folder))
        find = "import importlib.util as u; print(u.find_spec('snpc').origin)"
        words = [sys.executable, "-c", find]
        imported = subprocess.run(words, env=checkout.environment, capture_output=True, text=True, check=True).stdout
        if Path(imported.strip()).resolve().parent != folder / "snpc":
            sys.exit(f"{folder}: python imports snpc from {imported.strip()} instead")
        return checkout

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **SETTINGS, "PYTHONPATH": str(self.folder)}


def digest_of(files: Sequence[Path], below: Path, *more: str) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        digest.update(f"{path.relative_to(below)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:16]


def inputs_in(folder: Path, case: Case) -> Inputs:
    """The inputs of a case: made now, unless the folder has them."""
    noted = folder / "inputs.json"
    if noted.is_file():
        model, calibration = json.loads(noted.read_text())
        return Inputs(folder / model, folder / calibration if calibration else None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inputs = case.write(folder)
    noted.write_text(json.dumps([inputs.model.name, inputs.calibration.name if inputs.calibration else None]))
    return inputs


def prune(checkout: Checkout, case: Case, inputs: Inputs, results: Path) -> tuple[Path, float]:
    """The folder that ``snpc prune`` of the checkout wrote into, and the seconds it took (0: results used again)."""
    words = case.words(inputs)
    key = digest_of(sorted(inputs.model.parent.iterdir()), inputs.model.parent, checkout.digest, *words)
    # One folder for each side: equal code must run twice too, or nothing would be compared.
    folder = results / f"{checkout.side}-{key}"
    if (folder / "done").is_file():
        return folder, 0.0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "snpc.cli", *words],
        cwd=folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{checkout.folder}: snpc {' '.join(words)}\n{(done.stdout + done.stderr).strip()[-2000:]}")
    (folder / "done").touch()
    return folder, time.perf_counter() - start


def prune_both(sides: Sequence[Checkout], case: Case, inputs: Inputs, results: Path) -> list[tuple[Path, float]]:
    """Both sides at the same time, each on a core of its own: threads that share cores wait for each other."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []

    def on_core(number: int, side: Checkout) -> tuple[Path, float]:
        if cores:  # of this thread only; the process that it starts inherits them
            os.sched_setaffinity(0, {cores[number % len(cores)]})
        return prune(side, case, inputs, results)

    with ThreadPoolExecutor(len(sides)) as pool:
        running = [pool.submit(on_core, number, side) for number, side in enumerate(sides)]
        return [one.result() for one in running]


class Failed(Exception):
    """``snpc prune`` ended with an error."""


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def differences(ours: Path, theirs: Path, ignored: frozenset[str]) -> list[str]:
    """What differs between two folders of results, in words."""
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()})
    return [line for name in names for line in file_differences(ours / name, theirs / name, ignored)]


def file_differences(ours: Path, theirs: Path, ignored: frozenset[str]) -> list[str]:
    missing = [path for path in (ours, theirs) if not path.is_file()]
    if missing:
        return [f"{ours.name}: only {'the other checkout' if missing[0] == ours else 'this checkout'} writes it"]
    if ours.suffix == ".json":
        return cut_short(ours.name, json_differences(ours, theirs, ignored))
    if hashlib.sha256(ours.read_bytes()).digest() == hashlib.sha256(theirs.read_bytes()).digest():
        return []
    if ours.suffix == ".onnx":
        # Equal models in unequal bytes differ in how they were written, such as the order of fields.
        return cut_short(ours.name, list(model_differences(ours, theirs)) or ["only the bytes differ"])
    return [f"{ours.name}: {ours.stat().st_size} and {theirs.stat().st_size} bytes, not the same ones"]


def cut_short(name: str, lines: Sequence[str]) -> list[str]:
    more = [f"{name}: and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"{name}: {line}" for line in lines[:SHOWN]] + more


def json_differences(ours: Path, theirs: Path, ignored: frozenset[str]) -> list[str]:
    left, right = (dict(leaves(json.loads(path.read_text()), ignored)) for path in (ours, theirs))
    return [
        f"{key}: {shown(left, key)}, other {shown(right, key)}"
        for key in dict.fromkeys([*left, *right])
        if key not in left or key not in right or left[key] != right[key]
    ]


def leaves(value: Any, ignored: frozenset[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and flag of a JSON value with the way to it; empty containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield path, value
        return
    for key, item in items:
        if key not in ignored:
            yield from leaves(item, ignored, f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".strip("."))


def shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"


def model_differences(ours: Path, theirs: Path) -> Iterator[str]:
    """Initializers, nodes, inputs, outputs, types and properties that differ. Data files are compared on their own."""
    left, right = (onnx.load(path, load_external_data=False) for path in (ours, theirs))
    for what, of in PARTS.items():
        yield from part_differences(what, dict(of(left)), dict(of(right)))
    orders = {what: ([name for name, _ in of(left)], [name for name, _ in of(right)]) for what, of in PARTS.items()}
    for what, (ours_in, theirs_in) in orders.items():
        if ours_in != theirs_in and sorted(ours_in) == sorted(theirs_in):
            yield f"{what}s in another order"


def part_differences(what: str, left: Mapping[str, bytes], right: Mapping[str, bytes]) -> Iterator[str]:
    for name in dict.fromkeys([*left, *right]):
        if name not in right:
            yield f"{what} {name}: not in the other's"
        elif name not in left:
            yield f"{what} {name}: only in the other's"
        elif left[name] != right[name]:
            yield f"{what} {name}: {unequal(what, left[name], right[name])}"


def unequal(what: str, left: bytes, right: bytes) -> str:
    if what == "initializer":
        tensors = [onnx.TensorProto.FromString(data) for data in (left, right)]
        if not any(tensor.external_data for tensor in tensors):
            a, b = map(numpy_helper.to_array, tensors)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{a.dtype}{list(a.shape)}, other {b.dtype}{list(b.shape)}"
            apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)
            return f"{a.dtype}{list(a.shape)}, {np.count_nonzero(a != b)} entries differ, by {apart:.3g} at most"
    return "not the same"


def parts(kind: str, model: onnx.ModelProto) -> list[tuple[str, bytes]]:
    items = getattr(model.graph, kind)
    return [(item.name or f"{item.op_type} of {', '.join(item.output)}", item.SerializeToString()) for item in items]


def header(model: onnx.ModelProto) -> list[tuple[str, bytes]]:
    fields = ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string")
    properties = [(f"property {item.key}", item.value.encode()) for item in model.metadata_props]
    opsets = [(f"opset {item.domain or 'ai.onnx'}", str(item.version).encode()) for item in model.opset_import]
    functions = [(f"function {item.name}", item.SerializeToString()) for item in model.functions]
    return [*((name, str(getattr(model, name)).encode()) for name in fields), *properties, *opsets, *functions]


PARTS: dict[str, Callable[[onnx.ModelProto], list[tuple[str, bytes]]]] = {
    "header": header,
    "input": partial(parts, "input"),
    "output": partial(parts, "output"),
    "initializer": partial(parts, "initializer"),
    "node": partial(parts, "node"),
    "type": partial(parts, "value_info"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def compare(case: Case, sides: Sequence[Checkout], folder: Path, ignored: frozenset[str]) -> bool:
    """Print the row of a case, and what differs in it; whether nothing does."""
    try:
        inputs = inputs_in(folder / "inputs" / case.name, case)
        (ours, seconds), (theirs, seconds_other) = prune_both(sides, case, inputs, folder / "results" / case.name)
    except Failed as error:
        print(f"{case.name:22s} FAILED\n{error}", flush=True)
        return False
    lines = differences(ours, theirs, ignored)
    digest = hashlib.sha256((ours / "pruned.onnx").read_bytes()).hexdigest()[:12]
    macs = json.loads((ours / "report.json").read_text())["macs"]
    verdict = "DIFFERENT" if lines else "same"
    kept = macs["after"] / macs["before"]
    print(f"{case.name:22s} {digest} {kept:6.1%} {seconds:6.1f} {seconds_other:6.1f}  {verdict}", flush=True)
    for line in lines:
        print(f"    {line}", flush=True)
    return not lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("other", type=Path, help="the other checkout")
    arguments.add_argument("--only", action="append", choices=[case.name for case in CASES], metavar="NAME")
    arguments.add_argument("--folder", type=Path, help="keep inputs and results here, and use them again")
    arguments.add_argument("--ignore", action="append", default=[], metavar="KEY", help="key of JSON not to compare")
    options = arguments.parse_args()
    this, other = Checkout.at("this", ROOT), Checkout.at("other", options.other)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    print(f"this {this.folder} ({this.digest}), other {other.folder} ({other.digest})")
    print(f"{'case':22s} {'SHA-256':12s} {'MACs':>6s} {'s':>6s} {'other':>6s}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        same = [compare(case, (this, other), folder, CLOCK | frozenset(options.ignore)) for case in cases]
    print(f"{sum(same)} of {len(cases)} cases are the same; {time.perf_counter() - start:.0f} s")
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
