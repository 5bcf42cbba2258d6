"""Modules of one's own as pure functions: their statistics come back, their dropout draws from a key."""

import copy

import pytest
import torch
from torch import nn

import ftrain
from ftrain import tree
from ftrain.bridge import from_module
from ftrain.bridge.skeleton import flatten
from ftrain.sharding import Layout, Mesh, Plan


def squares(out, batch):
    return ftrain.Mean.of((out - batch["y"]).square())


def batch(seed=0, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 3, generator=generator)}


class Net(nn.Module):
    """A layer with statistics of the batch, and a table that it shares with nobody."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x)))) * self.scale


def test_three_steps_with_statistics_are_those_of_the_module():
    module = Net()
    plain = copy.deepcopy(module)
    model = from_module(module, squares)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)

    def step(params, state, batch):
        (_, state), grads = ftrain.value_and_grad(model.loss, has_aux=True)(params, batch, None, state)
        grads = flatten(grads)
        return {path: p - 0.1 * grads[path] for path, p in flatten(params).items()}, state

    jitted = ftrain.jit(step)
    params, state = model.load(), model.state
    for i in range(3):
        optimizer.zero_grad()
        (plain(batch(i)["x"]) - batch(i)["y"]).square().mean().backward()
        optimizer.step()
        flat, state = jitted(params, state, batch(i))
        params = ftrain.bridge.skeleton.nest(flat)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(flatten(params)[name], p.detach())
    for name, x in flatten(state).items():
        torch.testing.assert_close(x, dict(plain.named_buffers())[name])
    assert int(flatten(state)["norm.num_batches_tracked"]) == 3


def test_the_module_is_as_it_was_and_shares_no_memory():
    module = Net()
    before = copy.deepcopy(module.state_dict())
    model = from_module(module, squares)
    ftrain.value_and_grad(model.loss, has_aux=True)(model.load(), batch())
    flatten(model.load())["first.weight"].zero_()
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


class Counted(nn.Module):
    """Writes a buffer that is no statistics."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x):
        out = self.layer(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return out - self.average


def test_a_buffer_that_a_forward_writes_is_named_and_can_be_made_state():
    model = from_module(Counted(), squares)
    with pytest.raises(ValueError, match=r"writes the buffer 'average'.*state=\['average'\]"):
        model.loss(model.load(), batch())
    model = from_module(Counted(), squares, state=["average"])
    plain = Counted()
    plain.load_state_dict({**dict(flatten(model.load())), "average": torch.zeros(3)})
    plain(batch()["x"])
    _, state = ftrain.jit(lambda p, b: model.loss(p, b))(model.load(), batch())
    torch.testing.assert_close(state["average"], plain.average)


def test_dropout_and_stochastic_depth_draw_from_a_key():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

        def forward(self, x):
            kept = x.new_empty(len(x), 1).bernoulli_(0.5) / 0.5 if self.training else 1.0
            return self.drop(self.layer(x)) * kept

    model = from_module(Deep(), squares)
    step = ftrain.jit(lambda params, batch, key: ftrain.value_and_grad(model.loss)(params, batch, key), remat="all")
    first, again = (step(model.load(), batch(), ftrain.key(1)) for _ in range(2))
    other = step(model.load(), batch(), ftrain.key(2))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(again), strict=True))
    assert float(first[0]) != float(other[0])
    plain = copy.deepcopy(Deep().eval())
    plain.load_state_dict(flatten(model.load()))
    without = model.logits(model.load(), batch())
    torch.testing.assert_close(without, plain(batch()["x"]).detach() / 0.5)


def test_other_random_numbers_are_refused_with_the_line():
    class Noisy(nn.Module):
        def forward(self, x):
            return x[:, :3] + torch.randn_like(x[:, :3])

    model = from_module(Noisy(), squares)
    with pytest.raises(ValueError, match=r"test_from_module.py:\d+ .*randn_like draws random numbers"):
        model.loss({}, batch())


def test_a_module_without_memory_has_specs_and_initial_numbers():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model = from_module(module, squares, inputs=lambda batch: (batch["x"],))
    params = ftrain.init(model.specs, ftrain.key(0))
    assert torch.equal(params["1"]["weight"], torch.ones(5))
    assert 0.2 < float(params["0"]["weight"].std()) < 0.27
    assert model.loss(params, batch()).count == 24
    with pytest.raises(ValueError, match="is on the meta device and has no numbers"):
        model.load()


def test_tied_weights_are_one_leaf():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))[:, :3]

    module = Tied()
    model = from_module(module, squares)
    assert list(flatten(model.specs)) == ["a.weight"]
    value, grads = ftrain.jit(lambda p, b: ftrain.value_and_grad(model.loss)(p, b))(model.load(), batch())
    loss = (module(batch()["x"]) - batch()["y"]).square().mean()
    loss.backward()
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(grads["a"]["weight"], module.a.weight.grad)


@pytest.mark.parametrize("remat", ["none", "all"])
def test_statistics_are_those_of_the_whole_batch_where_ranks_divide_it(remat):
    model = from_module(Net(), squares)

    def step(params, state, batch):
        return ftrain.value_and_grad(model.loss, has_aux=True)(params, batch, None, state)

    alone = ftrain.jit(step)(model.load(), model.state, batch())
    plan = Plan(Mesh(replicate=2, shard=2, kind="virtual"), Layout())
    shared = ftrain.jit(step, plan=plan, specs=model.specs, remat=remat)(model.load(), model.state, batch())
    for a, b in zip(tree.leaves(alone), tree.leaves(shared), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Attending(nn.Module):
    """torch's own attention, by its module and by its function, with dropout of weights."""

    def __init__(self, p=0.5, **options):
        super().__init__()
        torch.manual_seed(0)
        self.p, self.heads = p, nn.MultiheadAttention(6, 2, dropout=p, batch_first=True, **options)

    def forward(self, x):
        x = x[:, None] * torch.ones(3, 1)
        x = x + self.heads(x, x, x)[0]
        p = self.p if self.training else 0.0
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)[:, 0, :3]


def test_dropout_of_attention_draws_from_the_key_on_any_mesh():
    model = from_module(Attending(), squares)

    def run(key, **options):
        step = ftrain.jit(lambda params, batch, key: ftrain.value_and_grad(model.loss)(params, batch, key), **options)
        return tree.leaves(step(model.load(), batch(), key))

    first, again, other = run(ftrain.key(1)), run(ftrain.key(1), remat="all"), run(ftrain.key(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert float(first[0]) != float(other[0])
    shared = run(ftrain.key(1), plan=Plan(Mesh(shard=2, kind="virtual"), Layout()), specs=model.specs)
    for a, b in zip(first, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.logits(model.load(), batch()), Attending().eval()(batch()["x"]).detach())


def test_keys_that_attention_adds_are_refused_where_it_drops():
    model = from_module(Attending(add_zero_attn=True), squares)
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention with add_zero_attn drops weights \(p=0.5\)"):
        model.loss(model.load(), batch(), ftrain.key(0))
    assert model.loss(model.load(), batch()).count == 24


def test_a_recurrent_network_that_drops_between_layers_is_refused_with_the_line():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.LSTM(6, 3, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.network(x[:, None])[0][:, 0]

    model = from_module(Recurrent(), squares)
    with pytest.raises(ValueError, match=r"test_from_module.py:\d+ .*lstm drops between its layers \(p=0.5\)"):
        model.loss(model.load(), batch(), ftrain.key(0))
    assert torch.equal(model.loss(model.load(), batch()).total, model.loss(model.load(), batch()).total)


def test_parts_of_rows_are_dropped_alike_on_any_mesh():
    class Windows(nn.Module):
        def forward(self, x):
            parts = x.reshape(len(x) * 2, 1, 3)  # two windows of each row
            return nn.functional.dropout(parts, 0.5).reshape(len(x), 2, 3).sum(1)

    model = from_module(Windows(), squares)

    def run(**options):
        step = ftrain.jit(lambda batch, key: model.loss({}, batch, key).value(), **options)
        return step(batch(), ftrain.key(1))

    torch.testing.assert_close(run(), run(plan=Plan(Mesh(shard=2, kind="virtual"), Layout())))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: from_module(nn.Linear(6, 3)), "has no loss"),
        (lambda: from_module(nn.Linear(6, 3), lambda out, b: out.sum(), inputs=lambda b: (b["x"],)), "ftrain.Mean"),
        (lambda: from_module(nn.Linear(6, 3), squares), "its forward needs 'input', and the batch has x, y"),
    ],
)
def test_what_does_not_fit_is_named(make, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        model.loss(model.load(), batch())


class Mixing(nn.Module):
    """Looks across the rows of its batch, in the way that `how` says."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(6, 4), nn.Linear(4, 3), how

    def forward(self, x):
        return self.last(self.how(self.first(x)))


def attended(h):
    return nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]


@pytest.mark.parametrize("how", [lambda h: h - h.mean(0), lambda h: h + h.roll(1, 0)], ids=["means", "shifts"])
def test_a_module_that_looks_across_rows_sees_those_of_all_ranks(how):
    model = from_module(Mixing(how), squares)

    def step(params, batch):
        return ftrain.value_and_grad(model.loss)(params, batch)

    alone = ftrain.jit(step)(model.load(), batch())
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    shared = ftrain.jit(step, plan=plan, specs=model.specs)(model.load(), batch())
    for a, b in zip(tree.leaves(alone), tree.leaves(shared), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "how", [lambda h: h[h[:, 0].argsort()], lambda h: h + h[0], attended], ids=["sorts", "reads one", "attends"]
)
def test_a_module_that_mixes_rows_in_another_way_is_refused_with_the_line(how):
    model = from_module(Mixing(how), squares)
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    step = ftrain.jit(lambda params, batch: model.loss(params, batch).value(), plan=plan, specs=model.specs)
    with pytest.raises(ValueError, match=r"test_from_module.py:\d+.* mixes rows of the batch"):
        step(model.load(), batch())


def test_parts_that_a_module_computes_again_are_refused_with_the_line():
    model = from_module(
        Mixing(lambda h: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=False)), squares
    )
    for wrap in (ftrain.jit, lambda step: step):
        step = wrap(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
        with pytest.raises(ValueError, match=r"test_from_module.py:\d+ .*computes again.*remat=\"layer\""):
            step(model.load(), batch())


def lazy():
    return nn.LazyLinear(3)


def hooked():
    module = nn.Linear(6, 3)
    module.weight.register_hook(lambda grad: grad / 2)
    return module


def weight_norm_of_old():
    module = nn.Linear(6, 3)
    nn.utils.weight_norm(module)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "says"),
    [(lazy, "has no shape before a first call"), (hooked, "has a hook"), (weight_norm_of_old, "cannot be copied")],
)
def test_a_module_that_a_copy_would_not_be_is_refused_with_the_way_out(make, says):
    with pytest.raises(ValueError, match=says):
        from_module(make(), squares)


def test_gradients_by_how_often_an_index_is_read_are_refused_on_a_mesh():
    table = nn.Embedding(4, 3, scale_grad_by_freq=True)
    model = from_module(table, squares, inputs=lambda batch: (batch["i"],))
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    step = ftrain.jit(lambda p, batch: ftrain.value_and_grad(model.loss)(p, batch), plan=plan, specs=model.specs)
    with pytest.raises(ValueError, match=r"embedding at .* mixes rows of the batch"):
        step(model.load(), {"i": torch.tensor([0, 1, 2, 3, 0, 0, 1, 2]), "y": batch()["y"]})
