"""genai_config.json and config.json: widths that changed with the model.

Runtimes read some widths from these files and not from the graph. A key is changed where its value is the width before
and all layers have the same width after; where layers differ, no value would be right, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snpc.folders.model_folder import PARTS
from snpc.graph import is_cache_name
from snpc.pipeline import PrunedModel
from snpc.planning import SlicePlan
from snpc.types import Role, TensorSpec

HEAD_KEYS = ("head_size", "head_dim", "d_kv", "kv_channels")
ROLE_KEYS: Mapping[Role, tuple[str, ...]] = {
    "ffn": (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim", "encoder_ffn_dim",
        "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
    ),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "residual": ("hidden_size", "d_model", "n_embd"),
}  # fmt: skip
ROLE_SUBJECTS: Mapping[Role, str] = {
    "ffn": "hidden layers",
    "experts": "layers of experts",
    "residual": "residual streams",
}


@dataclass(frozen=True)
class WidthChange:
    """What is as wide in every layer before: its ``keys`` in configurations, and the widths after, layer by layer."""

    what: str
    keys: tuple[str, ...]
    before: int
    after: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        return len(set(self.after)) == 1


@dataclass(frozen=True)
class ConfigUpdate:
    """The ``text`` of a configuration; ``changed``: what was set, in words; ``unsaid``: what it cannot say any more."""

    text: str
    changed: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()


def width_changes(results: Mapping[str, PrunedModel]) -> list[WidthChange]:
    """Of caches, by the inputs of the originals and of the pruned models and their companions; of the roles that
    configurations know, by the plans. ``results``: by the part of an encoder-decoder model that they are, "" where one
    is the whole; layers of a part that is not among them stay as they are."""
    pairs = []
    for result in results.values():
        pairs += [(result.plan.analysis.model.inputs, result.inputs)]
        pairs += [(companion.original.inputs, companion.inputs) for companion in result.companions]
    caches = {change: None for before, after in pairs for change in cache_changes(before, after)}
    plans = {part: result.plan for part, result in results.items()}
    return [*caches, *(change for role in ROLE_KEYS for change in role_changes(plans, role))]


def cache_changes(original: Sequence[TensorSpec], pruned: Sequence[TensorSpec]) -> Iterator[WidthChange]:
    """Inputs ``past_key_values.0.key`` [batch, heads, past, width] that got narrower."""
    before = {spec.name: spec.shape for spec in original}
    widths = [
        (shape[-1], spec.shape[-1])
        for spec in pruned
        if is_cache_name(spec.name) and len(shape := before.get(spec.name, ())) == 4
    ]
    for wide in sorted({a for a, b in widths if isinstance(a, int) and isinstance(b, int) and a != b}):
        after = tuple(b for a, b in widths if a == wide and isinstance(b, int))
        yield WidthChange("heads of caches", HEAD_KEYS, wide, after)


def role_changes(plans: Mapping[str, SlicePlan], role: Role) -> Iterator[WidthChange]:
    """Groups of a role, those of one width together. Keys of a part stand for its layers; keys of both for those of
    both, of which a part without a plan has some that stay."""
    widths = {part: layer_widths(plan, role) for part, plan in plans.items()}
    for size in sorted({size for of_part in widths.values() for size, _ in of_part}):
        after = {part: tuple(kept for wide, kept in of_part if wide == size) for part, of_part in widths.items()}
        for part, own in after.items():
            keys = tuple(key for key in ROLE_KEYS[role] if not part or key.startswith(part))
            if set(own) - {size}:
                yield WidthChange(ROLE_SUBJECTS[role], keys, size, own)
        both = (*(width for own in after.values() for width in own), *((size,) if len(plans) < len(PARTS) else ()))
        if "" not in plans and set(both) - {size}:
            keys = tuple(key for key in ROLE_KEYS[role] if not key.startswith(PARTS))
            yield WidthChange(ROLE_SUBJECTS[role], keys, size, both)


def layer_widths(plan: SlicePlan, role: Role) -> list[tuple[int, int]]:
    """(before, after) of each group of a role."""
    sizes = ((group, group.blocks * group.size) for group in plan.analysis.groups if group.role == role)
    return [(size, sum(map(len, plan.keep[g.id])) if g.id in plan.keep else size) for g, size in sizes]


def updated_config(config: dict[str, Any], changes: Sequence[WidthChange]) -> ConfigUpdate:
    """The configuration with the widths of the pruned model."""
    changed: list[str] = []
    unsaid: list[str] = []

    def visit(values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                visit(value)
                continue
            for change in changes:
                if key not in change.keys or value != change.before or isinstance(value, bool):
                    continue
                if change.uniform:
                    values[key] = change.after[0]
                    changed.append(f"{key} {change.before} -> {change.after[0]}")
                else:
                    low, high = min(change.after), max(change.after)
                    unsaid.append(f"{key} stays {change.before}: {change.what} are {low} to {high} wide now")

    visit(config)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return ConfigUpdate(text, tuple(dict.fromkeys(changed)), tuple(dict.fromkeys(unsaid)))
