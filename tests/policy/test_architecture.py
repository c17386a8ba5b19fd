"""The rules that keep the parts apart: who imports whom, who knows operators, and what `import snpc` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx.defs
import pytest

import snpc

ROOT = Path(snpc.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Each may import those before it, and itself.
LAYERS = (
    "types", "errors", "ops", "graph", "criteria", "passes", "planning", "tokens", "runtime", "targets",
    "pipeline", "report", "torch", "cli",
)  # fmt: skip
FIRST = {"types", "errors"}

HEAVY = ("onnxruntime", "torch", "tensorrt", "openvino", "PIL", "sklearn", "transformers", "timm", "scipy")
CORE = ("click", "jinja2", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "platformdirs", "psutil", "rich")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The layer of `snpc.passes.propagation.propagate`; None for `snpc` itself, the public face of all of them."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for those in `if TYPE_CHECKING:`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not only_for_types(child):
            yield from walk(child)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of everything that a file imports at run time, at the top or in functions."""
    module = name_of(path).split(".")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from snpc import cost` imports a submodule, `from snpc.types import Group` does not.
            yield from ((node.lineno, f"{source}.{alias.name}" if source == "snpc" else source) for alias in node.names)


def test_every_module_belongs_to_a_layer() -> None:
    tops = {layer_of(name_of(path)) for path in MODULES} - {None, "__main__"}
    assert tops <= set(LAYERS), "say in LAYERS where the new part stands"
    assert {"types", "errors", "ops", "passes", "criteria", "runtime"} <= tops


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    layer = layer_of(name_of(path))
    if layer in (None, "__main__"):
        return
    assert layer is not None
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) - (FIRST - {layer} if layer == "types" else set())
    if layer == "cli":  # it calls the public verbs
        allowed |= {None, *snpc.__all__}
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line} imports {target}"
        for line, target in imports(path)
        if target.split(".")[0] == "snpc" and layer_of(target) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


# -- only snpc.ops knows operators -----------------------------------------------------------------------------------

OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas()} | {
    "MultiHeadAttention", "GroupQueryAttention", "FusedMatMul", "FusedGemm", "SkipLayerNormalization", "BiasGelu",
    "MatMulNBits", "QuickGelu", "FastGelu",
}  # fmt: skip

# Shapes are evaluated by executing shape arithmetic; that a Shape's value is known when its input's shape is, and not
# its input's value, is what makes it arithmetic on shapes.
KNOWN = {"graph/shapes.py": {"Shape", "Size", "ConstantOfShape"}}


def strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def operator_literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Operator names that are compared with something, looked up, or given to a function (to make a node)."""
    for node in ast.walk(tree):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Call):
            compared = [*node.args, *(k.value for k in node.keywords)]
        elif isinstance(node, ast.Dict):
            compared = [k for k in node.keys if k is not None]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            node.value, ast.Constant | ast.Tuple | ast.Set
        ):
            compared = [node.value]
        for part in compared:
            if isinstance(part, ast.Constant | ast.Tuple | ast.List | ast.Set):
                yield from ((node.lineno, text) for text in strings(part) if text in OPERATORS)


def knows_operators(path: Path) -> bool:
    """The table, and how its operators are executed in torch."""
    return path.relative_to(ROOT).parts[0] == "ops" or path.relative_to(ROOT).parts[:2] == ("torch", "operators")


@pytest.mark.parametrize("path", [p for p in MODULES if not knows_operators(p)], ids=name_of)
def test_operators_are_known_to_the_table_only(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    wrong = {
        f"{where}:{line} knows {text!r}"
        for line, text in operator_literals(ast.parse(path.read_text()))
        if text not in KNOWN.get(where, ())
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_the_search_for_operators_finds_them() -> None:
    """The rule above can fail: these are the ways to write down an operator that it must see."""
    ways = [
        'a.op_type == "MatMul"',
        'a.op_type in ("Gemm", "Conv")',
        'ir.Node("", "Add", [])',
        '{"Relu": 1}',
        'OP = "Mul"',
    ]
    for way in ways:
        assert list(operator_literals(ast.parse(way))), way
    assert not list(operator_literals(ast.parse('x.kind == "movement"')))


def test_the_exceptions_are_needed() -> None:
    for where, names in KNOWN.items():
        found = {text for _, text in operator_literals(ast.parse((ROOT / where).read_text()))}
        assert found >= names, f"{where} no longer mentions {names - found}: drop the exception"


# -- what importing costs --------------------------------------------------------------------------------------------


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_snpc_loads_nothing_heavy() -> None:
    loaded = fresh(f"import sys, snpc; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"


BLOCKED = """
import importlib, importlib.abc, sys
allowed = set(sys.stdlib_module_names) | {allowed!r}
optional = {optional!r}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            raise ModuleNotFoundError(f"{{name}} is not a core dependency", name=name)
sys.meta_path.insert(0, Block())
failed = []
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed.append(f"{{module}}: {{error}}")
print("\\n".join(failed))
"""


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    optional = ("torch", "tensorrt", "openvino", "PIL", "sklearn", "transformers", "timm", "onnxscript",
                "hypothesis", "pytest", "onnx_graphsurgeon")  # fmt: skip
    modules = [name_of(p) for p in MODULES if p.name != "__main__.py" and layer_of(name_of(p)) != "torch"]
    assert fresh(BLOCKED.format(allowed=set(CORE) | {"snpc"}, optional=set(optional), modules=modules)) == ""


@pytest.mark.parametrize("module", ["snpc.types", "snpc.ops", "snpc.passes.analyze", "snpc.criteria"])
def test_the_lower_layers_never_load_onnxruntime(module: str) -> None:
    loaded = fresh(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"
