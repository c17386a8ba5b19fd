"""Provenance: what a written file says of how it was made, as entries of its ``metadata_props``.

Viewers show these entries, and ``InferenceSession.get_modelmeta().custom_metadata_map`` returns them. There is no time
among them: the same plan writes the same bytes. Every command that writes a model is a step; the entries are those of
the latest one, and ``snpc.previous`` has the steps before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from snpc.planning.plan import SlicePlan
from snpc.planning.plan_file import plan_to_json
from snpc.types import Model
from snpc.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

KEY_PREFIX = "snpc."
VOCABULARY_ENTRY = KEY_PREFIX + "vocabulary"  # the ids that a restricted model takes, which later steps keep
PREVIOUS = "previous"  # the entry with the steps that made the source, where snpc made that too
WIDTH_KEEPING_STEPS = ("finetune", "build", "convert")  # what they are made of keeps its widths and tokens

ProvenanceStep = Mapping[str, str]


def pruning_provenance(plan: SlicePlan, calibration: str) -> dict[str, str]:
    """How a model was pruned. ``calibration``: the data, in words; "" without.

    ``target`` says how much was asked for, ``options`` is JSON of all options that were set, ``widths`` of group id ->
    [units per block before, after], of the groups that were cut. ``plan_sha256`` is that of the plan without the record
    of its data, which a plan has once it was read from a file.
    """
    groups = {group.id: group for group in plan.analysis.groups}
    widths = {name: [groups[name].size, len(rows[0])] for name, rows in plan.keep.items()}
    analysis = plan.analysis
    return {
        "step": "prune",
        # without the record of the data, for which all samples would be read: a plan from a file has the same digest
        "plan_sha256": hashlib.sha256(plan_to_json(replace(plan, data=None)).encode()).hexdigest(),
        "target": target_text(plan.options),
        "options": compact_json(plan.options),
        "method": plan.method,
        "criterion": plan.criterion,
        "widths": compact_json(widths),
        **({"layers": compact_json(list(analysis.removal.names))} if analysis.removal is not None else {}),
        **({"tokens": analysis.reduction.spec} if analysis.reduction is not None else {}),
        **({"calibration": calibration} if calibration else {}),
    }


def target_text(options: Mapping[str, Any]) -> str:
    """How much was asked for, as on the command line: ``macs=0.5``, ``ratio=0.5`` or ``max_drift=0.1``; "" where the
    plan was made by hand."""
    given = {key: options[key] for key in ("ratio", "max_drift", "max_ppl", "max_drop") if options.get(key) is not None}
    texts = [str(options["target"])] if options.get("target") is not None else []
    return ", ".join([*texts, *(f"{key}={value}" for key, value in given.items())])


def complete_step(source: Model, entries: Mapping[str, str]) -> ProvenanceStep:
    """``entries`` of a step with the version of snpc, and the file, digest and exporter of ``source``."""
    earlier = read_provenance(source.graph)
    exporter = " ".join(filter(None, (source.graph.producer_name, source.graph.producer_version)))
    complete = {
        "version": __version__,
        "source": source.source.name,
        "source_sha256": source.digest,
        "producer": earlier[-1].get("producer", "") if earlier else exporter,
        **entries,
    }
    return {key: value for key, value in complete.items() if value}


def write_provenance(graph: ir.Model, source: Model, entries: Mapping[str, str]) -> None:
    """Write into ``graph``, in place, that it was made of ``source`` by a step with these ``entries``.

    The steps that made the source are kept as JSON in the entry ``snpc.previous``, in their order. The producer of the
    file becomes snpc, and that of the first source stays in ``snpc.producer``.
    """
    earlier, stored = read_provenance(source.graph), {**source.graph.metadata_props, **graph.metadata_props}
    latest = {**complete_step(source, entries), **({PREVIOUS: compact_json(earlier)} if earlier else {})}
    others = {key: value for key, value in stored.items() if not key.startswith(KEY_PREFIX) or key == VOCABULARY_ENTRY}
    graph.metadata_props.clear()
    graph.metadata_props.update({**others, **{KEY_PREFIX + key: value for key, value in latest.items()}})
    graph.producer_name, graph.producer_version = "snpc", __version__


def read_provenance(graph: ir.Model) -> tuple[ProvenanceStep, ...]:
    """The steps by which snpc made a file, in their order, without the prefix of their keys; none where it did not."""
    return provenance_in(graph.metadata_props)


def provenance_in(entries: Mapping[str, str]) -> tuple[ProvenanceStep, ...]:
    """The same of the metadata of a file."""
    latest = {
        key[len(KEY_PREFIX) :]: value
        for key, value in entries.items()
        if key.startswith(KEY_PREFIX) and key != VOCABULARY_ENTRY
    }
    earlier = earlier_steps(latest)
    latest.pop(PREVIOUS, None)
    return (*earlier, latest) if "step" in latest else ()


def earlier_steps(latest: ProvenanceStep) -> tuple[ProvenanceStep, ...]:
    """The steps before the latest one."""
    steps = json_value(latest, PREVIOUS)
    whole = isinstance(steps, list) and all(isinstance(step, dict) and "step" in step for step in steps)
    return tuple({key: str(value) for key, value in step.items()} for step in steps) if whole else ()


def options_of(step: ProvenanceStep) -> dict[str, Any]:
    """The options of a step; empty where it has none."""
    return json_object(step, "options")


def widths_of(step: ProvenanceStep) -> dict[str, tuple[int, int]]:
    """Group id -> units per block before and after a step, of the groups that it cut."""
    pairs = json_object(step, "widths")
    whole = all(isinstance(pair, list) and [type(number) for number in pair] == [int, int] for pair in pairs.values())
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()} if whole else {}


def layers_of(step: ProvenanceStep) -> tuple[str, ...]:
    """Names of the layers that a step removed whole."""
    names = json_value(step, "layers")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def json_object(step: ProvenanceStep, name: str) -> dict[str, Any]:
    value = json_value(step, name)
    return value if isinstance(value, dict) else {}


def json_value(step: ProvenanceStep, name: str) -> Any:
    """An entry that holds JSON; None where it is missing, or another program changed it into something else."""
    try:
        return json.loads(step.get(name, "null"))
    except (ValueError, RecursionError):
        return None


def pruning_of(steps: Sequence[ProvenanceStep], digest: str) -> ProvenanceStep | None:
    """The step that cut the file with this digest, where no later one cut anything; None else."""
    found = [index for index, step in enumerate(steps) if step["step"] == "prune"]
    if len(found) != 1 or steps[found[0]].get("source_sha256") != digest:
        return None
    later = steps[found[0] + 1 :]
    return steps[found[0]] if all(step["step"] in WIDTH_KEEPING_STEPS for step in later) else None


def compact_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
