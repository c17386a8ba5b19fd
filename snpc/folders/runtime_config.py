"""genai_config.json and config.json: widths that changed with the model.

Runtimes read some widths from these files and not from the graph. A key is changed where its value is the width before
and all layers have the same width after; where layers differ, no value would be right, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def width_changes(result: PrunedModel, part: str) -> list[WidthChange]:
    """Of caches, by the inputs of the original and of the pruned model and their companions; of the roles that
    configurations know, by the plan. ``part``: see ``ModelFolder.part``; layers of the other part stay as they are."""
    pairs = [(result.plan.analysis.model.inputs, result.inputs)]
    pairs += [(companion.original.inputs, companion.inputs) for companion in result.companions]
    caches = {change: None for before, after in pairs for change in cache_changes(before, after)}
    return [*caches, *(c for role in ROLE_KEYS for c in role_changes(result.plan, role, part))]


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


def role_changes(plan: SlicePlan, role: Role, part: str) -> Iterator[WidthChange]:
    """Groups of a role, those of one width together. Of a ``part``, keys of the other part are left alone, and keys of
    both stand for its layers too."""
    groups = [group for group in plan.analysis.groups if group.role == role]
    for size in sorted({group.blocks * group.size for group in groups}):
        after = tuple(
            sum(map(len, plan.keep[group.id])) if group.id in plan.keep else size
            for group in groups
            if group.blocks * group.size == size
        )
        if set(after) != {size}:
            own = tuple(key for key in ROLE_KEYS[role] if part and key.startswith(part))
            both = tuple(key for key in ROLE_KEYS[role] if not key.startswith(("encoder", "decoder")))
            yield WidthChange(ROLE_SUBJECTS[role], own if part else ROLE_KEYS[role], size, after)
            if part:
                yield WidthChange(ROLE_SUBJECTS[role], both, size, (*after, size))


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
