"""Attention that TensorRT computes in one kernel: what it asks of the graph, and what an engine says of it.

Its fusion wants queries or keys scaled before their product, heads of queries, keys and values equally wide, and half
precision. The rewritten graph has the outputs of the model, which is checked before anything is built of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from snpc.errors import UserError
from snpc.graph import run_pass
from snpc.passes import FOLD_ATTENTION_SCALE, PAD_ATTENTION_HEADS
from snpc.passes.canonicalization import finalize
from snpc.passes.fusion import attention_names
from snpc.runtime.evaluation import batch_differences, max_relative, run_batches
from snpc.runtime.io import save
from snpc.targets.base import FP32_TOLERANCE, AttentionKernel, BuildJob, PreparedModel
from snpc.types import Model, Precision

HALF_PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")  # TensorRT's kernels for attention take these
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: .*Metadata: (?P<metadata>.*)$", re.MULTILINE)
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
KERNEL = "mha"  # in the names of layers that hold a whole attention: _gemm_mha_v2
NAMED = 3  # attentions that a note names


def prepare_attention(model: Model, job: BuildJob, folder: Path) -> PreparedModel:
    """``model`` as TensorRT makes its attention one kernel, where that is possible with the same outputs."""
    plain = PreparedModel(model)
    try:
        plain = replace(plain, attentions=attention_names(model.graph))
        folded = run_pass(FOLD_ATTENTION_SCALE, model.graph, job.execution.observer)
        padded = folded
        if job.precision in HALF_PRECISIONS:
            padded = run_pass(PAD_ATTENTION_HEADS, folded.model, job.execution.observer)
        if not (folded.modified or padded.modified):
            return plain
        path = folder / "prepared.onnx"
        save(finalize(padded.model.clone()), path)
        difference = max_relative(batch_differences(run_batches(model.path, job.feeds), run_batches(path, job.feeds)))
    except UserError as error:
        return replace(plain, notes=(f"attention is left as it is: {error}",))
    if not difference <= FP32_TOLERANCE:
        return replace(plain, notes=(f"attention is left as it is: outputs would differ by {difference:.1e}",))
    notes, widened = [], padded is not folded and padded.modified
    if folded.modified:
        notes.append("attention: its scale is folded into what makes the queries")
    if widened:
        notes.append("attention: heads of queries, keys and values are made equally wide by zeros")
    notes.append(
        f"attention: outputs of the rewritten graph differ by {difference:.1e} from the model's in onnxruntime"
    )
    rewritten = replace(model, graph=padded.model)
    return replace(plain, model=rewritten, notes=tuple(notes), rewritten=True, padded=widened)


def whole_attentions(layers: str, attentions: Sequence[str]) -> frozenset[str] | None:
    """Which ``attentions`` (names of their nodes) are one kernel, by the text of an engine's layers: lines
    ``Name: _gemm_mha_v2, LayerType: kgen, ... Metadata: [ONNX Layer: Softmax_7]``. None where it has no such lines."""
    found = [(m["name"], ONNX_NODE.findall(m["metadata"])) for m in LAYER.finditer(layers)]
    inside = {node for name, nodes in found if KERNEL in name for node in nodes}
    return frozenset(inside & set(attentions)) if found else None


def attention_kernels(
    attentions: Sequence[str], after: frozenset[str] | None, before: frozenset[str] | None
) -> tuple[AttentionKernel, ...]:
    """One entry per attention; none where the engine does not tell."""
    if after is None:
        return ()
    return tuple(
        AttentionKernel(name, name in after, None if before is None else name in before) for name in attentions
    )


def kernel_notes(kernels: Sequence[AttentionKernel], precision: Precision) -> tuple[str, ...]:
    """How many attentions are one kernel, how many were before, and which are not."""
    if not kernels:
        return ()
    whole = sum(kernel.one_kernel for kernel in kernels)
    known = [kernel.one_kernel_before for kernel in kernels if kernel.one_kernel_before is not None]
    before = f", {sum(known)} of {len(known)} before it was rewritten" if known else ""
    notes = [f"attention: one kernel in {whole} of {len(kernels)} places{before}"]
    rest = [kernel.name for kernel in kernels if not kernel.one_kernel]
    if rest and precision not in HALF_PRECISIONS:
        notes.append(f"attention: TensorRT has such kernels for {' and '.join(HALF_PRECISIONS)}: give --precision fp16")
    elif rest:
        more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
        notes.append(f"attention: not one kernel: {', '.join(rest[:NAMED])}{more}")
    return tuple(notes)
