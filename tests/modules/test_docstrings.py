"""The examples in the docstrings of modules/ run as they stand, and everything public says what it does."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

MODULES = sorted(p.stem for p in (Path(__file__).parents[2] / "modules").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    module = importlib.import_module(f"ftrain.modules.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(f"ftrain.modules.{name}")
    own = [(n, x) for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    public = [(n, x) for n, x in own if not n.startswith("_") and (inspect.isfunction(x) or inspect.isclass(x))]
    for title, thing in public:
        assert inspect.getdoc(thing), title
        for method, inner in vars(thing).items() if inspect.isclass(thing) else ():
            is_public = not method.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property))
            assert not is_public or inspect.getdoc(getattr(thing, method)), f"{title}.{method}"
