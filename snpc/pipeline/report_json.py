"""Results as JSON: analysis, plan, pruned model, verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from snpc.passes import Analysis
from snpc.passes.canonicalization import original_name
from snpc.passes.rotation import entry_weight
from snpc.passes.slicing import Cuts
from snpc.passes.sublayers import Substitute
from snpc.pipeline.candidate import PrunedModel
from snpc.planning import SlicePlan, cuts_of, read_provenance
from snpc.runtime.io import atomic_write
from snpc.types import ClosedFormKind, FloatArray, Model, Quality, StreamBasis, Verdict


def json_report(result: PrunedModel) -> dict[str, Any]:
    """What ``--json`` writes. ``keep`` are indices into the original initializer."""
    plan = result.plan
    both = {
        key: {"before": getattr(result.before, key), "after": getattr(result.after, key)}
        for key in ("params", "macs", "bytes", "nodes")
    }
    return {
        "snpc_report": 1,
        "model": str(plan.analysis.model.source),
        "output": str(result.path),
        "digest": plan.analysis.model.digest,
        "method": plan.method,
        "criterion": plan.criterion,
        "dequantized": dequantization_json(plan.analysis.model),
        "restricted": restriction_json(plan.analysis.model),
        "metric": {output or "all": metric.name for output, metric in plan.analysis.metrics.items()} or None,
        "options": dict(plan.options),
        "provenance": [dict(step) for step in result.provenance],
        "calibration": calibration_json(result),
        "sampled_rows": [asdict(rows) for rows in result.sampled_rows],
        "search": asdict(result.search) if result.search else None,
        "missed_target": result.missed_target or None,
        **both,
        "cache_bytes_per_token": dict(zip(("before", "after"), result.cache_bytes, strict=True)),
        "head_size": dict(zip(("before", "after"), result.head_size, strict=True)) if result.head_size else None,
        "macs_at": dict(plan.analysis.dim_sizes),
        "tokens": plan.analysis.reduction.to_json() if plan.analysis.reduction is not None else None,
        "layers": layers_json(plan.analysis),
        "residual_streams": streams_json(plan),
        "groups": groups_json(plan, result.closed_forms),
        "pins": pins_json(plan.analysis),
        "task": {**asdict(result.task), "drop": result.task.drop} if result.task is not None else None,
        "verify": verdict_json(result.verification),
        "seconds": {k: round(v, 4) for k, v in result.seconds.items()},
    }


def layers_json(analysis: Analysis) -> list[dict[str, Any]]:
    """The layers that are gone whole, and what stands for each."""
    removal = analysis.removal
    if removal is None:
        return []
    return [
        {
            "name": sublayer.name,
            "kind": sublayer.kind,
            "macs": sublayer.macs,
            "params": sublayer.params,
            **substitute_json(removal.substitutes.get(sublayer.name)),
        }
        for sublayer in removal.sublayers
    ]


def substitute_json(substitute: Substitute | None) -> dict[str, Any]:
    """What stands for a layer; of a map also its rank, and what it reads."""
    if substitute is None or substitute.map is None:
        return {"replaced_by": "nothing" if substitute is None else "mean"}
    reads = ["tokens"] if substitute.map.pooled is None else ["tokens", "mean of tokens", "first token"]
    return {"replaced_by": "map", "rank": len(substitute.map.expand), "reads": reads}


def streams_json(plan: SlicePlan) -> list[dict[str, Any]]:
    """The residual streams that are cut with refitted weights, and what each basis loses: the share of what is read
    behind the normalizations, by the best channels and by principal directions. None where it cannot be rotated.
    ``begins_behind``: the value behind which a weight was put in, where the stream begins; None where none was."""
    entries = []
    for stream in plan.analysis.stream_bases:
        kept = plan.kept_width(plan.analysis.group(stream.group))
        entries.append(
            {
                "group": stream.group,
                "size": stream.size,
                "kept": kept,
                "basis": "rotated" if stream.rotated else "channels",
                "not_rotated": stream.reason or None,
                "begins_behind": next((v for v in plan.analysis.entries if begins_behind(plan, stream, v)), None),
                "loss_of_channels": stream.channels[kept] if stream.channels else None,
                "loss_of_rotation": stream.rotation[kept] if stream.rotation else None,
            }
        )
    return entries


def begins_behind(plan: SlicePlan, stream: StreamBasis, value: str) -> bool:
    sites = plan.analysis.group(stream.group).sites
    return any(site.tensor == entry_weight(value) and site.axis == 1 for site in sites)


def describe_stream(stream: StreamBasis, kept: int) -> str:
    """The basis of a residual stream that is cut to ``kept``, and what the other one would lose."""
    if stream.reason:
        return f"{stream.group}: cut by channels, as it cannot be rotated: {stream.reason}"
    losses = {"by channels": stream.channels[kept], "rotated": stream.rotation[kept]}
    used, other = ("rotated", "by channels") if stream.rotated else ("by channels", "rotated")
    return (
        f"{stream.group}: cut {used}: {losses[used]:.2%} of what is read behind its normalizations is lost, "
        f"{losses[other]:.2%} {other}"
    )


def dequantization_json(model: Model) -> dict[str, Any] | None:
    """How the float model was made of a quantized file; None where it was float."""
    record = model.dequantization
    if record is None:
        return None
    return {
        "source": str(record.source),
        "replaced": dict(record.replaced),
        "left": dict(record.left),
        "compared": record.compared,
        "drift": [asdict(difference) for difference in record.differences],
    }


def restriction_json(model: Model) -> dict[str, Any] | None:
    """What a model says of that which its source does; None where that is all."""
    record = model.restriction
    if record is None:
        return None
    return {
        "source": str(record.source),
        "vocabulary": None if record.vocabulary is None else {"kept": len(record.vocabulary), "of": record.entries},
        "last_logits": record.last_logits,
        "compared": record.compared,
        "drift": [asdict(difference) for difference in record.differences],
    }


def calibration_json(result: PrunedModel) -> dict[str, Any] | None:
    """The data that a model was fitted to: its record, or only its words where it was measured before."""
    if result.data is not None:
        return result.data.record()
    return {"text": result.calibration} if result.calibration else None


FORM_NAMES: Mapping[ClosedFormKind, str] = {
    "low_rank_qk": "scores",
    "low_rank_vo": "values",
    "refit": "refit",
    "score_selection": "coupled",
    "score_refit": "coupled_refit",
}
"""Closed forms under the names that reports have for them."""


def describe_approximation(role: str, form: str | None) -> str:
    """What is approximate about a cut group that is normalized inside, by its closed form (None: there is none)."""
    if role == "qk":
        return f"norm on query and key heads {'refitted' if form == 'score_refit' else 'not refitted'}"
    return f"normalized inside, {'refitted' if form == 'refit' else 'not refitted'}"


def groups_json(plan: SlicePlan, kinds: Mapping[str, ClosedFormKind] | None = None) -> list[dict[str, Any]]:
    """Groups with their sites. A rotated group has no ``keep``: its units are new ones, ``kept`` per block."""
    kinds = kinds or {}
    graph = plan.analysis.traced_graph.model.graph
    cuts = cuts_in_file(cuts_of(plan), graph)
    turned = {stream.group for stream in plan.analysis.stream_bases if stream.rotated}
    stored = {original_name(value) for value in plan.analysis.model.graph.graph.initializers.values()}
    entries = []
    for group in plan.analysis.groups:
        if group.pins:
            continue
        sites = []
        for site in group.sites:
            tensor = original_name(graph.initializers[site.tensor])
            removed = cuts.get((tensor, site.axis))
            if removed is not None and (tensor in stored or group.id not in turned):
                place = {"tensor": tensor, "axis": site.axis}
                rotated = kinds.get(group.id) in ("low_rank_qk", "low_rank_vo") or group.id in turned
                sites.append(place if rotated else {**place, "keep": np.flatnonzero(~removed).tolist()})
        entries.append(
            {
                "id": group.id,
                "role": group.role,
                "blocks": group.blocks,
                "size": group.size,
                "kept": plan.kept_width(group),
                "freedom": group.freedom,
                "normalized_inside": group.normalized_inside,
                "approximation": describe_approximation(group.role, kinds.get(group.id))
                if group.normalized_inside and group.id in plan.keep
                else None,
                "form": FORM_NAMES[kinds[group.id]] if group.id in kinds else None,
                "sites": sites,
            }
        )
    return entries


def cuts_in_file(cuts: Cuts, graph: ir.Graph) -> Cuts:
    """Cuts by the names that constants have in the user's file. Of one that several users share (it is a copy per user
    here), what every user loses is gone."""
    copies: dict[str, list[str]] = {}
    for name, value in graph.initializers.items():
        copies.setdefault(original_name(value), []).append(str(name))
    merged = {}
    for (tensor, axis), removed in cuts.items():
        name = original_name(graph.initializers[tensor])
        nothing = np.zeros_like(removed)
        merged[name, axis] = np.logical_and.reduce([cuts.get((copy, axis), nothing) for copy in copies[name]])
    return merged


def pins_json(analysis: Analysis) -> list[dict[str, Any]]:
    return [asdict(pin) for pin in analysis.pins]


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "max_abs_diff": verdict.max_abs_diff,
        "compared": compared_text(verdict),
        "tolerance": verdict.tolerance,
        "structure": list(verdict.structure),
        "not_run": verdict.not_run,
        "equals_mask": [asdict(d) for d in verdict.equals_mask],
        "quality": quality_json(verdict.quality),
        "requantization": asdict(verdict.requantization) if verdict.requantization is not None else None,
    }


def compared_text(verdict: Verdict) -> str:
    """What was compared with what."""
    if verdict.not_run:
        return "nothing"
    if verdict.equals_mask:
        return f"sliced against masked on {verdict.compared}"
    return f"pruned against original on {verdict.quality.source}"


def quality_json(quality: Quality) -> dict[str, Any]:
    perplexity = asdict(quality.perplexity) if quality.perplexity is not None else None
    return {"grade": quality.grade, "perplexity": perplexity, **asdict(quality)}


def write_json(data: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")


def analysis_json(analysis: Analysis, curves: Mapping[str, FloatArray]) -> dict[str, Any]:
    groups = []
    for g in analysis.groups:
        groups.append(
            {
                "id": g.id,
                "role": g.role,
                "layer": g.layer,
                "blocks": g.blocks,
                "size": g.size,
                "freedom": g.freedom,
                "freedom_reason": g.freedom_reason,
                "normalized_inside": g.normalized_inside,
                **({"curve": curves[g.id].tolist()} if g.id in curves else {}),
                "macs": g.macs,
                "params": g.params,
                "prunable": g.prunable,
                "sites": [{"tensor": s.tensor, "axis": s.axis, "kind": s.kind} for s in g.sites],
                "pins": [asdict(p) for p in g.pins],
            }
        )
    return {
        "snpc_inspect": 1,
        "model": str(analysis.model.source),
        "digest": analysis.model.digest,
        "provenance": [dict(step) for step in read_provenance(analysis.model.graph)],
        "dequantized": dequantization_json(analysis.model),
        "quantized": [asdict(entry) for entry in analysis.cost.quantized],
        "params": analysis.cost.params,
        "macs": analysis.cost.macs,
        "macs_not_counted": list(analysis.cost.not_counted),
        "nodes": analysis.cost.nodes,
        "macs_at": dict(analysis.dim_sizes),
        "groups": groups,
        "sublayers": [{**asdict(sublayer), "removable": sublayer.removable} for sublayer in analysis.sublayers],
        "pins": pins_json(analysis),
        "tokens": tokens_json(analysis),
    }


def tokens_json(analysis: Analysis) -> dict[str, Any]:
    return {
        "blocks": analysis.tokens.blocks,
        "points": [
            {
                "block": p.block,
                "tensor": p.value,
                "tokens": p.count if p.fixed_length else None,
                "leading": p.leading,
                "protected": [list(positions) for positions in p.protected],
                "scores": p.scores is not None,
                "exits": [e.block for e in p.exits],
            }
            for p in analysis.tokens.points
        ],
        "pins": [asdict(pin) for pin in analysis.tokens.pins],
    }
