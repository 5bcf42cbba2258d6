"""The mesh: groups partition the ranks, and sizes that do not fit are refused with those that would."""

import dataclasses
import itertools

import pytest
import torch

from ftrain.sharding.mesh import Mesh
from ftrain.sharding.spmd import axis_index, coordinates, on_mesh

MESHES = [Mesh(2, 2, 2, 4, "virtual"), Mesh(1, 4, 2, 2, "virtual"), Mesh(2, 1, 4, 1, "virtual"), Mesh(1, 2, 4, 8)]
AXES = ["replicate", "shard", "sequence", "expert", "expert_shard", "ulysses:1", "ulysses:2", "ring:2"]


@pytest.mark.parametrize(("mesh", "axis"), list(itertools.product(MESHES, AXES)))
def test_the_groups_of_an_axis_partition_the_ranks(mesh, axis):
    inner = int(axis.split(":")[1]) if ":" in axis else 1
    if mesh.sequence % inner:
        pytest.skip(f"sequence={mesh.sequence} is not divisible by {inner}")
    members = mesh.members(axis)
    assert sorted(itertools.chain(*members)) == list(range(mesh.size))
    assert {len(m) for m in members} == {mesh.group(axis).size}
    for group in members:
        assert [mesh.coordinate(rank, axis) for rank in group] == list(range(len(group)))


def test_a_group_over_two_axes_has_the_last_one_fastest():
    mesh = Mesh(2, 2, 2, kind="virtual")
    assert mesh.members("shard", "sequence") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert mesh.members("replicate", "shard") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert mesh.members("replicate", "shard", "sequence") == (tuple(range(8)),)


def test_experts_are_folded_over_shard_and_sequence_neighbours_first():
    mesh = Mesh(2, 2, 2, expert=2, kind="virtual")
    assert mesh.members("expert") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.members("expert_shard") == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize("axis", ["replicate", "shard", "sequence", "expert", "expert_shard", "ulysses:2", "ring:2"])
def test_axis_index_reads_the_coordinates(axis):
    mesh = Mesh(2, 2, 2, 4, "virtual")
    for rank in range(mesh.size):
        with on_mesh(mesh, coordinates(mesh, rank)):
            assert int(axis_index(axis)) == mesh.coordinate(rank, axis)
            assert int(axis_index("world")) == rank
            assert int(axis_index("data")) == rank // mesh.sequence


def test_outside_of_a_mesh_every_index_is_zero():
    assert torch.equal(axis_index("shard"), torch.zeros((), dtype=torch.int64))


def test_a_world_that_does_not_fit_lists_the_sizes_that_do():
    with pytest.raises(ValueError, match=r"2 \* 3 \* 1 = 6, but there are 8 ranks; .*1x8x1.*2x4x1"):
        Mesh.over(8, replicate=2, shard=3)
    assert Mesh.over(8, replicate=2).shard == 4


def test_experts_that_do_not_divide_list_the_sizes_that_do():
    with pytest.raises(ValueError, match=r"expert=3 does not divide shard \* sequence = 2 \* 2 = 4.*1, 2, 4"):
        Mesh(1, 2, 2, 3)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"shard": 0}, "shard=0"), ({"replicate": 1.5}, "replicate=1.5"), ({"kind": "real"}, "kind='real'"),
])  # fmt: skip
def test_sizes_and_kinds_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**arguments)


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match="no axis 'tensor'; it has replicate, shard, sequence, expert"):
        Mesh(1, 2).group("tensor")


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("tensor", "no tensor parallelism here, by design: divide parameters with shard .*sequence.*expert.*offload"),
        ("tp", "no tensor parallelism here"),
        ("pipeline", "no pipeline parallelism here, by design: .*shard.*expert.*offload.*micro-batches"),
        ("pp", "no pipeline parallelism here"),
        ("cp", "called sequence here"),
        ("ep", "called expert here"),
        ("dp", "called shard here where ranks divide the parameters too, and replicate"),
        ("fsdp", "called shard here"),
    ],
)
def test_axes_of_other_trainers_are_refused_with_what_to_take(axis, words):
    with pytest.raises(ValueError, match=rf"^Mesh\({axis}=2\): .*{words}"):
        Mesh(**{axis: 2})
    assert Mesh(shard=2, **{axis: 1}) == Mesh(shard=2)


def test_a_mistyped_axis_is_pythons_own_error_and_replace_keeps_a_mesh():
    with pytest.raises(TypeError, match="shards"):
        Mesh(shards=2)
    assert dataclasses.replace(Mesh(shard=2), sequence=2) == Mesh(shard=2, sequence=2)
