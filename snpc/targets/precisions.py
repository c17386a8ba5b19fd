"""A model in other precisions, in the forms that transformers.js and optimum know by the ending of their names.

``model_quantized.onnx`` beside ``model.onnx``: made by onnxruntime's quantizers, run, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from snpc.errors import CheckFailed, UserError
from snpc.ops import lookup
from snpc.passes.companions import merge_branches
from snpc.planning import write_provenance
from snpc.runtime.evaluation import batch_differences, max_relative, run_batches
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, first_lines
from snpc.runtime.io import PROTOBUF_LIMIT, file_bytes, load, read_model, save
from snpc.targets.cast import half_precision, silence_logging
from snpc.targets.dequantize import comparison_feeds
from snpc.temporary import temporary_folder
from snpc.types import Feeds, Model

BLOCK_SIZE, NF4_BLOCK_SIZE = 32, 64  # of weights that share a scale, as transformers.js quantizes them
NF4_TYPE = 1


@dataclass(frozen=True)
class PrecisionForm:
    """``ending`` of the name; ``make``: (model, where it is written); ``tolerance``: largest relative difference of
    outputs that rounding explains."""

    ending: str
    make: Callable[[Path, Path], None]
    tolerance: float


@dataclass(frozen=True)
class WrittenPrecision:
    """A file of a model at one precision. ``difference``: the largest of its outputs, relative to them, from those of
    the model, on ``compared`` in words."""

    path: Path
    precision: str
    difference: float
    compared: str


def write_half(model: Path, path: Path) -> None:
    onnx.save(half_precision(onnx.load(str(model)), model), str(path))


def write_dynamic(weights: str, model: Path, path: Path) -> None:
    """Weights in 8 bits, activations quantized as they are computed."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"EnableSubgraph": True}
    quantize_dynamic(str(model), str(path), weight_type=QuantType[weights], extra_options=options)


def write_widely_supported(model: Path, path: Path) -> None:
    """Weights in 8 bits, with sign where there is no convolution: for those not every onnxruntime has such kernels."""
    convolves = any(lookup(node.domain, node.op_type).windowed for node in load(model).graph.graph)
    write_dynamic("QUInt8" if convolves else "QInt8", model, path)


def write_blocks(model: Path, path: Path) -> None:
    """Weights in 4 bits, in blocks that share a scale."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    save_quantized(MatMulNBitsQuantizer(onnx.load(str(model)), bits=4, block_size=BLOCK_SIZE, is_symmetric=True), path)


def write_nf4(model: Path, path: Path) -> None:
    """Weights in 4-bit floats."""
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    save_quantized(MatMulBnb4Quantizer(onnx.load(str(model)), quant_type=NF4_TYPE, block_size=NF4_BLOCK_SIZE), path)


def write_half_blocks(model: Path, path: Path) -> None:
    write_blocks(model, path)
    write_half(path, path)


def save_quantized(quantizer: Any, path: Path) -> None:
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)


PRECISION_FORMS: Mapping[str, PrecisionForm] = {
    "fp16": PrecisionForm("fp16", write_half, 0.02),
    "q8": PrecisionForm("quantized", write_widely_supported, 0.25),
    "int8": PrecisionForm("int8", partial(write_dynamic, "QInt8"), 0.25),
    "uint8": PrecisionForm("uint8", partial(write_dynamic, "QUInt8"), 0.25),
    "q4": PrecisionForm("q4", write_blocks, 0.75),
    "q4f16": PrecisionForm("q4f16", write_half_blocks, 0.75),
    "bnb4": PrecisionForm("bnb4", write_nf4, 0.75),
}
"""By the names that transformers.js has for them (``dtype``)."""
FULL_PRECISION = "fp32"  # the model itself


def check_precisions(precisions: Sequence[str]) -> None:
    """Raises UserError for a name that is none."""
    for name in precisions:
        if name != FULL_PRECISION and name not in PRECISION_FORMS:
            raise UserError(f"--precisions {name}: choose from {', '.join((FULL_PRECISION, *PRECISION_FORMS))}")


def write_precisions(
    model: Path, precisions: Sequence[str], execution: Execution = DEFAULT_EXECUTION
) -> tuple[WrittenPrecision, ...]:
    """Write ``model`` at each of ``precisions`` beside it, run it and compare its outputs on random inputs.

    Raises UserError where one cannot be made, CheckFailed where its outputs are not those of the model to rounding.
    """
    names = [name for name in dict.fromkeys(precisions) if name != FULL_PRECISION]
    if not names:
        return ()
    if file_bytes(model) > PROTOBUF_LIMIT:
        raise UserError(f"{model}: over 2 GB: its other precisions are not supported; leave out --precisions")
    loaded = load(model, execution.observer)
    feeds, words = comparison_feeds(loaded, None)
    reference = run_batches(loaded.path, feeds, execution)
    written = []
    with execution.progress.stage("precisions", len(names)) as advance:
        for name in names:
            difference = write_precision(model, loaded, name, feeds, reference, execution)
            written.append(WrittenPrecision(precision_path(model, name), name, difference, words))
            advance(1)
    return tuple(written)


def precision_path(model: Path, precision: str) -> Path:
    return model.with_stem(f"{model.stem}_{PRECISION_FORMS[precision].ending}")


def write_precision(
    model: Path,
    loaded: Model,
    precision: str,
    feeds: Sequence[Feeds],
    reference: Sequence[Feeds],
    execution: Execution,
) -> float:
    """Write one file of ``model``. The largest difference of its outputs from ``reference``."""
    form, path = PRECISION_FORMS[precision], precision_path(model, precision)
    try:
        with silence_logging():
            make_form(form, model, loaded, path)
        sign(path, loaded, precision)
        written = load(path)  # of a merged decoder the branches, which are deleted with it
        difference = max_relative(batch_differences(reference, run_batches(written.path, feeds, execution)))
    except UserError as error:
        raise UserError(f"--precisions {precision}: {error}; leave it out") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"--precisions {precision}: this onnxruntime has no {error.name}: upgrade it, or leave {precision} out"
        ) from None
    except Exception as error:  # the quantizers have no exceptions of their own
        raise UserError(f"--precisions {precision}: {model.name} cannot be made so: {first_lines(error)}") from None
    if not difference <= form.tolerance:
        raise CheckFailed(
            f"{path}: its outputs differ by {difference:.2g} from those of {model.name}, more than "
            f"{form.tolerance:g}, which rounding explains: leave {precision} out of --precisions"
        )
    return difference


def make_form(form: PrecisionForm, model: Path, loaded: Model, path: Path) -> None:
    """Write ``model`` in the form; of a merged decoder both branches, as the quantizers leave out what lies in one."""
    if loaded.merged is None:
        form.make(model, path)
        return
    with temporary_folder() as folder:
        made = []
        for branch in (loaded, *loaded.companions):
            made.append(folder / branch.path.name)
            form.make(branch.path, made[-1])
        save(merge_branches(read_model(model), *map(read_model, made)), path)


def sign(path: Path, model: Model, precision: str) -> None:
    """Say in the file at ``path`` that it was made of ``model``."""
    graph = read_model(path)
    write_provenance(graph, model, {"step": "convert", "precision": precision})
    save(graph, path)
