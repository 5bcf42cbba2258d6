"""Laws of the source itself: a class that does too much is cut."""

import ast
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import ftrain

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


HOUSE = runpy.run_path(str(ROOT / ".ci" / "house.py"))


def test_imports_point_one_way_and_in_no_circle():
    found = list(HOUSE["imports"](HOUSE["modules"]()))
    assert len(found) > 1000
    assert HOUSE["against_the_order"](found) == []
    assert HOUSE["circles"](found) == []
    assert HOUSE["private_names"](found) == []


def test_what_points_upwards_goes_in_a_circle_or_is_private_is_found():
    upwards = HOUSE["Import"]("ftrain.graph.loop", "ftrain.trace.tracer", "trace", "a.py:1")
    back = HOUSE["Import"]("ftrain.trace.tracer", "ftrain.graph.loop", "is_loop", "b.py:1")
    floor = HOUSE["Import"]("ftrain.kernels.mean", "ftrain.sharding.mesh", "Mesh", "c.py:1")
    private = HOUSE["Import"]("experiments.mesh", "ftrain.step.api", "_plain", "d.py:1")
    assert len(HOUSE["against_the_order"]([upwards, back, floor])) == 2
    assert HOUSE["circles"]([upwards, back]) == [
        "a circle: ftrain.graph.loop -> ftrain.trace.tracer -> ftrain.graph.loop"
    ]
    assert len(HOUSE["private_names"]([private])) == 1


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        yield from [a.name for a in node.names] if isinstance(node, ast.Import) else []
        yield from [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_what_tests_share_is_in_their_helpers():
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = [(file.name, name) for file in files for name in imports_of(file) if "test_" in name]
    assert found == []


def test_names_of_test_files_are_their_own():
    """pytest imports them by these names: of two alike only one is found."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py") if "nullgpu" not in file.parts]
    assert sorted(names) == sorted(set(names))


_RAISES = "def _g():\n raise KeyError('x')"
_UNSAID = "f raises KeyError and does not say so"
_BARE = "B.f has no docstring"
DOCSTRINGS = runpy.run_path(str(ROOT / ".ci" / "docstrings.py"))


def test_docstrings_name_errors_and_shapes():
    assert [line for path in DOCSTRINGS["files"]() for line in DOCSTRINGS["missing"](path)] == []
    assert list(DOCSTRINGS["without_example"]()) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(): ...", "f has no docstring"),
        ("class A:\n '''A.'''\n def f(self): ...", "A.f has no docstring"),
        ("class A:\n '''A.'''\n def f(self):\n  '''Of f.'''\nclass B(A):\n '''B.'''\n def f(self): ...", ""),
        ("class A:\n '''A.'''\n def g(self):\n  '''g.'''\nclass B(A):\n '''B.'''\n def f(self): ...", _BARE),
        ("def f():\n '''Of f.'''\n raise ValueError('x')", "f raises ValueError and does not say so"),
        (f"def f():\n '''Of f.'''\n _g()\n{_RAISES}", _UNSAID),
        ("class A:\n '''A.'''\n def __init__(self):\n  raise OSError('x')", "A raises OSError and does not say so"),
        ("class A:\n '''A.'''\n def __init__(self):\n  '''OSError.'''\n  raise OSError('x')", ""),
        (f"def f():\n '''Of f.'''\n try:\n  _g()\n except KeyError:\n  pass\n{_RAISES}", ""),
        (f"def f():\n '''Of f.'''\n try:\n  _g()\n except OSError:\n  pass\n{_RAISES}", _UNSAID),
        (f"def f():\n '''Of f.'''\n try:\n  pass\n except KeyError:\n  _g()\n{_RAISES}", _UNSAID),
        ("def f(x: Tensor):\n '''Of x.'''", "f does not say the shapes of x"),
        ("def f(x_TD: Tensor, at: int):\n '''Of x.'''", ""),
        ("def f(x: Tensor):\n '''Of x, 0-d. ValueError for less.'''\n raise ValueError('x')", ""),
        ("def _f(): ...", ""),
        ("@overload\ndef f(x: int): ...\ndef f(x):\n '''Of f.'''", ""),
    ],
)
def test_what_a_docstring_lacks_is_found(tmp_path, monkeypatch, source, said):
    monkeypatch.setitem(DOCSTRINGS["missing"].__globals__, "ROOT", tmp_path)
    file = tmp_path / "a.py"
    file.write_text(f'"""A module."""\n{source}\n')
    found = list(DOCSTRINGS["missing"](file))
    assert [line.partition(": ")[2] for line in found] == ([said] if said else [])


@pytest.mark.parametrize(
    "package",
    [
        "ftrain.kernels", "ftrain.sharding", "ftrain.tree", "ftrain.optim", "ftrain.graph", "ftrain.trace",
        "ftrain.analysis", "ftrain.passes",
    ],
)  # fmt: skip
def test_every_public_name_of_a_package_is_there(package):
    found = importlib.import_module(package)
    assert found.__all__ == sorted(found.__all__)
    assert all(getattr(found, name) is not None for name in found.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        found.nothing_like_it  # noqa: B018


def test_importing_ftrain_loads_nothing_else_and_every_name_is_there():
    script = (
        "import sys, ftrain; print([m for m in sys.modules if m.startswith('ftrain.') or m == 'torch'])\n"
        "assert all(hasattr(ftrain, name) for name in ftrain.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_type_checkers_see_the_names_that_are_loaded_later():
    tree = ast.parse((ROOT / "ftrain" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    shown = {(node.module, alias.name) for node in imports for alias in node.names}
    places = {(module, name) for module, names in ftrain._PLACES.items() for name in names}
    assert {pair for pair in shown if pair[0] != "ftrain"} == places
