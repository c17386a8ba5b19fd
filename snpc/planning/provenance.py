"""Provenance: what a written file says of how it was made, as entries of its ``metadata_props``.

Viewers show these entries, and ``InferenceSession.get_modelmeta().custom_metadata_map`` returns them. There is no time
among them: the same plan writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
PREVIOUS = "previous"  # the entry with the provenance of the source, where that has one


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


def write_provenance(graph: ir.Model, source: Model, entries: Mapping[str, str]) -> None:
    """Write ``entries`` into ``graph``, with the version of snpc, and the file and digest of ``source``; in place.

    What the source says of how it was made itself is kept as JSON in the entry ``snpc.previous``. The producer of the
    file becomes snpc, and that of the source stays in ``snpc.producer``.
    """
    before = read_provenance(source.graph)
    exporter = " ".join(filter(None, (source.graph.producer_name, source.graph.producer_version)))
    complete = {
        "version": __version__,
        "source": source.source.name,
        "source_sha256": source.digest,
        "producer": before.get("producer", exporter),
        **entries,
        **({PREVIOUS: compact_json(before)} if before else {}),
    }
    stored = {**source.graph.metadata_props, **graph.metadata_props}
    others = {key: value for key, value in stored.items() if not key.startswith(KEY_PREFIX) or key == VOCABULARY_ENTRY}
    graph.metadata_props.clear()
    graph.metadata_props.update({**others, **{KEY_PREFIX + key: value for key, value in complete.items() if value}})
    graph.producer_name, graph.producer_version = "snpc", __version__


def read_provenance(graph: ir.Model) -> dict[str, str]:
    """What a file says of how snpc made it, without the prefix of its keys; empty where snpc did not."""
    return provenance_in(graph.metadata_props)


def provenance_in(entries: Mapping[str, str]) -> dict[str, str]:
    """The same of the metadata of a file."""
    return {
        key[len(KEY_PREFIX) :]: value
        for key, value in entries.items()
        if key.startswith(KEY_PREFIX) and key != VOCABULARY_ENTRY
    }


def compact_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
