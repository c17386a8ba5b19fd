"""Widths that quantized nodes take: packed codes fill bytes, those of experts whole blocks; query, key and value of one
weight are equally wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.ops import float_form
from snpc.types import Group, Pin, QuantizedForm, Site, StoredConstant


def with_stored_widths(form: QuantizedForm, groups: Sequence[Group]) -> tuple[Group, ...]:
    """``groups`` of the float graph of ``form``, in steps and ties that its nodes take."""
    result = [replace(group, step=math.lcm(group.step, *steps_of(form, group))) for group in groups]
    for name, constant in form.constants.items():
        for node in filter(None, (equal_widths_node(form, place) for place in constant.places)):
            result = tie_columns(result, name, str(node.op_type))
    return tuple(result)


def equal_widths_node(form: QuantizedForm, place: tuple[str, str, int]) -> ir.Node | None:
    """The node that reads the codes at ``place`` as queries, keys and values of one width."""
    part, name, index = place
    nodes = {str(node.name): node for node in form.graph.graph} if part == "codes" else {}
    rule = float_form(nodes[name].domain, nodes[name].op_type) if name in nodes else None
    return nodes[name] if rule is not None and rule.equal_widths == index else None


def tie_columns(groups: Sequence[Group], weight: str, operator: str) -> list[Group]:
    """``groups``, of which those of the queries, keys and values in the columns of ``weight`` are tied, or pinned where
    some of them cannot be cut. Whole heads are the same in all three anyway."""
    found = [
        (k, s) for k, g in enumerate(groups) for s in g.sites if g.role != "head" and (s.tensor, s.axis) == (weight, 1)
    ]
    result, members = list(groups), [groups[k] for k, _ in found]
    covered = np.any([site.units >= 0 for _, site in found], axis=0)
    alike = len({(g.blocks, g.size) for g in members}) == 1 and bool(covered.all())
    free = alike and all(g.prunable and not g.tie for g in members)
    for index, site in found:
        if free:
            result[index] = replace(groups[index], tie=f"tie.{weight}")
        elif groups[index].prunable:
            reason = f"queries, keys and values of {operator} are equally wide, and some of them cannot be cut"
            result[index] = replace(groups[index], pins=(Pin(weight, 1, len(site.units), reason, operator),))
    return result


def steps_of(form: QuantizedForm, group: Group) -> list[int]:
    """Of each site of a group: units of a block, so many that its constant can be stored."""
    found = []
    for site in group.sites:
        constant = form.constants.get(site.tensor)
        multiple = 1 if constant is None else positions_together(form, constant, site)
        positions = np.count_nonzero(site.units >= 0) // group.size  # that go with a unit of each block
        found.append(multiple // math.gcd(multiple, positions))
    return found


def positions_together(form: QuantizedForm, constant: StoredConstant, site: Site) -> int:
    """So many positions along the axis of the site, or a multiple, are stored: experts in whole blocks, packed codes in
    whole bytes."""
    codes = form.graph.graph.initializers[constant.parts["codes"]]
    if constant.layout not in ("table", "experts") or codes.dtype != ir.DataType.UINT8:
        return 1
    if codes.shape is None or site.axis != len(codes.shape) - 1:
        return 1
    per_byte = 8 // int(constant.attributes["bits"])
    block = int(constant.attributes.get("block_size", 0)) if constant.layout == "experts" else 0
    return math.lcm(per_byte, block or 1)
