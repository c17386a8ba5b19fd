"""Trained weights go back into the graph that they came from: same nodes, same names, other numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from snpc.errors import UserError
from snpc.runtime.io.atomic import check_target
from snpc.runtime.io.load import resolve_external_data
from snpc.runtime.io.save import save as save_model
from snpc.torch.module import GraphModule


def save_graph_module(module: GraphModule, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write the model in ``source`` with the weights of ``module``, which was loaded from it.

    Nothing but initializers (and the values of Constant nodes) changes; external data is written beside the target if
    it lay beside the source. Raises UserError where the file is not the one that the module came from.
    """
    where, written = Path(source), Path(target)
    check_target(written)
    model = ir.load(where)
    resolve_external_data(model, where.parent)
    held = {str(v.name): v for node in model.graph for v in node.outputs if not node.inputs}
    for name in module.weight_names():
        array = to_numpy(module.weight(name))
        value = model.graph.initializers.get(name)
        node = held[name].producer() if value is None and name in held else None
        tensor = value.const_value if value is not None else constant_node_value(node)
        if tensor is None or tuple(tensor.shape) != tuple(array.shape):
            raise UserError(f"{where}: its {name} is not the one that was trained: give the model that was loaded")
        made = ir.Tensor(array.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=name)
        if value is not None:
            value.const_value = made
        elif node is not None:
            node.attributes["value"] = ir.AttrTensor("value", made)
    outside = any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    save_model(model, written, outside)


def constant_node_value(node: ir.Node | None) -> ir.TensorProtocol | None:
    attribute = None if node is None else node.attributes.get("value")
    found = None if attribute is None else attribute.value
    return found if isinstance(found, ir.TensorProtocol) else None


def to_numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).contiguous().numpy()
