"""Private torch names that the trainer uses, with one canary test each: an upgrade of torch has few places. Those about
memory stand in `torch_memory.py`, those about sizes that depend on data in `torch_sizes.py`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from ftrain.graph.torch_sizes import SizesOfData

__all__ = ["FakeTensor", "FakeTensorMode"]


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have shapes and no memory; sizes that depend on data get symbols."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=SizesOfData())


DEVICE_QUERY = torch.ops.prim.device.default
"""What `x.device` dispatches inside modes, several times per op of a trace."""


def device_of_fake(tensor: Any) -> torch.device:
    """The device that a fake tensor stands for, without a dispatch through the modes."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def move_fake(tensor: FakeTensor, device: torch.device) -> None:
    """Let a fake tensor stand for one on another device, which this torch need not have; its memory stays the same."""
    tensor.fake_device = device


def next_seq_nr() -> int:
    """The number that autograd will give to the next forward op on this thread."""
    return torch.autograd._get_sequence_nr()


def own_backward(node: Any) -> type | None:
    """The `torch.autograd.Function` whose backward a node of autograd's graph runs; None for an op of torch's."""
    return getattr(type(node), "_forward_cls", None)


def runs_again_in_backward() -> bool:
    """True within a function that `torch.utils.checkpoint` (not its reentrant form) runs, and will run again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def tracing_graph() -> fx.Graph | None:
    """The graph being written by the innermost trace on this thread, or None."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def trace_to_graph(function: Callable[..., Any], fakes: list[Any]) -> fx.GraphModule:
    """Trace a function of flat fake tensors (`fakes`, its arguments) to a graph of ATen ops and opaque ops.

    An enclosing trace is paused, so a body of a loop can be traced in the middle of another trace. What torch raises
    for what it cannot trace passes through: see DATA_DEPENDENT, DYNAMIC_SHAPE and UNSUPPORTED.
    """
    lazily = _use_lazy_graph_module(True)  # source code is made on the first call, not after each pass
    with disable_proxy_modes_tracing(), torch.autograd.set_multithreading_enabled(False), lazily:
        return make_fx(
            function,
            tracing_mode="real",
            _error_on_data_dependent_ops=False,
            _disable_torch_fn_metadata_mode=True,
        )(*fakes)


@contextmanager
def quiet_shape_rules() -> Iterator[None]:
    """Within the block a shape rule that fails raises, as always, and writes no traceback to the log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def lazy_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module of a graph whose source code is made on the first call, not after each pass."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


DATA_DEPENDENT: tuple[type[Exception], ...] = (GuardOnDataDependentSymNode, DataDependentOutputException)
"""Raised where a trace is asked for a number that only data have."""
DYNAMIC_SHAPE: tuple[type[Exception], ...] = (DynamicOutputShapeException,)
"""Raised where the size of a result depends on data in a way that has no symbol."""
UNSUPPORTED: tuple[type[Exception], ...] = (UnsupportedOperatorException, UnsupportedFakeTensorException)
"""Raised where an op has no shape rule."""


def written_out(module: fx.GraphModule) -> Callable[..., Any]:
    """The module's `forward`, its source code made now: calls of a lazy one would all ask whether that was done."""
    for inner in module.modules():
        if isinstance(inner, _LazyGraphModule):
            inner.real_recompile()
    return module.forward


@contextmanager
def paused_trace() -> Iterator[None]:
    """Within the block ops leave no nodes in the enclosing trace."""
    with disable_proxy_modes_tracing():
        yield


def emit_node(
    target: Callable[..., Any],
    body: fx.GraphModule,
    name: str,
    args: tuple[Any, ...],
    outputs: list[Tensor],
    meta: dict[str, Any],
) -> list[Tensor]:
    """Append a node `target(body, *args)` to the trace under way, and let `outputs` (fake tensors) stand for its
    results.

    - `body`: a graph that the trace's module will hold, under `name` and a number.
    - `args`: as the target takes them, with tensors of the trace.
    - `meta`: metadata of all nodes that are made.

    Returns `outputs`. AssertionError outside of a trace.
    """
    mode = get_proxy_mode()
    assert mode is not None, "emit_node is only for use inside a trace"
    tracer: Any = mode.tracer
    held = next(key for i in count() if not hasattr(tracer.root, key := f"{name}_{i}"))
    # no submodule until the trace has ended: the tracer would take the body's constants for the outer graph's
    vars(tracer.root)[held] = body
    handle = tracer.create_proxy("get_attr", held, (), {})
    proxies = torch.utils._pytree.tree_map(tracer.unwrap_proxy, args)
    before = len(tracer.graph.nodes)
    proxy = tracer.create_proxy("call_function", target, (handle, *proxies), {}, name=name)
    track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)
    for _, node in zip(range(len(tracer.graph.nodes) - before), reversed(tracer.graph.nodes), strict=False):
        node.meta.update(meta)
    return outputs


def unwrap_functional(tensor: Tensor) -> Tensor:
    """The tensor, of the same shape, that `torch.func.functionalize` wraps, with all writes so far applied."""
    torch._sync(tensor)
    return torch._C._functorch._unwrap_functional_tensor(tensor, True)


def wrap_functional(tensor: Tensor) -> Tensor:
    """A tensor as the body of the innermost `torch.func.functionalize` sees it, of the same shape."""
    level = torch._C._functorch.maybe_current_level()
    assert level is not None, "wrap_functional is for use inside torch.func.functionalize"
    return torch._C._functorch._wrap_functional_tensor(tensor, level)


def is_tracked(tensor: Tensor) -> bool:
    """True if the tensor, of any shape, stands for a node of the trace under way."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    mode = get_proxy_mode()
    return mode is not None and get_proxy_slot(tensor, mode.tracer, None) is not None


def node_of(tensor: Tensor) -> fx.Node | None:
    """The node of the trace under way that a tensor (any shape) stands for, through the wrappers of `torch.func`; or
    None.
    """
    slot = _slot_of(tensor)
    return None if slot is None else slot.proxy.node


def _slot_of(tensor: Tensor) -> Any:
    """What the trace under way knows of a tensor, through the wrappers of `torch.func`; or None."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    mode = get_proxy_mode()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if mode is None else get_proxy_slot(tensor, mode.tracer, None)


def vmapped_dims(tensor: Tensor) -> list[int]:
    """The dims that `torch.func.vmap` hides of what a tensor (of any shape) wraps, the outermost first.

    Each counts in the shape that is left when those before it are gone.
    """
    dims = list[int]()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            dims.append(torch._C._functorch.maybe_get_bdim(tensor))
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return dims[::-1]


def constant_of(tensor: Tensor) -> Tensor | None:
    """The numbers of a tensor (any shape) of the trace that the tracer knows, as it computes ops on such alone while
    tracing; None for any other.
    """
    slot = _slot_of(tensor)
    return None if slot is None else slot.constant


def number_of(tensor: Tensor) -> float | None:
    """The number of a tensor of one element, of any shape, if it is no tensor of the trace, or one whose number the
    tracer knows; else None.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    known = tensor if type(tensor) is Tensor and _slot_of(tensor) is None else constant_of(tensor)
    if known is None or known.numel() != 1 or known.is_complex():
        return None
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():
        return float(known.item())


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""True within `torch.autocast` for any device."""

without_autocast: Callable[[], Any] = torch._C._DisableAutocast
"""A context in which autocast does nothing."""


def attention_choices() -> tuple[bool, bool, bool]:
    """Which kernels `scaled_dot_product_attention` may choose: flash, memory efficient, math."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
    )


def functions_are_watched() -> bool:
    """True within a mode on torch's functions; `torch.set_default_device` is one."""
    return torch._C._len_torch_function_stack() > 0


@contextmanager
def exporting() -> Iterator[None]:
    """Within the block `torch.compiler.is_exporting()` is true: modules that ask then keep no tensors in caches."""
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def functional_transform() -> bool:
    """True inside of `torch.func.grad`, `vmap`, `jvp` and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def modes_are_active() -> bool:
    """True inside of a trace, and where tensors are fake; not in a mode of a user's own, which counts or logs."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return get_proxy_mode() is not None or detect_fake_mode(None) is not None


def snapshot(tensor: Tensor) -> Tensor:
    """A fake tensor on the same memory, of the same shape, that no mode has seen: what a graph may keep."""
    with _disable_current_modes():
        return tensor.detach()


def computed_really(nodes: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """The real values, on the CPU and of any shapes, of nodes of the trace under way: ops that need no others than the
    nodes before them, and constants.
    """
    found: dict[fx.Node, Tensor] = {}
    root = get_proxy_mode().tracer.root  # type: ignore[union-attr]
    with _disable_current_modes(), torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                found[node] = getattr(root, str(node.target))
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), found.__getitem__)
            here = {
                name: torch.device("cpu") if name == "device" and x is not None else x for name, x in kwargs.items()
            }
            found[node] = node.target(*args, **here)  # type: ignore[operator]
    return found


def real_draw() -> None:
    """Move the default generator of the CPU on by a number, also within a trace, which is not told of it."""
    with _disable_current_modes():
        torch.rand(1, device="cpu")


def real_state() -> bytes:
    """The state of the default generator of the CPU, also within a trace."""
    with _disable_current_modes():
        return torch.get_rng_state().numpy().tobytes()


def below_autograd() -> Any:
    """A guard that skips autograd's dispatch: a traced graph already holds its backward."""
    return torch._C._AutoDispatchBelowAutograd()


def keep_busy(cycles: int) -> None:
    """Keep the current CUDA device idle for so many of its clock's cycles, after the work that it was given before."""
    torch.cuda._sleep(cycles)


def new_fake_like(tensor: Tensor) -> Tensor:
    """A fresh fake tensor of the same shape, dtype and device, contiguous, unknown to any trace."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def assert_on_device(condition: Tensor, message: str) -> None:
    """An assertion on a 0-d bool tensor that a CUDA device makes itself, so that the host does not wait; a RuntimeError
    on a CPU.
    """
    torch._assert_async(condition, message)


def shapes_of_result(function: Callable[[], Any]) -> Any:
    """Call a function for the shapes and dtypes of its result, a tree of fake tensors: inside a trace nothing is
    recorded, outside nothing is computed. What it raises passes through.
    """
    if tracing_graph() is not None:
        # Sizes that depend on data get symbols here that no node of the trace will ever bind.
        with disable_proxy_modes_tracing(), _shapes_under_way().ignore_fresh_unbacked_symbols():
            return function()
    with new_fake_mode():
        return function()


def _shapes_under_way() -> ShapeEnv:
    mode = detect_fake_mode(None)
    return mode.shape_env if mode is not None and mode.shape_env is not None else ShapeEnv()


def fake_mode_of(fakes: list[Any]) -> FakeTensorMode:
    """The mode that made these fake tensors (a new one if there is none)."""
    for value in fakes:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return new_fake_mode()


def compile_with_inductor(module: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph of functional ops and final `copy_`s to inputs; returns a function of the graph's inputs.

    It returns the graph's outputs, a list, with the shapes and strides of the trace. The graph goes to Inductor below
    AOTAutograd, which has nothing to do for it and whose wrapper costs more per call than a launch. Inductor then lacks
    the decompositions that AOTAutograd applies: they are traced through here.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    mode = fake_mode_of(inputs)
    with torch.no_grad(), mode, disable_proxy_modes_tracing():
        lowered = make_fx(module, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    output = lowered.graph.output_node()
    strides_kept = list(range(len(output.args[0])))  # type: ignore[arg-type]
    output.meta["user_visible_output_idxs"] = strides_kept
    with tracing(TracingContext(mode)):
        run = compile_fx_inner(lowered, inputs).current_callable  # type: ignore[attr-defined]
    return lambda *tensors: run(list(tensors))


def value_of(node: fx.Node) -> Any:
    """The fake value of a node, computed from those of its inputs: with memory of its own, or its input's view."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    flat = torch.utils._pytree.tree_leaves((args, kwargs, node.meta.get("val")))
    with fake_mode_of([a for a in flat if isinstance(a, FakeTensor)]):
        return node.target(*args, **kwargs)  # type: ignore[operator]
