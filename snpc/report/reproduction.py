"""How to make a file again: the command, the call, and what both were run with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from snpc.passes import Analysis
from snpc.pipeline import PlanRequest, PrunedModel
from snpc.planning import Budget
from snpc.version import __version__

DEFAULTS = {
    **{option.name: option.default for option in fields(Budget) if option.name != "head_sizes"},  # no option says them
    "effort": PlanRequest.effort,
}
NO_CRITERION = "none"  # of a plan that cuts no unit
DATA = "DATA"  # stands for data whose place is not known


@dataclass(frozen=True)
class Reproduction:
    """``command``, ``call``: for a shell, and for Python. ``facts``: (name, text) of versions, digests and data."""

    command: str
    call: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PruningRecord:
    """What a prune was asked for. ``data``: where it was, "" without, ``DATA`` where that is not known."""

    model: str
    output: str
    options: Mapping[str, Any]
    method: str
    criterion: str
    tokens: str
    data: str

    def command(self) -> str:
        """``snpc prune`` with these options."""
        words = ["snpc", "prune", self.model]
        for name, value in self.given().items():
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, text]
        words += ["--tokens", self.tokens] if self.tokens else []
        words += self.choice("--method", "--criterion")
        words += ["--calib", self.data] if self.data else []
        return shlex.join([*words, "-o", self.output])

    def call(self) -> str:
        """``snpc.prune`` with these options."""
        arguments = [repr(self.model), repr(self.output)]
        arguments += [f"{name}={python_text(value)}" for name, value in self.given().items()]
        arguments += [f"tokens={self.tokens!r}"] if self.tokens else []
        choice = self.choice("method", "criterion")
        arguments += [f"{name}={value!r}" for name, value in zip(choice[::2], choice[1::2], strict=True)]
        arguments += [f"calibration={self.data!r}"] if self.data else []
        lines = "".join(f"    {argument},\n" for argument in arguments)
        return f"import snpc\n\nsnpc.prune(\n{lines})"

    def given(self) -> dict[str, Any]:
        """The options that say something."""
        return {
            name: value
            for name, value in self.options.items()
            if name in DEFAULTS
            and value not in (None, False, (), [])  # no roles: tokens alone
            and (tuple(value) if isinstance(value, list) else value) != DEFAULTS[name]
        }

    def choice(self, method: str, criterion: str) -> list[str]:
        """Under these names, how units were chosen: a closed form says it all. Where no unit was, weights stay as they
        are without data, and with data by the method."""
        chosen = self.criterion != NO_CRITERION
        if self.method in ("none", "auto") or not (chosen or self.data):
            return []
        return [method, self.method, *([criterion, self.criterion] if chosen and self.method == "select" else [])]


def python_text(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list | tuple) else repr(value)


def reproduction_of_result(result: PrunedModel, command: str) -> Reproduction:
    """``command``: as it was typed; "": one of the same options."""
    plan, analysis = result.plan, result.plan.analysis
    record = PruningRecord(
        str(analysis.model.source),
        str(result.path),
        plan.options,
        plan.method,
        plan.criterion,
        analysis.reduction.spec if analysis.reduction is not None else "",
        result.data.source if result.data is not None else DATA if result.calibration else "",
    )
    facts = facts_of(__version__, analysis.model.source, analysis.model.digest, result.calibration)
    return Reproduction(command or record.command(), record.call(), facts)


def reproduction_of_file(path: Path, entries: Mapping[str, str], analysis: Analysis) -> Reproduction | None:
    """By what a file says of its latest step (``read_provenance``); None where that is no pruning that was asked for
    by options."""
    options = json.loads(entries.get("options", "{}"))
    if entries.get("step") != "prune" or not (options or "tokens" in entries):
        return None
    same = entries.get("source_sha256") == analysis.model.digest
    source = str(analysis.model.source) if same else entries.get("source", "MODEL")
    record = PruningRecord(
        source,
        str(path),
        options,
        entries.get("method", "none"),
        entries.get("criterion", ""),
        entries.get("tokens", ""),
        DATA if entries.get("calibration") else "",
    )
    facts = facts_of(
        entries.get("version", ""),
        Path(entries.get("source", "")),
        entries.get("source_sha256", ""),
        entries.get("calibration", ""),
    )
    return Reproduction(record.command(), record.call(), facts)


def facts_of(version: str, source: Path, digest: str, calibration: str) -> tuple[tuple[str, str], ...]:
    return (
        ("snpc", version),
        (f"sha256 of {source.name}", digest),
        ("calibration data", calibration or "none"),
    )
