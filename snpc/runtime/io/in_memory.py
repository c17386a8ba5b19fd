"""Models in memory: written to a temporary file that can be run, and read back as the type that came in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx
import onnx_ir as ir

from snpc.errors import UserError
from snpc.runtime.io.save import PROTOBUF_LIMIT, save
from snpc.runtime.io.tensor_checks import all_tensors, is_external
from snpc.types import ModelKind

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    InMemoryModel: TypeAlias = onnx.ModelProto | ir.Model | gs.Graph


def kind_of(model: object) -> ModelKind:
    """Raises UserError for what is no model."""
    if isinstance(model, onnx.ModelProto):
        return "onnx"
    if isinstance(model, ir.Model):
        return "onnx_ir"
    surgeon = sys.modules.get("onnx_graphsurgeon")  # who has such a graph has imported it
    if surgeon is not None and isinstance(model, surgeon.Graph):
        return "graphsurgeon"
    raise UserError(
        f"a model is a path, an onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph, not {type(model)}"
    )


def write_in_memory(model: InMemoryModel, path: Path) -> None:
    """Write a copy of ``model`` to ``path``; the model itself is not changed."""
    kind = kind_of(model)
    if isinstance(model, ir.Model):
        save(model.clone(), path)
        return
    proto: onnx.ModelProto = model if kind == "onnx" else sys.modules["onnx_graphsurgeon"].export_onnx(model)
    outside = next((t.name for t in all_tensors(proto) if is_external(t)), None)
    if outside is not None:
        raise UserError(
            f"the weight {outside} lies in another file: give the path of the model, or load it with its external data"
        )
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > PROTOBUF_LIMIT:
        save(ir.from_proto(proto), path)
    else:
        path.write_bytes(proto.SerializeToString())


def read_back(path: Path, kind: ModelKind) -> InMemoryModel:
    """The model at ``path`` with all of its weights in memory; of kind "file" as an ``onnx.ModelProto``."""
    if kind == "onnx_ir":
        return ir.external_data.load_to_model(ir.load(path))
    proto = onnx.load(str(path))
    if kind == "graphsurgeon":
        return sys.modules["onnx_graphsurgeon"].import_onnx(proto)
    return proto
