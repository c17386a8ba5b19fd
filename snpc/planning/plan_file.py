"""A plan as a file: JSON that can be read, edited and applied again."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis, enter_streams, remove_sublayers
from snpc.passes.sublayers import Substitute, TokenMap
from snpc.planning.plan import PruningMethod, SlicePlan
from snpc.planning.tied_widths import check_kept_widths
from snpc.types import FloatArray, Group

PLAN_FORMAT = 1


def plan_to_json(plan: SlicePlan) -> str:
    """Small, readable, editable: one line per block. The record of the calibration data is ``plan.data``."""
    groups = []
    for group in plan.analysis.groups:
        rows = plan.keep.get(group.id)
        if rows is not None:
            opening = json.dumps(
                {"id": group.id, "role": group.role, "blocks": group.blocks, "size": group.size, "kept": len(rows[0])}
            )
            lines = ",\n      ".join(json.dumps(list(row)) for row in rows)
            groups.append(f'    {opening[:-1]}, "keep": [\n      {lines}]}}')
    head = {
        "snpc_plan": PLAN_FORMAT,
        "model": plan.analysis.model.path.name,
        "digest": plan.analysis.model.digest,
        "method": plan.method,
        "criterion": plan.criterion,
        "options": dict(plan.options),
    }
    if plan.data is not None:
        head["calibration"] = dict(plan.data)
    if plan.analysis.traced_graph.kv_cache:
        head["prune_kv_cache"] = True
    if metric_texts(plan.analysis):
        head["metric"] = metric_texts(plan.analysis)
    if plan.analysis.removal is not None:
        removal = plan.analysis.removal
        head["layers"] = {name: substitute_entry(removal.substitutes.get(name)) for name in removal.names}
    rotated = [stream.group for stream in plan.analysis.stream_bases if stream.rotated and stream.group in plan.keep]
    if rotated or plan.rotated:
        head["rotated"] = rotated or list(plan.rotated)
    if plan.analysis.entries:
        head["entries"] = list(plan.analysis.entries)
    if plan.analysis.reduction is not None:
        head["tokens"] = plan.analysis.reduction.spec
        steps = plan.analysis.reduction.to_json()["steps"]
        if any("offline" in step for step in steps):
            head["token_scores"] = {str(s["block"]): join_numbers(s["offline"]) for s in steps if "offline" in s}
    body = ",\n".join(groups)
    return json.dumps(head, indent=2)[:-2] + f',\n  "groups": [\n{body}\n  ]\n}}\n'


def metric_texts(analysis: Analysis) -> list[str]:
    """The user's metrics by name. Functions are not in it: no code is to be run because a plan says so."""
    return [
        (f"{output}=" if output else "") + metric.name + (f":{metric.axis}" if metric.axis is not None else "")
        for output, metric in analysis.metrics.items()
        if metric.function is None
    ]


def metrics_in(text: str) -> list[str]:
    """The metrics of a plan; empty for text that is no plan."""
    entry = json_entry(text, "metric")
    return [name for name in entry if isinstance(name, str)] if isinstance(entry, list) else []


def join_numbers(scores: Sequence[float]) -> str:
    return " ".join(map(repr, scores))


def prunes_kv_cache(text: str) -> bool:
    """Was the plan in ``text`` made with --prune-kv-cache? False for text that is no plan."""
    return bool(json_entry(text, "prune_kv_cache"))


def token_reduction_in(text: str) -> tuple[str, dict[int, list[float]]] | None:
    """(specification, scores of positions by block) of the token reduction in a plan; None where it has none."""
    spec, rows = json_entry(text, "tokens"), json_entry(text, "token_scores")
    if not isinstance(spec, str):
        return None
    try:
        scores = {int(k): [float(x) for x in row.split()] for k, row in rows.items()} if isinstance(rows, dict) else {}
    except (AttributeError, TypeError, ValueError):
        scores = {}
    return spec, scores


def without_removed_layers(analysis: Analysis, text: str) -> Analysis:
    """The analysis without the layers that the plan in ``text`` removes: name -> what stands for one.

    Raises UserError for layers that the model does not have.
    """
    entry = json_entry(text, "layers")
    if not isinstance(entry, dict):
        return analysis
    read = {sublayer.name: sublayer.read for sublayer in analysis.sublayers}
    try:
        substitutes = {name: parse_substitute(row, read.get(name, "")) for name, row in entry.items() if row}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            '"layers" of a plan holds numbers as text, "", or a map as `snpc plan` writes it, by the name of a layer'
        ) from None
    return remove_sublayers(analysis, entry, substitutes)


def substitute_entry(substitute: Substitute | None) -> str | dict[str, Any]:
    """What stands for a layer, as a plan says it: nothing, numbers, or a map, whose matrices are float32 in base64."""
    if substitute is None:
        return ""
    constant, found = join_numbers(substitute.constant.tolist()), substitute.map
    if found is None:
        return constant
    matrices = {"reduce": found.reduce, "expand": found.expand}
    if found.pooled is not None:
        matrices["pooled"] = found.pooled
    entries = {
        name: {"shape": list(matrix.shape), "float32": b64encode(matrix.astype("<f4").tobytes()).decode()}
        for name, matrix in matrices.items()
    }
    return {"bias": constant, **entries}


def parse_substitute(entry: Any, read: str) -> Substitute:
    """What stands for a layer that reads the value ``read``, of an entry of a plan."""
    if isinstance(entry, str):
        return Substitute(split_numbers(entry))
    matrices = {
        name: np.frombuffer(b64decode(part["float32"], validate=True), "<f4").reshape(part["shape"])
        for name, part in entry.items()
        if name != "bias"
    }
    return Substitute(split_numbers(entry["bias"]), TokenMap(read, **matrices))


def split_numbers(text: str) -> FloatArray:
    return np.array([float(x) for x in text.split()])


def with_planned_entries(analysis: Analysis, text: str) -> Analysis:
    """The analysis in which residual streams begin where the plan in ``text`` says.

    Raises UserError for values that the model does not have.
    """
    entry = json_entry(text, "entries")
    if not entry:
        return analysis
    shapes = analysis.traced_graph.facts.shape
    known = {str(value.name) for value, shape in shapes.items() if value.producer() and len(shape or ()) > 1}
    if not isinstance(entry, list) or not all(isinstance(name, str) and name in known for name in entry):
        raise UserError('"entries" of a plan names values of the model, behind which residual streams begin')
    return enter_streams(analysis, entry)


def json_entry(text: str, name: str) -> object:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data.get(name) if isinstance(data, dict) else None


def is_unicode(data: object) -> bool:
    """Whether all texts of parsed JSON can be written: an escape such as backslash ud800 alone is no character."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def plan_from_json(text: str, analysis: Analysis, name: str) -> SlicePlan:
    """Read a plan for the analyzed model; ``name`` is for messages.

    Raises UserError for a plan of another model, unknown groups, or positions that do not exist.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise UserError(f"{name}: not a snpc plan (nested too deeply)") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{name}: not a snpc plan ({str(error).splitlines()[0]})") from None
    if not is_unicode(data):
        raise UserError(f"{name}: not a snpc plan (it holds half of a surrogate pair, which is no text)")
    if not isinstance(data, dict) or data.get("snpc_plan") != PLAN_FORMAT:
        raise UserError(f'{name}: not a snpc plan (it needs "snpc_plan": {PLAN_FORMAT}); `snpc plan` writes one')
    if data.get("digest") != analysis.model.digest:
        raise UserError(
            f"{name}: made for another model ({data.get('model')}, digest {str(data.get('digest'))[:12]}), "
            f"not for {analysis.model.path.name} ({analysis.model.digest[:12]}); make a new plan"
        )
    if bool(data.get("prune_kv_cache")) != analysis.traced_graph.kv_cache:
        origin = "made with" if data.get("prune_kv_cache") else "made without"
        raise UserError(f"{name}: {origin} --prune-kv-cache, unlike the analysis of the model; analyze it the same way")
    spec = analysis.reduction.spec if analysis.reduction is not None else None
    if data.get("tokens") != spec:
        raise UserError(
            f"{name}: its tokens are {data.get('tokens')!r}, but those of the analyzed model are {spec!r}; write them "
            "as snpc does, or make a new plan with --tokens"
        )
    groups = {g.id: g for g in analysis.groups}
    keep: dict[str, tuple[tuple[int, ...], ...]] = {}
    entries, options = data.get("groups"), data.get("options", {})
    if not isinstance(entries, list) or not isinstance(options, dict):
        raise UserError(f'{name}: not a snpc plan ("groups" must be a list, "options" an object)')
    for entry in entries:
        group = groups.get(str(entry.get("id"))) if isinstance(entry, dict) else None
        if group is None:
            raise UserError(
                f"{name}: unknown group {entry.get('id') if isinstance(entry, dict) else entry!r}; "
                "`snpc inspect` lists them"
            )
        if group.id in keep:
            raise UserError(f"{name}: {group.id} is listed twice; keep one")
        keep[group.id] = parse_kept_units(entry.get("keep"), group, name)
    check_kept_widths({key: len(rows[0]) for key, rows in keep.items()}, analysis.groups, name)
    method = data.get("method", "select")
    if method not in get_args(PruningMethod):
        raise UserError(f"{name}: unknown method {method!r}; it is one of {', '.join(get_args(PruningMethod))}")
    record = data.get("calibration")
    if record is not None and not (isinstance(record, dict) and isinstance(record.get("digest"), str)):
        raise UserError(f'{name}: its "calibration" is not what `snpc plan` writes; remove it, or make a new plan')
    rotated = parse_rotated(data.get("rotated", []), keep, groups, method, name)
    return SlicePlan(analysis, str(data.get("criterion", "by hand")), options, keep, method, record, rotated)


def parse_rotated(
    entry: object, keep: Collection[str], groups: Mapping[str, Group], method: str, name: str
) -> tuple[str, ...]:
    """The groups that a plan rotates: residual streams that it cuts, with refitted weights."""
    if not isinstance(entry, list):
        raise UserError(f'{name}: "rotated" must be a list of groups')
    for group_id in entry:
        if group_id not in keep or groups[group_id].role != "residual":
            raise UserError(f'{name}: "rotated" names {group_id!r}, which is no residual stream that the plan cuts')
    if entry and method == "select":
        raise UserError(f'{name}: "rotated" is for plans that refit weights; its method is select')
    return tuple(entry)


def parse_kept_units(rows: Any, group: Group, name: str) -> tuple[tuple[int, ...], ...]:
    where = f"{name}: {group.id}"
    if group.pins:
        raise UserError(f"{where} is pinned ({group.pins[0].reason}); remove it from the plan")
    if not isinstance(rows, list) or len(rows) != group.blocks or not all(isinstance(r, list) for r in rows):
        raise UserError(f'{where}: needs {group.blocks} lists in "keep", one per block')
    for row in rows:
        if not row or not all(type(k) is int and 0 <= k < group.size for k in row) or len(set(row)) != len(row):
            raise UserError(f'{where}: "keep" must hold different positions from 0 to {group.size - 1}, at least one')
    if len({len(row) for row in rows}) > 1:
        counts = sorted({len(row) for row in rows})
        raise UserError(f"{where}: every block must keep the same number of units, not {counts[0]} and {counts[-1]}")
    return tuple(tuple(sorted(row)) for row in rows)
