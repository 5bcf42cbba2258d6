"""A random step as plain Python source, and as functions that errors can point into."""

import linecache
from collections.abc import Callable
from typing import Any

from experiments.bench.fuzzing.program import Loss, Options, Program, leaf_paths, tree_source

_HEADER = """import torch
import torch.nn.functional as F

import ftrain
from ftrain import Layout, Mean, Mesh, Plan, Remat, accumulate, value_and_grad, weighted_sum
from experiments.bench.fuzzing.program import Pair
from ftrain.modules.spec import Constant, ParamSpec
"""
_NORMAL = """

def normal(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
"""
_MAIN = """

if __name__ == "__main__":
    jitted, eager = ftrain.jit(step, **OPTIONS), make_state()
    state = make_state()
    for rows in ROWS:
        torch.manual_seed(0)
        eager, expected = step(eager, make_batch(rows))
        torch.manual_seed(0)
        state, found = jitted(state, make_batch(rows))
        print("expected", eager, expected, "found", state, found, sep="\\n")
"""


def source_of(program: Program, *, main: bool = False) -> str:
    """The program as a module with `make_state`, `make_batch`, `step`, `OPTIONS` and `ROWS`; with `main` it runs the
    step eagerly and jitted and prints both results.
    """
    parts = [_HEADER]
    parts += [f"\n{name} = {text}" for name, text in program.captured]
    parts += [_NORMAL, _make_state(program), _make_batch(program), _step(program), _options(program)]
    if main:
        parts.append(_MAIN)
    return "".join(parts)


def load(program: Program) -> dict[str, Any]:
    """The program's module as a dict of its names; its file is one that errors and `linecache` know."""
    text = source_of(program)
    linecache.cache[program.file] = (len(text), None, text.splitlines(keepends=True), program.file)
    names: dict[str, Any] = {"__name__": "fuzzed"}
    exec(compile(text, program.file, "exec"), names)
    return names


def _make_state(program: Program) -> str:
    lines = [f"    {name} = {text}\n" for name, text in program.leaves]
    return f"\n\ndef make_state():\n{''.join(lines)}    return {tree_source(program.tree, '', _name)}\n"


def _make_batch(program: Program) -> str:
    items = ", ".join(f'"{key}": {text}' for key, text in program.batch)
    return f"\n\ndef make_batch(rows):\n    return {{{items}}}\n"


def _step(program: Program) -> str:
    lines = [line.source() for line in program.before]
    for loss in program.losses:
        lines += _loss(loss)
    lines += [line.source() for line in program.after]
    updates = dict(program.updates)
    new = tree_source(program.tree, "state", lambda path, _: updates.get(path, path))
    metrics = ", ".join(f'"{name}": {text}' for name, text in program.metrics)
    lines.append(f"return {new}, {{{metrics}}}")
    return "\n\ndef step(state, batch):\n" + "".join(f"    {line}\n" for line in lines)


def _loss(loss: Loss) -> list[str]:
    names = [f"p{i}" for i in range(len(loss.subtrees))]
    body = [line.source() for line in loss.lines]
    aux = f"({', '.join(loss.aux)},)" if loss.aux else ""
    body.append(f"return {loss.result.text.format(*loss.result.ins)}{', ' + aux if aux else ''}")
    function = f"loss{loss.name}"
    if loss.micro_batches > 1:
        function = f"accumulate({function}, {loss.micro_batches}{', has_aux=True' if aux else ''}, stacked=True)"
    many = f", argnums={tuple(range(len(names)))}" if len(names) > 1 else ""
    left = f"({loss.value}, aux{loss.name}), {loss.gradient}" if aux else f"{loss.value}, {loss.gradient}"
    call = f"value_and_grad({function}{many}{', has_aux=True' if aux else ''})"
    return [
        f"def loss{loss.name}({', '.join(names)}, batch):",
        *(f"    {line}" for line in body),
        f"{left} = {call}({', '.join(loss.subtrees)}, batch)",
    ]


def _options(program: Program) -> str:
    options, given = program.options, []
    if options.donate:
        given.append('donate="state"')
    if options.remat:
        given.append(f"remat={options.remat}")
    if options.backend != Options.backend:
        given.append(f'backend="{options.backend}"')
    if options.precision:
        given.append(f'precision="{options.precision}"')
    if not options.overlap:
        given.append("overlap=False")
    if options.mesh:
        given += [f"plan=Plan({options.mesh}, {options.layout})", f"specs={_specs(program)}"]
    return f"\n\nOPTIONS = dict({', '.join(given)})\nROWS = {options.rows}\n"


def _specs(program: Program) -> str:
    """The specs of the leaves that the plan knows, at their places."""
    shapes = {name: text.partition("(")[2].partition(")")[0].split(", ")[1:] for name, text in program.leaves}
    known = {path: name for path, name in leaf_paths(program.tree, "").items() if name in program.specs}
    return tree_source(_only(program.tree, set(known.values())), "", lambda _, name: _spec(shapes[name]))


def _spec(sizes: list[str]) -> str:
    sizes = [s for s in sizes if "=" not in s]
    axes = ("embed", "mlp", "heads")[: len(sizes)]
    shape = f"({', '.join(sizes)},)" if sizes else "()"
    return f"ParamSpec({shape}, {axes!r}, Constant(0.0))"


def _only(tree: Any, names: set[str]) -> Any:
    """The part of a nesting of dicts and lists that holds these leaves."""
    if isinstance(tree, str):
        return tree if tree in names else None
    if isinstance(tree, dict):
        parts = {key: _only(child, names) for key, child in tree.items()}
        return {key: part for key, part in parts.items() if part is not None} or {}
    return type(tree)(_only(child, names) for child in tree) or None


_name: Callable[[str, str], str] = lambda _, name: name  # noqa: E731
