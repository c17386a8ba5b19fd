"""Models written inline and with external data: weights are whole, the value that is saved stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.runtime.io.save import PAGE, save

WEIGHTS = {
    "large": np.arange(3000, dtype=np.float32).reshape(60, 50),
    "odd": np.arange(777, dtype=np.uint8).repeat(3),
    "small": np.array([1, -1], np.int64),
    "half": np.linspace(0, 1, 5000).astype(np.float16),
}


def model_with(**extra: ir.TensorProtocol) -> ir.Model:
    """A model that adds nothing up, with ``WEIGHTS`` and the ``extra`` ones as they are named."""
    tensors: dict[str, ir.TensorProtocol] = {name: ir.Tensor(array) for name, array in WEIGHTS.items()} | extra
    values = [ir.Value(name=name, const_value=tensor) for name, tensor in tensors.items()]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.Node("", "Identity", [x], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("external", [False, True])
def test_what_is_written_is_what_was_there(external: bool, tmp_path: Path) -> None:
    model, path = model_with(), tmp_path / "m.onnx"
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    save(model, path, external)
    onnx.checker.check_model(str(path), full_check=True)
    read = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    assert read.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(read[name], array)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == tensors  # not changed
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", *(["m.onnx.data"] if external else [])}


def test_external_weights_begin_at_pages(tmp_path: Path) -> None:
    save(model_with(), tmp_path / "m.onnx", external=True)
    entries = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(str(tmp_path / "m.onnx"), load_external_data=False).graph.initializer
    }
    assert not entries["small"]  # below a kilobyte: inside the graph
    for name in ("large", "odd", "half"):
        assert entries[name]["location"] == "m.onnx.data"
        assert int(entries[name]["offset"]) % PAGE == 0
        assert int(entries[name]["length"]) == WEIGHTS[name].nbytes


def test_strings_stay_in_the_graph(tmp_path: Path) -> None:
    words = ir.StringTensor([b"abcdef"] * 500, shape=ir.Shape((500,)), name="words")
    for external in (False, True):
        save(model_with(words=words), tmp_path / "m.onnx", external)
        read = {t.name: t for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
        assert list(read["words"].string_data) == [b"abcdef"] * 500


def test_a_model_is_written_over_the_file_that_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(model_with(), path, external=True)
    data = path.with_name("m.onnx.data").read_bytes()
    save(ir.load(path), path, external=True)
    assert path.with_name("m.onnx.data").read_bytes() == data
    onnx.checker.check_model(str(path), full_check=True)
    read = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(read[name], array)


def test_weights_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A weight that is computed when it is read is dropped before the next one is computed."""
    alive: list[int] = []
    most = [0]

    class Counted(np.ndarray[tuple[int, ...], np.dtype[np.float32]]):
        def __del__(self) -> None:
            if self.base is None:
                alive.pop()

    def lazy(name: str) -> ir.LazyTensor:
        def read() -> ir.Tensor:
            array = np.full((1000,), 1, np.float32).view(Counted)
            owner = np.array(array, subok=True)
            alive.append(1)
            most[0] = max(most[0], len(alive))
            return ir.Tensor(owner, name=name)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape((1000,)), name=name)

    extra = {f"lazy{k}": lazy(f"lazy{k}") for k in range(5)}
    for external in (False, True):
        save(model_with(**extra), tmp_path / "m.onnx", external)
        assert most[0] == 1
        read = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
        np.testing.assert_array_equal(read["lazy4"], np.ones(1000, np.float32))
