"""What a law is about: a training step and how it is run."""

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`model`: dense, moe, 30b-a3b, dit, dit_text or omni. `backend`: as in `ftrain.jit`.

    `tokens`: rows of the pack (omni: as many as its examples need). `remat`: none, layer, offload, or budget, which is
    0.6 of the plain step's peak.
    """

    model: str
    backend: str = "aten"
    layers: int = 2
    tokens: int = 1024
    remat: str = "none"

    def __str__(self) -> str:
        """What differs from the defaults, as the name of a test."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{getattr(self, f.name)}{' ' + f.name if f.type is int else ''}" for f in changed)

    def as_json(self) -> str:
        """For the command line of a process that runs it."""
        return json.dumps(dataclasses.asdict(self))
