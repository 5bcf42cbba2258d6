"""What no linter knows of this house: which way imports point, that none go in a circle, and what experiments may name.

    python .ci/house.py

Prints each import against the order and exits with 1 if there is one. ARCHITECTURE.md tells the order of the rooms.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "sharding", "modules", "ftrain", "experiments")
ROOMS = (
    "lazy", "tree", "files", "optim", "graph", "trace", "analysis", "passes", "remat", "runtime", "report", "step",
    "checkpoint", "hf", "debug", "profile", "plan", "bridge", "resilience", "lora", "data",
    "tasks", "run", "cli", "__main__",
)  # fmt: skip


class Import(NamedTuple):
    """`module` imports `target` (and from it `name`) in this line of its file."""

    module: str
    target: str
    name: str
    line: str


def modules() -> dict[str, Path]:
    """All modules by the name under which they are imported."""
    found = {}
    for floor in FLOORS:
        inside = "" if floor in ("ftrain", "experiments") else "ftrain."
        for path in sorted((ROOT / floor).rglob("*.py")):
            if not any(part.is_symlink() for part in path.parents):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[inside + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: Mapping[str, Path]) -> Iterator[Import]:
    """What the modules import of each other, wherever it stands; what stands under TYPE_CHECKING is for readers."""
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        skipped = {n for block in ast.walk(tree) if _is_for_types(block) for n in ast.walk(block)}
        for node in ast.walk(tree):
            line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if node in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    target = inner if inner in known else node.module
                    if target in known:
                        yield Import(module, target, alias.name, line)
            elif isinstance(node, ast.Import):
                yield from (Import(module, a.name, "", line) for a in node.names if a.name in known)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def place(module: str) -> tuple[int, int]:
    """The number of a module's floor, and of its room where that is the trainer's."""
    first, *rest = module.split(".")
    floor = rest[0] if first == "ftrain" and rest and rest[0] in FLOORS else first
    room = rest[0] if floor == "ftrain" and rest else ""
    if floor == "ftrain" and room and room not in ROOMS:
        raise SystemExit(f"{module}: {room!r} is no room; rooms are {', '.join(ROOMS)} (.ci/house.py)")
    return FLOORS.index(floor), ROOMS.index(room) if room else len(ROOMS)


def against_the_order(found: list[Import]) -> list[str]:
    """Imports of what lies above: of `ftrain` itself too, which names everything, but for a room or a part of one."""
    wrong = []
    for module, target, _, line in found:
        if module != "ftrain" and not module.startswith("experiments") and place(target) > place(module):
            wrong.append(f"{line}: {module} imports {target}, which lies above it")
    return wrong


def circles(found: list[Import]) -> list[str]:
    """Modules that import each other, directly or through others."""
    edges: dict[str, set[str]] = {}
    for module, target, _, _ in found:
        if module != target:
            edges.setdefault(module, set()).add(target)
    state: dict[str, int] = {}
    wrong: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(edges.get(module, ())):
            if state.get(target) == 1:
                wrong.append("a circle: " + " -> ".join([*path[path.index(target) :], target]))
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    sys.setrecursionlimit(10_000)
    for module in sorted(edges):
        if module not in state:
            visit(module, [module])
    return wrong


def private_names(found: list[Import]) -> list[str]:
    """Names that experiments import though they are none of theirs: users copy experiments."""
    return [
        f"{line}: {module} imports {name}, a private name of {target}"
        for module, target, name, line in found
        if module.startswith("experiments") and not target.startswith("experiments") and name.startswith("_")
    ]


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = list(imports(modules()))
    wrong = [*against_the_order(found), *circles(found), *private_names(found)]
    print("\n".join(wrong) or f"{len(found)} imports, none against the order, no circle")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
