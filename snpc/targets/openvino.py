"""Build target OpenVINO: an IR (.xml and .bin)."""

from __future__ import annotations

from snpc.errors import UserError
from snpc.runtime.execution import OPENVINO_SUFFIX, PRECISION_RT_INFO, first_lines, import_openvino
from snpc.targets.base import BuildJob, BuildOutput, BuildRequest, BuildTarget


def build_openvino(job: BuildJob) -> BuildOutput:
    ov = import_openvino()
    try:
        model = ov.convert_model(str(job.source))
    except Exception as error:  # its front end raises types of its own per operator
        raise UserError(f"{job.model}: OpenVINO does not convert it: {first_lines(error)}") from None
    model.set_rt_info(job.precision, PRECISION_RT_INFO)
    ov.save_model(model, str(job.output), compress_to_fp16=job.precision == "fp16")
    notes = []
    if job.precision in ("fp32", "int8"):
        notes.append(
            "a CPU with bfloat16 units computes in bfloat16 unless INFERENCE_PRECISION_HINT is f32; "
            "snpc runs it with f32, also in `snpc bench`"
        )
    if job.precision == "fp16":
        notes.append("weights are held in fp16; on a CPU the arithmetic is fp32 or bfloat16, as OpenVINO chooses")
    if job.precision == "bf16":
        notes.append("weights stay fp32; set INFERENCE_PRECISION_HINT to bf16, as `snpc bench` does")
    return BuildOutput((job.output, job.output.with_suffix(".bin")), tuple(notes))


def check_openvino(request: BuildRequest) -> None:
    import_openvino()
    if request.output.suffix != OPENVINO_SUFFIX:
        raise UserError(f"{request.output}: OpenVINO's IR is named .xml; give such a name with -o")


OPENVINO_TARGET = BuildTarget(
    "openvino",
    "OpenVINO: an IR (.xml and .bin)",
    OPENVINO_SUFFIX,
    build_openvino,
    ("fp32", "fp16", "bf16", "int8"),
    graph_precisions=("int8",),
    extra_suffixes=(".bin",),
    check_request=check_openvino,
)
