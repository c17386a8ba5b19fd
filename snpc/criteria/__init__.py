"""Criteria: plug-ins that score a group's units from arrays alone. Higher means keep.

A criterion is one small file holding one frozen dataclass whose fields are its options. It never sees a graph: the
runtime measures what `Criterion.probes` names, streams it through `Criterion.observe`, sums the answers over the whole
calibration set and hands them to `Criterion.score` together with the group's weights (`snpc.types.CriterionInputs`).

What can be measured, for a probe kind K of query, key, value, context, hidden (all float64, rows are usually tokens):

    "energy:K"   [samples, blocks, size]         sum over rows of the squared activation of each unit
    "gram:K"     [samples, blocks, size, size]   X^T X over rows, X the [rows, size] activations of one block
    "tokens:K"   [samples]                       how many rows were summed; where absent, samples count instead

    role                      probe kinds
    qk                        query, key
    vo                        context (after the attention weights), value
    ffn, conv, residual,      hidden
    other
    head                      context, as "energy" only: [samples, 1, heads], summed over the head's width
    experts                   expert, as "routed" only: [parts, 2, experts], sums over the tokens of an expert of the
                              norm of what it adds to them, and the number of these tokens

With torch, of a gate on each unit (a factor: one as the model is, zero where the unit is gone), for every role:

    "gate:loss"        [samples, blocks, size]   derivative of the sample's loss
    "gate:weights"     [samples, blocks, size]   sum over the unit's weights of (w dL/dw)^2
    "gate:relevance"   [samples, blocks, size]   relevance (LRP) that passes through the unit
    "gate:sensitivity" [samples, blocks, size]   mean over outputs y of |dy/dp|, p the unit's value in a row; rows added
    "gate:macs", "gate:memory"   [samples]       what one unit costs: MACs, activations

A probe the group has no activation for (a constant query) is absent from the batch: a criterion must cope.

Adding one: docs/adding-a-criterion.md.

Files
  activation  Activation: how much signal a unit carries on calibration data.
  fisher      Fisher information: squared gradients, of single weights or of whole units.
  gates       Criteria from gate gradients: a gate is a factor on each unit, one in the model as it is, zero where it is
              removed.
  magnitude   Magnitude: how large the weights of a unit are.
  mixed       The default where there is data: for each role the criterion that was measured to keep most.
  movement    Movement: which units training would make larger, and which smaller.
  random      Random: the floor that every other criterion has to beat.
  reap        REAP: how much an expert adds to the tokens that are routed to it (arXiv 2510.13999).
  relevance   Layer-wise relevance propagation: how much of the answer came through a unit.
  serene      SeReNe: how sensitive the outputs are to what a unit says.
  snp         SNP: keep the attention scores, drop what others already say (ECCV 2024, arXiv 2404.11630).
  taylor      First and second order models of what the loss does when a unit goes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast, get_args, get_origin, get_type_hints

from snpc.criteria.activation import Activation
from snpc.criteria.fisher import Fisher, GroupFisher
from snpc.criteria.magnitude import Magnitude
from snpc.criteria.mixed import Mixed
from snpc.criteria.movement import Gum, Movement
from snpc.criteria.random import Random
from snpc.criteria.reap import Reap
from snpc.criteria.relevance import Relevance
from snpc.criteria.serene import Serene
from snpc.criteria.snp import Snp
from snpc.criteria.taylor import Linear, Quadratic, Taylor
from snpc.errors import UserError
from snpc.types import CriterionInputs, FloatArray, Role

__all__ = [
    "ENTRY_POINTS",
    "Criterion",
    "Description",
    "criteria",
    "describe",
    "make_criterion",
    "needs_data",
]

ENTRY_POINTS = "snpc.criteria"
"""The entry point group in which other packages offer criteria: ``name = "module:Class"``."""


class Criterion(Protocol):
    """What a criterion must offer; a frozen dataclass whose fields all have defaults."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def probes(self, role: Role) -> tuple[str, ...]:
        """The names it wants measured for a group of this role, such as ``"energy:hidden"``; () needs no data."""
        ...

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """One batch of measurements -> arrays SUMMED over the batch's samples; they are added up over all batches."""
        ...

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], finite, higher = keep. Must follow the units when they are reordered."""
        ...


class Description(NamedTuple):
    """One criterion for ``--help``: ``options`` holds (``"terms=8"``, what it does) pairs with the defaults."""

    name: str
    summary: str
    options: tuple[tuple[str, str], ...]


_CLASSES: tuple[type[Criterion], ...] = (
    Activation, Fisher, GroupFisher, Gum, Linear, Magnitude, Mixed, Movement, Quadratic, Random, Reap, Relevance,
    Serene, Snp, Taylor,
)  # fmt: skip
_BUILT_IN: Mapping[str, type[Criterion]] = MappingProxyType({cls.name: cls for cls in _CLASSES})


def criteria() -> Mapping[str, type[Criterion]]:
    """Name -> class of every criterion there is, snpc's own and those of installed packages, sorted by name.

    Raises `UserError` where two offer the same name or an installed one does not load.
    """
    classes_by_name = {**_BUILT_IN, **{name: _load_entry_point(entry) for name, entry in _entry_points().items()}}
    return MappingProxyType(dict(sorted(classes_by_name.items())))


def make_criterion(spec: str) -> Criterion:
    """A criterion from its spelling: ``"snp"`` or ``"snp:terms=4,average=grams"``.

    Options are the fields of the criterion's dataclass and take the field's type: a whole number, a number, text,
    true or false, or one of a ``Literal``'s words. Raises `UserError` that lists what exists.
    """
    name, colon, options = spec.partition(":")
    cls = _find_criterion(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in options.split(",") if colon else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            example = next((_format_option(field) for field in fields.values()), "key=value")
            raise UserError(f"criterion {spec!r}: {item!r} is not key=value: write {name}:{example}")
        if key not in fields:
            raise UserError(f"criterion {name!r} has no option {key!r}: it has {', '.join(fields) or 'none'}")
        if key in values:
            raise UserError(f"criterion {spec!r} gives {key!r} twice: keep one")
        values[key] = _parse_option(name, key, text, hints[key])
    return cls(**values)


def describe() -> list[Description]:
    """What ``--help`` shows: every criterion with its one line and its options, sorted by name."""
    return [
        Description(
            name,
            next(iter((cls.__doc__ or "").strip().splitlines()), ""),
            tuple((_format_option(field), str(field.metadata.get("help", ""))) for field in dataclasses.fields(cls)),
        )
        for name, cls in criteria().items()
    ]


def needs_data(criterion: Criterion, roles: Iterable[Role]) -> bool:
    """Whether scoring groups of these roles takes calibration data."""
    return any(criterion.probes(role) for role in roles)


def _entry_points() -> dict[str, metadata.EntryPoint]:
    """What other packages offer, not yet imported: a broken one must not stop the others from being used."""
    classes_by_name: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _BUILT_IN:
            raise UserError(f"criterion {entry.name!r} of {entry.value!r} is also snpc's own: uninstall or rename it")
        if entry.name in classes_by_name:
            other = classes_by_name[entry.name].value
            raise UserError(f"criterion {entry.name!r} is offered by both {other!r} and {entry.value!r}: uninstall one")
        classes_by_name[entry.name] = entry
    return classes_by_name


def _load_entry_point(entry: metadata.EntryPoint) -> type[Criterion]:
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"criterion {entry.name!r} of {entry.value!r} does not load: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and getattr(cls, "name", None) == entry.name):
        raise UserError(f"criterion {entry.name!r} of {entry.value!r} is not a dataclass with name = {entry.name!r}")
    return cast("type[Criterion]", cls)


def _find_criterion(name: str) -> type[Criterion]:
    offered = _entry_points()
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name in offered:
        return _load_entry_point(offered[name])
    names = sorted([*_BUILT_IN, *offered])
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"there is no criterion {name!r}{hint}: choose one of {', '.join(names)}")


def _format_option(field: dataclasses.Field[Any]) -> str:
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"{field.name}={default}"


def _parse_option(name: str, key: str, text: str, hint: Any) -> Any:
    """One option's text as its field's type."""
    if get_origin(hint) is Literal:
        words = {str(value): value for value in get_args(hint)}
        expected = f"one of {', '.join(words)}"
    elif hint is bool:
        words = {"true": True, "false": False}
        expected = "true or false"
    elif hint in (int, float):
        words = {}
        expected = "a whole number" if hint is int else "a number"
    else:
        return text
    try:
        return words[text] if words else hint(text)
    except (KeyError, ValueError):
        raise UserError(f"criterion {name!r}: {key}={text} is not {expected}") from None
