"""A canary for each private torch name: after an upgrade of torch, what fails here is to be mended in one file."""

import logging
import operator

import pytest
import torch
from torch import fx

from ftrain.graph import torch_memory
from ftrain.graph import torch_private as private


def tracing(function, *shapes):
    with private.new_fake_mode():
        return private.trace_to_graph(function, [torch.empty(s) for s in shapes])


def names(module):
    return [n.name for n in module.graph.nodes if n.op == "call_function"]


def test_fake_mode_makes_shapes_without_memory():
    with private.new_fake_mode() as mode:
        x = torch.empty(1 << 20, 1 << 20)
    assert isinstance(x, private.FakeTensor)
    assert private.fake_mode_of([1, x]) is mode
    assert private.fake_mode_of([]) is not mode


def test_fake_mode_gives_symbols_to_sizes_that_depend_on_data():
    with private.new_fake_mode():
        count = torch.ones(3).nonzero().shape[0]
    assert isinstance(count, torch.SymInt)


def test_autograd_numbers_ops_and_their_backwards_alike():
    x = torch.ones(2, requires_grad=True)
    before = private.next_seq_nr()
    y = x.sin()
    assert private.next_seq_nr() == before + 1
    assert y.grad_fn._sequence_nr() == before


def test_tracing_graph_is_that_of_the_innermost_trace():
    assert private.tracing_graph() is None
    seen = []

    def function(x):
        y = x + 1
        seen.append([n.name for n in private.tracing_graph().nodes])
        with private.paused_trace():
            seen.append(private.tracing_graph())
            x * 2
        return y

    assert names(tracing(function, (3,))) == ["add"]
    assert seen == [["x_1", "add"], None]


def test_a_trace_may_be_made_inside_another():
    inner = []

    def function(x):
        with private.paused_trace():
            fake = private.new_fake_like(x)
        inner.append(private.trace_to_graph(lambda y: y.sin(), [fake]))
        return x.cos()

    assert names(tracing(function, (3,))) == ["cos"]
    assert names(inner[0]) == ["sin"]


def test_emitted_nodes_stand_for_their_outputs():
    body = tracing(lambda y: y + 1, (3,))

    def call(body, tensors):
        return [body(t) for t in tensors]

    def function(x):
        assert private.is_tracked(x)
        with private.paused_trace():
            out = private.new_fake_like(x)
        assert not private.is_tracked(out)
        (out,) = private.emit_node(call, body, "call", ([x],), [out], {"phase": "test"})
        assert private.is_tracked(out)
        return out * 2

    module = tracing(function, (3,))
    assert [n.target for n in module.graph.nodes if n.op == "call_function"][:2] == [call, operator.getitem]
    assert next(n for n in module.graph.nodes if n.target is call).meta["phase"] == "test"
    assert isinstance(module.call_0, fx.GraphModule)
    assert module(torch.ones(3)).tolist() == [4, 4, 4]


def test_vmapped_dims_are_told_from_the_outermost_on():
    found = []

    def inner(x):
        found.append(private.vmapped_dims(x))
        return x

    torch.func.vmap(torch.func.vmap(inner, in_dims=1), in_dims=2)(torch.ones(2, 3, 4))
    assert found == [[2, 1]]
    assert private.vmapped_dims(torch.ones(2)) == []


def test_functional_wrappers_come_off_and_on():
    def function(x):
        y = x * 2
        y += 1
        inner = private.unwrap_functional(y)
        assert private.is_tracked(inner)
        assert not private.is_tracked(y)
        return private.wrap_functional(inner) * 3

    module = tracing(torch.func.functionalize(function, remove="mutations"), (2,))
    assert names(module) == ["mul", "add", "mul_1"]


def test_below_autograd_no_graph_is_recorded():
    x = torch.ones(2, requires_grad=True)
    with private.below_autograd():
        assert x.sin().grad_fn is None


def test_shapes_of_a_result_cost_nothing():
    made = private.shapes_of_result(lambda: torch.ones(1 << 20, 1 << 20).sum(0))
    assert made.shape == (1 << 20,)

    def function(x):
        assert private.shapes_of_result(lambda: x @ x).shape == (3, 3)
        return x + 1

    assert names(tracing(function, (3, 3))) == ["add"]


def test_value_of_a_node_is_new_memory_or_a_view():
    module = tracing(lambda x: (x + 1).t(), (3, 2))
    x, add, t = (n for n in module.graph.nodes if n.op != "output")
    for node, viewed in ((add, False), (t, True)):
        value = private.value_of(node)
        assert value.shape == node.meta["val"].shape
        assert (torch_memory.storage_id(value) == torch_memory.storage_id(node.args[0].meta["val"])) == viewed
        assert torch_memory.storage_id(value) != torch_memory.storage_id(node.meta["val"]) or viewed
    assert x.op == "placeholder"


def test_inductor_compiles_a_graph():
    module = tracing(lambda x: [x * 2 + 1, (x.view(2, 4).t() * 2).softmax(-1)], (8,))
    x = torch.arange(8.0)
    for ours, expected in zip(private.compile_with_inductor(module)(x), module(x), strict=True):
        torch.testing.assert_close(ours, expected)
        assert ours.stride() == expected.stride()


def test_inductor_writes_over_inputs():
    module = tracing(lambda x, y: [y.sin() + x, x.copy_(y.cos() * 2)][:1], (8,), (8,))
    x, y = torch.arange(8.0), torch.ones(8)
    before = x.clone()
    (out,) = private.compile_with_inductor(module)(x, y)
    torch.testing.assert_close(out, y.sin() + before)
    torch.testing.assert_close(x, y.cos() * 2)


def test_views_are_known_as_such():
    assert torch.ops.aten.view.default.is_view
    assert not torch.ops.aten.add.Tensor.is_view
    assert torch.Tag.pointwise in torch.ops.aten.add.Tensor.tags


def test_the_profiler_reports_the_allocators_events():
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as recorded:
        torch.empty(1000)
    assert [e.nbytes() for e in recorded.kineto_results.events() if e.name() == "[memory]"] == [4000, -4000]


def test_names_that_are_used_for_speed_exist() -> None:
    assert callable(torch._fused_adamw_)
    assert isinstance(torch.ops.prim.device.default, torch._ops.OpOverload)
    with private._use_lazy_graph_module(True):
        pass


def test_the_code_of_a_lazy_module_is_made_when_it_is_called():
    module = tracing(lambda x: x.sin() + 1, (3,))
    copy = private.lazy_module(module, module.graph)
    next(n for n in copy.graph.nodes if "sin" in n.name).target = torch.ops.aten.cos.default
    copy.recompile()
    torch.testing.assert_close(copy(torch.ones(3)), torch.ones(3).cos() + 1)


@pytest.mark.gpu
def test_a_card_is_kept_busy():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    private.keep_busy(10_000_000)
    end.record()
    end.synchronize()
    assert 1 < start.elapsed_time(end) < 100


def test_the_name_that_keeps_a_card_busy_is_there():
    assert callable(torch.cuda._sleep)


def test_the_tracer_knows_the_number_of_a_constant():
    found = []

    def step(x):
        found.extend([private.number_of(torch.tensor(2.0)), private.number_of(x), private.constant_of(x)])
        return x

    tracing(step, (3,))
    assert found == [2.0, None, None]


def test_modes_that_lie_around_a_call():
    assert not private.any_autocast()
    with torch.autocast("cpu"):
        assert private.any_autocast()
        with private.without_autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not private.functions_are_watched()
    with torch.device("meta"):
        assert private.functions_are_watched()
    assert private.attention_choices() == (True, True, True)


def test_transforms_and_traces_are_seen():
    assert not private.functional_transform()
    assert not private.modes_are_active()
    torch.func.grad(lambda x: x * private.functional_transform())(torch.ones(()))
    assert torch.func.grad(lambda x: x * private.functional_transform())(torch.ones(())) == 1
    with private.new_fake_mode():
        assert private.modes_are_active()


def test_a_lazy_module_is_written_out():
    module = tracing(lambda x: x * 2, (3,))
    assert private.written_out(module)(torch.ones(3)).tolist() == [2, 2, 2]
    assert type(module).forward.__code__.co_filename.startswith("<eval_with_key>")


def test_a_real_draw_moves_the_generator_within_a_trace():
    before, graphs = torch.get_rng_state(), []
    graphs.append(tracing(lambda x: private.real_draw() or x * 2, (3,)))
    assert names(graphs[0]) == ["mul"]
    assert not torch.equal(torch.get_rng_state(), before)


def test_an_assertion_of_the_device_says_what_is_wrong():
    private.assert_on_device(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="cut in two"):
        private.assert_on_device(torch.tensor(False), "cut in two")


def test_a_shape_rule_that_fails_writes_no_traceback_where_it_is_tried(caplog):
    def failing():
        with private.new_fake_mode(), pytest.raises(RuntimeError):
            torch.empty(3) + torch.empty(4)

    with caplog.at_level(logging.ERROR, logger="torch._subclasses.fake_tensor"), private.quiet_shape_rules():
        failing()
    assert not caplog.records
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_a_backward_of_the_users_own_is_told_from_torchs():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    doubled = Doubled.apply(torch.ones(2, requires_grad=True))
    assert private.own_backward(doubled.grad_fn) is Doubled
    assert private.own_backward(doubled.sum().grad_fn) is None


def test_a_function_that_will_run_again_is_told():
    seen = []

    def note(x):
        seen.append(private.runs_again_in_backward())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    note(x)
    torch.utils.checkpoint.checkpoint(note, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        note(x)
    assert seen == [False, True, False]


def test_modules_that_ask_are_told_of_an_export_within_the_block():
    with private.exporting():
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_exporting()
