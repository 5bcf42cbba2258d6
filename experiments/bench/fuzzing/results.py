"""What a random step returns: new values of leaves, often from gradients, and metrics, some of which share memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.bench.fuzzing.program import Loss, leaf_paths
from experiments.bench.fuzzing.scope import Value
from experiments.bench.fuzzing.writer import Writer, is_alike, is_float
from ftrain import tree

_STEPS = (
    "{0} - 0.1 * {1}", "{0} - {1}", "{0} + {1}", "{0}.lerp({1}, 0.1)", "{0} - {1}.clamp(-1, 1)",
    "{0} - {1} / ({1}.norm() + 1)",
)  # fmt: skip
_NUMBERS = ("3", '"text"', "None", "(1.5, True)", "{}")
_SEEN = ('batch["x"]', 'batch["x"][:2]', 'batch["x"].detach()', 'batch["x"].mT')


def give_gradients(writer: Writer, loss: Loss) -> None:
    """Let the step's lines read a loss's gradients; numbers stand for them until the step is run."""
    generator = torch.Generator().manual_seed(7)

    def stand_in(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)

    grads = [tree.map(stand_in, writer.value(subtree)) for subtree in loss.subtrees]
    writer.scope.names[loss.gradient] = grads[0] if len(grads) == 1 else tuple(grads)
    for number, subtree in enumerate(loss.subtrees):
        for path in writer.paths(subtree):
            expression = loss.of_gradient(number) + path[len(subtree) :]
            writer.scope.values.append(Value(expression, writer.value(expression)))


def random_updates(writer: Writer, losses: Sequence[Loss]) -> dict[str, str]:
    """Expressions of leaves to those of their new values."""
    found = dict[str, str]()
    for path, name in leaf_paths(writer.program.tree, "state").items():
        value = writer.value(path)
        if name.startswith("k"):
            found[path] = f"ftrain.fold_in({path}, 1)"
        elif name.startswith("i") and isinstance(value, Tensor):
            found[path] = f"{path} + 1"
        elif is_float(value):
            new = _new_value(writer, path, value, losses)
            if new is not None:
                found[path] = new
    return found


def _new_value(writer: Writer, path: str, value: Tensor, losses: Sequence[Loss]) -> str | None:
    rng = writer.rng
    fitting = [v.expression for v in writer.scope.values if is_alike(v.value, value) and not v.rows]
    own = [
        f"{loss.of_gradient(i)}{path[len(subtree) :]}"
        for loss in losses
        for i, subtree in enumerate(loss.subtrees)
        if path in writer.paths(subtree)
    ]
    if rng.random() < 0.04:
        return rng.choice(fitting)
    if own and rng.random() < 0.75:
        return rng.choice(_STEPS).format(path, rng.choice(own))
    return None if rng.random() < 0.75 else rng.choice(_STEPS).format(path, rng.choice(fitting))


def random_metrics(writer: Writer, losses: Sequence[Loss]) -> dict[str, str]:
    """Names to expressions: losses, what they returned beside, parts of arguments, constants."""
    rng, found = writer.rng, dict[str, str]()
    for loss in losses:
        found[f"loss{loss.name}"] = loss.value
        if loss.aux:
            found[f"aux{loss.name}"] = f"aux{loss.name}"
    readable = [v for v in writer.scope.values if isinstance(v.value, Tensor) and not (writer.on_mesh and v.rows)]
    for i in range(rng.choices((0, 1, 2), (0.5, 0.3, 0.2))[0]):
        found[f"also{i}"] = rng.choice(readable).expression
    if rng.random() < 0.05:
        found["number"] = rng.choice(_NUMBERS)
    if rng.random() < 0.1:
        found["seen"] = 'Mean.of(batch["x"])' if writer.on_mesh else rng.choice(_SEEN)
    return found
