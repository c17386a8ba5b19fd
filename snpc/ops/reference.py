"""One node, evaluated by onnx's reference implementation of its operator in its opset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from snpc.types import AnyArray


def evaluate_node(node: onnx.NodeProto, feeds: Mapping[str, AnyArray], version: int) -> list[Any]:
    """The outputs of ``node`` at opset ``version`` of the default domain, for its inputs by name.

    The evaluator takes a lone node for one of its newest opset, whatever opset it is given, and misses the attributes
    of older ones (the axes of a Squeeze). It respects the opset of a graph. Raises what the evaluator raises.
    """
    inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names if n] for names in (feeds, node.output))
    graph = helper.make_graph([node], "node", inputs, outputs)
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(graph, opsets={"": version}).run(None, dict(feeds)))
