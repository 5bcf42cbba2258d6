"""Examples in docstrings run as they stand, a test for each module that has any."""

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"kernels": "ftrain.kernels", "sharding": "ftrain.sharding", "modules": "ftrain.modules", "ftrain": "ftrain"}


def modules_with_examples() -> list[str]:
    """The modules whose text holds an example, by the names under which users import them."""
    found = []
    for floor, package in FLOORS.items():
        for path in sorted((ROOT / floor).rglob("*.py")):
            if not any(part.is_symlink() for part in path.parents) and ">>> " in path.read_text():
                parts = path.relative_to(ROOT / floor).with_suffix("").parts
                found.append(".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return found


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The examples of a module; doctest by itself takes a decorated function for another module's."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    decorated = [f for f in vars(module).values() if hasattr(f, "__wrapped__") and f.__module__ == module.__name__]
    found = [*finder.find(module), *(test for f in decorated for test in finder.find(inspect.unwrap(f), f.__name__))]
    return list({test.docstring: test for test in found}.values())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in examples(module):
        runner.run(test)
    written = inspect.getsource(module).count(">>> ")
    assert runner.tries == written, f"{name}: {written} lines begin with >>>, but only {runner.tries} were found"
    assert not runner.failures, f"{runner.failures} of {runner.tries} examples of {name} fail; see above"
