"""Names that several constants of a graph define, which onnxruntime takes and onnx-ir refuses.

onnxruntime turns every ``Constant`` node of the main graph into an initializer while it loads it. Of several constants
with one name it uses one for all consumers; which one depends on their size and on its version. So they can only be
taken for one constant where their contents are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper

from snpc.errors import UserError
from snpc.ops import CONSTANT
from snpc.runtime.io.tensor_checks import external_entry, is_external

Content = tuple[int, tuple[int, ...], bytes]


def merge_equal_constants(graph: onnx.GraphProto, path: Path) -> int:
    """Remove, in place, all but one of the constants of a main graph that have one name. Returns how many.

    An initializer that is a graph input is no constant: a caller may set it. Raises UserError where contents differ.
    """
    names = [tensor.name for tensor in graph.initializer] + [name for _, name in _constant_nodes(graph)]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    repeated -= {value.name for value in graph.input}
    if not repeated:
        return 0
    found: dict[str, Content] = {}
    tensors = [index for index, tensor in enumerate(graph.initializer) if tensor.name in repeated]
    nodes = [(index, name) for index, name in _constant_nodes(graph) if name in repeated]
    extra_tensors = [
        k
        for k in tensors
        if _is_known(found, graph.initializer[k].name, _tensor_content(graph.initializer[k], path), path)
    ]
    extra_nodes = [k for k, name in nodes if _is_known(found, name, _node_content(graph.node[k], path), path)]
    for index in reversed(extra_tensors):
        del graph.initializer[index]
    for index in reversed(extra_nodes):
        del graph.node[index]
    return len(extra_tensors) + len(extra_nodes)


def _constant_nodes(graph: onnx.GraphProto) -> Iterator[tuple[int, str]]:
    """(index, name of its output) of every Constant node."""
    for index, node in enumerate(graph.node):
        if node.op_type == CONSTANT and node.domain in ("", "ai.onnx"):
            yield from ((index, name) for name in node.output)


def _is_known(found: dict[str, Content], name: str, content: Content, path: Path) -> bool:
    """Whether ``name`` has this content already; else it is recorded."""
    if found.setdefault(name, content) != content:
        raise UserError(f"{path}: {name} is defined twice, with different contents; rename one of them")
    return found[name] is not content


def _node_content(node: onnx.NodeProto, path: Path) -> Content:
    """Content of a Constant node; of one without a tensor, its attribute."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            return _tensor_content(attribute.t, path)
    return -1, (), b"".join(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)


def _tensor_content(tensor: onnx.TensorProto, path: Path) -> Content:
    """Element type, shape and bytes. ``path``: of the model file, beside which external data lie."""
    if not is_external(tensor):
        return tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
    with (path.parent / external_entry(tensor, "location")).open("rb") as file:
        file.seek(int(external_entry(tensor, "offset") or 0))
        length = external_entry(tensor, "length")
        return tensor.data_type, tuple(tensor.dims), file.read(int(length) if length else -1)
