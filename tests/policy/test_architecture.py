"""The rules of the architecture: who imports whom, who knows operators and runtimes, one name for one thing.

Each rule is a function from a source tree to its violations. It is applied to snpc, where it must give none, and to a
small package that breaks it, where it must give one: a rule that cannot fail is no rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import onnx.defs
import pytest

import snpc
from tests.policy.source_tree import SourceTree

ROOT = Path(snpc.__file__).parent
SNPC = SourceTree(ROOT)
MODULES = list(SNPC.modules.values())
name_of = SNPC.name_of

# Each may import those before it, and itself.
LAYERS = (
    "temporary", "types", "errors", "version", "remote", "ops", "graph", "criteria", "passes", "planning", "tokens",
    "runtime", "targets", "pipeline", "folders", "report", "integrations", "torch", "cli",
)  # fmt: skip

# The same inside two of them: members of a row may import what stands in the rows before it, and themselves. Rows are
# levels, members of one row do not know each other.
INSIDE: Mapping[str, Sequence[tuple[str, ...]]] = {
    "passes": (
        ("canonicalization", "propagation"),
        ("quantization", "grouping", "fusion"),
        ("weights", "token_analysis", "sublayers"),
        ("slicing", "companions", "rotation"),
        ("analyze",),
        ("mac_breakdown", "output_kinds", "pass_list"),
    ),
    "runtime": (
        ("io",),
        ("calibration",),
        ("execution",),
        ("batches",),
        ("statistics", "evaluation"),
        ("closed_form",),
        ("sensitivity",),
    ),
}

# Where a runtime is called. All others go through snpc.runtime.execution.
CALLS_ONNXRUNTIME = ("snpc.runtime.execution", "snpc.targets")

# Where temporary files are made. A folder that a killed process leaves is removed by the next one; an array that is
# kept out of memory has no name, so the kernel removes it.
MAKES_TEMPORARY_FILES = ("snpc.temporary", "snpc.runtime.execution.memory", "snpc.runtime.io.spill_files")

MOST_FILES = 14  # in a package, beside its __init__

MOST_PARAMETERS = 8  # of a function, beside self
# Their parameters are the inputs of an ONNX operator, in its order.
TAKES_OPERATOR_INPUTS = "snpc.torch.operators"

# Names that several modules define, and why.
DEFINED_TWICE: Mapping[str, str] = {
    "__all__": "the names that a package exports",
    "__getattr__": "packages that import their names when they are first used",
    "__dir__": "the same",
}

HEAVY = ("onnxruntime", "torch", "tensorrt", "openvino", "PIL", "sklearn", "transformers", "timm", "scipy")
CORE = ("click", "lazy_loader", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich")

Rule = Callable[[SourceTree], Iterator[str]]


def layer_of(module: str) -> str | None:
    """The layer of `snpc.passes.propagation.propagate`; None for `snpc` itself, the public face of all of them."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports_of(tree: SourceTree) -> Iterator[tuple[str, str, str]]:
    """(module, target, "module:line imports target") of every import of the package's own modules."""
    for module in tree.modules:
        for imported in tree.imports(module):
            if is_in(imported.target, tree.root.name):
                yield module, imported.target, f"{module}:{imported.line} imports {imported.target}"


# -- who imports whom ------------------------------------------------------------------------------------------------


def imports_of_later_layers(tree: SourceTree) -> Iterator[str]:
    """A layer imports the layers before it. The command line also imports the public verbs, from snpc itself."""
    for module, target, violation in imports_of(tree):
        layer, other = layer_of(module), layer_of(target)
        if layer in (None, "__main__") or (layer == "cli" and (other is None or other in snpc.__all__)):
            continue
        if layer not in LAYERS:
            yield f"{module}: say in LAYERS where it stands"
        elif other not in LAYERS[: LAYERS.index(layer) + 1]:
            yield violation


def imports_of_later_parts(tree: SourceTree) -> Iterator[str]:
    """The order of INSIDE holds inside passes and inside runtime."""
    for module, target, violation in imports_of(tree):
        layer, part, other = layer_of(module), *(".".join(name.split(".")[2:3]) for name in (module, target))
        if layer not in INSIDE or layer_of(target) != layer or not part or not other or part == other:
            continue
        levels = {name: level for level, row in enumerate(INSIDE[layer]) for name in row}
        if part not in levels:
            yield f"{module}: say in INSIDE where it stands"
        elif levels.get(other, len(levels)) >= levels[part]:
            yield violation


def imports_of_criteria(tree: SourceTree) -> Iterator[str]:
    """Criteria are plug-ins: they know what they are given, and nothing of snpc else."""
    for module, target, violation in imports_of(tree):
        if layer_of(module) == "criteria" and layer_of(target) not in ("criteria", "types", "errors"):
            yield violation


def imports_of_onnxruntime(tree: SourceTree) -> Iterator[str]:
    """One place makes sessions, and one builds artifacts; all others say what to run and get arrays."""
    for module in tree.modules:
        for imported in tree.imports(module):
            if is_in(imported.target, "onnxruntime") and not any(is_in(module, place) for place in CALLS_ONNXRUNTIME):
                yield f"{module}:{imported.line} imports onnxruntime"


def tempfile_outside_temporary(tree: SourceTree) -> Iterator[str]:
    """``snpc.temporary`` makes all temporary folders."""
    for module in tree.modules:
        for imported in tree.imports(module):
            if imported.target == "tempfile" and module not in MAKES_TEMPORARY_FILES:
                yield f"{module}:{imported.line} imports tempfile"


def imports_past_faces(tree: SourceTree) -> Iterator[str]:
    """What is in another package is imported from the package, not from a file of it.

    ``snpc.types`` and ``snpc.errors`` are files without a package. A package may import files of the packages that it
    is in, as its own.
    """
    for module, target, violation in imports_of(tree):
        owner = tree.package_of(target)
        if target not in tree.packages and owner != tree.root.name and not is_in(module, owner):
            yield violation


RULES: dict[Rule, dict[str, str]] = {
    imports_of_later_layers: {"graph/walk.py": "from snpc.passes import analyze", "passes/__init__.py": ""},
    imports_of_later_parts: {
        "passes/grouping/units.py": "def units():\n    from snpc.passes.slicing import cut\n",
        "passes/slicing/__init__.py": "cut = 1",
    },
    imports_of_criteria: {"criteria/taylor.py": "import snpc.graph", "graph/__init__.py": ""},
    imports_of_onnxruntime: {"pipeline/prune.py": "import onnxruntime as ort"},
    tempfile_outside_temporary: {"pipeline/prune.py": "import tempfile"},
    imports_past_faces: {"planning/plan.py": "from snpc.graph.walk import step", "graph/walk.py": "step = 1"},
}


def small_package(folder: Path, files: Mapping[str, str]) -> SourceTree:
    """A package named snpc with these files, and an ``__init__.py`` in every folder."""
    root = folder / "snpc"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [root, *(inner for inner in root.rglob("*") if inner.is_dir())]:
        (path / "__init__.py").touch()
    return SourceTree(root)


def rule_name(rule: Rule) -> str:
    return rule.__name__


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_imports(rule: Rule) -> None:
    violations = list(rule(SNPC))
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_the_rules_of_imports_can_fail(rule: Rule, tmp_path: Path) -> None:
    (violation,) = rule(small_package(tmp_path, RULES[rule]))
    assert "imports" in violation


@pytest.mark.parametrize(
    "written",
    [
        "import snpc.torch",
        "from snpc import torch",
        "from ..torch import gradients",
        "import importlib\nimportlib.import_module('snpc.torch.gradients')",
        "from importlib import import_module\nimport_module(f'snpc.torch.{name}')",
        "def late():\n    __import__('snpc.torch')",
    ],
)
def test_an_import_is_seen_however_it_is_written(written: str, tmp_path: Path) -> None:
    files = {"runtime/measure.py": written, "torch/gradients.py": ""}
    assert list(imports_of_later_layers(small_package(tmp_path, files)))


def test_imports_for_types_alone_do_not_count(tmp_path: Path) -> None:
    written = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from snpc.torch import gradients\n"
    tree = small_package(tmp_path, {"runtime/measure.py": written, "torch/gradients.py": ""})
    assert not list(imports_of_later_layers(tree))


def test_every_layer_is_there() -> None:
    assert {layer_of(name) for name in SNPC.modules} - {None, "__main__"} == set(LAYERS)
    for layer, rows in INSIDE.items():
        parts = {name.split(".")[2] for name in SNPC.modules if name.startswith(f"snpc.{layer}.")}
        assert parts <= {part for row in rows for part in row}, layer


# -- packages and names ----------------------------------------------------------------------------------------------


def packages_without_a_word(tree: SourceTree) -> Iterator[str]:
    """Every package says what it holds."""
    for name in tree.packages:
        if not ast.get_docstring(tree.tree(name)):
            yield f"{name}: no docstring"


def packages_without_exports(tree: SourceTree) -> Iterator[str]:
    """Every package lists what it exports."""
    for name in tree.packages:
        if "__all__" not in tree.definitions(name):
            yield f"{name}: no __all__"


def crowded_packages(tree: SourceTree) -> Iterator[str]:
    for name, path in tree.packages.items():
        count = len(list(path.parent.glob("*.py"))) - 1
        if count > MOST_FILES:
            yield f"{name}: {count} files, at most {MOST_FILES}: make packages of what belongs together"


def names_defined_twice(tree: SourceTree) -> Iterator[str]:
    for name, modules in tree.defined_in().items():
        if len(modules) > 1 and name not in DEFINED_TWICE:
            yield f"{name}: {', '.join(sorted(modules))}"


def long_signatures(tree: SourceTree) -> Iterator[str]:
    """What travels together through several functions is a value of its own."""
    for module in tree.modules:
        for node in ast.walk(tree.tree(module)):
            if isinstance(node, ast.FunctionDef) and not is_in(module, TAKES_OPERATOR_INPUTS):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                if count > MOST_PARAMETERS:
                    yield f"{module}:{node.lineno} {node.name} has {count} parameters, at most {MOST_PARAMETERS}"


STRUCTURE: dict[Rule, dict[str, str]] = {
    packages_without_a_word: {"__init__.py": '"""Prunes."""', "ops/__init__.py": "__all__ = []"},
    packages_without_exports: {"__init__.py": "__all__ = []", "ops/__init__.py": '"""Operators."""'},
    crowded_packages: {f"ops/file{number}.py": "" for number in range(MOST_FILES + 1)},
    long_signatures: {"ops/one.py": "class A:\n    def run(self, a, b, c, d, e, f, g, *, h, i): ..."},
    names_defined_twice: {"ops/one.py": "def build(): ...", "graph/two.py": "build: int = 1"},
}


@pytest.mark.parametrize("rule", STRUCTURE, ids=rule_name)
def test_structure(rule: Rule) -> None:
    violations = list(rule(SNPC))
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("rule", STRUCTURE, ids=rule_name)
def test_the_rules_of_structure_can_fail(rule: Rule, tmp_path: Path) -> None:
    (violation,) = rule(small_package(tmp_path, STRUCTURE[rule]))
    assert violation


def test_exported_names_exist() -> None:
    """Names in ``__all__`` are defined or imported there."""
    for name in SNPC.packages:
        if "__all__" in SNPC.definitions(name):
            module = __import__(name, fromlist=["__all__"])
            assert [exported for exported in module.__all__ if is_missing(module, exported)] == [], name


def is_missing(module: ModuleType, name: str) -> bool:
    """Plug-ins are there even if the package that they plug into is not installed."""
    try:
        return not hasattr(module, name)
    except ModuleNotFoundError as error:
        return is_in(str(error.name), "snpc")


def test_names_that_may_be_defined_twice_are() -> None:
    defined = SNPC.defined_in()
    for name, reason in DEFINED_TWICE.items():
        assert reason
        assert len(defined[name]) > 1, f"{name} is defined once: drop the exception"


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
        literals = {text for _, text in operator_literals(ast.parse((ROOT / where).read_text()))}
        assert literals >= names, f"{where} no longer mentions {names - literals}: drop the exception"


# -- what importing costs --------------------------------------------------------------------------------------------


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


START_UP_SECONDS = {"import snpc": 0.3, "from snpc.cli import main; main(['--help'], standalone_mode=False)": 0.4}


def test_importing_snpc_loads_nothing_before_it_is_needed() -> None:
    modules = (*HEAVY, "numpy", "onnx", "onnx_ir", "rich")
    loaded = fresh(f"import sys, snpc; print([m for m in {modules!r} if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.parametrize(("code", "limit"), START_UP_SECONDS.items(), ids=["import", "help"])
def test_start_up_takes_no_time(code: str, limit: float) -> None:
    """CPU time of the whole process, the interpreter included: it does not depend on what else the machine does."""
    used = fresh(f"import sys, time; sys.stderr = sys.stdout\n{code}\nprint(time.process_time())").splitlines()[-1]
    assert float(used) < limit


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


def needs_an_extra(module: str) -> bool:
    """The torch bridge, and the plug-ins, but not the face of these."""
    return is_in(module, "snpc.torch") or module.startswith("snpc.integrations.")


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    optional = ("torch", "tensorrt", "openvino", "PIL", "sklearn", "transformers", "timm", "onnxscript",
                "hypothesis", "pytest", "onnx_graphsurgeon", "polygraphy", "olive")  # fmt: skip
    modules = [name_of(p) for p in MODULES if p.name != "__main__.py" and not needs_an_extra(name_of(p))]
    assert fresh(BLOCKED.format(allowed=set(CORE) | {"snpc"}, optional=set(optional), modules=modules)) == ""


@pytest.mark.parametrize("module", ["snpc.types", "snpc.ops", "snpc.passes.analyze", "snpc.criteria"])
def test_the_lower_layers_never_load_onnxruntime(module: str) -> None:
    loaded = fresh(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"


# -- the tests -------------------------------------------------------------------------------------------------------

TESTS = SourceTree(Path(__file__).resolve().parents[1])
OF_THEIR_OWN = {"models", "policy"}  # folders of tests that no package of snpc has


def imports_of_test_files(tree: SourceTree) -> Iterator[str]:
    """What several test files use is in a helper: a test file can be moved or deleted without breaking another."""
    for module, target, violation in imports_of(tree):
        if target.rpartition(".")[2].startswith("test_") and target != module:
            yield violation


def test_no_test_file_is_imported() -> None:
    assert not list(imports_of_test_files(TESTS))


def test_an_import_of_a_test_file_is_seen(tmp_path: Path) -> None:
    tree = small_package(
        tmp_path, {"ops/test_one.py": "from snpc.graph.test_two import helper", "graph/test_two.py": ""}
    )
    assert list(imports_of_test_files(tree))


def test_folders_of_tests_are_those_of_the_package() -> None:
    folders = {name.removeprefix("tests").lstrip(".") for name in TESTS.packages} - {""}
    packages = {name.removeprefix("snpc.") for name in SNPC.packages}
    assert {name for name in folders if name.partition(".")[0] not in OF_THEIR_OWN} <= packages
