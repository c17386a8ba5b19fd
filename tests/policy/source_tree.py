"""A package as the rules of its structure see it: its modules, what they import, and the names they define."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One import at run time; ``target`` is a module where the tree has one of that name, else what is written."""

    line: int
    target: str


@dataclass(frozen=True)
class SourceTree:
    """The package in ``root``, whose name is that of the folder."""

    root: Path

    @functools.cached_property
    def modules(self) -> Mapping[str, Path]:
        """Every file by the name that it is imported by: ``snpc.ops`` is ``ops/__init__.py``."""
        return {self.name_of(path): path for path in sorted(self.root.rglob("*.py"))}

    @functools.cached_property
    def packages(self) -> Mapping[str, Path]:
        """The folders among them, as their ``__init__.py``."""
        return {name: path for name, path in self.modules.items() if path.name == "__init__.py"}

    def name_of(self, path: Path) -> str:
        parts = path.relative_to(self.root.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.modules[module].read_text())

    def package_of(self, module: str) -> str:
        return module if module in self.packages else module.rpartition(".")[0]

    def imports(self, module: str) -> Iterator[Import]:
        """What a module imports at run time: at the top, in functions, and by name through importlib."""
        package = self.package_of(module).split(".")
        for node in nodes_at_run_time(self.tree(module)):
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    # `from snpc import ops` imports a module; `from snpc.runtime.io import save` what the package
                    # exports under that name.
                    name = f"{source}.{alias.name}"
                    is_module = name in self.modules and alias.name not in self.exports(source)
                    yield Import(node.lineno, name if is_module else source)
            elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
                yield from (Import(node.lineno, name) for name in first_words(node))

    @functools.cache  # noqa: B019  trees live as long as the tests do
    def exports(self, module: str) -> frozenset[str]:
        """The names in ``__all__`` of a module."""
        for node in self.tree(module).body if module in self.modules else ():
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                assert isinstance(node, ast.Assign)
                return frozenset(ast.literal_eval(node.value))
        return frozenset()

    def definitions(self, module: str) -> Iterator[str]:
        """The names that a module defines at the top: functions, classes, constants; not what it imports."""
        for node in self.tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    yield from (inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name))

    def defined_in(self) -> Mapping[str, set[str]]:
        """The modules that define each name."""
        modules: dict[str, set[str]] = defaultdict(set)
        for module in self.modules:
            for name in self.definitions(module):
                modules[name].add(module)
        return modules


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for those in ``if TYPE_CHECKING:``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from nodes_at_run_time(child)


def called_name(call: ast.Call) -> str:
    """The last part of what is called: ``import_module`` of ``importlib.import_module(...)``."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def first_words(call: ast.Call) -> Iterator[str]:
    """The text that the first argument is, or begins with: ``snpc.torch.`` of ``f"snpc.torch.{name}"``."""
    for part in ast.walk(call.args[0]) if call.args else ():
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value.strip(".")
