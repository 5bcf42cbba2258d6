"""Copies of tensors to the host and back, behind the compute of a device.

Four ops, each a node of a graph: `offload_start` begins a copy to the host, `offload_wait` says that it is done (only
then may the tensor be dropped), `fetch_start` begins the copy back into new memory, `fetch_wait` says that it is done.

On CUDA copies run on two streams of their own, one for each direction, from and to pinned memory that is used again;
a wait makes the current stream wait, never the host. On a CPU all copies are made at once. Numbers are the same to the
bit. Tensors are dense (no gaps, no overlaps): a copy has the strides of the original.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.opaque import opaque_op


@opaque_op("offload_start(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x, device="cpu"))
def offload_start(x: Tensor) -> Tensor:
    """Begin to copy `x` (any shape, dense) to the host; the result, on the host, is complete after `offload_wait`."""
    return _copies_of(x.device).out(x) if x.device.type == "cuda" else x.clone()


@opaque_op("offload_wait(Tensor(a) host, Tensor x) -> Tensor(a)", fake=lambda host, x: host)
def offload_wait(host: Tensor, x: Tensor) -> Tensor:
    """`host`, the copy of `x` and of its shape, complete: later work on the current stream may overwrite the memory of
    `x`.
    """
    if x.device.type == "cuda":
        _copies_of(x.device).wait(host)
    return host


@opaque_op(
    "fetch_start(Tensor host, Device device) -> Tensor",
    fake=lambda host, device: torch.empty_like(host, device=device),
)
def fetch_start(host: Tensor, device: torch.device) -> Tensor:
    """Begin to copy `host`, which `offload_wait` returned (any shape), to `device`; it is complete after
    `fetch_wait`.
    """
    return _copies_of(device).back(host, device) if device.type == "cuda" else host.clone()


@opaque_op("fetch_wait(Tensor(a) x, Tensor host) -> Tensor(a)", fake=lambda x, host: x)
def fetch_wait(x: Tensor, host: Tensor) -> Tensor:
    """`x`, the copy of `host` and of its shape, complete. The memory of `host` is freed: a tensor is fetched once."""
    if x.device.type == "cuda":
        copies = _copies_of(x.device)
        copies.wait(x)
        copies.give_back(host, x.device)
    return x


class _Flight(NamedTuple):
    """A copy under way: what is recorded behind it, and the tensor of the device, which must not be freed before."""

    done: torch.cuda.Event
    held: Tensor


class _Copies:
    """The copies of one device: a stream for each direction, those under way, and pinned memory that is free.

    Pinned memory is never given back to the system, and torch rounds a piece up to a power of two. It is handed from
    copy to copy in the order of the stream that gave it back.
    """

    def __init__(self, device: torch.device) -> None:
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._flights: dict[int, _Flight] = {}
        self._free: dict[int, list[tuple[Tensor, torch.cuda.Stream]]] = {}

    def out(self, x: Tensor) -> Tensor:
        """Begin a copy to the host."""
        host = self._pinned(x)
        self._copy(self._out, host, x, held=x, key=host)
        return host

    def back(self, host: Tensor, device: torch.device) -> Tensor:
        """Begin a copy to the device."""
        x = torch.empty_like(host, device=device)
        self._copy(self._back, x, host, held=x, key=x)
        return x

    def wait(self, copy: Tensor) -> None:
        """Make the current stream wait for the copy; one that is not under way is done."""
        flight = self._flights.pop(copy.data_ptr(), None)
        if flight is not None:
            torch.cuda.current_stream(flight.held.device).wait_event(flight.done)

    def give_back(self, host: Tensor, device: torch.device) -> None:
        """The memory of `host` may be written to by what comes after this on the current stream."""
        storage = host.untyped_storage()
        free = self._free.setdefault(storage.nbytes(), [])
        if all(piece.data_ptr() != storage.data_ptr() for piece, _ in free):
            piece = torch.empty(0, dtype=torch.uint8).set_(storage)
            free.append((piece, torch.cuda.current_stream(device)))

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor, *, held: Tensor, key: Tensor) -> None:
        self._forget_failed()
        stream.wait_stream(torch.cuda.current_stream(held.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self._flights[key.data_ptr()] = _Flight(stream.record_event(), held)

    def _forget_failed(self) -> None:
        """Of a run that was broken off copies stay that nobody waits for: hold their tensors no longer than needed."""
        self._flights = {key: flight for key, flight in self._flights.items() if not flight.done.query()}

    def _pinned(self, x: Tensor) -> Tensor:
        """Pinned memory with the shape, dtype and strides of `x`."""
        free = self._free.get(x.nbytes)
        if free:
            piece, stream = free.pop()
            current = torch.cuda.current_stream(x.device)
            if stream != current:
                current.wait_stream(stream)
        else:
            piece = _pinned_bytes(x.nbytes)
        return piece.view(x.dtype).as_strided(x.shape, x.stride())


def _pinned_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def _copies_of(device: torch.device) -> _Copies:
    return _copies_by_number(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _copies_by_number(number: int) -> _Copies:
    return _Copies(torch.device("cuda", number))
