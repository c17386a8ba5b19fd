"""Quantization to int8: weights and the activations they multiply, as QuantizeLinear and DequantizeLinear nodes.

Ranges come from calibration data through onnxruntime.quantization. Where a few columns of an activation are far larger
than the others, rounding would destroy the others; the product is then split as in LLM.int8 (Dettmers et al. 2022,
section 3.2): those columns stay in float, the rest is clipped to its own range and quantized. The split is kept where
it is closer to the float model on the calibration data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import Attribute, add_constant, make_node, opset_version, redirect_uses, replace_graph_output
from snpc.ops import ADD, CLIP, GATHER, IDENTITY, MATMUL, lookup
from snpc.passes.canonicalization import finalize
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import OutputMetrics, batch_differences, max_drift, run_batches
from snpc.runtime.execution import first_lines, open_session, run_session
from snpc.runtime.io import save
from snpc.types import Feeds, FloatArray, IntArray, Model

OUTLIER_FACTOR = 4.0  # a column whose maximum is this many times the median one is an outlier
COLUMNS_PER_OUTLIER = 16  # at most one outlier among so many columns
SPLIT_GAIN = 0.9  # the split is kept if its drift is below this fraction of the plain one
MIN_OPSET = 13  # the first opset with one scale per channel


@dataclass(frozen=True)
class OutlierColumns:
    """Columns of an activation that stay in float, and the largest value in the others."""

    columns: IntArray
    clip_limit: float


def quantize_model(model: Model, calibration: Calibration, path: Path, signed: bool) -> tuple[str, ...]:
    """Write ``model`` in int8 to ``path``; returns notes for the user. ``signed``: activations symmetric around
    zero."""
    if opset_version(model.graph) < MIN_OPSET:
        raise UserError(
            f"{model.path}: int8 needs opset {MIN_OPSET} or newer, this is {opset_version(model.graph)}: "
            "export it again"
        )
    folder = path.parent
    feeds = list(calibration.batches())
    outliers = find_outliers(model, folder, feeds)
    reference, metrics = run_batches(model.path, feeds[:4]), OutputMetrics.of_model(model)

    def attempt(split: Mapping[str, OutlierColumns], to: Path) -> float:
        graph, nodes = prepare_for_quantization(model.graph, split)
        run_quantizer(graph, nodes, calibration, to, signed)
        outputs = run_batches(to, feeds[:4])
        return max_drift(batch_differences(reference, outputs, metrics))

    plain = attempt({}, path)
    if not outliers:
        return (f"int8: drift {plain:.3g} on calibration data; no activation has outlier columns",)
    mixed = folder / "mixed.onnx"
    drift = attempt(outliers, mixed)
    split_is_closer = drift < SPLIT_GAIN * plain
    if split_is_closer:
        mixed.replace(path)
    columns = sum(len(o.columns) for o in outliers.values())
    decision = "kept" if split_is_closer else "not kept"
    return (
        f"int8: {columns} outlier columns of {len(outliers)} activations in float: drift {drift:.3g} instead of "
        f"{plain:.3g} on calibration data, {decision}",
    )


def weight_products(model: ir.Model) -> list[ir.Node]:
    """Products of an activation (first) with a constant weight (second)."""
    products = []
    for node in model.graph:
        spec = lookup(node.domain, node.op_type)
        if spec.kind != "contraction" or node.domain or spec.operands != (0, 1):
            continue
        data, weight = node.inputs[:2]
        computed = data is not None and data.const_value is None
        if computed and weight is not None and weight.const_value is not None and weight.const_value.size >= 256:
            products.append(node)
    return products


def is_weight_matmul(node: ir.Node) -> bool:
    """The activation's last axis is summed with the first of a weight matrix: x @ W."""
    return node.op_type == MATMUL and len(node.inputs[1].const_value.shape) == 2  # type: ignore[union-attr]


# -- outliers --------------------------------------------------------------------------------------------------------


def find_outliers(model: Model, folder: Path, feeds: Sequence[Feeds]) -> dict[str, OutlierColumns]:
    """Activation -> its outlier columns, for activations that have some."""
    outliers = {}
    for name, maxima in column_maxima(model, folder, feeds).items():
        limit = OUTLIER_FACTOR * float(np.median(maxima))
        columns = np.flatnonzero(maxima > limit)
        most = max(1, len(maxima) // COLUMNS_PER_OUTLIER)
        columns = np.sort(columns[np.argsort(-maxima[columns])][:most])
        if len(columns) and limit > 0:
            outliers[name] = OutlierColumns(columns, float(np.delete(maxima, columns).max()))
    return outliers


def column_maxima(model: Model, folder: Path, feeds: Sequence[Feeds]) -> dict[str, FloatArray]:
    """Largest absolute value in each column of every activation that meets a weight matrix, over the data."""
    copy = model.graph.clone()
    watched = {node.inputs[0]: node.inputs[1] for node in weight_products(copy) if is_weight_matmul(node)}
    for value, weight in watched.items():
        if value is not None and not value.is_graph_output() and not value.is_graph_input():
            value.dtype = value.dtype or weight.const_value.dtype  # type: ignore[union-attr]
            copy.graph.outputs.append(value)
    path = folder / "watched.onnx"
    graph_outputs = [str(value.name) for value in copy.graph.outputs]
    for value in copy.graph.outputs:
        value.dtype = value.dtype or ir.DataType.FLOAT
    save(copy, path)
    session = open_session(path, optimization="basic", memory="least")
    maxima: dict[str, FloatArray] = {}
    names = {str(v.name) for v in watched if v is not None} & set(graph_outputs)
    for batch in feeds:
        outputs = run_session(session, batch, name=path.name)
        for name in names:
            array = np.abs(outputs[name].astype(np.float64))
            maxima[name] = np.maximum(maxima.get(name, 0.0), array.reshape(-1, array.shape[-1]).max(0))
    return maxima


# -- the graph to quantize -------------------------------------------------------------------------------------------


def prepare_for_quantization(source: ir.Model, split: Mapping[str, OutlierColumns]) -> tuple[ir.Model, list[str]]:
    """A copy whose products read a value of their own, clipped where ``split`` names outliers, and the products' names.

    A value of their own, so that what else reads the activation (a residual sum) gets it unrounded.
    """
    model = source.clone()
    nodes = weight_products(model)
    fronts: dict[ir.Value, tuple[ir.Value, ir.Value | None]] = {}
    for node in nodes:
        data = node.inputs[0]
        assert data is not None
        outliers = split.get(str(data.name)) if is_weight_matmul(node) else None
        if data not in fronts:
            fronts[data] = insert_product_input(model, node, data, outliers)
        narrow, columns = fronts[data]
        node.replace_input_with(0, narrow)
        if outliers is not None and columns is not None:
            add_outlier_product(model, node, columns, outliers.columns)
    return model, [str(node.name) for node in nodes]


def insert_product_input(
    model: ir.Model, node: ir.Node, data: ir.Value, outliers: OutlierColumns | None
) -> tuple[ir.Value, ir.Value | None]:
    """(what the int8 product reads, the outlier columns)."""
    if outliers is None:
        return insert_node_before(node, IDENTITY, [data], f"{data.name}_int8"), None
    bound = np.float32(outliers.clip_limit)
    low = add_constant(model.graph, np.asarray(-bound), f"{data.name}_low", typed=False)
    high = add_constant(model.graph, np.asarray(bound), f"{data.name}_high", typed=False)
    index = add_constant(model.graph, outliers.columns.astype(np.int64), f"{data.name}_outliers", typed=False)
    clipped = insert_node_before(node, CLIP, [data, low, high], f"{data.name}_int8")
    return clipped, insert_node_before(node, GATHER, [data, index], f"{data.name}_float", {"axis": -1})


def add_outlier_product(model: ir.Model, node: ir.Node, columns: ir.Value, index: IntArray) -> None:
    """x W = x' W' + x[outliers] W[outliers]; W' has zero rows where x' has clipped outliers."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    array = np.array(weight.const_value.numpy())
    outer = add_constant(model.graph, np.ascontiguousarray(array[index]), f"{node.name}_outer", typed=False)
    array[index] = 0
    node.replace_input_with(1, add_constant(model.graph, array, f"{node.name}_inner", typed=False))
    out = node.outputs[0]
    users, listed = list(out.uses()), out.is_graph_output()
    product = make_node(MATMUL, [columns, outer], name=f"{node.name}_float")
    total = make_node(ADD, [out, product.outputs[0]], name=f"{node.name}_sum")
    node.append([product, total])
    redirect_uses(users, total.outputs[0])
    if listed:
        replace_graph_output(model.graph, out, total.outputs[0], f"{out.name}_inner")


def insert_node_before(
    before: ir.Node, op: str, inputs: list[ir.Value], name: str, attributes: Mapping[str, Attribute] | None = None
) -> ir.Value:
    node = make_node(op, inputs, attributes, name=name, outputs=[name])
    before.prepend(node)
    return node.outputs[0]


def run_quantizer(model: ir.Model, nodes: list[str], calibration: Calibration, path: Path, signed: bool) -> None:
    from onnxruntime import quantization as q

    float_path = path.with_name(f"{path.stem}-float.onnx")
    kinds = sorted({n.op_type for n in model.graph if n.name in nodes})
    save(finalize(model), float_path)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        q.quantize_static(
            str(float_path),
            str(path),
            calibration_reader(calibration, q.CalibrationDataReader),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=q.QuantType.QInt8 if signed else q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": signed,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT refuses a bias of 32 bits, the others gain nothing from one
                "OpTypesToExcludeOutputQuantization": kinds,
            },
        )
    except Exception as error:  # the quantiser has no exceptions of its own
        raise UserError(f"onnxruntime.quantization refuses the model: {first_lines(error)}") from None
    finally:
        logging.disable(before)


def calibration_reader(calibration: Calibration, base: type[Any]) -> Any:
    """The calibration data as onnxruntime.quantization reads them."""

    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration.batches())

        def get_next(self) -> Any:
            return next(self.batches, None)

    return Reader()
