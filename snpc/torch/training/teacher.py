"""The dense model as a teacher: run by onnxruntime on a CPU, as a torch module where the student is on a GPU.

Measured on a CPU, onnxruntime is the faster of the two, and it needs no memory for gradients. Where both models are on
a GPU, nothing has to be copied. Inputs are never augmented, so outputs that fit into memory are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution, open_session, run_session
from snpc.runtime.io import save
from snpc.temporary import temporary_folder
from snpc.torch.module import GraphModule
from snpc.torch.operators import Tensor, to_tensor
from snpc.torch.training.sampling import sample_ids
from snpc.types import Feeds, IntArray

MAX_CACHE_BYTES = 1 << 30  # outputs of more bytes than this are computed again in every epoch

TeacherOutputs = dict[str, Tensor]
TeacherFunction = Callable[[Feeds], TeacherOutputs]


def teacher_function(teacher: Analysis, names: Sequence[str], device: torch.device) -> TeacherFunction:
    """A function from feeds to the teacher's values of these names, on ``device``."""
    if device.type == "cpu":
        return onnxruntime_teacher(teacher, names)
    module = GraphModule(teacher.model, watch=names).to(device).eval()

    def run(feeds: Feeds) -> TeacherOutputs:
        with torch.no_grad():
            values = module({name: to_tensor(array).to(device) for name, array in feeds.items()})
        return {name: values[name] for name in names}

    return run


def onnxruntime_teacher(teacher: Analysis, names: Sequence[str]) -> TeacherFunction:
    """The same, of a session whose model has these values as outputs."""
    traced_graph = teacher.traced_graph
    dtypes = traced_graph.facts.types_by_name
    model = traced_graph.model.clone()
    output_names = {value.name for value in model.graph.outputs}
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for name in names:
        if name not in output_names:
            values[name].type = ir.TensorType(dtypes[name])
            model.graph.outputs.append(values[name])
    with temporary_folder() as folder:
        path = folder / "teacher.onnx"
        save(finalize(model), path)
        session = open_session(path, execution=Execution(threads=torch.get_num_threads()))
    input_names = {value.name for value in session.get_inputs()}

    def run(feeds: Feeds) -> TeacherOutputs:
        inputs = {k: v for k, v in feeds.items() if k in input_names}
        outputs = run_session(session, inputs, name=teacher.model.path.name)
        return {name: to_tensor(outputs[name]) for name in names}

    return run


@dataclass
class Teacher:
    """Runs the teacher, or looks its outputs up by sample once ``fill_cache`` has stored them."""

    run: TeacherFunction
    device: torch.device
    cache: dict[int, TeacherOutputs] = field(default_factory=dict)

    def __call__(self, ids: IntArray, feeds: Feeds) -> TeacherOutputs:
        rows = [self.cache[int(k)] for k in ids if int(k) in self.cache]
        if len(rows) < len(ids):
            return self.run(feeds)
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def fill_cache(self, data: Calibration, wrap: Callable[[Iterable[Feeds]], Iterable[Feeds]] = iter) -> None:
        """Run every sample once, in stored order, so that the outputs do not depend on the order of training. Nothing
        is stored where the outputs do not fit into memory, or have no row per sample."""
        for ids, feeds in zip(sample_ids(data), wrap(data.batches()), strict=True):
            outputs = {name: value.cpu() for name, value in self.run(feeds).items()}
            if not self.cache:
                size = sum(value.nbytes for value in outputs.values()) * data.samples // len(ids)
                if size > MAX_CACHE_BYTES:
                    return
            if data.unbatched or any(value.ndim < 1 or len(value) != len(ids) for value in outputs.values()):
                self.cache.clear()
                return
            for row, sample in enumerate(ids):
                self.cache[int(sample)] = {name: value[row].clone() for name, value in outputs.items()}


def mean_squares(outputs: TeacherOutputs) -> dict[str, float]:
    """Mean square of each value's finite entries, at least 1e-12: errors are divided by it."""
    squares = {name: value.float().square() for name, value in outputs.items()}
    return {name: max(float(s[torch.isfinite(s)].sum()) / max(s.numel(), 1), 1e-12) for name, s in squares.items()}
