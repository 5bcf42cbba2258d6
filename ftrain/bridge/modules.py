"""`from_module`: any torch module as a `Model`: a pure function of its parameters, its state, a batch and a key."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.draws import drawing
from ftrain.bridge.plain import plain_loss_of, widened
from ftrain.bridge.skeleton import buffers, call, detached, flatten, nest, parameters
from ftrain.bridge.specs import inits_of, specs_of
from ftrain.bridge.statistics import WholeBatch
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree

Loss = Callable[[Any, Any], Mean]


def from_module(
    module: nn.Module,
    loss: Loss | None = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    state: Sequence[str] = (),
) -> Model:
    """A torch module as pure functions over a tree of parameters. The module stays as it is, and shares no memory.

    Args:
        module: in the mode (train or eval) in which it is to run. Its parameters may be on the meta device.
        loss: from the module's result and the batch to a `Mean`; None for a model without a loss.
        inputs: from the batch to the module's arguments: a tuple, or a dict of keywords. None: the leaves of the batch
            that are named as arguments of its `forward`.
        state: globs over the names of buffers that a forward writes and that are to come back; those of BatchNorm are
            found without.

    The model's functions: `loss(params, batch, key=None, state=None)` gives a `Mean`, or `(Mean, state)` if the module
    has state; `logits` gives what the module gives. `load()` gives the module's own numbers.

    ValueError for a loss that is no `Mean`, for arguments that the batch has not, for parameters with hooks or without
    a shape, for a module that cannot be copied, and, when it runs, for a buffer that a forward writes and that is no
    state.

    >>> import ftrain, torch
    >>> from ftrain.bridge import from_module
    >>> def squares(out, batch):
    ...     return ftrain.Mean.of((out - batch["y"]).square())
    >>> model = from_module(torch.nn.Linear(3, 1), squares, inputs=lambda batch: (batch["x"],))
    >>> batch = {"x": torch.ones(4, 3), "y": torch.zeros(4, 1)}
    >>> step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
    >>> value, grads = step(model.load(), batch)
    >>> sorted(grads)
    ['bias', 'weight']
    """
    own = _copied(module)
    held = {name: x.clone() for name, x in buffers(own).items()}
    known = statistics(own)
    written = tuple(name for name in held if name in known or any(fnmatchcase(name, g) for g in state))
    bridged = Bridged(own, type(module).__name__, held, written, loss, inputs)
    return Model(
        name=f"{type(module).__name__} (a module)",
        specs=nest(specs_of(parameters(own), inits=inits_of(own))),
        batch={},
        loss=bridged.loss,
        logits=bridged.logits,
        load=lambda into=None: _own_numbers(module, into),
        plain=None if loss is None else bridged.plain,
        state=nest({name: held[name] for name in written}),
        packs=False,
        alone="nothing is known of its dims",
        why="bridged",
    )


@dataclass(frozen=True)
class Bridged:
    """A module as functions. `held`: its buffers by name. `written`: those that are its state."""

    module: nn.Module
    name: str
    held: Mapping[str, Tensor]
    written: tuple[str, ...] = ()
    loss_of: Loss | None = None
    inputs: Callable[[Any], Any] | None = None
    _wrapped: "_WithBuffers" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_wrapped", _WithBuffers(self.module))

    def loss(self, params: Tree, batch: Any, key: Tensor | None = None, state: Tree | None = None) -> Any:
        """The `Mean` of the batch, or `(Mean, new state)` if the module has state. `key`: int64 `[2]`, for dropout.

        ValueError without a loss, for one that gives no `Mean`, and as `run`.
        """
        if self.loss_of is None:
            raise ValueError(f"{self.name} has no loss: from_module(module, loss) takes one")
        result, after = self.run(params, batch, key, state)
        mean = self._mean(self.loss_of, result, batch)
        return (mean, after) if self.written else mean

    def _mean(self, loss: Loss, result: Any, batch: Any) -> Mean:
        mean = loss(result, batch)
        if not isinstance(mean, Mean):
            raise ValueError(
                f"{self.name}: its loss gives a {type(mean).__name__}, not a ftrain.Mean(total, count), which says "
                "what it is a mean of"
            )
        return mean

    def plain(self, params: Tree, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the module by itself, eager, in float64, 0-d, and its gradients by name. Nothing is dropped.

        ValueError as `loss`.
        """

        loss_of = self.loss_of
        assert loss_of is not None

        def loss(module: nn.Module, batch: Any) -> Mean:
            args, kwargs = self._arguments(batch)
            return self._mean(loss_of, module(*args, **kwargs), batch)

        return plain_loss_of(copy.deepcopy(self.module), loss, params, widened(batch), as_it_is=True)

    def logits(self, params: Tree, batch: Any, key: Tensor | None = None, state: Tree | None = None) -> Any:
        """What the module gives for the batch. `key`: int64 `[2]`, for dropout."""
        return self.run(params, batch, key, state)[0]

    def run(self, params: Tree, batch: Any, key: Tensor | None, state: Tree | None) -> tuple[Any, Tree]:
        """The module's result, and its state afterwards. `key`: int64 `[2]`, for dropout.

        ValueError for a batch that lacks an argument, and for a buffer that is written and is no state.
        """
        given = flatten(state) if state else {name: self.held[name] for name in self.written}
        before = {**self.held, **{name: x.clone() for name, x in given.items()}}
        versions = {name: x._version for name, x in before.items()}
        args, kwargs = self._arguments(batch)
        tensors = {f"inner.{name}": x for name, x in {**before, **flatten(params)}.items()}
        with drawing(key, _rows(batch), watched=True), WholeBatch():
            result, after = call(self._wrapped, tensors, args, kwargs)
        changed = {n for n, x in after.items() if n in before and (x is not before[n] or x._version != versions[n])}
        strange = sorted(changed - set(self.written))
        if strange:
            raise ValueError(
                f"{self.name}: its forward writes the buffer {strange[0]!r}, which is no state of the model: "
                f"from_module(module, state=[{strange[0]!r}]) makes it one, and it comes back with the loss"
            )
        return result, nest({name: after[name] for name in self.written})

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.inputs is not None:
            found = self.inputs(batch)
            return ((), found) if isinstance(found, dict) else (tuple(found), {})
        names = inspect.signature(self.module.forward).parameters
        if not isinstance(batch, dict):
            raise ValueError(f"{self.name}: the batch is a {type(batch).__name__}: say from_module(inputs=...)")
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [name for name, p in names.items() if p.default is p.empty and p.kind in named]
        missing = [name for name in needed if name not in batch]
        if missing:
            raise ValueError(
                f"{self.name}: its forward needs {missing[0]!r}, and the batch has {', '.join(map(str, batch))}: say "
                "from_module(inputs=lambda batch: ...)"
            )
        return (), {name: batch[name] for name in names if name in batch}


class _WithBuffers(nn.Module):
    """Gives the inner module's result, and its buffers as they are after the call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        result = self.inner(*args, **kwargs)
        return result, dict(self.inner.named_buffers())


def statistics(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that normalizations over the batch write."""
    norms = {path for path, inner in module.named_modules() if isinstance(inner, nn.modules.batchnorm._NormBase)}
    return tuple(name for name, _ in module.named_buffers() if name.rpartition(".")[0] in norms)


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares no memory. ValueError for a module of which a copy would compute something else, or none."""
    name = type(module).__name__
    for path, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name}: parameter {path!r} has no shape before a first call: call the module once on a batch, then "
                "bridge it"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name}: parameter {path!r} has a hook on its gradient, which a pure function's parameters have not: "
                "remove the hook, and change the gradients between value_and_grad and the update"
            )
    if any(isinstance(inner, torch.jit.ScriptModule) for inner in module.modules()):
        raise ValueError(f"{name}: a part of it is TorchScript, which cannot be traced: give the module that it was")
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be copied ({str(error).partition('. ')[0]}): it keeps a tensor that was computed, or "
            "something that has no copy; of torch.nn.utils.weight_norm take torch.nn.utils.parametrizations.weight_norm"
        ) from error


def _rows(batch: Any) -> int:
    leaf = next((x for x in flatten(batch).values() if isinstance(x, Tensor) and x.dim()), None)
    return 0 if leaf is None else leaf.shape[0]


def _own_numbers(module: nn.Module, into: Tree | None) -> Tree:
    if into is not None:
        raise ValueError("a module's own numbers are given as a new tree: place them with the step's share")
    return nest({name: x.clone() for name, x in detached(module).items()})
