"""The digits model, in which one attention adds next to nothing: what is to go first."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper

import snpc
from tests.command_line import VIT

IDLE = "blocks.1.attn"


def write_idle(path: Path) -> Path:
    model = onnx.load(VIT)
    analysis = snpc.analyze(snpc.load(VIT))
    group = next(g for g in analysis.groups if g.id == f"{IDLE}.vo")
    (consumer,) = analysis.weights[group.id].consumers
    names = {consumer.weight_slice.tensor, *(v.name for n in consumer.nodes for v in n.inputs if v is not None)}
    for initializer in model.graph.initializer:
        if initializer.name in names or initializer.name == f"{IDLE}.proj.bias":
            array = 0.001 * numpy_helper.to_array(initializer)
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    onnx.save(model, path)
    return path
