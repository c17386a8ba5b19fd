"""Labels that cannot follow an operator are pinned, with a reason; nothing is raised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

from snpc.passes.analyze import Analysis
from tests.oracle import analysis_at, prunable

GRAPHS = {
    "resampled_along_channels": (
        """<ir_version: 8, opset_import: ["": 9]>
        g (float[B, 4, 4, 16] x) => (float[B, 4, 4, 5] y) <float[4] scales = {1.0, 1.0, 1.0, 2.0}> {
            a = MatMul(x, w1)  b = Relu(a)  r = Upsample <mode = "nearest"> (b, scales)  y = MatMul(r, w2)
        }""",
        {"w1": (16, 24), "w2": (48, 5)},
        "it is pooled or resampled",
    ),
    "resampled_along_a_computed_last_axis": (
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 4, 4, 16] x) => (float[B, 4, 4, 5] y) {
            a = MatMul(x, w1)  b = Relu(a)  sizes = Shape(b)
            r = Resize <mode = "nearest"> (b, , , sizes)  y = MatMul(r, w2)
        }""",
        {"w1": (16, 24), "w2": (24, 5)},
        "it is pooled or resampled",
    ),
    "cropped_channels": (
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 16, 4, 4] x) => (float[B, 5, 4, 4] y)
        <float[8] roi = {0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0}, int64[4] sizes = {1, 24, 4, 4}> {
            a = Conv(x, w1)  b = Relu(a)
            r = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (b, roi, , sizes)
            y = Conv(r, w2)
        }""",
        {"w1": (24, 16, 1, 1), "w2": (5, 24, 1, 1)},
        "it is pooled or resampled",
    ),
    "order_of_too_few_axes": (
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 4, 8] x) => (float[B, 4, 5] y) {
            a = MatMul(x, w1)  b = Relu(a)  c = Transpose <perm = [0, 1]> (b)  y = MatMul(c, w2)
        }""",
        {"w1": (8, 24), "w2": (24, 5)},
        "[0, 1] is no order of its 3 axes",
    ),
    "heads_without_width": (
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 4, 8] x) => (float[B, 4, 5] y) <int64[4] heads = {0, 0, 2, 0}, int64[3] merged = {0, 0, 24}> {
            a = MatMul(x, w1)  b = Relu(a)  c = Reshape <allowzero = 1> (b, heads)  d = Reshape(c, merged)
            y = MatMul(d, w2)
        }""",
        {"w1": (8, 24), "w2": (24, 5)},
        "",
    ),
}


def analysis_of_text(text: str, weights: dict[str, tuple[int, ...]], folder: Path) -> Analysis:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return analysis_at(folder / "model.onnx", model)


@pytest.mark.parametrize("name", GRAPHS)
def test_labels_that_cannot_follow_are_pinned(name: str, tmp_path: Path) -> None:
    text, weights, reason = GRAPHS[name]
    analysis = analysis_of_text(text, weights, tmp_path)
    assert not prunable(analysis.groups)
    assert [pin for pin in analysis.pins if reason in pin.reason]
