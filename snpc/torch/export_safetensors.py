"""Export of a graph's weights as safetensors, with the widths of its layers as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from snpc.errors import UserError
from snpc.passes import Analysis, analyze
from snpc.passes.canonicalization import original_name
from snpc.runtime.io import atomic_write, check_target, load, model_files, refuse_branches
from snpc.torch.module import GraphModule

WEIGHTS_FILE, WIDTHS_FILE = "model.safetensors", "widths.json"


def export_tensors(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write ``model.safetensors`` (every weight under its name in the file) and ``widths.json`` into ``folder``.

    The JSON lists groups as ``{"id", "role", "layer", "blocks", "size", "sites": [{"tensor", "axis"}]}``: of an
    attention layer the heads (blocks) and the width of each (size), of a feed-forward layer the hidden width. A matrix
    that is stored twice (tied) is written once, and named under "tied". Returns both paths. Raises UserError for
    operators without a torch implementation.
    """
    folder_path = Path(folder)
    try:
        folder_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder_path}: cannot make this folder ({error.strerror})") from None
    weights, widths = folder_path / WEIGHTS_FILE, folder_path / WIDTHS_FILE
    analysis = analyze(load(source))
    refuse_branches(analysis.model, "exporting weights")
    for path in (weights, widths):
        check_target(path, *model_files(analysis.model.path))
    module = GraphModule(analysis.model)
    tensors = {name: weight.detach().contiguous() for name, weight in module.weights()}
    with atomic_write(weights) as temporary:
        save_file(tensors, temporary, {"format": "pt", "digest": analysis.model.digest})
    with atomic_write(widths) as temporary:
        temporary.write_text(json.dumps(widths_json(analysis, module), indent=1) + "\n")
    return weights, widths


def widths_json(analysis: Analysis, module: GraphModule) -> dict[str, Any]:
    """The content of ``widths.json``. Its keys are an interface."""
    graph = analysis.traced_graph.model.graph
    return {
        "snpc_widths": 1,
        "model": analysis.model.path.name,
        "digest": analysis.model.digest,
        "groups": [
            {
                "id": group.id,
                "role": group.role,
                "layer": group.layer,
                "blocks": group.blocks,
                "size": group.size,
                "sites": [{"tensor": original_name(graph.initializers[s.tensor]), "axis": s.axis} for s in group.sites],
            }
            for group in analysis.groups
        ],
        "tied": {name: {"to": owner, "transposed": transposed} for name, (owner, transposed) in module.ties.items()},
        "shapes": {name: list(weight.shape) for name, weight in module.weights()},
    }
