"""What a CUDA graph cannot hold is refused before anything runs, by op, path and line."""

import pytest
import torch
from torch import fx

from ftrain.graph.source import SourceLine
from ftrain.graph.torch_private import FakeTensor, new_fake_mode
from ftrain.graph.writes import written_inputs
from ftrain.runtime.recordable import require_recordable

aten = torch.ops.aten


def graph_of(*ops, devices=("cuda", "cpu")):
    """A graph of inputs `x0`, `x1`, ... [4] on these devices, and of ops `(target, value, *inputs)`; inputs by number,
    values as (shape, device) or None.
    """
    graph = fx.Graph()
    nodes = []
    with new_fake_mode() as mode:

        def fake(shape, device):
            return FakeTensor(mode, torch.empty(shape, device="meta"), torch.device(device))

        for i, device in enumerate(devices):
            nodes.append(graph.placeholder(f"x{i}"))
            nodes[-1].meta.update(val=fake((4,), device), path=f"state.x{i}")
        for target, value, *inputs in ops:
            nodes.append(graph.call_function(target, tuple(nodes[i] for i in inputs)))
            nodes[-1].meta.update(source=SourceLine("model.py", 7, "loss"), path="state.x0")
            if value is not None:
                nodes[-1].meta["val"] = fake(*value)
    graph.output(nodes[-1])
    return fx.GraphModule({}, graph)


def test_work_of_the_card_with_a_number_of_the_host_is_recorded():
    require_recordable(graph_of((aten.mul.Tensor, ((4,), "cuda"), 0, 1), (aten.neg.default, ((4,), "cpu"), 1)))


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ((aten._local_scalar_dense.default, None, 0), "makes the host wait for a number"),
        ((aten._to_copy.default, ((4,), "cpu"), 0), "copies from the GPU to the CPU"),
        ((aten._to_copy.default, ((4,), "cuda"), 1), "copies from the CPU to the GPU"),
    ],
)
def test_waits_and_copies_are_named_by_op_path_and_line(op, reason):
    with pytest.raises(ValueError, match=rf"state.x0\) at .*model.py:7 {reason}.* backend='inductor'"):
        require_recordable(graph_of(op))


def test_a_state_on_the_cpu_is_refused_by_its_path():
    module = graph_of((aten.copy_.default, ((4,), "cpu"), 1, 0))
    assert written_inputs(module) == {1}
    with pytest.raises(ValueError, match=r"leaf 'state\.x1' is on the CPU and the step writes"):
        require_recordable(module)
