"""A canary for each private torch name about memory."""

import torch

from ftrain.graph import torch_memory
from ftrain.graph import torch_private as private


def test_a_fake_tensor_stands_for_one_on_a_device_that_is_not_here():
    cuda = torch.device("cuda", 0)
    with private.new_fake_mode():
        x = torch.empty(4, 6)
        view, memory = x.t(), torch_memory.storage_id(x)
        for tensor in (x, view):
            private.move_fake(tensor, cuda)
        y = torch.mm(x, view)
    assert [t.device for t in (x, view, y)] == [cuda] * 3
    assert x.is_cuda
    assert torch_memory.storage_id(x) == torch_memory.storage_id(view) == memory
    assert x.narrow(0, 0, 2).split([2, 4], -1)[1].device == cuda  # outside of the mode, as rules of cost ask


def test_storage_is_shared_by_views():
    for mode in (private.new_fake_mode(), torch.no_grad()):
        with mode:
            x = torch.empty(4, 4)
            assert torch_memory.storage_id(x) == torch_memory.storage_id(x.t()[1:])
            assert torch_memory.storage_id(x) != torch_memory.storage_id(torch.empty(4, 4))


def test_writes_are_counted_through_any_view():
    x = torch.zeros(4)
    alias, before = x.detach(), torch_memory.version_of(x)
    x.view(2, 2)[0].add_(1)
    assert torch_memory.version_of(alias) == before + 1
    with torch.inference_mode():
        assert torch_memory.version_of(torch.zeros(1)) == 0


def test_addresses():
    tensors = [torch.ones(2), torch.ones(3)]
    at = [t.data_ptr() for t in tensors]
    assert torch_memory.addresses_equal(tensors, at, [0, 1])
    assert not torch_memory.addresses_equal(tensors, [0, at[1]], [0, 1])
    assert torch_memory.addresses_equal(tensors, [0, at[1]], [1])


def test_a_snapshot_is_seen_by_no_mode():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with private.new_fake_mode():
        x = torch.empty(3)
        with Watch():
            y = private.snapshot(x)
    assert not seen
    assert torch_memory.storage_id(x) == torch_memory.storage_id(y)


def test_references_to_memory_are_counted():
    x = torch.zeros(3)
    alone = torch_memory.references([torch.ones(2)])[1]
    assert torch_memory.references([x])[1] == alone
    assert torch_memory.storage_ids([x]) == [torch_memory.storage_id(x)]
    view, array = x[1:], x.numpy()
    assert torch_memory.references([x])[1].memory[0] == alone.memory[0] + 2
    del view, array
    storage = x.untyped_storage()
    assert torch_memory.references([x])[1].objects == [alone.objects[0] + 1]
    del storage
    capsule = torch.utils.dlpack.to_dlpack(x)
    assert torch_memory.references([x])[1].handles == [alone.handles[0] + 1]
    del capsule
    assert torch_memory.references([x])[1] == alone


def test_a_weak_reference_keeps_an_identity_and_no_memory():
    x = torch.zeros(3)
    identity, anchor = torch_memory.storage_id(x), torch_memory.weak_reference(x)
    assert not anchor.expired()
    del x
    assert anchor.expired()
    assert all(torch_memory.storage_id(torch.zeros(3)) != identity for _ in range(20))


def test_a_tensor_of_any_class_gets_other_memory():
    class Refuses(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise ValueError("no")

    x, y = torch.zeros(3, dtype=torch.int64), torch.ones(2)
    x.__class__ = Refuses
    torch_memory.set_memory(x, y)
    x.__class__ = torch.Tensor
    assert x.data_ptr() == y.data_ptr()
    assert x.dtype is torch.float32


def test_a_tensor_without_memory_has_a_shape_and_computes_by_its_own_functions():
    class Three(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func(*(torch.full((2,), 3.0) if isinstance(a, cls) else a for a in args), **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("not reached")

    made = torch_memory.tensor_without_memory(Three, (2,), torch.float32, torch.device("cpu"))
    assert isinstance(made, torch.Tensor)
    assert (torch.ones(2) * made).tolist() == [3.0, 3.0]
