"""What the dense model says: through onnxruntime on a CPU, as a torch module where the student is on a GPU.

Measured on a CPU, onnxruntime is the faster of the two, and it needs no memory for gradients; where both models are on
a GPU, nothing has to be copied. Inputs are never changed, so where its answers fit into memory they are computed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.runtime.calibration.dataset import Calibration
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.session import open_session, run_session
from snpc.runtime.io.save import save
from snpc.torch.module import GraphModule
from snpc.torch.operators.registry import Tensor, to_tensor
from snpc.torch.training.sampling import sample_ids
from snpc.types import Feeds, IntArray

MAX_CACHE_BYTES = 1 << 30  # bytes of answers that are kept

TeacherOutputs = dict[str, Tensor]
TeacherFunction = Callable[[Feeds], TeacherOutputs]


def teacher_function(teacher: Analysis, names: Sequence[str], device: torch.device) -> TeacherFunction:
    """A function that gives the teacher's values of these names, on ``device``."""
    if device.type == "cpu":
        return onnxruntime_teacher(teacher, names)
    module = GraphModule(teacher.model, watch=names).to(device).eval()

    def ask(feeds: Feeds) -> TeacherOutputs:
        with torch.no_grad():
            found = module({name: to_tensor(array).to(device) for name, array in feeds.items()})
        return {name: found[name] for name in names}

    return ask


def onnxruntime_teacher(teacher: Analysis, names: Sequence[str]) -> TeacherFunction:
    traced = teacher.traced_graph
    types = {str(v.name): dtype for v, dtype in traced.facts.dtype.items() if dtype is not None}
    model = traced.model.clone()
    given = {value.name for value in model.graph.outputs}
    made = {str(v.name): v for node in model.graph for v in node.outputs}
    for name in names:
        if name not in given:
            made[name].type = ir.TensorType(types[name])
            model.graph.outputs.append(made[name])
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "teacher.onnx"
        save(finalize(model), path)
        session = open_session(path, execution=Execution(threads=torch.get_num_threads()))
    taken = {value.name for value in session.get_inputs()}

    def ask(feeds: Feeds) -> TeacherOutputs:
        found = run_session(session, {k: v for k, v in feeds.items() if k in taken}, name=teacher.model.path.name)
        return {name: to_tensor(found[name]) for name in names}

    return ask


@dataclass
class Teacher:
    """Asks, and remembers by sample where it has been told to (``learn_all``)."""

    run: TeacherFunction
    device: torch.device
    cache: dict[int, TeacherOutputs] = field(default_factory=dict)

    def __call__(self, ids: IntArray, feeds: Feeds) -> TeacherOutputs:
        rows = [self.cache.get(int(k)) for k in ids]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return self.run(feeds)
        return {name: torch.stack([row[name] for row in found]).to(self.device) for name in found[0]}

    def fill_cache(self, data: Calibration, wrap: Callable[[Iterable[Feeds]], Iterable[Feeds]] = iter) -> None:
        """Ask for every sample once, in the order in which they are stored, so that the answers do not depend on the
        order of training; nothing is kept where it does not fit or has no row per sample."""
        room = MAX_CACHE_BYTES
        for ids, feeds in zip(sample_ids(data), wrap(data.batches()), strict=True):
            answers = {name: value.cpu() for name, value in self.run(feeds).items()}
            if not self.cache:
                size = sum(value.nbytes for value in answers.values()) * data.samples // len(ids)
                if size > room:
                    return
            if data.unbatched or any(value.ndim < 1 or len(value) != len(ids) for value in answers.values()):
                self.cache.clear()
                return
            for row, number in enumerate(ids):
                self.cache[int(number)] = {name: value[row].clone() for name, value in answers.items()}


def mean_squares(answers: TeacherOutputs) -> dict[str, float]:
    """Of each value, for relative errors: at least a number that can be divided by."""
    return {name: max(float(value.float().square().mean()), 1e-12) for name, value in answers.items()}


def relative_drift(found: Sequence[TeacherOutputs], expected: Sequence[TeacherOutputs]) -> float:
    """Root mean square of the difference of outputs over all batches, relative; the mean over outputs."""
    rates = []
    for name in expected[0]:
        gap = sum(
            float((a[name].float() - b[name].float()).square().sum()) for a, b in zip(found, expected, strict=True)
        )
        size = sum(float(b[name].float().square().sum()) for b in expected)
        rates.append((gap / size) ** 0.5 if size else gap**0.5)
    return float(np.mean(rates))
