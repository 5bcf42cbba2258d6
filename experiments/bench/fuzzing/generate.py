"""A random program from a seed: options and arguments first, then losses, then what becomes of their gradients."""

import random
import warnings
from dataclasses import replace

from experiments.bench.fuzzing.eager import run_eagerly
from experiments.bench.fuzzing.losses import random_loss
from experiments.bench.fuzzing.options import random_options
from experiments.bench.fuzzing.program import DEFAULT_ROWS, Program, leaf_paths
from experiments.bench.fuzzing.results import give_gradients, random_metrics, random_updates
from experiments.bench.fuzzing.trees import Shapes, random_batch, random_tree
from experiments.bench.fuzzing.writer import Writer

_ATTEMPTS = 4


def generate(seed: int) -> Program:
    """The random program of a seed: of a few attempts the first that runs eagerly, else the last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(_ATTEMPTS):
            program = _attempt(seed, random.Random(f"{seed}/{attempt}"))
            try:
                run_eagerly(program)
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError):
                continue
            break
    return program


def _attempt(seed: int, rng: random.Random) -> Program:
    program, subtrees, micro = _with_arguments(seed, rng)
    writer = Writer(rng, program, subtrees, micro)
    scope = writer.scope
    if rng.random() < 0.3:
        writer.give_batch(scope, whole=True)
        scope.grow(rng.randint(1, 3))
    before = tuple(scope.lines)
    scope.lines.clear()
    losses = tuple(random_loss(writer, str(i)) for i in range(rng.choices((1, 2, 3), (0.82, 0.16, 0.02))[0]))
    scope.prefix = "u"
    for loss in losses:
        give_gradients(writer, loss)
    scope.grow(rng.choice((0, 0, 1, 2, 4)))
    updates = tuple(random_updates(writer, losses).items())
    metrics = tuple(random_metrics(writer, losses).items())
    return replace(
        program, before=before, losses=losses, after=tuple(scope.lines), updates=updates, metrics=metrics
    )  # fmt: skip


def _with_arguments(seed: int, rng: random.Random) -> tuple[Program, list[str], int]:
    """A program without lines, the subtrees that it may be differentiated by, and how many micro-batches it has."""
    options = random_options(rng)
    on_mesh = options.mesh is not None
    micro = rng.choice((2, 3)) if not on_mesh and rng.random() < 0.12 else 1
    low = "float32" if options.precision or rng.random() < 0.05 else "float64"
    shapes = Shapes(rng, rng.choice((3, 4, 5)), low, dicts_only=on_mesh)
    leaves, nesting, subtrees = random_tree(shapes)
    batch = random_batch(rng, shapes, micro, low=options.precision)
    program = Program(seed, leaves, nesting, batch, options=options)
    if rng.random() < 0.2:
        program = replace(program, captured=(("CAPTURED", _constant(rng, shapes)),))
    if on_mesh:
        program = replace(program, specs=_known(rng, program, subtrees))
    return program, subtrees, micro


def _constant(rng: random.Random, shapes: Shapes) -> str:
    """Source of a tensor that a program captures: a row, a square, rows as of a batch."""
    width, rows = shapes.width, rng.choice((None, shapes.width, DEFAULT_ROWS[0]))
    count, view = (width, "") if rows is None else (rows * width, f".view({rows}, {width})")
    return f"torch.linspace(-1.0, 1.0, {count}, dtype={shapes.dtype}){view}"


def _known(rng: random.Random, program: Program, subtrees: list[str]) -> tuple[str, ...]:
    """The leaves that a plan knows: what is differentiated, and most others."""
    made_by = dict(program.leaves)
    wanted = {n for p, n in leaf_paths(program.tree, "state").items() if p.startswith(tuple(subtrees))}
    wanted |= {n for n in made_by if rng.random() < 0.7}
    return tuple(sorted(n for n in wanted if made_by[n].startswith("normal")))
