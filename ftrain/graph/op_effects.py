"""What an op does beside computing its result: nothing, draw random numbers, write. One answer for every pass.

An op's schema does not say it all: `native_batch_norm` writes its statistics and does not tell, dropout draws from
torch's generator. What is asked here: may a node be recomputed, moved across others (order), left out when nobody reads
it (clean), fused by a compiler. An op that is not known here may do anything.
"""

import enum
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ftrain.graph.fused import fused_body, is_fused
from ftrain.graph.loop import is_loop, loop_body

_aten = torch.ops.aten


class Effect(enum.IntEnum):
    """What an op does beside computing its result; the greater, the less may be done with it.

    - `PURE`: nothing, and equal inputs give equal results.
    - `RANDOM`: it draws from torch's generator.
    - `WRITES`: it writes into arguments.
    - `ANYTHING`: unknown.
    """

    PURE = 0
    RANDOM = 1
    WRITES = 2
    ANYTHING = 3


OURS = frozenset({"ftrain", "_c10d_functional", "prims"})
"""Namespaces whose ops do what their schemas say: see `ftrain.kernels.opaque`. Collectives are among them: when they
may be recomputed is a question of cost."""

HIDDEN_WRITES = {
    "aten::native_batch_norm": ("training", ("running_mean", "running_var")),
    "aten::cudnn_batch_norm": ("training", ("running_mean", "running_var")),
    "aten::miopen_batch_norm": ("training", ("running_mean", "running_var")),
}
"""Ops that write into arguments which their schemas do not mark: where which flag is set, and these arguments."""

_CHANCE = ("dropout_p", "dropout")
_FLAGS = ("train", "training")

_REPLAYED = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention_backward",
        "aten::_scaled_dot_product_efficient_attention_backward",
        "aten::native_dropout_backward",
    }
)
"""Tagged as random, and made from the seed or the mask of the forward alone."""

RANDOM = frozenset(
    {
        "aten::_cudnn_init_dropout_state",
        "aten::_efficient_attention_forward",
        "aten::_flash_attention_forward",
        "aten::_fused_dropout",
        "aten::_sample_dirichlet",
        "aten::_standard_gamma",
        "aten::binomial",
        "aten::_cudnn_rnn",
        "aten::miopen_rnn",
        "aten::multinomial",
        "aten::native_dropout",
        "aten::poisson",
    }
)
"""Random whether torch says so or not."""

_MAYBE_RANDOM = frozenset({"_cudnn_rnn", "miopen_rnn", "native_dropout", "_fused_dropout", "dropout", "alpha_dropout"})

_PYTHON = frozenset(
    {
        value
        for module in (operator, math)
        for name in dir(module)
        if callable(value := getattr(module, name)) and name not in ("setitem", "delitem", "iadd")
    }
    | {torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sqrt, torch.sym_sum}
)
"""Functions of sizes and parts of tuples."""


def effect_of(node: fx.Node) -> Effect:
    """What a node of a graph does; of a loop or a fused run, the most that an op in it does."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Effect.PURE
    if node.op != "call_function":
        return Effect.ANYTHING
    if is_loop(node):
        return effect_of_graph(loop_body(node))
    if is_fused(node):
        return effect_of_graph(fused_body(node))
    if isinstance(node.target, torch._ops.OpOverload):
        return effect_of_op(node.target, node.args, node.kwargs)
    return Effect.PURE if node.target in _PYTHON else Effect.ANYTHING


def effect_of_graph(module: fx.GraphModule) -> Effect:
    """The most that an op of the graph does."""
    return max(map(effect_of, module.graph.nodes), default=Effect.PURE)


def is_pure(node: fx.Node) -> bool:
    """True for a node that may be recomputed, moved to wherever its inputs exist, and left out if nobody reads it."""
    return effect_of(node) is Effect.PURE


def effect_of_op(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Effect:
    """What an op does with these arguments: dropout with probability 0 draws nothing.

    >>> import torch
    >>> from ftrain.graph.op_effects import effect_of_op
    >>> aten = torch.ops.aten
    >>> effect_of_op(aten.mul.Tensor, (), {}).name, effect_of_op(aten.mul_.Tensor, (), {}).name
    ('PURE', 'WRITES')
    """
    schema = op._schema
    if schema.is_mutable or hidden_writes(op, args, kwargs):
        return Effect.WRITES
    random = op_draws(op, args, kwargs)
    if op.namespace in OURS and not random:
        return Effect.PURE
    if op.namespace not in ("aten", "prim", *OURS):
        return Effect.ANYTHING
    if "assert" in schema.name:
        return Effect.ANYTHING  # nobody reads it, and it must stay
    return Effect.RANDOM if random else Effect.PURE


def draws(node: fx.Node) -> bool:
    """True for a node that draws numbers from torch's generator, also one that writes them into an argument; of a loop
    or a fused run, if an op in it does.
    """
    if is_loop(node):
        return any(map(draws, loop_body(node).graph.nodes))
    if is_fused(node):
        return any(map(draws, fused_body(node).graph.nodes))
    return isinstance(node.target, torch._ops.OpOverload) and op_draws(node.target, node.args, node.kwargs)


def op_draws(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if an op draws from torch's generator with these arguments: attention whose dropout is 0 does not.

    >>> import torch
    >>> from ftrain.graph.op_effects import op_draws
    >>> op_draws(torch.ops.aten.bernoulli_.float, (), {}), op_draws(torch.ops.aten.mul.Tensor, (), {})
    (True, False)
    """
    name = op._schema.name
    known = name in RANDOM or torch.Tag.nondeterministic_seeded in op.tags
    return known and name not in _REPLAYED and _by_chance(op, args, kwargs)


def hidden_writes(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.Node]:
    """The arguments that an op writes into though its schema does not say so, as `native_batch_norm` into its
    statistics.

    `args`, `kwargs`: those of the op, positional and by name; nodes or values.
    """
    found = HIDDEN_WRITES.get(op._schema.name)
    if found is None or any(a.is_write for a in op._schema.arguments):
        return []
    flag, names = found
    value = argument_reader(op, args, kwargs)
    if value(flag) is False:
        return []
    return [value(name) for name in names if value(name) is not None]


def argument_reader(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """A function from an argument's name to its value, or to its default where it is not given; None if there is none.

    `args`, `kwargs`: those of the op, positional and by name.
    """
    arguments = op._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return lambda name: given.get(name, defaults.get(name))


def _by_chance(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False in evaluation, and for attention and recurrent layers whose dropout is 0."""
    name = op._schema.name.removeprefix("aten::")
    value = argument_reader(op, args, kwargs)
    if name in _MAYBE_RANDOM and any(value(flag) is False for flag in _FLAGS):
        return False
    chances = [value(n) for n in _CHANCE if any(a.name == n for a in op._schema.arguments)]
    return not chances or any(not isinstance(p, int | float) or p != 0 for p in chances)
