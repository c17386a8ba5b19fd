"""Widths that quantized constants take: rows of packed codes fill bytes, those of experts whole blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.types import Group, QuantizedForm, Site, StoredConstant


def with_stored_widths(form: QuantizedForm, groups: Sequence[Group]) -> tuple[Group, ...]:
    """``groups`` of the float graph of ``form``, in steps that its constants can be stored in."""
    return tuple(replace(group, step=math.lcm(group.step, *steps_of(form, group))) for group in groups)


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
