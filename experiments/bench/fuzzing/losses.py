"""Random losses: lines over parameters and batch, perhaps the same for each layer of a list, and a number of them."""

import re
from dataclasses import replace

from experiments.bench.fuzzing.program import Line, Loss
from experiments.bench.fuzzing.scope import Scope, Value
from experiments.bench.fuzzing.writer import Writer, is_alike, is_float
from ftrain import tree

_SUMS = ("{0}.square().mean()", "{0}.sin().sum()", "({0} * 0.5).tanh().mean()", "{0}.abs().add(0.1).log().mean()")
_ROW_SUMS = ("{0}.square().sum()", "{0}.sin().sum()", "({0} * 0.5).tanh().sum()")
_COUNTS = (
    "torch.full((), float({0}.numel()), dtype=torch.float64)",
    "torch.tensor(float({0}.shape[0]), dtype=torch.float64)",
    '(batch["i"] > 1).sum().double()',
)
_MEMBER = re.compile(r'p0\["layers"\]\[(\d+)\]')


def random_loss(writer: Writer, name: str) -> Loss:
    """A loss of one or two subtrees of the state."""
    rng, scope = writer.rng, writer.scope.inner("h")
    count = 1 if writer.micro > 1 else rng.choices((1, 2), (0.75, 0.25))[0]
    subtrees = tuple(rng.sample(writer.subtrees, min(len(writer.subtrees), count)))
    scope.values = [v for v in scope.values if _may_close_over(writer, v, subtrees)]
    for number, subtree in enumerate(subtrees):
        scope.names[f"p{number}"] = tree.map(writer.shown, writer.value(subtree))
        for path in writer.paths(subtree):
            argument = f"p{number}{path[len(subtree) :]}"
            scope.give(argument, eval(argument, scope.names))
    writer.give_batch(scope)
    _warm_up(writer, scope)
    scope.grow(rng.choice((1, 1, 2, 3, 5)))
    _layers(writer, scope)
    scope.grow(rng.randint(0, 2))
    aux = _aux(writer, scope)
    return Loss(name, subtrees, tuple(scope.lines), _result(writer, scope), aux, writer.micro)


def _may_close_over(writer: Writer, v: Value, subtrees: tuple[str, ...]) -> bool:
    """True for what a loss may read beside its arguments."""
    if v.rows and writer.micro > 1:
        return False
    if not v.expression.startswith("state"):
        return True
    if writer.on_mesh and is_float(v.value):  # it is a piece there, which the loss would not gather
        return False
    return not v.expression.startswith(subtrees) or writer.rng.random() < 0.1


def _warm_up(writer: Writer, scope: Scope) -> None:
    """A product of the batch and a parameter, so that most losses have a gradient; then one with what is captured."""
    for text, kind, other in (("{0} @ {1}", "w", r"p\d"), ("{0} * {1}", "c", r"p\d"), ("{0} * {1}", "=", "CAPTURED")):
        rows = [v for v in scope.floats() if v.rows]
        x = rows[-1] if kind == "=" else next(v for v in rows if v.expression == 'batch["x"]')
        parameters = [v for v in scope.values if re.match(other, v.expression)]
        writer.rng.shuffle(parameters)
        for v in parameters:
            line = Line(text, (x.expression, v.expression), f"h{len(scope.lines)}", "product")
            if scope.fits(kind, v, [x]) and scope.run(line, [x, v]):
                break


def _layers(writer: Writer, scope: Scope) -> None:
    """The same lines for each member of a list of layers, each reading what the one before made."""
    members = sorted({found.group() for v in scope.values if (found := _MEMBER.match(v.expression))})
    ready = [v for v in scope.values if v.rows and is_float(v.value) and v.value.dim() == 2 and not v.argument]
    if len(members) < 2 or not ready:
        return
    start, count = ready[-1], len(scope.lines)
    others = tuple(members[1:])
    scope.values = [v for v in scope.values if not v.expression.startswith(others)]
    scope.values.append(start)
    scope.grow(writer.rng.randint(1, 4))
    block = scope.lines[count:]
    made = {line.out for line in block}
    ends = [v for v in scope.values if v.expression in made and is_alike(v.value, start.value)]
    if ends:
        _repeat(scope, block, members, (start.expression, ends[-1].expression))


def _repeat(scope: Scope, block: list[Line], members: list[str], ends: tuple[str, str]) -> None:
    """Run a block for the other members; `ends`: the variables that it begins and ends with."""
    start, end = ends
    rename, read = {start: end}, {v.expression: v for v in scope.values}
    for member in members[1:]:
        for line in block:
            ins = tuple(rename.get(i, i.replace(members[0], member)) for i in line.ins)
            out = f"h{len(scope.lines)}" if line.out else None
            made = scope.run(replace(line, ins=ins, out=out), [read[i] for i in line.ins])
            if made is None:
                return
            if line.out and out:
                rename[line.out], read[out] = out, made
        rename[start] = rename.get(end, end)


def _aux(writer: Writer, scope: Scope) -> tuple[str, ...]:
    rng = writer.rng
    if rng.random() < 0.6:
        return ()
    fitting = [v for v in scope.floats() if v.expression.startswith(("h", "p", "v"))]
    fitting = [v for v in fitting if not (writer.on_mesh and (v.rows or v.argument))]
    return tuple(v.expression for v in rng.sample(fitting, min(len(fitting), rng.randint(1, 2))))


def _result(writer: Writer, scope: Scope) -> Line:
    """The number that is returned: of the last values and some others."""
    rng, floats = writer.rng, scope.floats()
    own = [v for v in floats if v.expression.startswith("h")] or floats
    if not writer.on_mesh and writer.micro == 1 and rng.random() < 0.7:
        terms = [own[-1], rng.choice(own)]
        parts = [rng.choice(_SUMS).replace("{0}", f"{{{i}}}") for i in range(len(terms))]
        return Line(" + ".join(parts), tuple(v.expression for v in terms), None, "scalar")
    rows = [v for v in own if v.rows] or [v for v in floats if v.rows]
    one, other, kind = rng.choice(rows[-3:]), rng.choice(rows), rng.choice(("mean of", "mean", "weighted sum"))
    if kind == "mean of":
        return Line("Mean.of({0})", (one.expression,), None, kind)
    mean = f"Mean({rng.choice(_ROW_SUMS)}, {rng.choice(_COUNTS)})"
    if kind == "mean":
        return Line(mean, (one.expression,), None, kind)
    second = rng.choice(("Mean.of({1}.square())", mean.replace("{0}", "{1}")))
    text = f'weighted_sum({{{{"a": {mean}, "b": {second}}}}}, {{{{"b": 0.3}}}})'
    return Line(text, (one.expression, other.expression), None, kind)
