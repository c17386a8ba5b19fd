"""Whole rewrites as text: what the graph looks like afterwards, for a person to read in a diff.

Small integer constants are shown by value, for they are what a rewrite recomputes; weights by type and shape. After a
change that is meant, `pytest tests/passes/slicing/test_golden.py --update-golden` writes the files anew; read the diff.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from snpc.types import Group
from tests.golden import check_golden
from tests.oracle import TOLERANCE, Cuts, analysis_of, cut, cuts_of, feeds_of, prunable

FOLDER = Path(__file__).parent / "golden"

# (export, the roles that lose half of their units)
CASES = {
    "vit_packed_qk": ("vit_timm__ts17", ("qk",)),
    "bert_half": ("bert__ts17", ("qk", "vo", "ffn")),
    "gpt2_half": ("gpt2__dyn20", ("qk", "vo", "ffn")),
    "llama_rotary": ("llama__dyn20", ("qk",)),
}


def every_second(group: Group) -> np.ndarray:
    removed = np.zeros((group.blocks, group.size), bool)
    removed[:, 1::2] = True
    return removed


def cuts_for(name: str, roles: tuple[str, ...]) -> Cuts:
    return cuts_of((group, every_second(group)) for group in prunable(analysis_of(name).groups, *roles))


# -- the graph as text -----------------------------------------------------------------------------------------------


def dump(model: onnx.ModelProto) -> str:
    return "\n".join(lines(model)) + "\n"


def lines(model: onnx.ModelProto) -> Iterator[str]:
    """One line per input, weight, node and output. Values are numbered in order: names of exporters are long."""
    graph = model.graph
    yield f"ir_version {model.ir_version}, " + ", ".join(
        f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import
    )
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    names: dict[str, str] = {v.name: v.name for v in graph.input}
    for value in graph.input:
        yield f"input {value.name}: {typed(value)}"
    for node in graph.node:
        for name in node.input:
            if name in constants and name not in names:
                names[name] = constant_text(constants[name], f"w{sum(n.startswith('w') for n in names.values())}")
                if names[name].startswith("w"):
                    array = constants[name]
                    yield f"  {names[name]} = {array.dtype}{list(array.shape)}"
        for name in node.output:
            names[name] = f"%{sum(n.startswith('%') for n in names.values())}"
        inputs = ", ".join(names.get(name, "-") if name else "-" for name in node.input)
        attributes = "".join(f" {a.name}={attribute_text(a)}" for a in sorted(node.attribute, key=lambda a: a.name))
        domain = f"{node.domain}." if node.domain else ""
        yield f"  {', '.join(names[n] for n in node.output)} = {domain}{node.op_type}({inputs}){attributes}"
    for value in graph.output:
        yield f"output {value.name} = {names[value.name]}: {typed(value)}"


def constant_text(array: np.ndarray, name: str) -> str:
    """Integers, and single numbers, by value."""
    small = array.size <= 8 and array.dtype.kind in "iub"
    if small:
        return str(array.tolist()).replace(" ", "")
    if array.size == 1 and array.dtype.kind == "f":
        return f"{float(array.reshape(-1)[0]):.4g}f"
    return name


def attribute_text(attribute: onnx.AttributeProto) -> str:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return constant_text(numpy_helper.to_array(value), f"{list(value.dims)}")
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


def typed(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ",".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{dims}]"


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, request: pytest.FixtureRequest) -> None:
    name, roles = CASES[case]
    pair = cut(analysis_of(name), cuts_for(name, roles))
    assert pair.error(feeds_of(name)) < TOLERANCE  # a golden file of a wrong graph would be worse than none
    text = dump(onnx.load_from_string(pair.sliced))
    check_golden(request, FOLDER / f"{case}.txt", text)


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(CASES)


def test_the_dump_tells_graphs_apart() -> None:
    """A size, a shape target, a number and the wiring all show."""
    name, roles = CASES["vit_packed_qk"]
    model = onnx.load_from_string(cut(analysis_of(name), cuts_for(name, roles)).sliced)
    text = dump(model)
    assert dump(model) == text
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    target = next(n.input[1] for n in changed.graph.node if n.op_type == "Split" and len(n.input) > 1)
    tensor = next(t for t in changed.graph.initializer if t.name == target)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
    assert dump(changed) != text
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)
    node = next(n for n in swapped.graph.node if n.op_type == "Split")
    node.output[0], node.output[1] = node.output[1], node.output[0]
    assert dump(swapped) != text
