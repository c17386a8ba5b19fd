"""The multiply-accumulates of a model by role, every contraction counted once."""

from __future__ import annotations

import numpy as np

from snpc.graph import contraction_sizes, count_macs, infer_graph, opset_version
from snpc.passes.analyze import Analysis
from snpc.passes.propagation import Contraction
from snpc.types import IntArray, Role

DEAD_ROWS = "rows no output depends on"
UNATTRIBUTED = "the rest"

# A contraction can have axes of several roles: a value projection reads the residual stream and produces values.
ROLE_PRECEDENCE: tuple[Role, ...] = ("qk", "vo", "ffn", "conv", "other", "head", "residual")


def macs_by_role(analysis: Analysis) -> dict[str, int]:
    """Role -> MACs, at the sizes of ``analysis.binding``; adds up to ``analysis.cost.macs``.

    A product counts for the role whose width is an axis of it, the first of ``ROLE_PRECEDENCE`` where there are
    several.
    ``DEAD_ROWS`` and ``UNATTRIBUTED`` take what no role does.
    """
    model = analysis.traced_graph.model
    facts = infer_graph(model, dict(analysis.dim_sizes))
    roles = role_per_unit(analysis)
    macs_by_name: dict[str, int] = dict.fromkeys(ROLE_PRECEDENCE, 0)
    for contraction in analysis.traced_graph.trace.contractions:
        touched_roles = contraction_roles(contraction, analysis.traced_graph.units.unit_of_label, roles)
        if touched_roles:
            node = contraction.node
            call = facts.call(node, opset_version(model, node.domain))
            macs_by_name[ROLE_PRECEDENCE[min(touched_roles)]] += sum(
                count_macs(sizes) for part, _, sizes in contraction_sizes(call, node.domain) if part == contraction.part
            )
    macs_by_name[DEAD_ROWS] = analysis.dead_macs
    macs_by_name[UNATTRIBUTED] = max(0, analysis.cost.macs - sum(macs_by_name.values()))
    return {name: macs for name, macs in macs_by_name.items() if macs}


def role_per_unit(analysis: Analysis) -> IntArray:
    """[units]: index into ``ROLE_PRECEDENCE``, -1 for none."""
    table, units = analysis.traced_graph.trace.table, analysis.traced_graph.units
    first = {(str(axis.constant.name), axis.axis): axis.first_label for axis in table.axes}
    role_of_unit = np.full(table.count, -1, np.int64)
    for group in sorted(analysis.groups, key=lambda g: -ROLE_PRECEDENCE.index(g.role)):
        for site in group.sites:
            labels = first[site.tensor, site.axis] + np.flatnonzero(site.units >= 0)
            role_of_unit[units.unit_of_label[labels]] = ROLE_PRECEDENCE.index(group.role)
    return role_of_unit


def contraction_roles(contraction: Contraction, unit: IntArray, roles: IntArray) -> set[int]:
    labels = [f[f >= 0] for side in (contraction.left, contraction.right) for f in side.factors]
    return {int(role) for own in labels for role in np.unique(roles[unit[own]])} - {-1}
