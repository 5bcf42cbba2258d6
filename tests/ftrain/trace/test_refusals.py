"""What a step cannot do is said in one sentence of ours, with the user's line and the way out."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ftrain
from ftrain.modules import spec
from ftrain.sharding import Mesh, Plan

compiled = torch.compile(lambda x: x * 2, backend="eager")
rows = torch.tensor([0, 1])

REFUSED = {
    "if": (lambda w, b: (b @ w).sum() * (2 if (b @ w).sum() > 0 else 1), "number in a tensor .*torch.where"),
    "float": (lambda w, b: (b @ w).sum() * float(b.sum()) * (1 if float(b.sum()) > 0 else 2), "number in a tensor"),
    "assert": (lambda w, b: (b @ w).sum() if torch.isfinite(b).all() else None, "number in a tensor"),
    "sparse": (lambda w, b: F.embedding(rows, w, sparse=True).sum(), "sparse tensor.*sparse=False"),
    "cond": (lambda w, b: torch.cond(b.sum() > 0, lambda x: x * 2, lambda x: x, (b @ w,)).sum(), "cond.*torch.where"),
    "compiled": (lambda w, b: compiled(b @ w).sum(), "torch.compile made.*plain function"),
    "ctc": (
        lambda w, b: F.ctc_loss((b @ w)[:, None].log_softmax(-1), rows[None, 1:], rows[1:] * 4, rows[1:]),
        "calls ctc_loss, .*forward recursion.*custom_op",
    ),
    "a column": (
        lambda w, b: (b @ w)[:, rows[1] + b.argmax()].sum(),
        r"tensor's value as a Python index.*index_select.*index_copy",
    ),
    "a slice": (lambda w, b: (b @ w)[: b.argmax()].sum(), r"slices with a tensor .*torch.where\(torch.arange"),
    "a format": (
        lambda w, b: print(f"{(b @ w).sum():.2f}") or (b @ w).sum(),
        "shows the number in a tensor .*return the tensor as a metric",
    ),
    "round": (lambda w, b: round((b @ w).sum(), 2), "shows the number in a tensor .*return the tensor as a metric"),
    "a list of tensors": (lambda w, b: torch.tensor([(b @ w).sum(), 1.0])[0], "numbers in tensors .*torch.stack"),
    "an address": (lambda w, b: (b @ w).sum() * (b.data_ptr() > 0), "address of a tensor's memory"),
    "int": (lambda w, b: (b @ w).sum() * int(b.argmax()), "number in a tensor .*torch.where"),
    "range": (lambda w, b: sum((b @ w).sum() for _ in range(b.argmax())), "number in a tensor"),
    "any": (lambda w, b: (b @ w).sum() if (b > 0).any() else b.sum(), "number in a tensor .*torch.where"),
    "istft": (
        lambda w, b: torch.istft(
            torch.stft((b @ w).flatten(), 8, return_complex=True, window=torch.ones(8)), 8, window=b.flatten()[:8]
        ).sum(),
        "number in a tensor",
    ),
}


@pytest.mark.parametrize(("loss", "words"), REFUSED.values(), ids=REFUSED)
def test_a_sentence_with_the_line(loss, words):
    with pytest.raises(ValueError, match=rf"test_refusals.py:\d+ \(.*\): the step .*{words}") as refusal:
        ftrain.jit(ftrain.value_and_grad(loss))(torch.randn(4, 4), torch.randn(4, 4))
    said = str(refusal.value)
    assert "\n" not in said
    assert not re.search("docs.google|TORCH_LOGS|dynamo|u0", said)
    line = int(re.search(r"test_refusals.py:(\d+)", said).group(1))
    assert loss.__code__.co_firstlineno <= line <= loss.__code__.co_firstlineno + 3


def test_a_column_that_a_tensor_tells_is_written():
    def step(k, x, t):
        k = k.clone()
        k[:, t] = x
        return k

    given = torch.zeros(3, 5), torch.ones(3), torch.tensor(2)
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ \(step\): the step .*k\[:, t\] = x.*index_copy.*where"):
        ftrain.jit(step)(*given)
    written = ftrain.jit(lambda k, x, t: k.index_copy(1, t.view(1), x[:, None]))(*given)
    torch.testing.assert_close(written, step(*given))


def exchanged(x):
    h = x * 2
    h.data = x
    return h.clone()


def exchanged_argument(x):
    x.data = torch.ones(2, 2)
    return x * 1


def swapped(x):
    h = x * 2
    torch.utils.swap_tensors(h, x * 1)
    return h * 1


def filled(x):
    h = x * 2
    h.untyped_storage().fill_(0)
    return h


def through_numpy(x):
    return x * float(x.numpy().max())


def by_a_numpy_function(x):
    return x * torch.as_tensor(np.sin(x))


def overlapping(x):
    h = x * 2
    h.unfold(-1, 2, 1).relu_()
    return h


def overlapping_argument(x):
    x.unfold(-1, 2, 1).mul_(2)
    return x * 1


UNSEEN = {
    exchanged: r"exchanges the memory of a tensor \(h.data = x\).*x.copy_\(y\)",
    exchanged_argument: r"exchanges the memory of a tensor \(x.data = torch.ones.*x.copy_\(y\)",
    swapped: r"exchanges the memory of a tensor \(torch.utils.swap_tensors.*make a new value",
    filled: r"uses a tensor's storage \(h.untyped_storage\(\).*make a new value",
    through_numpy: r"passes a tensor to numpy \(return x \* float\(x.numpy.*use the torch function",
    by_a_numpy_function: r"passes a tensor to numpy .*use the torch function",
    overlapping: r"writes into a view whose elements share memory .*clone",
    overlapping_argument: r"writes into a view whose elements share memory .*clone",
}


@pytest.mark.parametrize(("step", "words"), UNSEEN.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_a_trace_is_not_told_of(step, words):
    with pytest.raises(ValueError, match=rf"test_refusals.py:\d+ \({step.__name__}\): the step {words}") as refusal:
        ftrain.jit(step)(torch.randn(2, 2))
    assert "\n" not in str(refusal.value)
    step(torch.randn(2, 2))  # eager PyTorch does it


def test_a_loss_on_a_mesh_that_is_a_plain_number_names_the_line():
    state, plan = {"w": torch.randn(2)}, Plan(Mesh(2, kind="virtual"))
    step = ftrain.jit(lambda s, batch: ftrain.grad(lambda w: w.sum())(s["w"]), plan=plan, specs=spec.of(state))
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ \(<lambda>\): on a mesh .*return Mean\("):
        step(state, torch.randn(2))


def test_complex_parameters():
    with pytest.raises(ValueError, match=r"leaf 'w' is dtype torch.complex64.*real and imaginary parts as two leaves"):
        ftrain.jit(ftrain.grad(lambda p: p["w"].abs().sum()))({"w": torch.ones(2, dtype=torch.complex64)})


def test_errors_of_the_users_own_stay():
    def step(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        ftrain.jit(step)(torch.ones(2))


@pytest.mark.parametrize("options", [{}, {"remat": "all"}, {"donate": "w"}], ids=str)
def test_a_failing_op_names_the_users_line(options):
    def step(w, at):
        return ftrain.grad(lambda w: w[at].square().sum())(w)

    with pytest.raises(IndexError, match=r"index 9 is out of bounds.*\n.*test_refusals.py:\d+ \(<lambda>\): .*w\[at\]"):
        ftrain.jit(step, **options)(torch.randn(4, 3), torch.tensor([0, 9]))


def test_a_failing_op_in_a_loop_names_the_users_line():
    def loss(w, at):
        return ftrain.Mean(w[at].square().sum(), torch.tensor(2.0))

    step = ftrain.jit(ftrain.value_and_grad(ftrain.accumulate(loss, 2, stacked=True)))
    with pytest.raises(IndexError, match=r"test_refusals.py:\d+ \(loss\): .*w\[at\]"):
        step(torch.randn(4, 3), torch.tensor([[0, 1], [2, 9]]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": 3}, r"3 is not one of .*'bfloat16'.*ftrain.Precision\('bfloat16'\)"),
        ({"precision": "int8"}, "'int8' is not one of .*'bfloat16'"),
        ({"backend": "eager"}, "backend='eager' is not one of auto, aten, inductor, cudagraph.*disable_jit"),
        ({"plan": "fsdp"}, "plan='fsdp': .*no such plan; give a ftrain.Plan.*is FSDP.*'auto'"),
        ({"plan": 3}, "plan=3 is not a ftrain.Plan: give"),
        ({"remat": "layers"}, "the policy is 'none', 'layer' or 'all'"),
    ],
)
def test_options_are_refused_when_the_step_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        ftrain.jit(lambda x: x, **options)


@pytest.mark.parametrize("precision", ["bf16", "bfloat16", torch.bfloat16, ftrain.Precision(compute="bfloat16")])
def test_spellings_of_a_precision(precision):
    seen = ftrain.jit(ftrain.value_and_grad(lambda w: (w * 2).sum().float()), precision=precision).lower(torch.ones(3))
    assert torch.bfloat16 in {n.meta["val"].dtype for n in seen.graph.graph.nodes if "val" in n.meta}


def float_or_two(x):
    try:
        return x * float(x.sum())
    except Exception:
        return x * 2


def if_or_two(x):
    try:
        if x.sum() > 0:
            return x
    except (TypeError, ValueError, RuntimeError):
        pass
    return x * 2


def item_or_two(x):
    total = x.sum().item()
    try:
        return x if total > 0 else -x
    except Exception:
        return x * 2


def data_or_two(x):
    try:
        x.data = x + 1
    except Exception:
        return x * 2
    return x


def equal_or_two(x):
    try:
        return x if torch.equal(x, x) else -x
    except Exception:
        return x * 2


def seeded_or_two(x):
    try:
        torch.manual_seed(0)
        return x + torch.rand(3)
    except Exception:
        return x * 2


def misfit_or_two(x):
    try:
        return torch.add(x, "one")
    except TypeError:
        return x * 2


@pytest.mark.parametrize("step", [float_or_two, if_or_two, item_or_two, data_or_two, equal_or_two, seeded_or_two])
@pytest.mark.parametrize("within", ["the step", "a loss"])
def test_a_refusal_that_the_step_catches_comes_out_at_its_end(step, within):
    jitted = step if within == "the step" else lambda x: ftrain.grad(lambda w: step(w).sum())(x)
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ \(.*the step "):
        ftrain.jit(jitted)(torch.ones(3))


def test_an_error_that_eager_code_catches_too_is_no_refusal():
    torch.testing.assert_close(ftrain.jit(misfit_or_two)(torch.ones(3)), misfit_or_two(torch.ones(3)))


def test_a_text_that_shows_a_tensor_is_no_result():
    with pytest.raises(ValueError, match=r"result '1' is a text that shows a tensor.*as a metric"):
        ftrain.jit(lambda x: (x, f"{x}"))(torch.ones(3))


@torch.library.custom_op("refusals_test::add_into", mutates_args={"y"})
def add_into(x: torch.Tensor, y: torch.Tensor) -> None:
    """An op of a user that writes."""
    y.add_(x)


add_into.register_fake(lambda x, y: None)


def test_an_op_of_a_user_that_writes_is_refused_with_its_line():
    def step(x):
        y = x * 2
        add_into(x, y)
        return y

    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ .*refusals_test::add_into writes into its argument y"):
        ftrain.jit(step)(torch.ones(3))


def test_a_hessian_under_vmap_in_a_loss_is_computed_or_refused_with_the_one_that_is():
    def loss(w_D, x_ND, second):
        return torch.vmap(second(lambda x: torch.tanh(x * w_D).sum()))(x_ND).square().sum()

    w_D, x_ND = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    by_reverse = lambda f: torch.func.jacrev(torch.func.grad(f))  # noqa: E731
    expected = ftrain.grad(loss)(w_D, x_ND, by_reverse)
    torch.testing.assert_close(ftrain.jit(lambda w, x: ftrain.grad(loss)(w, x, by_reverse))(w_D, x_ND), expected)
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ .*torch.func.hessian.*take torch.func.jacrev"):
        ftrain.jit(lambda w, x: ftrain.grad(loss)(w, x, torch.func.hessian))(w_D, x_ND)
