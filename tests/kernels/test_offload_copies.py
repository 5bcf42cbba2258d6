"""Copies to the host and back: the same numbers in the same layout, and pinned memory that goes from copy to copy."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrain.kernels import offload
from ftrain.kernels.offload import fetch_start, fetch_wait, offload_start, offload_wait

CPU = torch.device("cpu")


def round_trip(x, device=CPU):
    host = offload_wait(offload_start(x), x)
    return host, fetch_wait(fetch_start(host, device), host)


def tensors():
    x = torch.arange(24.0).view(2, 3, 4)
    return {
        "rows": x, "transposed": x.transpose(0, 2), "permuted": x.permute(1, 2, 0), "scalar": torch.tensor(3.5),
        "bf16": x.bfloat16(), "int64": x.long(), "bool": x > 7, "nan": torch.full((3,), float("nan")),
    }  # fmt: skip


@pytest.mark.parametrize("x", tensors().values(), ids=tensors())
def test_what_comes_back_has_the_same_bits_and_strides(x):
    host, back = round_trip(x)
    assert torch.equal(back.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8)) if x.dim() else back == x
    assert back.stride() == host.stride() == x.stride()
    assert len({t.untyped_storage().data_ptr() for t in (x, host, back)}) == 3


@pytest.mark.parametrize("x", tensors().values(), ids=tensors())
def test_a_trace_sees_the_same_shapes_and_what_shares_memory(x):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        start = offload_start(fake)
        host, back = round_trip(fake)
        assert offload_wait(start, fake) is start
    for copy in (host, back):
        assert (copy.shape, copy.dtype, copy.stride()) == (x.shape, x.dtype, x.stride())


def test_waits_are_views_and_nothing_is_written():
    for op, is_view in ((offload_start, False), (offload_wait, True), (fetch_start, False), (fetch_wait, True)):
        assert op.is_view == is_view
        assert not op._schema.is_mutable


class Stream:
    """A stream that writes down what it was told; copies are made at once."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for a copy on {event.name}")

    def record_event(self):
        return Event(self.name)


class Event:
    def __init__(self, name):
        self.name, self.over = name, False

    def query(self):
        return self.over


@pytest.fixture
def streams(monkeypatch):
    """Stand-ins for the streams of a device: the log, and the current stream as a list of one."""
    log, names = [], iter(("out", "back"))
    current = [Stream(log, "main")]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(offload, "_pinned_bytes", lambda count: torch.empty(count, dtype=torch.uint8))
    return log, current


def there_and_back(copies, x):
    host = copies.out(x)
    copies.wait(host)
    back = copies.back(host, CPU)
    copies.wait(back)
    copies.give_back(host, CPU)
    return host, back


def test_copies_run_behind_what_made_them_and_waits_are_for_one_copy(streams):
    log, _ = streams
    x = torch.randn(4, 6).t()
    host, back = there_and_back(offload._Copies(CPU), x)
    assert torch.equal(back, x)
    assert host.stride() == x.stride()
    assert log == [
        "out waits for main", "main waits for a copy on out", "back waits for main", "main waits for a copy on back",
    ]  # fmt: skip


def test_pinned_memory_is_used_again(streams):
    copies = offload._Copies(CPU)
    first, _ = there_and_back(copies, torch.ones(8))
    address = first.data_ptr()
    second = copies.out(torch.zeros(2, 8, dtype=torch.int16))
    assert second.data_ptr() == address
    assert second.dtype == torch.int16
    third = copies.out(torch.ones(8))
    assert third.data_ptr() != address
    copies.give_back(third, CPU)
    copies.give_back(third, CPU)
    assert [len(free) for free in copies._free.values()] == [1]


def test_memory_from_another_stream_is_waited_for(streams):
    log, current = streams
    copies = offload._Copies(CPU)
    there_and_back(copies, torch.ones(8))
    current[0] = Stream(log, "other")
    log.clear()
    copies.out(torch.ones(8))
    assert log == ["other waits for main", "out waits for other"]


def test_of_a_run_that_broke_off_nothing_is_held(streams):
    copies = offload._Copies(CPU)
    host = copies.out(torch.ones(8))
    (flight,) = copies._flights.values()
    flight.done.over = True
    copies.out(torch.ones(9))
    assert len(copies._flights) == 1
    copies.wait(host)  # is done: nothing to wait for


@pytest.mark.gpu
def test_on_a_device_copies_are_pinned_and_used_again():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1 << 20, device=device)
    addresses = set()
    for _ in range(3):
        host, back = round_trip(x, device)
        assert host.is_pinned()
        addresses.add(host.data_ptr())
        torch.testing.assert_close(back, x, rtol=0, atol=0)
        del host
    assert len(addresses) == 1


@pytest.mark.gpu
def test_on_a_device_memory_may_be_written_over_after_the_wait():
    device = torch.device("cuda", torch.cuda.current_device())
    for i in range(20):
        x = torch.full((1 << 22,), float(i), device=device)
        host = offload_wait(offload_start(x), x)
        x.fill_(-1.0)
        back = fetch_wait(fetch_start(host, device), host)
        assert bool((back == i).all())
