"""The house stands: imports point down, nothing imports a script, files and functions stay of a size that a reader holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT, python_files

SOURCES = [path.relative_to(ROOT) for path in python_files()]
CODE = [path for path in SOURCES if path.parts[0] not in {"tests", "benchmarks", "tools"}]
LINES, LINES_OF_FUNCTION = 550, 90  # about 500 and 80 are wanted; parsers apart
# Packages by floor, the lowest first: each imports its own modules and those of the floors below.
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
# What knows nothing of what, beyond the floors.
APART = (
    ({"data"}, {"models", "losses"}),
    ({"losses"}, {"checkpoints"}),
    ({"training"}, {"losses.dino", "losses.region", "losses.udi", "losses.matching"}),
)


def module_of(path: Path) -> str:
    """The floor's word for a file: its folder, or its own name."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def is_script(path: Path) -> bool:
    return len(path.parts) == 1 and 'if __name__ == "__main__"' in (ROOT / path).read_text()


def imports_of(path: Path) -> set[str]:
    """First names of what a file imports when it runs; what only types need does not count."""
    tree = ast.parse((ROOT / path).read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in (node for node in ast.walk(tree) if node not in for_types):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}
SCRIPTS = {path.stem for path in CODE if is_script(path)} | {"hubconf"}


def test_every_module_has_one_floor() -> None:
    modules = {module_of(path) for path in CODE} - SCRIPTS
    assert modules == FLOOR_OF.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    imported = (imports_of(path) & (FLOOR_OF.keys() | SCRIPTS)) - {module}
    assert not imported & SCRIPTS
    if module in FLOOR_OF:
        assert {other for other in imported - SCRIPTS if FLOOR_OF[other] > FLOOR_OF[module]} == set()
    for some, others in APART:
        assert module not in some or not imported & others


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= LINES
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= LINES_OF_FUNCTION
        and not node.name.endswith(("_parser", "_flags"))
    ]
    assert not long
