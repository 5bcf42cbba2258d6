"""Laws of the source itself: a class that does too much is cut."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "sharding", "modules", "ftrain", "experiments")
MOST_METHODS = 15


def classes(floor):
    for path in sorted((ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(ROOT).as_posix()}: {node.name}", node


def methods(node):
    return [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_class_has_more_than_fifteen_methods(floor):
    larger = {name for name, node in classes(floor) if len(methods(node)) > MOST_METHODS}
    assert larger == set(), "cut it: what state do some of its methods share that the others do not use?"
