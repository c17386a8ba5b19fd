"""Gradients of unit gates, for criteria that ask for them. Whoever can differentiate a graph registers how.

snpc itself runs graphs without gradients; ``snpc.torch`` registers its implementation when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from snpc.criteria import Criterion
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.types import ROLES, FloatArray, Group, Role

GATE_PREFIX = "gate:"  # names of the probes that a gradient provider measures

GateObserver = Callable[[str, Mapping[str, FloatArray]], None]
"""Takes a group's id and what was measured for it: arrays whose first axis is one sample."""


class GradientProvider(Protocol):
    """Calls ``observe`` for every sample and group with the "gate:" probes that the criterion names for the role.

    Shapes and meanings: the module docstring of ``snpc.criteria``."""

    def __call__(
        self,
        analysis: Analysis,
        calibration: Calibration,
        groups: Sequence[Group],
        criterion: Criterion,
        observe: GateObserver,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> None: ...


_registered: list[GradientProvider] = []  # at most one: the latest


def register_gradient_provider(provider: GradientProvider) -> None:
    """Measure gates with ``provider`` from now on."""
    _registered[:] = [provider]


def needs_gate_gradients(criterion: Criterion, group: Group) -> bool:
    return _asks_gates(criterion, group.role)


def needs_gradient_provider(criterion: Criterion) -> bool:
    """Does the criterion ask for gradients of groups of any role?"""
    return any(_asks_gates(criterion, role) for role in ROLES)


def _asks_gates(criterion: Criterion, role: Role) -> bool:
    return any(name.startswith(GATE_PREFIX) for name in criterion.probes(role))


def observe_gate_gradients(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    criterion: Criterion,
    observe: GateObserver,
    execution: Execution = DEFAULT_EXECUTION,
) -> None:
    """Measure with the registered provider. Raises UserError where none is registered."""
    if not _registered:
        raise UserError(
            f"criterion {criterion.name} needs gradients: import snpc.torch first (pip install 'snpc[torch]'), or "
            "choose the criterion mixed"
        )
    _registered[0](analysis, calibration, groups, criterion, observe, execution)
