"""Structure of the code: packages import downwards, without cycles, and never a script; files and functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, python_files

SOURCES = [path.relative_to(ROOT) for path in python_files()]
CODE = [path for path in SOURCES if path.parts[0] not in {"tests", "benchmarks", "tools", "experiments"}]
MAX_LINES, MAX_FUNCTION_LINES = 510, 80  # functions that only declare flags may be longer
# Packages from the lowest floor to the highest: each imports itself and lower floors.
FLOORS = (
    {"utils"},
    {"ops", "config"},
    {"models"},
    {"distributed"},
    {"checkpoints", "losses"},
    {"data"},
    {"training"},
    {"evaluation"},
    {"analysis"},
)
FLOOR_OF = {package: number for number, floor in enumerate(FLOORS) for package in floor}
# Independent although a higher floor might import a lower one.
INDEPENDENT = (
    ("data", ("models", "losses")),
    ("losses", ("models.base", "models.registry", "models.heads")),
    ("training", ("losses.dino", "losses.region", "losses.udi", "losses.matching")),
)
SCRIPTS_OF_SCRIPTS = {("main_esvit_mnodes", "main_esvit")}  # starts it with its flags


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in CODE}
SCRIPTS = {name for name, path in MODULES.items() if len(path.parts) == 1} - {"utils"}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the project's modules that a file imports, also those for types only and those inside functions."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


def test_the_root_holds_scripts_and_utils_only() -> None:
    runnable = {name for name in SCRIPTS if 'if __name__ == "__main__"' in (ROOT / MODULES[name]).read_text()}
    assert SCRIPTS - runnable == {"hubconf"}
    assert {path.parts[0] for path in CODE if len(path.parts) > 1} == FLOOR_OF.keys() - {"utils"}


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_point_down(path: Path) -> None:
    module, imported = name_of(path), set(imports_of(path))
    assert {(module, other) for other in imported & SCRIPTS} <= SCRIPTS_OF_SCRIPTS
    package = module.partition(".")[0]
    if package in FLOOR_OF:
        above = {other for other in imported if FLOOR_OF[other.partition(".")[0]] > FLOOR_OF[package]}
        assert above == set()
        beside = {other.partition(".")[0] for other in imported} - {package}
        assert all(FLOOR_OF[other] < FLOOR_OF[package] for other in beside)
    for lower, others in INDEPENDENT:
        if package == lower:
            assert not {other for other in imported if other.startswith(others)}


def test_no_import_cycles() -> None:
    """Also none for types. A package's `__init__` counts as its re-exports only, not as what its modules import."""
    graph = {name: set(imports_of(path)) - {name} for name, path in MODULES.items()}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for name, imported in graph.items():
        graph[name] = {other for other in imported if not (other in packages and name.startswith(f"{other}."))}
    list(TopologicalSorter(graph).static_order())


def test_config_needs_no_torch() -> None:
    config = {name for name in MODULES if name.partition(".")[0] in {"config", "utils"}}
    for name in config:
        tree = ast.parse((ROOT / MODULES[name]).read_text())
        top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        heavy = {"torch", "torchvision", "timm"}
        named = {alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module or "" for node in top_level if isinstance(node, ast.ImportFrom)}
        assert not {other.partition(".")[0] for other in named} & heavy, name


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= MAX_LINES
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
        and not node.name.endswith(("_parser", "_flags"))
    ]
    assert not long


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "tests"], ids=str)
def test_test_modules_do_not_import_each_other(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.rpartition(".")[2].startswith("test_")]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "benchmarks"], ids=str)
def test_benchmarks_run_from_any_folder(path: Path) -> None:
    """The project's root is on the path before the first import of the project."""
    nodes = ast.parse((ROOT / path).read_text()).body
    changes = [number for number, node in enumerate(nodes) if "sys.path" in ast.unparse(node)]
    roots = {module.partition(".")[0] for module in MODULES} | {"benchmarks"}
    for number, node in enumerate(nodes[: changes[0]] if changes else []):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & roots, number
