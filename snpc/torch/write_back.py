"""Writing trained weights back into the graph that they came from: same nodes, same names, other numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from snpc.errors import UserError
from snpc.planning import write_provenance
from snpc.runtime.io import check_target, load, model_files, publish_files, read_model, staging_folder
from snpc.runtime.io import save as save_model
from snpc.torch.module import GraphModule
from snpc.types import Model


def save_graph_module(module: GraphModule, source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write the model in ``source``, which ``module`` was loaded from, with the module's weights.

    Only initializers, the values of Constant nodes and what the file says of how it was made change. Weights are
    written as external data beside the output if the source has external data. Raises UserError where the file is not
    the one that the module came from.
    """
    write_trained(module, load(source), Path(output), {"step": "finetune"})


def write_trained(module: GraphModule, source: Model, output: Path, entries: Mapping[str, str]) -> None:
    """The same with ``source`` loaded, and with ``entries`` that say how it was trained."""
    check_target(output)
    model = read_model(source.path)
    constants = {str(v.name): v for node in model.graph for v in node.outputs if not node.inputs}
    for name in module.weight_names():
        array = to_numpy(module.weight(name))
        value = model.graph.initializers.get(name)
        node = constants[name].producer() if value is None and name in constants else None
        tensor = value.const_value if value is not None else constant_node_value(node)
        if tensor is None or tuple(tensor.shape) != tuple(array.shape):
            raise UserError(
                f"{source.path}: its {name} is not the one that was trained: give the model that was loaded"
            )
        trained = ir.Tensor(array.astype(tensor.dtype.numpy()), dtype=tensor.dtype, name=name)
        if value is not None:
            value.const_value = trained
        elif node is not None:
            node.attributes["value"] = ir.AttrTensor("value", trained)
    write_provenance(model, source, entries)
    with staging_folder(output) as folder:
        staged = folder / output.name
        save_model(model, staged, external=len(model_files(source.path)) > 1)
        publish_files([staged], output)


def constant_node_value(node: ir.Node | None) -> ir.TensorProtocol | None:
    attribute = None if node is None else node.attributes.get("value")
    value = None if attribute is None else attribute.value
    return value if isinstance(value, ir.TensorProtocol) else None


def to_numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """bfloat16, which numpy has not, as float32."""
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).contiguous().numpy()
