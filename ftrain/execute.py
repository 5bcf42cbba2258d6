"""Ways to run a graph: as Python over ATen, through Inductor, as a CUDA graph.

Each takes a graph and returns a function from the list of flat inputs to the list of flat outputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from ftrain.loan import LEAST_BYTES
from ftrain.loop import is_loop, loop_body
from ftrain.passes.aliasing import storage
from ftrain.passes.donate import carry_in_place, write_in_place
from ftrain.passes.reuse import reuse_memory
from ftrain.passes.twins import use_twins
from ftrain.private import below_autograd, compile_with_inductor

Program = Callable[[Sequence[Tensor]], list[Tensor]]


def choose(backend: str, device: torch.device) -> str:
    """Resolve "auto": the interpreter of ATen ops on CPU, Inductor on CUDA."""
    known = ("auto", "aten", "inductor", "cudagraph")
    if backend not in known:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(known)}")
    if backend == "cudagraph" and device.type != "cuda":
        raise ValueError(f"backend='cudagraph' needs arguments on a CUDA device; these are on {device}")
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "aten"
    return backend


def compile_graph(module: fx.GraphModule, backend: str, *, before_write: Callable[[], None]) -> Program:
    """Make the program; `module` is the graph after all passes and is not used again.

    The program calls `before_write` before it writes over an input of `LEAST_BYTES` or more: as late as it can.
    """
    if backend == "aten":
        return aten_program(module, after=lambda module: _call_before_writes(module, before_write))
    program = inductor_program(module)
    if backend == "cudagraph":
        from ftrain.cudagraph import cudagraph_program

        program = cudagraph_program(program)
    return waiting(program, before_write)


def waiting(program: Program, before: Callable[[], None]) -> Program:
    """The program, with a call of `before` first."""

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        before()
        return program(inputs)

    return run


def aten_program(module: fx.GraphModule, *, after: Callable[[fx.GraphModule], None] | None = None) -> Program:
    """The graph as one Python function, each variable dropped after its last use.

    `after` may change the graph when all passes are done, e.g. to measure: passes must see collectives as they are.
    """
    prepare_for_python(module)
    if after is not None:
        after(module)
    forward = module.forward

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), below_autograd():
            return forward(*inputs)

    return run


def prepare_for_python(module: fx.GraphModule) -> None:
    """Turn final copies into writes in place, in bodies of loops too: the graph as the interpreter runs it."""
    use_twins(module)
    write_in_place(module)
    carry_in_place(module)
    reuse_memory(module)
    for node in module.graph.nodes:
        if is_loop(node):
            prepare_for_python(loop_body(node))
    module.recompile()


def inductor_program(module: fx.GraphModule) -> Program:
    """The graph compiled whole; bodies of loops are compiled once each and called from Python."""
    if any(is_loop(n) for n in module.graph.nodes):
        return _inductor_around_loops(module)
    compiled = compile_with_inductor(module)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(compiled(*inputs))

    return run


def _inductor_around_loops(module: fx.GraphModule) -> Program:
    """Cut the graph at its loops; compile what lies between, and each body."""
    stage = 0
    stages: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if is_loop(node):
            stages[node], stage = stage + 1, stage + 2
        else:
            stages[node] = stage
    split = split_module(module, module, lambda n: stages[n], keep_original_order=True)
    for name, part in list(split.named_children()):
        if not isinstance(part, fx.GraphModule):
            continue
        loops = [n for n in part.graph.nodes if is_loop(n)]
        if loops:
            _compile_bodies(part, loops)
        elif any(n.op == "call_function" for n in part.graph.nodes):
            setattr(split, name, _Compiled(compile_with_inductor(part)))
    forward = split.forward

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(forward(*inputs))

    return run


def _compile_bodies(part: fx.GraphModule, loops: list[fx.Node]) -> None:
    for node in loops:
        body = loop_body(node)
        setattr(part, str(node.args[0].target), _Compiled(compile_with_inductor(body)))  # type: ignore[union-attr]


def _call_before_writes(module: fx.GraphModule, function: Callable[[], None]) -> None:
    """Call the function in the generated code just before the first write over a large input."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    large = {storage(n) for n in given if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].nbytes >= LEAST_BYTES}
    first = next((n for n in module.graph.nodes if any(storage(w) in large for w in _written(n))), None)
    if first is None:
        return
    module.before_write = _Compiled(function)
    with module.graph.inserting_before(first):
        module.graph.call_module("before_write")
    module.recompile()


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes into, by its schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    values = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    found: list[fx.Node] = []
    fx.map_arg([values.get(a.name) for a in arguments if a.is_write], found.append)
    return found


class _Compiled(torch.nn.Module):
    """A compiled function in the place of a submodule."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.function(*inputs)
