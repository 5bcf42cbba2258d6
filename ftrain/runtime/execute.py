"""Backends: a graph as Python over ATen, through Inductor, or as a CUDA graph.

Each takes a graph and returns a function from the list of flat inputs to the list of flat outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.aliasing import storage
from ftrain.graph.fused import fused_body, is_fused
from ftrain.graph.layouts import LayoutCheck
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import below_autograd, compile_with_inductor, written_out
from ftrain.graph.writes import written_arguments
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.borrow import LEAST_BYTES
from ftrain.runtime.cudagraph import cudagraph_program

Program = Callable[[Sequence[Tensor]], list[Tensor]]


def require_backend(backend: str) -> None:
    """ValueError that lists the backends, for a name that is none of them."""
    known = ("auto", "aten", "inductor", "cudagraph")
    if backend not in known:
        hint = "; to run a step eagerly: with ftrain.disable_jit()" if backend == "eager" else ""
        raise ValueError(f"backend={backend!r} is not one of {', '.join(known)}{hint}")


def choose(backend: str, device: torch.device) -> str:
    """Resolve "auto": "aten" on CPU, "inductor" on CUDA. ValueError for an unknown backend, and for "cudagraph" on a
    device that is not CUDA.
    """
    require_backend(backend)
    if backend == "cudagraph" and device.type != "cuda":
        raise ValueError(f"backend='cudagraph' needs arguments on a CUDA device; these are on {device}")
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "aten"
    return backend


def compile_graph(
    module: fx.GraphModule,
    backend: str,
    *,
    before_write: Callable[[], None],
    checked: Callable[[LayoutCheck], None] = lambda _: None,
    arguments: ArgumentMemory | None = None,
) -> Program:
    """Make the program of a graph in the form that runs (`pipeline.EXECUTED`); `module` is changed and must not be used
    elsewhere.

    - `backend`: resolved by `choose`.
    - `before_write`: called as late as possible before the program writes over an input of `LEAST_BYTES` or more.
    - `checked`: called once, after the first run, with the comparison of real and planned layouts.
    - `arguments`: where a CUDA graph keeps its arguments.

    ValueError for a graph that a CUDA graph cannot hold.
    """
    if backend != "aten":
        _compile_runs(module)
    if backend == "cudagraph":  # a record holds no Python calls
        return _FirstRun(
            module,
            lambda: waiting(python_program(module), before_write),
            lambda: waiting(cudagraph_program(module, python_program(module), arguments), before_write),
            checked,
        )
    _call_before_writes(module, before_write)
    return _FirstRun(module, lambda: python_program(module), lambda: python_program(module), checked)


class _FirstRun:
    """A program whose first run compares the layouts of all results with the plan."""

    def __init__(
        self,
        module: fx.GraphModule,
        first: Callable[[], Program],
        later: Callable[[], Program],
        checked: Callable[[LayoutCheck], None],
    ) -> None:
        """`first` and `later` make programs of the module as it is when they are called."""
        self._first, self._later, self._checked = first, later, checked
        self._check = LayoutCheck(module)
        self._program: Program | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if self._program is not None:
            return self._program(inputs)
        results = self._first()(inputs)
        self._check.settle()
        self._checked(self._check)
        self._program = self._later()
        return results


def waiting(program: Program, before: Callable[[], None]) -> Program:
    """The program, with a call of `before` ahead of each run."""

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        before()
        return program(inputs)

    return run


def python_program(module: fx.GraphModule) -> Program:
    """The graph as one Python function, each variable dropped after its last use.

    The program takes the flat inputs, real tensors of the shapes and dtypes of the graph's placeholders, and returns
    the flat outputs. It runs without autograd. What an op raises passes through.
    """
    forward = written_out(module)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), below_autograd():
            return list(forward(*inputs))

    return run


def _compile_runs(module: fx.GraphModule) -> None:
    """Replace each body of fused ops by what Inductor compiles; equal bodies are one submodule and compiled once."""
    done: set[str] = set()
    for node in module.graph.nodes:
        if is_loop(node):
            _compile_runs(loop_body(node))
        if is_fused(node) and node.args[0].target not in done:
            name = node.args[0].target
            done.add(name)
            compiled = compile_with_inductor(fused_body(node))
            delattr(module, name)
            setattr(module, name, compiled)  # a plain function: a submodule's call costs a microsecond more


def _call_before_writes(module: fx.GraphModule, function: Callable[[], None]) -> None:
    """Call the function in the generated code just before the first write over a large input."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    large = {storage(n) for n in given if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].nbytes >= LEAST_BYTES}
    first = next((n for n in module.graph.nodes if any(storage(w) in large for w in written_arguments(n))), None)
    if first is None:
        return
    module.before_write = _Compiled(function)
    with module.graph.inserting_before(first):
        module.graph.call_module("before_write")
    module.recompile()


class _Compiled(torch.nn.Module):
    """A compiled function as a submodule."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.function(*inputs)
