"""Where external data may lie: every tensor of a file is found, and links do not lead out of its folder."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from snpc.errors import UserError
from snpc.runtime.io.load import load
from snpc.runtime.io.tensor_checks import all_tensors
from tests.command_line import arrays, invoke, write_tiny

Way = tuple[str, ...]
TENSOR = TensorProto.DESCRIPTOR


def message_fields(kind: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, field.message_type) for field in kind.fields if field.message_type is not None)


def ways_to(start: Any, goal: Any) -> Way | None:
    """The shortest way of field names from one kind of message to another."""
    queue: deque[tuple[Any, Way]] = deque([(start, ())])
    seen = {start.full_name}
    while queue:
        kind, way = queue.popleft()
        if kind.full_name == goal.full_name:
            return way
        for name, inner in message_fields(kind):
            if inner.full_name not in seen:
                seen.add(inner.full_name)
                queue.append((inner, (*way, name)))
    return None


def ways_through_every_field() -> list[Way]:
    """For each field of each kind of message below a model, a way through it that ends at a tensor."""
    model = onnx.ModelProto.DESCRIPTOR
    queue = [model]
    kinds: dict[str, Any] = {}
    while queue:
        kind = queue.pop()
        if kinds.setdefault(kind.full_name, kind) is kind and kind is not TENSOR:
            queue += [inner for _, inner in message_fields(kind) if inner.full_name not in kinds]
    ways = []
    for kind in kinds.values():
        before = ways_to(model, kind)
        for name, inner in message_fields(kind):
            after = ways_to(inner, TENSOR)
            if before is not None and after is not None:
                ways.append((*before, name, *after))
    return sorted(set(ways))


WAYS = ways_through_every_field()


def place_tensor(model: onnx.ModelProto, way: Way) -> TensorProto:
    """Add what is missing along the way, and return the tensor at its end."""
    message: Any = model
    for name in way:
        content = getattr(message, name)
        if isinstance(content, Message):
            content.SetInParent()
            message = content
        else:
            message = content.add()
    assert isinstance(message, TensorProto)
    return message


def test_the_ways_are_those_that_are_known() -> None:
    assert {
        ("graph", "initializer"),
        ("functions", "attribute_proto", "t"),
        ("graph", "sparse_initializer", "indices"),
    } <= {*WAYS}
    assert {"t", "tensors", "sparse_tensor", "sparse_tensors", "g", "graphs"} <= {name for way in WAYS for name in way}


@pytest.mark.parametrize("way", WAYS, ids=".".join)
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_data_outside_are_refused_wherever_the_tensor_stands(way: Way, location: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    tensor = place_tensor(model, way)
    tensor.CopyFrom(TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL))
    tensor.external_data.add(key="location", value=location)
    assert "t" in [t.name for t in all_tensors(model)]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"outside its folder|sparse weight"):
        load(path)


def with_default_in(location: str) -> onnx.ModelProto:
    """x -> MatMul, a function that also gives its default tensor, MatMul; the default lies in ``location``."""
    tensor = TensorProto(name="s", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="v")
    body = [constant, helper.make_node("Neg", ["c"], ["z"]), helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("my", "F", ["x"], ["y", "z"], body, [helper.make_opsetid("", 17)])
    function.attribute_proto.append(onnx.AttributeProto(name="v", type=onnx.AttributeProto.TENSOR, t=tensor))
    rng = np.random.default_rng(0)
    held = [
        numpy_helper.from_array(rng.normal(size=s).astype("f4"), n) for n, s in {"u": (8, 16), "v": (16, 4)}.items()
    ]
    nodes = [helper.make_node("MatMul", ["x", "u"], ["a"]), helper.make_node("F", ["a"], ["b", "more"], domain="my"),
             helper.make_node("MatMul", ["b", "v"], ["y"])]  # fmt: skip
    shapes: dict[str, list[str | int]] = {"x": ["B", 8], "y": ["B", 4], "more": [4]}
    ends = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)


def test_a_default_of_a_function_does_not_read_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4, dtype="f4").tobytes())
    path = tmp_path / "inner" / "m.onnx"
    monkeypatch.chdir(tmp_path)  # where a relative location would be found
    for location, words in ((str(secret), "outside its folder"), ("secret.bin", "not beside it")):
        onnx.save(with_default_in(location), path)
        result = invoke("prune", path, "--ratio", 0.5, "-o", tmp_path / "out.onnx", code=2)
        assert words in result.stderr
        assert not (tmp_path / "out.onnx").exists()


def test_a_default_of_a_function_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype="f4").tobytes())
    onnx.save(with_default_in("w.bin"), tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx").graph.graph
    assert any(
        np.array_equal(v.const_value.numpy(), np.arange(4)) for v in graph.initializers.values() if v.const_value
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with its weights in w.bin, in a folder of its own."""
    (tmp_path / "inner").mkdir()
    return write_tiny(tmp_path / "inner" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)


def relocated(model: Path, location: str) -> None:
    proto = onnx.load(model, load_external_data=False)
    for entry in (e for t in proto.graph.initializer for e in t.external_data if e.key == "location"):
        entry.value = location
    model.write_bytes(proto.SerializeToString())


def link_to_a_file(model: Path) -> str:
    (model.parent / "w.bin").rename(model.parent.parent / "secret.bin")
    (model.parent / "w.bin").symlink_to(Path("..") / "secret.bin")
    return "w.bin"


def link_to_a_folder(model: Path) -> str:
    (model.parent / "w.bin").rename(model.parent.parent / "w.bin")
    (model.parent / "up").symlink_to("..")
    return "up/w.bin"


@pytest.mark.parametrize("leave", [link_to_a_file, link_to_a_folder])
def test_links_that_leave_the_folder_are_refused(leave: Callable[[Path], str], model: Path) -> None:
    relocated(model, leave(model))
    with pytest.raises(UserError, match=r"a link to .*outside its folder.*in place of the link"):
        load(model)


def test_links_in_a_circle_are_no_files(model: Path) -> None:
    (model.parent / "w.bin").unlink()
    (model.parent / "w.bin").symlink_to("v.bin")
    (model.parent / "v.bin").symlink_to("w.bin")
    with pytest.raises(UserError, match="not beside it"):
        load(model)


def test_links_within_the_folder_are_followed(model: Path) -> None:
    (model.parent / "data").mkdir()
    (model.parent / "w.bin").rename(model.parent / "data" / "1.bin")
    (model.parent / "w.bin").symlink_to("data/1.bin")
    load(model)


def test_a_cache_that_links_model_and_data_into_one_folder(model: Path, tmp_path: Path) -> None:
    """Hugging Face's cache: snapshots/<revision>/onnx/model.onnx -> ../../../blobs/<digest>, and so its data."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, digest in (("m.onnx", "aa"), ("w.bin", "bb")):
        (model.parent / name).rename(blobs / digest)
        (snapshot / name).symlink_to(Path("..") / ".." / ".." / "blobs" / digest)
    out = tmp_path / "out.onnx"
    result = invoke("prune", snapshot / "m.onnx", "--ratio", 0.5, "-o", out)
    assert re.search("sliced equals masked", result.stdout)
    assert sorted(p.name for p in snapshot.iterdir()) == ["m.onnx", "w.bin"]


def test_external_weights_of_a_branch_are_written_into_the_output(tmp_path: Path) -> None:
    """A branch keeps its own weights; as external data of the output they would name a file by its full path."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    block (float[B, 8] x, bool which) => (float[B, 4] y)
    {
        a = MatMul(x, u) b = Relu(a) c = MatMul(b, v)
        y = If (which) <
            then_branch = yes () => (float[B, 4] t) { t = Add(c, w) },
            else_branch = no () => (float[B, 4] e) { e = Neg(c) }
        >
    }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {"u": (8, 64), "v": (64, 4)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype("f4"), name))
    weight = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    branch = proto.graph.node[3].attribute[0].g
    branch.initializer.append(weight)
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype="f4").tobytes())
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    invoke("prune", path, "--ratio", 0.5)
    written = onnx.load(tmp_path / "m-pruned.onnx", load_external_data=False)
    assert str(tmp_path).encode() not in written.SerializeToString()
    for file in (tmp_path / "w.bin", path):
        file.unlink()
    assert arrays(tmp_path / "m-pruned.onnx")["u"].shape == (8, 32)
    onnx.checker.check_model(onnx.load(tmp_path / "m-pruned.onnx"), full_check=True)


def test_strings_in_another_file_are_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING
    onnx.save(model, path)
    with pytest.raises(UserError, match="has strings in another file"):
        load(path)
