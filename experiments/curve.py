"""Losses of a training that may be stopped and go on: means of so many steps, a line of a file each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Curve:
    """Means of each `every` steps of a stage, appended to `file`; `say` tells each as a line."""

    file: Path
    every: int
    say: Callable[[str], None]
    _recent: list[dict[str, float]] = field(default_factory=list)

    def log(self, stage: str, number: int, losses: Mapping[str, Any]) -> None:
        """The losses of step `number` (from 1) of a stage, as `ftrain.run.stages.fold` tells them."""
        self._recent.append({name: float(value) for name, value in losses.items()})
        if number % self.every:
            return
        mean = {name: round(float(np.mean([row[name] for row in self._recent])), 4) for name in self._recent[0]}
        self._recent.clear()
        self.say(f"{stage}, step {number}: {mean}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps({"stage": stage, "step": number, **mean}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines so far; of a step that was done twice, since a run went on from before it, the last."""
        if not self.file.is_file():
            return []
        found = [json.loads(line) for line in self.file.read_text().splitlines()]
        return list({(row["stage"], row["step"]): row for row in found}.values())
