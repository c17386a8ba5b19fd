"""How to make a file again: the command, the call, and what both were run with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from snpc.passes import Analysis
from snpc.pipeline import PlanRequest, PrunedModel
from snpc.planning import Budget, ProvenanceStep, options_of
from snpc.version import __version__

DEFAULTS = {
    **{option.name: option.default for option in fields(Budget) if option.name != "head_sizes"},  # no option says them
    "effort": PlanRequest.effort,
}
NO_CRITERION = "none"  # of a plan that cuts no unit
DATA = "DATA"  # stands for data whose place is not known


@dataclass(frozen=True)
class Reproduction:
    """``command``: for a shell, a line for each step. ``call``: the same in Python, "" of several steps. ``facts``:
    (name, text) of versions, digests and data."""

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


def reproduction_of_file(path: Path, steps: Sequence[ProvenanceStep], analysis: Analysis) -> Reproduction | None:
    """By the steps that a file says it was made by: a command for each, and the call where there is one step. None
    where one of them is no pruning that was asked for by options, no finetuning and no build."""
    outputs = [*(step.get("source", "MODEL") for step in steps[1:]), str(path)]
    commands = [command_of_step(step, output, analysis) for step, output in zip(steps, outputs, strict=False)]
    if not commands or "" in commands:
        return None
    first = steps[0]
    facts = facts_of(
        steps[-1].get("version", ""),
        Path(first.get("source", "")),
        first.get("source_sha256", ""),
        first.get("calibration", ""),
    )
    record = pruning_record(first, outputs[0], analysis)
    call = record.call() if len(steps) == 1 and record is not None else ""
    return Reproduction("\n".join(commands), call, facts)


def command_of_step(step: ProvenanceStep, output: str, analysis: Analysis) -> str:
    """What makes ``output`` again; "" where a step does not say all that it takes."""
    if step["step"] == "prune":
        record = pruning_record(step, output, analysis)
        return record.command() if record is not None else ""
    words = COMMANDS_OF_STEPS[step["step"]](step, analysis) if step["step"] in COMMANDS_OF_STEPS else []
    return shlex.join([*words, "-o", output]) if words else ""


def pruning_record(step: ProvenanceStep, output: str, analysis: Analysis) -> PruningRecord | None:
    """What a step was asked for; None where that is no pruning, or a plan that was made by hand."""
    options = options_of(step)
    if step["step"] != "prune" or not (options or "tokens" in step):
        return None
    return PruningRecord(
        named_source(step, analysis),
        output,
        options,
        step.get("method", "none"),
        step.get("criterion", ""),
        step.get("tokens", ""),
        DATA if step.get("calibration") else "",
    )


def named_source(step: ProvenanceStep, analysis: Analysis) -> str:
    """The file that a step began with: the original by its path."""
    same = step.get("source_sha256") == analysis.model.digest
    return str(analysis.model.source) if same else step.get("source", "MODEL")


def finetuning_words(step: ProvenanceStep, analysis: Analysis) -> list[str]:
    """``snpc finetune`` with the options that have not their default value."""
    same = step.get("teacher_sha256") == analysis.model.digest
    teacher = str(analysis.model.source) if same else step.get("teacher", "TEACHER")
    words = ["snpc", "finetune", step.get("source", "MODEL"), "--teacher", teacher, "--data", DATA]
    for name, value in options_of(step).items():
        flag = OPTION_NAMES.get(name, f"--{name.replace('_', '-')}")
        if value is True:
            words.append(flag)
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (flag, str(one))]
    return [*words, "--labels", "LABELS"] if "ce" in step.get("loss", "") else words


def building_words(step: ProvenanceStep, analysis: Analysis) -> list[str]:
    """``snpc build`` with the precision."""
    words = ["snpc", "build", named_source(step, analysis), "--target", step.get("runtime", "ort")]
    words += ["--precision", step.get("precision", "fp32")]
    return [*words, "--calib", DATA] if step.get("calibration") else words


COMMANDS_OF_STEPS: Mapping[str, Callable[[ProvenanceStep, Analysis], list[str]]] = {
    "finetune": finetuning_words,
    "build": building_words,
}
OPTION_NAMES = {"outputs": "--output-name"}  # of ``TrainingOptions`` on the command line, where it is another word


def facts_of(version: str, source: Path, digest: str, calibration: str) -> tuple[tuple[str, str], ...]:
    return (
        ("snpc", version),
        (f"sha256 of {source.name}", digest),
        ("calibration data", calibration or "none"),
    )
