"""`ftrain params --model DIR`: how many parameters a model has, and which a glob names. Nothing is loaded.

A `config.json` alone is enough for a model of the library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftrain.bridge.described import described, described_whole
from ftrain.bridge.opened import open as open_model
from ftrain.cli.opened import Native
from ftrain.modules.spec import ParamSpec, Tree, leaves_with_paths
from ftrain.sharding.paths import Rules


@dataclass(frozen=True)
class ParamsOptions:
    """Count the parameters of a model's folder, all and by component, and list those that a glob names."""

    model: Path
    """A folder in Hugging Face's format; its weights are not read, nor needed for a family of the library."""
    match: str | None = None
    """A glob over paths: * is one part, ** any number. Default: components are counted."""
    native: Native = "auto"
    """auto: a family of the library where it has the model's."""
    whole: bool = False
    """Of an omni model its talker too, and what plays its codes; by its config.json alone."""


def run(options: ParamsOptions) -> int:
    """The command. ValueError for a folder without a model, and a glob that matches nothing."""
    title, specs, top_k = _found(options)
    leaves = dict(leaves_with_paths(specs))
    console = Console()
    console.print(title, highlight=False)
    console.print(_matching(leaves, options.match) if options.match else _components(leaves))
    total, expert = _count(leaves.values()), _count(s for s in leaves.values() if "expert" in s.axes)
    text = f"{total:,} parameters" + (f", {expert:,} of them in experts" if expert else "")
    console.print(f"{text}; a token uses {used(leaves, top_k):,}" if top_k else text, highlight=False)
    return 0


def used(leaves: Mapping[str, ParamSpec], top_k: int) -> int:
    """How many parameters compute a token, where each router sends it to `top_k` experts."""
    experts = [spec for spec in leaves.values() if "expert" in spec.axes]
    of_token = sum(spec.elements * top_k // spec.shape[spec.axes.index("expert")] for spec in experts)
    return _count(leaves.values()) - _count(experts) + of_token


def _found(options: ParamsOptions) -> tuple[str, Tree, int]:
    """What the model is, its specs, and how many experts a token uses."""
    if options.whole:
        kind, specs, top_k = described_whole(options.model)
        return f"{kind} (native), whole: of its config.json alone", specs, top_k
    if options.native != "never" and not any(options.model.glob("*.safetensors*")):
        kind, specs, top_k = described(options.model)
        return f"{kind} (native): of its config.json alone", specs, top_k
    model = open_model(options.model, native=options.native)
    return f"{model.name}: {model.why}", model.specs, model.top_k


def _components(leaves: Mapping[str, ParamSpec]) -> Table:
    table = Table("component", "tensors", "parameters")
    found: dict[str, list[ParamSpec]] = {}
    for path, spec in leaves.items():
        parts = [part for part in path.split(".") if not part.isdigit()]
        found.setdefault(".".join(parts[:3]), []).append(spec)
    for name, specs in found.items():
        table.add_row(name, f"{len(specs):,}", f"{_count(specs):,}")
    return table


def _matching(leaves: Mapping[str, ParamSpec], glob: str) -> Table:
    rules = Rules({glob: True}, of="--match")
    rules.require_used(leaves)
    table = Table("parameter", "shape", "axes", "parameters")
    for path, spec in leaves.items():
        if rules.find(path):
            axes = ", ".join(axis or "-" for axis in spec.axes)
            table.add_row(path, "x".join(map(str, spec.shape)), axes, f"{math.prod(spec.shape):,}")
    return table


def _count(specs: Any) -> int:
    return sum(math.prod(spec.shape) for spec in specs)


COMMANDS = {"params": (ParamsOptions, run)}
