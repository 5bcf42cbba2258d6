"""Real processes that save together and restore on other meshes."""

import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from ftrain.checkpoint import Checkpointer, Ranks, Retention, SaveFailed, restore, save, shard_writer
from ftrain.sharding.mesh import Mesh
from tests.helpers.checkpoint_dtensors import on_mesh
from tests.helpers.checkpoint_layouts import placements, whole_leaves
from tests.helpers.checkpoint_states import same_bits
from tests.helpers.rank_processes import run

MESHES = {2: Mesh(1, 2), 4: Mesh(2, 1, 2, 2)}


def state_on(mesh, rank, seed, device="cpu"):
    params = on_mesh(whole_leaves(seed), placements(mesh), mesh, rank, device)
    return {"params": params, "opt_state": {"mu": params["embed_VD"]}, "step": torch.tensor(seed), "position": seed}


def whole_state(seed):
    params = whole_leaves(seed)
    return {"params": params, "opt_state": {"mu": params["embed_VD"]}, "step": torch.tensor(seed), "position": seed}


def local(leaf):
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def save_and_restore(rank, mesh, background, folder, found):
    with Checkpointer(folder, ranks=Ranks.of_run(), background=background) as checkpoints:
        everywhere = init_device_mesh("cpu", (mesh.size,))
        for bad, message in [
            (DTensor.from_local(torch.ones(2), everywhere, [Partial()]), "'params' is placed as .*Partial"),
            (DTensor.from_local(torch.ones(rank + 1), everywhere, [Shard(0)], shape=(9,), stride=(1,)), "torch.chunk"),
        ]:
            with pytest.raises(ValueError, match=message):
                checkpoints.save({"params": bad}, 9)
        with pytest.raises(ValueError, match=r"is spread over 4 ranks and one saves: .*ranks=Ranks.of_run\(\)"):
            save(state_on(mesh, rank, 1), folder, 1)
        for step in (1, 2):
            assert checkpoints.save(state_on(mesh, rank, step), step)
        for device, donate in (("cpu", False), ("cpu", True), ("meta", False)):
            back = checkpoints.restore(state_on(mesh, rank, 0, device), donate=donate)
            expected = state_on(mesh, rank, 2)
            equal = [torch.equal(local(back["params"][n]), local(expected["params"][n])) for n in expected["params"]]
            kinds = [type(back["params"][n]) is type(expected["params"][n]) for n in expected["params"]]
            found[rank, device, donate] = all(equal) and all(kinds) and back["position"] == 2


@pytest.mark.parametrize(("world", "background"), [(4, True)])
def test_processes_save_and_restore_together(tmp_path, world, background):
    found = run(save_and_restore, world, MESHES[world], background, str(tmp_path))
    assert len(found) == 3 * world
    assert all(found.values())
    for step in (1, 2):
        assert same_bits(restore(whole_state(0), tmp_path, step), whole_state(step))
    assert sorted(p.name for p in tmp_path.glob("*")) == [
        ".writer", "global_step_1", "global_step_2", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def lose_a_rank(rank, mesh, folder, found):
    """A step that rank 1 cannot write, one that all can, and one during which rank 1 dies."""
    write, failing = shard_writer.write_part, {"now": rank == 1}

    def write_part(*args, **kwargs):
        if failing["now"]:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    shard_writer.write_part = write_part
    checkpoints = Checkpointer(folder, ranks=Ranks.of_run(), keep=Retention(last=1))
    checkpoints.save(state_on(mesh, rank, 1), 1)
    with pytest.raises(SaveFailed) as error:
        checkpoints.save(state_on(mesh, rank, 2), 2)
    found[rank, "failed"] = str(error.value)
    failing["now"] = False
    for step in (3, 4):
        checkpoints.save(state_on(mesh, rank, step), step)
    checkpoints.wait()
    found[rank, "steps"] = checkpoints.steps()
    if rank == 1:
        os._exit(0)
    checkpoints.save(state_on(mesh, rank, 5), 5)
    with pytest.raises(SaveFailed) as error:
        checkpoints.close()
    found[rank, "lost"] = str(error.value)
    os._exit(0)


def test_a_rank_that_fails_and_a_rank_that_is_lost(tmp_path):
    found = run(lose_a_rank, 2, MESHES[2], str(tmp_path))
    for rank in range(2):
        assert "saving step 1 into" in found[rank, "failed"]
        assert "No space left on device; no step was saved before" in found[rank, "failed"]
        assert found[rank, "steps"] == [4]
    assert "rank 1 no longer answers; the last good step is 4" in found[0, "lost"]
    assert same_bits(restore(whole_state(0), tmp_path), whole_state(4))
