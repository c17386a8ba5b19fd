"""Groups without a model behind them."""

from __future__ import annotations

import numpy as np

from snpc.types import Group, Pin, Role, Site


def make_group(name: str, role: Role, blocks: int, size: int, *, pinned: bool = False) -> Group:
    units = np.arange(blocks * size)
    sites = (Site(f"{name}.w", 0, "produce", units), Site(f"{name}.v", 1, "consume", np.append(units, -1)))
    pins = (Pin(f"{name}.w", 0, size, "it is held", "Hold h"),) if pinned else ()
    return Group(name, role, 0, blocks, size, sites, (), "select", "", 1, 1, pins)
