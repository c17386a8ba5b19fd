"""Damaged models, made from a seed: small whole ones with one to three things wrong.

    python tests/models/mutants.py [--count 2000] [--first 0] [--processes 2]

runs all of them through ``snpc inspect`` and ``snpc prune``, in processes of their own with little memory, and lists
what is neither done nor refused in one line. tests/policy/test_mutants.py does the same with a few hundred in one
process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper, parser

from snpc.cli import main

Mutation = Callable[[onnx.ModelProto, random.Random], None]
LIMIT_SECONDS = 60
LIMIT_BYTES = 6 << 30  # of address space: Python, onnxruntime and its threads take one or two

ATTENTION = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, N, 12] x) => (float[B, N, 12] y)
    <int64[4] split = {0, 0, 2, 8}, int64[3] merge = {0, 0, -1}, int64[1] last = {-1}, int64[1] end = {1000},
     int64[1] zero = {0}, int64[1] half = {4}, float root = {2.8284271}>
    {
        qf = MatMul(x, wq) kf = MatMul(x, wk) vf = MatMul(x, wv)
        qs = Reshape(qf, split) ks = Reshape(kf, split) vs = Reshape(vf, split)
        q = Transpose <perm = [0, 2, 1, 3]> (qs)
        kt = Transpose <perm = [0, 2, 3, 1]> (ks)
        v = Transpose <perm = [0, 2, 1, 3]> (vs)
        raw = MatMul(q, kt)
        scores = Div(raw, root)
        p = Softmax <axis = -1> (scores)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        o = MatMul(cm, wo)
        r = Add(o, x)
        n = LayerNormalization <axis = -1> (r, gain, shift)
        a = Slice(n, zero, half, last)
        b = Slice(n, half, end, last)
        ab = Concat <axis = -1> (b, a)
        h = MatMul(ab, w1)
        g = Relu(h)
        y = MatMul(g, w2)
    }"""
ATTENTION_SHAPES = {"wq": (12, 16), "wk": (12, 16), "wv": (12, 16), "wo": (16, 12), "gain": (12,), "shift": (12,),
                    "w1": (12, 24), "w2": (24, 12)}  # fmt: skip

CONVOLUTIONS = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 3, 8, 8] x) => (float[B, 5] y)
    <int64[2] pads_to = {0, -1}, float[4] scales = {1.0, 1.0, 2.0, 2.0}>
    {
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
        b = BatchNormalization (a, gain, shift, mean, variance)
        c = Relu(b)
        d = Conv <kernel_shape = [3, 3], group = 6> (c, w2)
        e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
        f = Resize <mode = "nearest"> (e, , scales)
        g = GlobalAveragePool(f)
        h = Reshape(g, pads_to)
        i = Gemm <transB = 1> (h, w3, b3)
        j = Sigmoid(i)
        y = MatMul(j, w4)
    }"""
CONVOLUTION_SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "gain": (6,), "shift": (6,), "mean": (6,), "variance": (6,),
                      "w2": (6, 1, 3, 3), "w3": (9, 6), "b3": (9,), "w4": (9, 5)}  # fmt: skip

BRANCHES = """
    <ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 8] x, bool which) => (float[B, 16] y)
    {
        c = MatMul(x, w2)
        d = Relu(c)
        a = MatMul(d, w3)
        y = If (which) <
            then_branch = yes () => (float[B, 16] t) { t = Relu(a) },
            else_branch = no () => (float[B, 16] e) { e = Add(a, v) }
        >
    }"""
BRANCH_SHAPES = {"v": (16,), "w2": (8, 40), "w3": (40, 16)}


def whole(text: str, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = np.abs(rng.normal(size=shape)).astype(np.float32) * 0.3
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


BASES = [
    whole(ATTENTION, ATTENTION_SHAPES),
    whole(CONVOLUTIONS, CONVOLUTION_SHAPES),
    whole(BRANCHES, BRANCH_SHAPES),
]

NUMBERS = [0, 1, -1, -2, 2, 3, 7, 8, 255, 1 << 31, (1 << 31) - 1, 1 << 33, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)]


# -- damage to the message -------------------------------------------------------------------------------------------


def values(model: onnx.ModelProto) -> list[str]:
    return [*(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer),
            *(o for n in model.graph.node for o in n.output)]  # fmt: skip


def dangling(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    node.input[rng.randrange(len(node.input))] = rng.choice(["nowhere", "", " ", "x\n", "é" * 100])


def rewired(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another value of the graph: of another shape or type, or one that comes later (a cycle)."""
    node = rng.choice(model.graph.node)
    node.input[rng.randrange(len(node.input))] = rng.choice(values(model))


def reordered(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [copy.deepcopy(n) for n in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def dropped(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    field = rng.choice([graph.node, graph.initializer, graph.input, graph.output])
    if len(field):
        del field[rng.randrange(len(field))]


def doubled(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    field = rng.choice([graph.node, graph.initializer, graph.input, graph.output, model.opset_import])
    if len(field):
        field.append(rng.choice(field))


def renamed(model: onnx.ModelProto, rng: random.Random) -> None:
    """Two values of one name."""
    name = rng.choice(values(model))
    thing = rng.choice([*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output])
    if isinstance(thing, onnx.NodeProto):
        thing.output[0] = name
    else:
        thing.name = rng.choice([name, ""])


def retyped(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.choice([*range(27), -1, 1000])
    if rng.random() < 0.5:
        rng.choice(model.graph.initializer).data_type = kind
    else:
        rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.elem_type = kind


def resized(model: onnx.ModelProto, rng: random.Random) -> None:
    """Negative, huge, more, fewer or other dimensions of a weight, an input or an output."""
    number = rng.choice(NUMBERS)
    if rng.random() < 0.5:
        dims: Any = rng.choice(model.graph.initializer).dims
        how = rng.randrange(4)
        if how == 0:
            dims.append(number)
        elif how == 1 and len(dims):
            del dims[rng.randrange(len(dims))]
        elif len(dims):
            dims[rng.randrange(len(dims))] = number
        return
    shape = rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if rng.random() < 0.2 or not len(shape.dim):
        shape.dim.add().dim_value = number
    elif rng.random() < 0.2:
        del shape.dim[0]
    elif rng.random() < 0.3:
        rng.choice(shape.dim).dim_param = rng.choice(["", "a+", "9**9**9**9", "batch-1", "a" * 5000, "((((", "B*0"])
    else:
        rng.choice(shape.dim).dim_value = number


def untyped(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    how = rng.randrange(4)
    if how == 0:
        value.ClearField("type")
    elif how == 1:
        value.type.tensor_type.ClearField("shape")
    elif how == 2:
        inner = helper.make_tensor_type_proto(1, [2])
        value.type.CopyFrom(
            rng.choice([helper.make_sequence_type_proto(inner), helper.make_optional_type_proto(inner)])
        )
    else:
        value.type.CopyFrom(helper.make_sparse_tensor_type_proto(1, [2, 3]))


def miscounted(model: onnx.ModelProto, rng: random.Random) -> None:
    """Bytes that are more or fewer than the shape needs, or in the wrong field."""
    tensor = rng.choice(model.graph.initializer)
    how = rng.randrange(5)
    if how == 0:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif how == 1:
        tensor.raw_data = tensor.raw_data + bytes(rng.randrange(1, 5000))
    elif how == 2:
        tensor.ClearField("raw_data")
    elif how == 3:
        tensor.float_data.extend([1.0] * rng.randrange(1, 50))
    else:
        tensor.string_data.append(b"what")


def renumbered(model: onnx.ModelProto, rng: random.Random) -> None:
    """Other numbers in shapes, bounds and sizes, or in a weight (not a number, infinity)."""
    tensor = rng.choice(model.graph.initializer)
    try:
        array = numpy_helper.to_array(tensor).copy()
    except (ValueError, TypeError, KeyError):
        return
    if not array.size:
        return
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        if array.dtype.kind == "f":
            flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0])
        elif array.dtype == np.int64:
            flat[rng.randrange(flat.size)] = rng.choice(NUMBERS)
    if rng.random() < 0.2:
        array = flat[: rng.randrange(flat.size + 1)]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


LOCATIONS = ["weights.bin", "weights.bin", "weights.bin", "", ".", "..", "../secret", "a/../../secret", "/etc/passwd",
             "none.bin", "weights.bin\0", "sub", "link.bin", "w" * 300, "model.onnx"]  # fmt: skip


def readdressed(model: onnx.ModelProto, rng: random.Random) -> None:
    """External data that are elsewhere, outside, too few, or badly described."""
    tensor = rng.choice(model.graph.initializer)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = rng.choice(LOCATIONS)
    entries = {"location": location}
    if rng.random() < 0.7:
        entries["offset"] = rng.choice(["0", "4096", "-1", "-4096", "1e3", "", "99999999999", str(1 << 70), "0x10"])
    if rng.random() < 0.7:
        entries["length"] = rng.choice([str(size), str(size), "0", "-1", "nine", "", str(1 << 40), str(1 << 70)])
    if rng.random() < 0.1:
        del entries["location"]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    if rng.random() < 0.1:
        tensor.external_data.add(key="location", value="../secret")


def opsets(model: onnx.ModelProto, rng: random.Random) -> None:
    how = rng.randrange(5)
    if how == 0:
        del model.opset_import[:]
    elif how == 1:
        model.opset_import[0].version = rng.choice([0, -1, 1, 6, 9, 11, 12, 13, 99, 1 << 40])
    elif how == 2:
        model.opset_import[0].domain = rng.choice(["ai.onnx", "com.microsoft", "nobody"])
    elif how == 3:
        model.ir_version = rng.choice([0, -1, 1, 2, 3, 4, 99, 1 << 40])
    else:
        rng.choice(model.graph.node).domain = rng.choice(["com.microsoft", "ai.onnx", "ai.onnx.ml", "nobody"])


OPERATORS = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain in ("", "com.microsoft")})


def reoperated(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice([*OPERATORS, "Rilu", "", "é"])


def reattributed(model: onnx.ModelProto, rng: random.Random) -> None:
    """Attributes with other numbers, of other types, too many, too few."""
    node = rng.choice(model.graph.node)
    how = rng.randrange(4)
    if how == 0 or not len(node.attribute):
        name = rng.choice(["axis", "perm", "group", "transB", "pads", "strides", "kernel_shape", "axes", "value", "to",
                           "equation", "scale", "num_heads", "allowzero", "then_branch"])  # fmt: skip
        content: Any = rng.choice([rng.choice(NUMBERS), [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 6))],
                                   0.5, "text", [0.5, 1.5], ["a", "b"], model.graph.initializer[0] if
                                   len(model.graph.initializer) else 1])  # fmt: skip
        node.attribute.append(helper.make_attribute(name, content))
        return
    attribute = rng.choice(node.attribute)
    if how == 1:
        attribute.type = rng.randrange(15)
    elif how == 2 and len(attribute.ints):
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif how == 2:
        attribute.i = rng.choice(NUMBERS)
    else:
        node.attribute.remove(attribute)


def miswired(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    how = rng.randrange(4)
    if how == 0:
        node.input.append(rng.choice(values(model)))
    elif how == 1 and len(node.input):
        del node.input[rng.randrange(len(node.input))]
    elif how == 2:
        node.output.append(rng.choice(["more", "", rng.choice(values(model))]))
    else:
        del node.output[:]


def bodies(model: onnx.ModelProto, rng: random.Random) -> None:
    """Subgraphs that read nothing there is, declare what exists, hold themselves, or are empty."""
    held = [a for n in model.graph.node for a in n.attribute if a.HasField("g")]
    if not held:
        node = rng.choice(model.graph.node)
        body = onnx.GraphProto(name="body")
        body.node.extend([rng.choice(model.graph.node)])
        node.attribute.append(helper.make_attribute(rng.choice(["body", "then_branch"]), body))
        return
    body = rng.choice(held).g
    how = rng.randrange(6)
    if how == 0:
        body.node[0].input[0] = rng.choice(["nowhere", "y", "t", "e", "d"])
    elif how == 1:
        del body.output[:]
    elif how == 2:
        del body.node[:]
    elif how == 3:
        body.node.append(helper.make_node("If", ["which"], ["deep"], then_branch=copy.deepcopy(body)))
    elif how == 4:
        body.initializer.append(rng.choice(model.graph.initializer))
    else:
        body.node[0].output[0] = rng.choice(values(model))


def functions(model: onnx.ModelProto, rng: random.Random) -> None:
    """A model-local function: whole, calling itself, or of the wrong arity."""
    names = ["a"] if rng.random() < 0.6 else ["a", "b"]
    op, domain = rng.choice([("Relu", ""), ("F", "mine"), ("Nothing", "mine")])
    function = helper.make_function(
        "mine", "F", names, ["z"], [helper.make_node(op, ["a"], ["z"], domain=domain)], [helper.make_opsetid("", 17)]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    node = rng.choice(model.graph.node)
    node.op_type, node.domain = "F", "mine"


MUTATIONS: list[Mutation] = [
    dangling, rewired, reordered, dropped, doubled, renamed, retyped, resized, untyped, miscounted, renumbered,
    readdressed, opsets, reoperated, reattributed, miswired, bodies, functions,
]  # fmt: skip


# -- damage to the bytes ---------------------------------------------------------------------------------------------


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bits, mostly of what is not the numbers of a weight."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        changed[graph_byte(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def graph_byte(data: bytes, rng: random.Random) -> int:
    while True:
        at = rng.randrange(len(data))
        if rng.random() < 0.05 or any(32 <= b < 127 for b in data[max(0, at - 3) : at + 3] if chr(b).isalnum()):
            return at


def spliced(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + rng.choice([1, 2, 8, 64, 4096]))
    return rng.choice([data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(b - a) + data[b:]])


def mutant(seed: int, folder: Path) -> tuple[Path, str]:
    """Write the damaged model of this number into ``folder`` (with the files it may refer to); say what was done."""
    rng = random.Random(seed)
    model = copy.deepcopy(BASES[seed % len(BASES)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(np.ones(2048, np.float32).tobytes())
    (folder / "sub").mkdir(exist_ok=True)
    (folder.parent / "secret").write_bytes(bytes(8192))
    link = folder / "link.bin"
    if not link.is_symlink():
        link.symlink_to(folder.parent / "secret")
    bytes_too = seed % 4 == 0
    done = []
    for _ in range(0 if bytes_too and rng.random() < 0.7 else rng.choice([1, 1, 1, 2, 3])):
        change = rng.choice(MUTATIONS)
        try:
            change(model, rng)
        except (IndexError, TypeError, ValueError):  # an earlier change took what this one needs
            continue
        done.append(change.__name__)
    try:
        data = model.SerializeToString()
    except Exception:  # names that are not text
        data = BASES[0].SerializeToString()
    if bytes_too:
        damage = rng.choice([truncated, flipped, flipped, flipped, spliced])
        data = damage(data, rng)
        done.append(damage.__name__)
    path = folder / "model.onnx"
    path.write_bytes(data)
    return path, ", ".join(done)


# -- the judge -------------------------------------------------------------------------------------------------------


def trial(path: Path) -> list[str]:
    """What is wrong with how ``inspect`` and ``prune`` take a file: nothing, where they work or refuse it in a line.

    Refusals are exit code 2; a check that fails for the numbers of the model itself is 1. Either leaves no file.
    """
    complaints = []
    for verb in ("inspect", "prune"):
        flags = [] if verb == "inspect" else ["--ratio", "0.5", "--method", "select", "--criterion", "magnitude"]
        before = {p: p.stat().st_mtime_ns for p in path.parent.iterdir()}
        result = CliRunner().invoke(main, [verb, str(path), *flags])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            trace = traceback.extract_tb(result.exception.__traceback__)
            where = next(
                (f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(trace) if "snpc" in f.filename), ""
            )
            complaints.append(f"{verb}: {type(result.exception).__name__} at {where}: {str(result.exception)[:200]}")
        lines = [line for line in result.stderr.splitlines() if not line.startswith("snpc: note:")]
        refused = result.exit_code in (1, 2) and not complaints
        if refused and (len(lines) != 1 or not lines[0].startswith("snpc: ") or len(lines[0]) > 1000):
            complaints.append(f"{verb}: exit code {result.exit_code} in {len(lines)} lines: {lines[:3]}")
        after = {p: p.stat().st_mtime_ns for p in path.parent.iterdir()}
        new_files = {p.name for p in set(after) - set(before)}
        written = (
            {name for name in new_files if name.startswith("model-pruned.onnx")} if result.exit_code == 0 else set()
        )
        if new_files - written:
            complaints.append(f"{verb}: exit code {result.exit_code} left {sorted(new_files)}")
        if any(after.get(p) != time for p, time in before.items()):
            complaints.append(f"{verb}: changed its input")
        OUTCOMES[verb, result.exit_code] += 1
        if result.exit_code:
            REASONS[verb, re.sub(r"[^ ]*/[^ ]*|\d+|'[^']*'", "_", (lines or [""])[0])[:110]] += 1
        for name in written:
            (path.parent / name).unlink()
    return complaints


OUTCOMES: Counter[tuple[str, int]] = Counter()
REASONS: Counter[tuple[str, str]] = Counter()


# -- all of them, in processes that may die --------------------------------------------------------------------------


def work(first: int, last: int, step: int) -> None:
    """One process's share; a line of JSON before and after each, so that the one that killed it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("a hang")))
    with tempfile.TemporaryDirectory(prefix="snpc-mutants-") as name:
        for seed in range(first, last, step):
            path, done = mutant(seed, Path(name) / "inner" / str(seed))
            print(json.dumps({"seed": seed, "done": done}), flush=True)
            signal.alarm(LIMIT_SECONDS)
            complaints = trial(path)
            signal.alarm(0)
            print(json.dumps({"seed": seed, "complaints": complaints}), flush=True)
    counts = {"outcomes": list(OUTCOMES.items()), "reasons": list(REASONS.items())}
    print(json.dumps(counts), flush=True)


def share(first: int, last: int, step: int) -> tuple[list[str], list[Any]]:
    """Complaints of one share; a process that dies is reported and started again behind the file that killed it."""
    complaints: list[str] = []
    counts: list[Any] = []
    while first < last:
        words = [sys.executable, __file__, "--share", str(first), str(last), str(step)]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        now: dict[str, Any] = {"seed": first - step, "done": ""}
        for line in child.stdout:
            said = json.loads(line)
            if "outcomes" in said:
                counts.append(said)
            elif "done" in said:
                now = said
            else:
                complaints += [f"{now['seed']} ({now['done']}) {words}" for words in said["complaints"]]
                for words in said["complaints"]:
                    print(now["seed"], f"({now['done']})", words, flush=True)
        code = child.wait()
        if code == 0:
            break
        complaints.append(f"{now['seed']} ({now['done']}) the process ended with {code}")
        print(complaints[-1], (child.stderr.read() if child.stderr else "")[-300:], flush=True)
        first = int(now["seed"]) + step
    return complaints, counts


def run_all() -> None:
    from concurrent.futures import ThreadPoolExecutor

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=2000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--share", type=int, nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.share:
        work(*given.share)
        return
    ends = given.first + given.count
    with ThreadPoolExecutor(given.processes) as pool:
        shares = list(pool.map(lambda k: share(given.first + k, ends, given.processes), range(given.processes)))
    complaints = list(itertools.chain(*(lines for lines, _ in shares)))
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for said in itertools.chain(*(counts for _, counts in shares)):
        for (verb, code), count in said["outcomes"]:
            outcomes[f"{verb} exit code {code}"] += count
        for (verb, reason), count in said["reasons"]:
            reasons[f"{verb} {reason}"] += count
    for text, count in [*sorted(outcomes.items()), *reasons.most_common(60)]:
        print(f"{count:6d}  {text}")
    print(f"{len(complaints)} of {given.count} damaged models are neither done nor refused in a line")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    run_all()
