"""What criteria ask of gates, measured by the torch bridge where torch is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from snpc.criteria import Criterion
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.runtime.calibration import Calibration
from snpc.types import Feeds, FloatArray, Group

GATE_PREFIX = "gate:"  # names of what is measured here
GRADIENT_PROVIDER = "snpc.torch.pruning.gradients"  # loaded by name: this layer stands below it, and does without it


def needs_gate_gradients(criterion: Criterion, group: Group) -> bool:
    return any(name.startswith(GATE_PREFIX) for name in criterion.probes(group.role))


def observe_gate_gradients(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    criterion: Criterion,
    observe: Callable[[str, Mapping[str, FloatArray]], None],
    progress: Callable[[Iterable[Feeds]], Iterable[Feeds]] | None = None,
) -> None:
    """See ``snpc.torch.pruning.gradients.compute_gate_gradients``. Raises UserError where torch is not installed."""
    try:
        provider = importlib.import_module(GRADIENT_PROVIDER)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in ("torch", "safetensors"):
            raise
        raise UserError(
            f"criterion {criterion.name} needs gradients, and for them {missing}, which is not installed: "
            "pip install 'snpc[torch]', or choose --criterion mixed"
        ) from None
    provider.measure_gates(analysis, calibration, groups, criterion, observe, progress)
