"""The line of the user's code that an op came from."""

import functools
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the floors lie beside the package, and in an installed one within it.
_MODELS = tuple(place / "modules" for place in (_PACKAGE, _PACKAGE.parent))  # read by users as their own
_MACHINERY = (
    *(place / name for place in (_PACKAGE, _PACKAGE.parent) for name in ("kernels", "sharding")),
    _PACKAGE,
    Path(torch.__file__).resolve().parent,
)
_GENERATED = ("<frozen ", "<eval_with_key>", "<torch", "<attrs generated ", "<__array_function__ ")
"""Names of code that libraries generate: Python's own, of graphs, of torch's."""


class SourceLine(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@functools.cache
def _is_machinery(file: str) -> bool:
    if file.startswith("<"):  # no file: a shell, a notebook's cell and `python -c` are the user's
        return file.startswith(_GENERATED)
    if file.startswith(("optree", "contextlib")):
        return True
    path = Path(file).resolve()  # a folder may be reached by a link, as a home often is
    if any(map(path.is_relative_to, _MODELS)):
        return False
    return path.name == "contextlib.py" or "optree" in path.parts or any(map(path.is_relative_to, _MACHINERY))


def is_users(file: str) -> bool:
    """True for a file that is neither torch's nor the trainer's nor a kernel's: one that a user would edit."""
    return not _is_machinery(file)


@functools.cache
def is_models(file: str) -> bool:
    """True for a file of the library's own modules, which users read as theirs."""
    return any(map(Path(file).resolve().is_relative_to, _MODELS))


def user_source() -> SourceLine | None:
    """The innermost frame that is neither torch's nor the trainer's nor a kernel's: the line that a user would edit.

    None where no frame is the user's.
    """
    here: FrameType | None = sys._getframe(1)
    while here is not None:
        code = here.f_code
        of_tracer = (code.co_filename, code.co_name) == ("<string>", "<lambda>")  # else `python -c` has such a file
        if not of_tracer and not _is_machinery(code.co_filename):
            return SourceLine(here.f_code.co_filename, here.f_lineno, here.f_code.co_name)
        here = here.f_back
    return None
