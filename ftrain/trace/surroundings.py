"""The values that a function reads besides its arguments and tensors: in closures, globals, modules and options.

A jitted function runs its Python code once, so such values are constants of the trace, like numbers among the
arguments: another value needs another trace. They are found from the code (`ftrain.trace.code_reads`,
`ftrain.trace.code_walk`): the functions, methods and properties that it reaches, and the attributes that these load.
`ftrain.trace.watched` compares them.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ftrain.trace.code_walk import CodeWalk
from ftrain.trace.held_generators import HeldGenerators
from ftrain.trace.watched import Change, Watched


class Surroundings:
    """The values that a function reads besides its arguments, as they are when this object is made.

    `fn`: the function. `is_step`: whether its arguments are those of a call, and so no surroundings.

    >>> from types import SimpleNamespace
    >>> from ftrain.trace.surroundings import Surroundings
    >>> options = SimpleNamespace(rate=0.5, name="a")
    >>> surroundings = Surroundings(lambda x: x * options.rate)
    >>> options.name = "b"
    >>> surroundings.unchanged()
    True
    >>> options.rate = 0.25
    >>> [f"{change.name}: {change.was} -> {change.now}" for change in surroundings.changes()]
    ['options.rate: 0.5 -> 0.25']
    """

    def __init__(self, fn: Callable[..., Any], *, is_step: bool = True) -> None:
        self._watched = Watched()
        self._slots: list[tuple[dict[str, Any], str, Tensor, str]] = []
        walk = CodeWalk(self._watched, self._slots)
        walk.run(fn, is_step=is_step)
        self.draws_of_numpy = walk.draws_of_numpy
        """Whether the function's code names a function that draws from numpy's global generator."""
        self._generators = HeldGenerators(walk.generators)

    def unchanged(self) -> bool:
        """True if the function would read the same values now."""
        return self._watched.unchanged()

    def changes(self) -> list[Change]:
        """What is another value now."""
        return [*self._watched.changes()]

    def add_changed(self, attributes: Iterable[tuple[nn.Module, str, Any]]) -> None:
        """Watch these attributes too, which the trace has changed: module, name, and the value before."""
        for module, key, before in attributes:
            self._watched.entry(vars(module), key, f"{key} of a {type(module).__name__}", holds=before)

    def add_captured(self, tensors: Iterable[Tensor]) -> None:
        """Watch that the modules still hold these tensors, which the graph reads."""
        captured = [*tensors]
        read = set(map(id, captured))
        for table, key, tensor, name in self._slots:
            if id(tensor) in read:
                self._watched.entry(table, key, name)
        self._watched.captured(captured)

    def require_undrawn(self) -> None:
        """ValueError if the trace has drawn from a generator of random numbers that the function holds."""
        self._generators.require_undrawn()

    @property
    def names(self) -> list[str]:
        """The names of the places that are watched, for messages."""
        return self._watched.names
