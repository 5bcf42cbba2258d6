"""One canary for each private name of torch.distributed that the floor uses."""

import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from ftrain.sharding import private
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement, Split
from ftrain.sharding.processes import DeviceMeshes, open_groups, require_world, same_everywhere, to_dtensor, to_piece


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


def test_groups_are_known_by_name(one_process):
    assert not private.has_group("here")
    private.register_group("here", dist.group.WORLD)
    assert private.has_group("here")
    assert private.resolve_group("here") is not None
    assert private.rank_in_group("here") == 0
    private.unregister_group("here")
    assert not private.has_group("here")


def test_the_timeout_and_the_store_of_the_process_group(one_process):
    assert private.group_timeout().total_seconds() > 0
    private.default_store().set("key", "value")
    assert private.default_store().clone().get("key") == b"value"


def test_a_dtensor_from_a_piece(one_process):
    mesh = init_device_mesh("cpu", (1,))
    array = private.make_dtensor(torch.arange(6.0).view(2, 3), mesh, [Shard(0)], (2, 3))
    assert torch.equal(array.full_tensor(), torch.arange(6.0).view(2, 3))


def test_pieces_and_dtensors_are_two_sides_of_one_memory(one_process):
    placement = Placement((3, 2), (Split(0, ("shard", "sequence"), 1),))
    piece = torch.arange(6.0).view(3, 2)
    array = to_dtensor(piece, placement, Mesh(), 0, DeviceMeshes(Mesh(), "cpu"))
    assert to_piece(array, placement) is piece
    assert torch.equal(to_piece(array.clone(), placement), piece)


def test_an_array_of_another_mesh_is_refused(one_process):
    whole = to_dtensor(
        torch.zeros(8, 2), Placement((8, 2), (Split(0, ("shard",), 1),)), Mesh(), 0, DeviceMeshes(Mesh(), "cpu")
    )
    with pytest.raises(ValueError, match="it comes from another mesh; restore the state from its checkpoint"):
        to_piece(whole, Placement((8, 2), (Split(0, ("shard", "sequence"), 4),)))


def test_a_world_of_another_size_is_refused(one_process):
    assert require_world(Mesh()) == 0
    with pytest.raises(ValueError, match=r"has 4 ranks and there are 1 processes; .* may be 1x1x1"):
        open_groups(Mesh(2, 2), [("shard",)])
    assert same_everywhere("value", Mesh()) == "value"


def recorded(backend: str, device: str, found: multiprocessing.SimpleQueue) -> None:
    """In a process of its own: a sum over one rank, and what is recorded before and after it."""
    before = private.flight_record()
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    dist.all_reduce(torch.ones(3, device=device))
    found.put((before, private.flight_record()))
    dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.gpu)])
def test_the_flight_record_holds_what_the_backend_ran(backend, device, monkeypatch):
    """Each backend has a recorder of its own: gloo's is empty under NCCL, and NCCL's under gloo."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "16")
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    process = context.Process(target=recorded, args=(backend, device, found))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    before, after = found.get()
    assert before == ""
    (record,) = [json.loads(line) for line in after.splitlines()]
    assert [entry["profiling_name"] for entry in record["entries"]] == [f"{backend}:all_reduce"]
    assert record["entries"][0]["input_sizes"] == [[3]]
