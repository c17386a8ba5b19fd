"""Readable, stable names for groups, from what the exporter called nodes and weights."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable

import onnx_ir as ir

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
GENERATED_NAME = re.compile(r"^(onnx::|node_|val_|_?[A-Za-z]+_?\d*$)")


def module_path(node: ir.Node, constants: Iterable[str]) -> tuple[str, ...]:
    """Module path of a node: recorded scopes, else ``/a/a.0/b/MatMul``, else the name of a weight it reads."""
    scopes = node.metadata_props.get(SCOPES_KEY)
    if scopes:
        try:
            listed = [str(s) for s in ast.literal_eval(scopes)]
        except (ValueError, SyntaxError):
            listed = []
        if len(listed) > 1 and listed[-2]:
            return tuple(listed[-2].split("."))
    name = node.name or ""
    if "/" in name:
        return tuple(merge_scopes([p for p in name.split("/")[:-1] if p]))
    for constant in constants:
        if "." in constant and not GENERATED_NAME.match(constant):
            return tuple(constant.split(".")[:-1])
    return ()


def merge_scopes(parts: list[str]) -> list[str]:
    """``blocks, blocks.0, attn`` -> ``blocks, 0, attn`` (TorchScript repeats the name of a list)."""
    merged: list[str] = []
    for part in parts:
        if merged and part.startswith(merged[-1] + "."):
            merged += part[len(merged[-1]) + 1 :].split(".")
        else:
            merged += part.split(".")
    return merged


def common_module_path(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The common prefix of all paths; of a single path, all but the last module (the projection itself)."""
    named = sorted(set(paths))
    if not named or not named[0]:
        return ()
    if len(named) == 1:
        return named[0][:-1] or named[0]
    return tuple(os.path.commonprefix(named))  # noqa: RUF071 - of lists it compares entries


def unique_names(candidates: list[str]) -> list[str]:
    """The names, with ``#2``, ``#3``, ... behind those that repeat."""
    counts: dict[str, int] = {}
    names = []
    for name in candidates:
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names
