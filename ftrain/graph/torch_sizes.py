"""Private torch names about sizes that depend on data, which are symbols in a trace; one canary test each."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class SizesOfData(ShapeEnv):
    """Symbols for sizes that depend on data, which tell who asks for a number that only data have."""

    def _make_data_dependent_error(self, *args: Any, **kwargs: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_OF_SYMBOLS):
            frame = frame.f_back
        for note in _notes.get():
            note(frame)
        return super()._make_data_dependent_error(*args, **kwargs)


_OF_SYMBOLS = (torch.__file__, str(Path(torch.__file__).parent / "fx" / "experimental"))


_notes: ContextVar[tuple[Callable[[FrameType | None], None], ...]] = ContextVar("ftrain_notes_of_numbers", default=())


@contextmanager
def noting_numbers(note: Callable[[FrameType | None], None]) -> Iterator[None]:
    """Within the block, `note` is called with the frame that asked for a number that only data have."""
    token = _notes.set((*_notes.get(), note))
    try:
        yield
    finally:
        _notes.reset(token)


def size_symbol(size: torch.SymInt) -> Any:
    """The symbol that stands for a size which depends on data."""
    return size.node.expr


def free_sizes(value: Any) -> set[Any]:
    """The symbols of sizes that depend on data in a fake value: of a tensor's shape, of a number, of several."""
    if isinstance(value, list | tuple):
        return set().union(*map(free_sizes, value))
    if isinstance(value, Tensor):
        return set().union(*(free_sizes(n) for n in value.shape))
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt | torch.SymFloat) else set()


def largest_sizes(value: Any, known: Collection[Any]) -> dict[Any, int | None]:
    """The symbols in a fake value (a tensor, a number or several) that are not in `known`, each with the largest number
    it can be; None where that is unknown or 2^40 and more.
    """
    found: dict[Any, int | None] = {}
    for part in value if isinstance(value, list | tuple) else [value]:
        sizes = part.shape if isinstance(part, Tensor) else [part]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                ranges = size.node.shape_env.var_to_range
                for symbol in sorted(size.node.expr.free_symbols - set(known), key=str):
                    most = ranges[symbol].upper if symbol in ranges else None
                    found[symbol] = int(most) if most is not None and most.is_Integer and most < 2**40 else None
    return found


def concrete_size(size: int | torch.SymInt, symbols: dict[Any, int]) -> int:
    """A size with numbers in the place of symbols."""
    return size if isinstance(size, int) else int(size.node.expr.xreplace(symbols))
