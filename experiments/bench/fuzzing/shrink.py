"""Make a failing program smaller while it fails in the same way: options, losses, lines and leaves are taken out."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from experiments.bench.fuzzing.program import Line, Loss, Options, Program, leaf_paths, without_leaf

_PLAIN: dict[str, Any] = {field.name: field.default for field in fields(Options) if field.name != "mesh"}


def shrink(program: Program, fails: Callable[[Program], bool], *, seconds: float = 60.0) -> Program:
    """The smallest program found within the time for which `fails` is still true; it is for the given one."""
    end = time.monotonic() + seconds
    smaller: Program | None = program
    while smaller is not None:
        program, smaller = smaller, None
        for candidate in candidates(program):
            if time.monotonic() > end:
                return program
            if fails(candidate):
                smaller = candidate
                break
    return program


def candidates(program: Program) -> Iterator[Program]:
    """Programs with one thing less, the largest things first."""
    yield from _without_options(program)
    yield from _without_losses(program)
    yield from _without_items(program)
    yield from _without_lines(program)
    yield from _with_simpler_losses(program)
    yield from _without_leaves(program)


def _without_options(program: Program) -> Iterator[Program]:
    options = program.options
    if options.mesh:
        yield replace(program, options=replace(options, mesh=None), specs=())
    for name, plain in _PLAIN.items():
        if getattr(options, name) != plain:
            yield replace(program, options=replace(options, **{name: plain}))
    if len(options.rows) > 2:
        yield replace(program, options=replace(options, rows=options.rows[:-1]))
        yield replace(program, options=replace(options, rows=options.rows[1:]))


def _without_losses(program: Program) -> Iterator[Program]:
    for loss in program.losses:
        fewer = tuple(other for other in program.losses if other is not loss)
        without = replace(program, losses=fewer, metrics=_without_mention(program.metrics, loss))
        for number, subtree in enumerate(loss.subtrees):
            without = _substituted(without, loss.of_gradient(number), subtree, prefix=True)
        yield without


def _without_mention(metrics: tuple[tuple[str, str], ...], loss: Loss) -> tuple[tuple[str, str], ...]:
    gone = (loss.value, f"aux{loss.name}")
    return tuple((name, text) for name, text in metrics if text not in gone)


def _without_items(program: Program) -> Iterator[Program]:
    if len(program.updates) > 1:
        yield replace(program, updates=())
    if len(program.metrics) > 1:
        yield replace(program, metrics=())
    for i in range(len(program.metrics)):
        yield replace(program, metrics=_without(program.metrics, i))
    for i in range(len(program.updates)):
        yield replace(program, updates=_without(program.updates, i))
    for i, (path, text) in enumerate(program.updates):
        simple = f"{path} - {text.rpartition(' ')[2]}"
        if len(simple) < len(text):
            yield replace(program, updates=(*program.updates[:i], (path, simple), *program.updates[i + 1 :]))


def _without_lines(program: Program) -> Iterator[Program]:
    for number, loss in reversed(list(enumerate(program.losses))):
        for i in reversed(range(len(loss.lines))):
            for replaced in _replacements(loss.lines[i]):
                lines = tuple(_reading(line, loss.lines[i].out, replaced) for line in _without(loss.lines, i))
                aux = tuple(replaced if a == loss.lines[i].out else a for a in loss.aux)
                result = _reading(loss.result, loss.lines[i].out, replaced)
                smaller = replace(loss, lines=lines, aux=aux, result=result)
                yield replace(program, losses=(*program.losses[:number], smaller, *program.losses[number + 1 :]))
    for field in ("after", "before"):
        lines = getattr(program, field)
        for i in reversed(range(len(lines))):
            for replaced in _replacements(lines[i]):
                fewer: dict[str, Any] = {field: _without(lines, i)}
                without = replace(program, **fewer)
                yield without if lines[i].out is None else _substituted(without, lines[i].out, replaced, prefix=False)


def _replacements(line: Line) -> Iterator[str]:
    """What may stand where the line's result did."""
    yield from dict.fromkeys(line.ins) if line.out and line.ins else [line.out or ""]


def _with_simpler_losses(program: Program) -> Iterator[Program]:
    for number, loss in enumerate(program.losses):
        found = [replace(loss, aux=_without(loss.aux, i)) for i in range(len(loss.aux))]
        if loss.result.feature == "scalar":
            simple = [Line("{0}.sum()", (name,), None, "scalar") for name in dict.fromkeys(loss.result.ins)]
            found += [replace(loss, result=line) for line in simple if line.text != loss.result.text]
        if loss.result.feature in ("mean", "weighted sum"):
            found += [replace(loss, result=Line("Mean.of({0})", (name,), None, "mean of")) for name in loss.result.ins]
        for smaller in found:
            dropped = () if smaller.aux else (f"aux{loss.name}",)
            metrics = tuple((name, text) for name, text in program.metrics if text not in dropped)
            losses = (*program.losses[:number], smaller, *program.losses[number + 1 :])
            yield replace(program, losses=losses, metrics=metrics)


def _without_leaves(program: Program) -> Iterator[Program]:
    for name, _ in reversed(program.leaves):
        smaller = without_leaf(program.tree, name)
        if smaller is None:
            continue
        kept = leaf_paths(smaller, "state")
        yield replace(
            program,
            tree=smaller,
            leaves=tuple((n, text) for n, text in program.leaves if n != name),
            updates=tuple((path, text) for path, text in program.updates if path in kept),
            specs=tuple(n for n in program.specs if n != name),
        )


def _reading(line: Line, old: str | None, new: str) -> Line:
    return replace(line, ins=tuple(new if i == old else i for i in line.ins))


def _substituted(program: Program, old: str, new: str, *, prefix: bool) -> Program:
    """The program with `new` in the place of the expression `old`; with `prefix` also at the start of longer ones."""

    def sub(text: str) -> str:
        if prefix:
            return text.replace(f"{old}[", f"{new}[").replace(f"{old}.", f"{new}.") if old in text else text
        return _whole_words(text, old, new)

    def of_line(line: Line) -> Line:
        return replace(line, ins=tuple(new if i == old else sub(i) for i in line.ins))

    losses = (replace(x, lines=tuple(map(of_line, x.lines)), result=of_line(x.result)) for x in program.losses)
    return replace(
        program,
        before=tuple(map(of_line, program.before)),
        after=tuple(map(of_line, program.after)),
        losses=tuple(losses),
        updates=tuple((path, new if text == old else sub(text)) for path, text in program.updates),
        metrics=tuple((name, new if text == old else sub(text)) for name, text in program.metrics),
    )


def _whole_words(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", lambda _: new, text)


def _without(items: tuple, i: int) -> tuple:
    return items[:i] + items[i + 1 :]
