"""Patches by dotted name, also where a package exports a function with the name of its module."""

from __future__ import annotations

import sys

import pytest


def patch(monkeypatch: pytest.MonkeyPatch, target: str, value: object) -> None:
    """As ``monkeypatch.setattr(target, value)``. ``snpc.runtime.io.save`` is a function there, and a module here."""
    module, _, name = target.rpartition(".")
    if module in sys.modules:
        monkeypatch.setattr(sys.modules[module], name, value)
    else:
        monkeypatch.setattr(target, value)
