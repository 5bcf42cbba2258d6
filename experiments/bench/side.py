"""What benches measure of each way to run a training step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Side:
    """One way to run the step: `step(number)` makes one update, with the batch of that number, and returns the loss.

    `seconds`, `cpu_seconds`: of the steps that count. `peak`: bytes above the state.
    """

    name: str
    step: Callable[[int], float]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0

    def run(self, number: int, *, kept: bool) -> None:
        """A step; its time counts if it is `kept`."""
        began, cpu = time.perf_counter(), time.process_time()
        self.losses.append(self.step(number))
        if kept:
            self.seconds.append(time.perf_counter() - began)
            self.cpu_seconds.append(time.process_time() - cpu)
