"""The log of what all ranks call together: each process keeps its own, and two of them are compared by number."""

import threading

import torch.distributed as dist

from ftrain.sharding.joint_calls import JointCall, calls_made, first_difference, joint_call, last_calls


def test_calls_of_the_main_thread_are_numbered_where_there_are_ranks(tmp_path):
    made = calls_made()
    joint_call("saved step 1")  # without torch.distributed nobody waits
    assert calls_made() == made
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        joint_call("saved step 2")
        other = threading.Thread(target=joint_call, args=("saved step 3",))
        other.start()
        other.join()
    finally:
        dist.destroy_process_group()
    assert last_calls()[-1] == JointCall(made + 1, "saved step 2")


def test_a_rank_that_is_behind_has_not_gone_another_way():
    ahead = [JointCall(7, "began step 3"), JointCall(8, "called the step"), JointCall(9, "began step 4")]
    assert first_difference(ahead[1:], ahead[:2]) is None
    assert first_difference(ahead, ahead[-1:]) is None
    other = [JointCall(8, "saved step 3")]
    assert first_difference(ahead, other) == (ahead[1], other[0])
