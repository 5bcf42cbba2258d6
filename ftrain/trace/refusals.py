"""Errors for code that a trace cannot hold: one sentence with the user's line and a fix. Torch's error is the cause."""

import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import SourceLine, is_users, user_source
from ftrain.graph.torch_private import DATA_DEPENDENT, DYNAMIC_SHAPE, UNSUPPORTED
from ftrain.graph.torch_sizes import noting_numbers

_NUMBER = (
    "reads the number in a tensor ({what}), which a traced step does not have: choose with torch.where, return it as a "
    "part of the result, or debug with ftrain.disable_jit()"
)
_SHOWN = (
    "shows the number in a tensor ({what}), which a traced step does not have: return the tensor as a metric (a part "
    "of the result) and format or round it after the call, or debug with ftrain.disable_jit()"
)
_OF_NUMBERS = (
    "makes a tensor of the numbers in tensors ({what}), which a traced step does not have: join them with torch.stack"
)
_ADDRESS = "reads the address of a tensor's memory ({what}), which a traced step does not have: leave it out"
_NUMPY = (
    "passes a tensor to numpy ({what}), but tensors have no values while a step is traced: use the torch function of "
    "that name, compute it before the step and pass it as an argument, or debug with ftrain.disable_jit()"
)
_EXCHANGED = (
    "exchanges the memory of a tensor ({what}), which a trace cannot see: make a new value, e.g. x = y, or write into "
    "it with x.copy_(y)"
)
_STORAGE = (
    "uses a tensor's storage ({what}), which a trace cannot see: write into the tensor, e.g. x.copy_(y), or make a new "
    "value"
)
_SIZE = (
    "has a result whose size depends on data ({what}), which cannot be traced: mask instead of selecting, or compute "
    "it before the step and pass it as an argument"
)
_PLACE = (
    "uses a tensor's value as a Python index ({what}), which a traced step does not have: read with "
    "x.index_select(dim, t.view(1)), write with x.index_copy(dim, t.view(1), value) or "
    "torch.where(torch.arange(n) == t, value, x)"
)
_BOUND = (
    "slices with a tensor as a bound ({what}), so that the size would depend on data: keep the size and mask, e.g. "
    "torch.where(torch.arange(n) < t, x, 0)"
)
_CTC = (
    "calls ctc_loss, whose kernels have no shape rule that a trace can use: write its forward recursion with torch ops "
    "(logsumexp over the states, frame by frame), or make it an op of your own that has one (torch.library.custom_op "
    "with register_fake and register_autograd)"
)
_OPERATOR = (
    "calls {what}, a higher-order operator, which a traced step cannot hold: for torch.cond use torch.where, for "
    "loops (while_loop, scan, map) a Python loop or ftrain.accumulate"
)
_COMPILED = (
    "calls a function that torch.compile made, which cannot be traced: call the plain function (a compiled module's "
    "_orig_mod); ftrain.jit(backend='inductor') compiles the whole step"
)
_REENTRANT = (
    "uses torch.utils.checkpoint with use_reentrant=True, which a traced step cannot hold: leave it out, and give "
    "ftrain.jit remat='layer' (in a loss of your own, use_reentrant=False)"
)
_FORWARD_MODE = (
    "differentiates a vmap over torch.func.hessian or jacfwd, which torch cannot trace: take "
    "torch.func.jacrev(torch.func.grad(f)) in the place of the hessian"
)
_TWO_DEVICES = ("at least two devices, meta and", "two different devices meta, ")
"""Of torch 2.13 and 2.11."""
_SPARSE = "uses a sparse tensor, which a traced step cannot hold: use sparse=False, or to_dense()"
_PACKED = (
    "packs sequences by lengths that only the data have (pack_padded_sequence): run the network on padded sequences, "
    "and take each row's result at its length"
)
_UNKNOWN_OP = "calls {what}, for which torch has no shape rule, so it cannot be traced: register one (register_fake)"


_refused: ContextVar[list["Untraceable"] | None] = ContextVar("ftrain_refused", default=None)


class Untraceable(ValueError):
    """The error for a step that a trace cannot hold; the message names the user's line and a fix.

    The trace under way remembers each of them, since the step may catch it.
    """

    def __init__(self, words: str) -> None:
        super().__init__(words)
        refused = _refused.get()
        if refused is not None:
            refused.append(self)


class RefuseUnseen(TorchFunctionMode):
    """A mode in which `x.data = y` raises `Untraceable`, because it calls no op and the trace would keep the old `x`.

    An index or a slice bound that is a tensor, where Python needs a number, raises `Untraceable` too. Errors of torch
    that the trace cannot hold are remembered (see `explain_refusals`).
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA:
            source = user_source()
            raise Untraceable(f"{source}: the step {_EXCHANGED.format(what=_text_at(source) or 'x.data = y')}")
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            raise Untraceable(f"{user_source()}: the step {_PACKED}")
        if func == Tensor.data_ptr:
            raise Untraceable(f"{user_source()}: the step {_ADDRESS.format(what=_text_at(user_source()))}")
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            source = user_source()
            if func in _INDEXING and isinstance(error, DATA_DEPENDENT):
                words = _BOUND if any(map(_is_bounded_by_a_tensor, _parts(args[1]))) else _PLACE
                raise Untraceable(f"{source}: the step {words.format(what=_text_at(source) or 'x[t]')}") from error
            reason = _reason(error, _text_at(source))
            if reason is not None:
                _remember(f"{source}: the step {reason}")
            raise


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_bounded_by_a_tensor(part: Any) -> bool:
    return isinstance(part, slice) and any(isinstance(n, Tensor) for n in (part.start, part.stop, part.step))


_OWN = str(Path(__file__).parent)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


@contextmanager
def explain_refusals() -> Iterator[None]:
    """Within the block, errors of torch about code that cannot be traced become `Untraceable`.

    A refusal that was caught within the block (by a step's `except Exception`) is raised at its end: the step took
    another way than eager code does.
    """
    refused: list[Untraceable] = []
    token = _refused.set(refused)
    try:
        with noting_numbers(_note_number):
            yield
        if refused:
            raise refused[0]
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise Untraceable(f"{_where(error.__traceback__)}: the step {reason}") from error
    finally:
        _refused.reset(token)


@contextmanager
def refusals_are_tries() -> Iterator[None]:
    """Within the block, which tries a way to trace some code, refusals are not remembered."""
    refused = _refused.get()
    known = len(refused or ())
    try:
        yield
    finally:
        if refused is not None:
            del refused[known:]


def _note_number(frame: FrameType | None) -> None:
    """Remember a user's line that asked for a number that only data have."""
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is not None and is_users(frame.f_code.co_filename):
        source = SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        _remember(f"{source}: the step {_NUMBER.format(what=_text_at(source))}")


def _remember(words: str) -> None:
    """Let the trace under way remember a refusal that is not raised here."""
    Untraceable(words)


@contextmanager
def explain_mesh_sizes(ranks: int) -> Iterator[None]:
    """Within the block, which traces a step for one of `ranks` ranks, errors about sizes become `Untraceable`.

    The message says that outside of losses a leaf is one rank's piece. With one rank errors stay as they are.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if ranks == 1 or _reason(error) is not None or not any(word in str(error) for word in _SIZES):
            raise
        raise Untraceable(
            f"{_where(error.__traceback__)}: {_first_line(error)}. On a mesh of {ranks} ranks the batch is one rank's "
            "share of it, and a leaf of the state is one rank's piece outside of losses: pass it to value_and_grad or "
            "ftrain.forward as an argument, gather it (ftrain.optim.shards.whole_leaf), or keep it whole with "
            "Layout(parameters=())"
        ) from error


_SIZES = ("shape", "size", "dimension", "dim", "broadcast", "must match", "more than 1 value per channel")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:160].rstrip(".")


def require_dense(module: fx.GraphModule) -> None:
    """Raises Untraceable if a node of the graph has a sparse tensor."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise Untraceable(f"{node.meta.get('source')}: the step {_SPARSE}")


def _reason(error: Exception, asked: str | None = None) -> str | None:
    """Why a trace cannot hold what raised an error, and the way out; None for other errors. `asked`: the text of the
    user's line; None to take that which the error went through.
    """
    words = str(error)
    if isinstance(error, Untraceable):
        return None
    asked = _asked(error) if asked is None else asked
    if "Tensor.__format__" in words or "define __round__" in words or _was_in(error, "__format__"):
        return _SHOWN.format(what=asked or "f'{loss:.3f}', round(loss)")
    if isinstance(error, DATA_DEPENDENT):
        return _NUMBER.format(what=asked or "float(loss), an `if` on it, an assert")
    if "memory format option is only supported by strided tensors" in words:
        return _SPARSE
    if "its data is not allocated yet" in words:
        return _OF_NUMBERS.format(what=asked or "torch.tensor([a, b])")
    if isinstance(error, DYNAMIC_SHAPE) and "ctc_loss" in words:
        return _CTC
    if isinstance(error, DYNAMIC_SHAPE):
        return _SIZE.format(what=_first_argument(error))
    if "numpy() is not supported for tensor subclasses" in words:
        return _NUMPY.format(what=asked or "x.numpy()")
    if "torch.storage.UntypedStorage" in words:
        return _STORAGE.format(what=asked or "x.untyped_storage()")
    if any(each in words for each in _TWO_DEVICES) and _in_a_transform(error.__traceback__):
        return _FORWARD_MODE
    if "Cannot swap t" in words:
        return _EXCHANGED.format(what=asked or "swap_tensors")
    if "dynamo-optimized function" in words:
        return _COMPILED
    if "use_reentrant=True" in words:
        return _REENTRANT
    if "HigherOrderOperator" in words:
        return _OPERATOR.format(what=_between(words, "HigherOrderOperator ", " "))
    if "Sparse" in words or "sparse" in words:
        return _SPARSE if isinstance(error, NotImplementedError | RuntimeError) else None
    if isinstance(error, UNSUPPORTED):
        return _UNKNOWN_OP.format(what=_first_argument(error))
    return None


def _was_in(error: Exception, function: str) -> bool:
    """True if an error went through a function of this name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_name != function:
        trace = trace.tb_next
    return trace is not None


def _in_a_transform(trace: TracebackType | None) -> bool:
    """True for an error that went through a transform of `torch.func`, or torch's backward of one."""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "_functorch" in code.co_filename or code.co_name == "_engine_run_backward":
            return True
        trace = trace.tb_next
    return False


def _asked(error: Exception) -> str:
    """The text of the user's line that an error went through."""
    return _text_at(_source(error.__traceback__))


def _text_at(source: SourceLine | None) -> str:
    return "" if source is None else linecache.getline(source.file, source.line).strip()[:80]


def _first_argument(error: Exception) -> str:
    return str(error.args[0] if error.args else error).split("\n")[0][:80]


def _between(words: str, before: str, after: str) -> str:
    return words.split(before, 1)[1].split(after, 1)[0]


def _where(trace: TracebackType | None) -> str:
    source = _source(trace)
    return "an unknown line" if source is None else str(source)


def _source(trace: TracebackType | None) -> SourceLine | None:
    """The innermost line of the user's code that an error went through; None if there is none."""
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_users(code.co_filename):
            found = SourceLine(code.co_filename, trace.tb_lineno, code.co_name)
        trace = trace.tb_next
    return found
