"""Every node knows its source line, its phase, and the parameter it is about."""

from pathlib import Path

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.source import is_users
from ftrain.kernels.mean import Mean
from ftrain.kernels.rms_norm import rms_norm
from ftrain.plan.jit import jit
from ftrain.trace.accumulate import accumulate
from ftrain.trace.grad import value_and_grad


def loss(params, x):
    x = torch.sin(x @ params["first"])
    x = x * 2  # no parameter here
    x = rms_norm(x, params["norm"])
    return Mean.of(torch.exp(x @ params["second"]))


def step(state, x):
    value, grads = value_and_grad(loss)(state, x)
    return tree.map(lambda p, g: p - 0.1 * g, state, grads), value


def accumulated_step(state, x):
    return value_and_grad(accumulate(loss, 2, stacked=True))(state, x)


LINE = loss.__code__.co_firstlineno
STATE = {"first": torch.randn(3, 4), "norm": torch.ones(4), "second": torch.randn(4, 2)}


@pytest.fixture(params=["whole", "in a loop"])
def nodes(request):
    if request.param == "whole":
        return list(jit(step).lower(STATE, torch.randn(5, 3)).graph.graph.nodes)
    graph = jit(accumulated_step).lower(STATE, torch.randn(2, 5, 3)).graph.graph
    return list(loop_body([n for n in graph.nodes if is_loop(n)][-1]).graph.nodes)


def the(nodes, op, phase, count=1):
    found = [n for n in nodes if n.op == "call_function" and n.name.split("_")[0] == op and n.meta["phase"] == phase]
    assert len(found) == count, [n.name for n in nodes]
    return found if count > 1 else found[0]


def place(node):
    assert node.meta["source"].file == __file__
    return node.meta["source"].line - LINE, node.meta["path"]


def test_forward_nodes(nodes):
    first, second = the(nodes, "mm", "forward", 2)
    assert place(first) == (1, "state.first")
    assert place(the(nodes, "sin", "forward")) == (1, "state.first")
    assert place(second) == (4, "state.second")
    assert place(the(nodes, "exp", "forward")) == (4, "state.second")
    assert place(the(nodes, "rms", "forward")) == (3, "state.norm")
    assert place(next(n for n in nodes if n.name == "mul")) == (2, "state.first")


def test_backward_nodes_are_led_to_the_forward_op_they_transpose(nodes):
    places = {place(n) for n in nodes if n.meta.get("phase") == "backward" and n.name.startswith("mm")}
    assert places == {(1, "state.first"), (4, "state.second")}
    assert place(the(nodes, "cos", "backward")) == (1, "state.first")
    assert place(the(nodes, "rms", "backward")) == (3, "state.norm")


def test_updates_are_of_the_step():
    nodes = jit(step).lower(STATE, torch.randn(5, 3)).graph.graph.nodes
    updates = [n for n in nodes if n.meta.get("phase") == "step" and n.name.startswith("sub")]
    assert {n.meta["path"] for n in updates} == {"state.first", "state.norm", "state.second"}
    lines = {n.meta["source"].line for n in updates}
    assert lines == {step.__code__.co_firstlineno + 2}


def test_every_op_of_the_forward_pass_has_a_line(nodes):
    for node in nodes:
        if node.op == "call_function" and node.meta["phase"] in ("forward", "backward"):
            assert node.meta["source"] is not None, node.name
            assert node.meta["source"].file == __file__, node.name


def test_lines_survive_the_removal_of_writes():
    def writes(x):
        y = x * 2
        y += 1
        return y

    (add,) = [n for n in jit(writes).lower(torch.ones(3)).graph.graph.nodes if n.name.startswith("add")]
    assert add.meta["source"].line == writes.__code__.co_firstlineno + 2
    assert add.meta["source"].function == "writes"


def test_parameters_survive_the_removal_of_writes():
    def writing_loss(params, x):
        x = (x @ params["first"]).sin_()
        return Mean.of(x @ params["second"])

    compiled = jit(value_and_grad(writing_loss)).lower(STATE, torch.randn(5, 3))
    paths = {n.meta["path"] for n in compiled.graph.graph.nodes if n.meta.get("phase") == "backward"}
    assert {"params.first", "params.second"} <= paths
    assert "x" not in paths


def test_writes_into_a_list_are_refused_in_a_loss_and_done_outside():
    def listed(params, x):
        h = x @ params["first"]
        seen = h.diagonal()
        torch._foreach_mul_([h], 0.5)
        return Mean.of(seen)

    def halved(state, x):
        grads = value_and_grad(loss)(state, x)[1]
        torch._foreach_mul_(list(grads.values()), 0.5)
        return grads

    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"listed.*_foreach_mul_ writes into a list.*wrong gradient"):
        jit(value_and_grad(listed))(STATE, x)
    whole = value_and_grad(loss)(STATE, x)[1]
    assert all(torch.allclose(g, whole[name] / 2) for name, g in jit(halved)(STATE, x).items())


@pytest.mark.parametrize("package", [ftrain, torch])
def test_a_package_reached_by_a_link_is_nobodys_own_code(package, tmp_path):
    (tmp_path / "home").symlink_to(Path(package.__file__).parent.parent)
    assert not is_users(str(tmp_path / "home" / package.__name__ / "__init__.py"))


def test_a_folder_whose_name_begins_like_a_package_is_the_users():
    root = Path(ftrain.__file__).parent.parent
    assert is_users(str(root / "ftrain_runs" / "train.py"))
    assert is_users(str(root / "mycontextlib.py"))
