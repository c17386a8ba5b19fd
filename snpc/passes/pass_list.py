"""Every graph pass of snpc in the order in which passes run, and a way to write the graph after one of them.

The stages are run from these tuples: ``canonicalize`` while loading, ``dequantize`` where a quantized file is to be
made float, ``analyze`` before labels are propagated, ``rewrite`` for each model that is cut, ``finalize`` before each
model that is written or run, ``fuse`` for candidates of ``--target ort`` and for TensorRT.
"""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import GraphPass, static_shape
from snpc.passes.canonicalization import (
    CANONICALIZATION_PASSES,
    ELIMINATE_DEAD_ROWS,
    FINALIZATION_PASSES,
    FOLD_SHAPE_ARITHMETIC,
)
from snpc.passes.fusion import FuseAttention, FuseGemmBias, PadAttentionHeads
from snpc.passes.quantization import DEQUANTIZATION_PASSES
from snpc.passes.slicing import REWRITE_PASSES, FoldAttentionScale

ANALYSIS_PASSES = (ELIMINATE_DEAD_ROWS,)

FUSE_ATTENTION = GraphPass(
    "fuse-attention",
    "fuse",
    FuseAttention,
    "replaces attention in separate nodes by one com.microsoft.MultiHeadAttention",
    "after shape arithmetic is folded, which hides where heads are split and merged",
)
FUSE_ATTENTION_PROJECTIONS = GraphPass(
    "fuse-attention-projections",
    "fuse",
    partial(FuseAttention, projections=True),
    "the same with the products of query, key and value: one com.microsoft.Attention",
    "an alternative to fuse-attention: both are timed",
)
FUSE_GEMM_BIAS = GraphPass(
    "fuse-gemm-bias",
    "fuse",
    FuseGemmBias,
    "replaces a product and the bias that is added to it by one Gemm",
    "last: attention that holds its projections takes their biases too",
)
FOLD_ATTENTION_SCALE = GraphPass(
    "fold-attention-scale",
    "fuse",
    FoldAttentionScale,
    "multiplies what makes queries by the scale of their attention, which is then left out",
    "for TensorRT, before the graph gets its precision",
)
PAD_ATTENTION_HEADS = GraphPass(
    "pad-attention-heads",
    "fuse",
    PadAttentionHeads,
    "makes heads of queries, keys and values equally wide by zeros",
    "for TensorRT in half precision, after fold-attention-scale, which follows queries to their weights",
)
FUSION_PASSES = (FOLD_SHAPE_ARITHMETIC, FUSE_ATTENTION, FUSE_ATTENTION_PROJECTIONS, FUSE_GEMM_BIAS)
ENGINE_PASSES = (FOLD_ATTENTION_SCALE, PAD_ATTENTION_HEADS)

PASSES: tuple[GraphPass, ...] = (
    *CANONICALIZATION_PASSES,
    *DEQUANTIZATION_PASSES,
    *ANALYSIS_PASSES,
    *REWRITE_PASSES,
    *FINALIZATION_PASSES,
    *FUSION_PASSES,
    *ENGINE_PASSES,
)
PASS_NAMES = tuple(entry.name for entry in PASSES)

EVERY_PASS = "all"
MAX_PRINTED_ELEMENTS = 64  # larger constants are printed as a name, a type and a shape
OMITTED = "omitted"  # where their contents are said to lie


class DumpAfter:
    """An observer that writes the graph as ONNX text after each run of one pass, or of every pass (``"all"``).

    Files are called ``<count>-<pass>.txt``, in the order of the runs. Raises UserError for a name that no pass has.
    """

    def __init__(self, name: str, folder: Path) -> None:
        check_pass_name(name)
        self.name, self.folder = name, folder
        self.files: list[Path] = []

    def __call__(self, name: str, model: ir.Model) -> None:
        if self.name not in (name, EVERY_PASS):
            return
        path = self.folder / f"{len(self.files) + 1:02d}-{name}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(graph_text(model), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: the graph cannot be written there ({error.strerror}); name another folder"
            ) from None
        self.files.append(path)


def check_pass_name(name: str) -> None:
    if name in (*PASS_NAMES, EVERY_PASS):
        return
    close = difflib.get_close_matches(name, PASS_NAMES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"there is no pass {name!r}{hint}: `snpc passes` lists them, {EVERY_PASS!r} stands for all")


def graph_text(model: ir.Model) -> str:
    """The model as ONNX text, which ``onnx.parser`` reads; without the contents of large constants."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size > MAX_PRINTED_ELEMENTS:
            shape = ir.Shape(static_shape(tensor))
            value.const_value = ir.ExternalTensor(OMITTED, 0, 0, tensor.dtype, shape=shape, name=str(value.name))
    return onnx.printer.to_text(ir.to_proto(copy)) + "\n"
