"""A matcher of two point sets: residual feed-forward layers, and the log assignment of a dual softmax.

Entries of the assignment are far below zero, most of them irrelevant, and some are minus infinity, as in LightGlue.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

POINTS = 6
WIDTH = 16
HIDDEN = 24
LAYERS = 3

TEXT = """
<ir_version: 10, opset_import: ["": 17]>
matcher (float[batch, {points}, {width}] left, float[batch, {points}, {width}] right)
    => (float[batch, {points}, {points}] log_assignment) {{
    {layers}
    turned = Transpose <perm = [0, 2, 1]> (right_{last})
    similarity = MatMul (left_{last}, turned)
    over_right = LogSoftmax <axis = 2> (similarity)
    over_left = LogSoftmax <axis = 1> (similarity)
    dual = Add (over_right, over_left)
    log_assignment = Where (possible, dual, impossible)
}}"""

LAYER = """
    {side}_up_{k} = MatMul ({side}_{k}, up_{k})
    {side}_hidden_{k} = Relu ({side}_up_{k})
    {side}_down_{k} = MatMul ({side}_hidden_{k}, down_{k})
    {side}_{next} = Add ({side}_{k}, {side}_down_{k})"""


def matcher(seed: int = 0) -> onnx.ModelProto:
    """A matcher whose points meet at similarities of about 20."""
    rng = np.random.default_rng(seed)
    sides = ("left", "right")
    layers = "".join(LAYER.format(side=side, k=k, next=k + 1) for k in range(LAYERS) for side in sides)
    for side in sides:
        layers = layers.replace(f"({side}_0,", f"({side},")
        layers = layers.replace(f"Add ({side}_0", f"Add ({side}")
    model = onnx.parser.parse_model(TEXT.format(points=POINTS, width=WIDTH, layers=layers, last=LAYERS))
    possible = np.ones((POINTS, POINTS), bool)
    possible[0, POINTS - 1] = possible[POINTS - 1, 0] = False
    constants = {"possible": possible, "impossible": np.float32(-np.inf)}
    for k in range(LAYERS):
        constants[f"up_{k}"] = (rng.normal(size=(WIDTH, HIDDEN)) / 4).astype(np.float32)
        constants[f"down_{k}"] = (rng.normal(size=(HIDDEN, WIDTH)) / 6).astype(np.float32)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    onnx.checker.check_model(model)
    return model


def matched_points(samples: int, seed: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    """Points, and the same points in another order with some noise."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(samples, POINTS, WIDTH)).astype(np.float32) * 1.2
    right = left[:, rng.permutation(POINTS)] + 0.2 * rng.normal(size=left.shape).astype(np.float32)
    return {"left": left, "right": right.astype(np.float32)}
