"""Which examples a step trains on: a pure function of the step and the data, the same on every layout and in a run of
any length.

Step `s` has `documents` examples of its own, those numbered from `s * documents`. The few that its budget has no room
for are carried over to other steps of its window of `WINDOW` steps (`ftrain.modules.dealing.carry_over`), so that
arrays keep their sizes and each example is trained on once. That is decided by the budget of a whole step, before
anything is dealt to packs: a run may go on on another number of ranks and sees what it would have seen. A window stands
alone, so that any step can be had without those before it. An example that no step of its window has room for stays in
its own. A run that ends within a window leaves a few of its examples to the window's other steps, which the run trains
on when it is made longer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.omni.tasks import Mixture
from ftrain.modules.budget import Budget, Size
from ftrain.modules.dealing import carry_over
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, measure

WINDOW = 8  # steps over which chance evens out: the room for media is 4 standard deviations of a window's mean


class Chosen(NamedTuple):
    """A training example, by its number in the mixture."""

    number: int
    task: str
    document: Document


class _Own(NamedTuple):
    """The examples of one step before any are carried over."""

    examples: list[Chosen]
    sizes: list[Size]


class Choice:
    """What each step trains on. Keeps the examples of the window that was last asked for, and of `prepare`d steps."""

    def __init__(self, mixture: Mixture, model: OmniModel, *, documents: int, budget: Budget) -> None:
        """`budget`: of a whole step of so many `documents`."""
        self._mixture, self._model, self._documents = mixture, model, documents
        self._budget = budget
        self._made: dict[int, _Own] = {}
        self._carried: tuple[range, list[list[tuple[int, int]]]] = (range(0), [])

    def at(self, step: int) -> list[Chosen]:
        """The examples of a step (from 0): its own in their order, then those that are carried over to it."""
        window, groups = self._carried
        if step not in window:
            window = window_of(step)
            self._made = {s: made for s, made in self._made.items() if s >= window.start}
            groups = carry_over([self._own(s).sizes for s in window], self._budget)
            self._carried = window, groups
        return [self._own(window[group]).examples[place] for group, place in groups[step - window.start]]

    def prepare(self, step: int) -> None:
        """Make the examples of a later step now, so that a window's need not all be made at its first step."""
        self._own(step)

    def _own(self, step: int) -> _Own:
        if step not in self._made:
            numbers = range(step * self._documents, (step + 1) * self._documents)
            found = [self._mixture.example(number) for number in numbers]
            examples = [Chosen(n, e.task, e.document) for n, e in zip(numbers, found, strict=True)]
            self._made[step] = _Own(examples, self._sizes(examples))
        return self._made[step]

    def _sizes(self, examples: Sequence[Chosen]) -> list[Size]:
        return [measure(example.document, model=self._model) for example in examples]


def window_of(step: int) -> range:
    """The steps among which the examples of a step are carried over."""
    first = step // WINDOW * WINDOW
    return range(first, first + WINDOW)
