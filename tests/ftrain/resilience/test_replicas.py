"""Copies of a state that differ by one bit are found and named; copies that are equal raise no alarm."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import ftrain
from ftrain import optim, tree
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.resilience.replicas import Difference, ReplicasDiffer, check_replicas, compare
from ftrain.sharding import Mesh, Plan
from ftrain.sharding.bits import hash_bits
from tests.helpers.rank_processes import exit_codes


def flip(tensor, *, index=0, bit=0):
    """Change one bit in place."""
    tensor.view(-1).view(torch.uint8)[index * tensor.element_size()] ^= 1 << bit


def one_flipped_bit(rank, folder):
    """A plain leaf, a leaf in copies, and a divided one that has none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    copied = DTensor.from_local(torch.arange(6.0), mesh, [Replicate()])
    divided = DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0)])
    state = {"step": torch.tensor(3), "copied": [copied, copied.clone()], "divided": divided, "rate": 0.1}
    check_replicas(state)
    if rank == 1:
        flip(copied.to_local(), index=4, bit=3)
    with pytest.raises(ReplicasDiffer) as caught:
        check_replicas(state)
    (folder / f"{rank}.txt").write_text(str(caught.value))


def test_a_flipped_bit_is_found_on_all_ranks(tmp_path):
    assert exit_codes(one_flipped_bit, 2, tmp_path) == [0, 0]
    for rank in (0, 1):
        assert "'copied.0': of 2 copies (ranks 0, 1) no majority is equal" in (tmp_path / f"{rank}.txt").read_text()


def test_of_three_copies_the_odd_one_is_named():
    hashes_RL = torch.tensor([[5, 1], [5, 2], [6, 2]])
    found = compare(["w", "b"], hashes_RL, [[(0, 1, 2)], [(1, 2)]])
    assert found == [Difference("w", ranks=(0, 1, 2), odd=(2,))]
    assert str(found[0]) == "'w': of 3 copies (ranks 0, 1, 2) that of rank 2 differs from the others"


MODEL = DecoderConfig(
    61, 32, layers=1, attention=AttentionConfig(32, heads=8, kv_heads=2, head_dim=4, bias=True), d_hidden=40
)


def twenty_steps(rank, folder):
    """A mesh that keeps copies of all leaves."""
    specs, tx = decoder.specs(MODEL), optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(3e-3))

    def loss_fn(params, batch):
        hidden_TD, _ = decoder.apply(
            params, batch["tokens_T"], positions=batch["positions_T"], segments=batch["segments_T"], cfg=MODEL
        )
        return decoder.loss(params, hidden_TD, batch["labels_T"], MODEL)

    def step(state, batch):
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), loss

    jitted = ftrain.jit(step, plan=Plan(Mesh(2, 1)), donate="state")
    state = jitted.init(lambda key: ftrain.TrainState.create(ftrain.init(specs, key), tx), ftrain.key(3))
    tokens_T = torch.arange(32) % 61
    batch = {
        "tokens_T": tokens_T,
        "positions_T": torch.arange(32) % 8,
        "segments_T": torch.arange(32) // 8,
        "labels_T": decoder.next_token_labels(tokens_T, torch.arange(32) // 8),
    }
    for _ in range(20):
        state, _ = jitted(state, jitted.share(batch))
        check_replicas(state)
    if rank == 1:
        leaf = tree.leaves(state.params)[1]
        flip(leaf.to_local() if isinstance(leaf, DTensor) else leaf)
    with pytest.raises(ReplicasDiffer) as caught:
        check_replicas(state)
    assert [d.path for d in caught.value.differences] == [f"params.{tree.paths(state.params)[1]}"]


def test_training_raises_no_false_alarm(tmp_path):
    assert exit_codes(twenty_steps, 2, tmp_path) == [0, 0]


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (2, 1, 2)], ids=str)
def test_the_pieces_of_a_virtual_mesh(sizes):
    """What the ranks of a mesh hold of a leaf, and one piece with a flipped bit."""
    mesh, specs = Mesh(*sizes), decoder.specs(MODEL)
    params, placements = ftrain.init(specs, ftrain.key(0)), Plan(mesh).placements(specs)
    for path, leaf in zip(tree.paths(params), tree.leaves(params), strict=True):
        placement = placements[path]
        pieces = [placement.shard(leaf, mesh, rank) for rank in range(mesh.size)]
        windows = [placement.windows(mesh, rank) for rank in range(mesh.size)]
        groups = [tuple(r for r in range(mesh.size) if windows[r] == w) for w in sorted(set(windows))]
        hashes = torch.stack([hash_bits(p) for p in pieces])[:, None]
        assert compare([path], hashes, [groups]) == []
        flip(pieces[0], bit=5)
        hashes = torch.stack([hash_bits(p) for p in pieces])[:, None]
        mine = next(g for g in groups if 0 in g)
        odd = (0,) if len(mine) > 2 else mine
        assert compare([path], hashes, [groups]) == ([Difference(path, mine, odd)] if len(mine) > 1 else [])


def test_one_process_has_no_copies():
    check_replicas({"w": torch.zeros(3)})


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (257, 129)], ids=str)
def test_the_hash_is_of_the_bits(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    before = hash_bits(tensor)
    assert torch.equal(hash_bits(tensor.clone()), before)
    real = torch.view_as_real(tensor) if dtype.is_complex else tensor
    flip(real, index=real.numel() - 1)
    assert not torch.equal(hash_bits(tensor), before)


def test_the_hash_does_not_depend_on_strides_or_offset():
    numbers = torch.randn(7, 9)
    assert torch.equal(hash_bits(numbers.T.contiguous().T), hash_bits(numbers))
    assert torch.equal(hash_bits(torch.cat([torch.zeros(1, 9), numbers])[1:]), hash_bits(numbers))
    assert hash_bits(torch.zeros(0)) == 0


def test_nans_and_zeros_count_by_their_bits():
    assert not torch.equal(hash_bits(torch.tensor([0.0])), hash_bits(torch.tensor([-0.0])))
    nans = torch.full((3,), torch.nan)
    assert torch.equal(hash_bits(nans), hash_bits(nans.clone()))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=50), st.data())
def test_changes_that_would_cancel_in_a_sum_are_seen(numbers, data):
    before = torch.tensor(numbers)
    i, j = (data.draw(st.integers(0, len(numbers) - 1)) for _ in range(2))
    swapped = before.clone()
    swapped[i], swapped[j] = before[j], before[i]
    assert torch.equal(hash_bits(swapped), hash_bits(before)) == torch.equal(swapped, before)
    signs = before.clone()
    signs[[i, j]] ^= -(2**63)
    assert torch.equal(hash_bits(signs), hash_bits(before)) == torch.equal(signs, before)
