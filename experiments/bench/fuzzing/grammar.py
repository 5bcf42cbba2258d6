"""The ops that random steps are made of: source with holes, and what each hole takes.

Kinds of holes: "f" floating; "v" floating with a last dim; "m" a matrix or more; "q" a square matrix; "s" a number;
"l" long integers; "b" booleans; "t" a floating temporary, which may be written; "T" a temporary with a last dim;
"a" an argument of the step; "k" a key; "n" a Python number of the state; "0" any tensor.
Related to the first hole: "=" its shape and dtype; "c" one number for each place of its last dim; "w" a matrix that it
multiplies from the left; "r" broadcast against it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """One op. `rows`: each row of the result is of one row of the arguments, so that ranks may share the rows.
    `makes`: False for a statement. `weight`: how often it is drawn, beside others.
    """

    text: str
    holes: str
    feature: str
    rows: bool = False
    makes: bool = True
    weight: float = 1.0


_ELEMENTWISE = """
torch.sin({0})
torch.tanh({0})
{0}.sigmoid()
F.gelu({0})
F.silu({0})
F.softplus({0})
{0}.clamp(-2, 2).exp()
({0}.abs() + 0.1).log()
({0}.abs() + 0.1).sqrt()
{0}.square()
F.relu({0})
F.elu({0})
F.hardswish({0})
F.leaky_relu({0}, 0.1)
{0} * 1.5
1 - {0}
{0} / ({0}.abs() + 1)
{0}.clamp(-1, 1)
torch.where({0} > 0, {0}, 0.5 * {0})
{0}.sign() * {0}
{0}.detach()
{0}.erf()
{0}.masked_fill({0} > 0.5, 0.0)
torch.atan2({0}, {0}.abs() + 1)
F.mish({0})
F.logsigmoid({0})
F.threshold({0}, 0.1, 0.2)
({0}.abs() + 0.1).pow(1.5)
{0}.clone()
{0}.contiguous()
-{0}
{0} + ({0}.round() - {0}).detach()
torch.lerp({0}, {0}.sin(), 0.3)
F.hardtanh({0})
F.celu({0})
F.tanhshrink({0})
{0}.nan_to_num()
F.softsign({0})
torch.logaddexp({0}, -{0})
F.relu6({0})
({0}.abs() + 0.5).rsqrt()
torch.special.expm1({0}.clamp(max=1.0))
F.hardsigmoid({0})
F.selu({0})
torch.ones_like({0})
torch.zeros_like({0})
torch.full_like({0}, 0.5)
{0} * torch.tensor(1.25)
"""

_CASTS = """
{0}.float().to({0}.dtype)
{0}.to(torch.bfloat16).to({0}.dtype)
{0}.half().float().to({0}.dtype)
{0}.double().to({0}.dtype)
({0} > 0).to({0}.dtype)
{0}.clamp(-9, 9).long().to({0}.dtype)
{0}.float()
{0}.double()
"""

_LAST_DIM = """
torch.softmax({0}, -1)
torch.log_softmax({0}, -1)
{0}.cumsum(-1)
F.layer_norm({0}, {0}.shape[-1:])
F.rms_norm({0}, {0}.shape[-1:])
F.normalize({0}, dim=-1, eps=1e-2)
{0}.flip(-1)
{0}.sort(-1).values
{0}.topk(2, -1).values
{0}.logsumexp(-1)
{0}.max(-1).values
{0}.mean(-1, keepdim=True)
{0}.sum(-1)
{0}.var(-1)
({0}.var(-1, keepdim=True) + 0.1).sqrt()
{0}.norm(dim=-1)
{0}.amax(-1, keepdim=True)
{0}.tanh().prod(-1)
F.pad({0}, (1, 1))
{0}[..., :2]
{0}[..., ::2]
{0}[..., -1]
{0}.chunk(2, -1)[0]
{0}.unsqueeze(-1)
{0}.repeat_interleave(2, -1)
{0}.roll(1, -1)
{0}.diff(dim=-1)
{0}.unfold(-1, 2, 1)
torch.cat([{0}, {0}.sin()], -1)
torch.stack([{0}, {0} * 2], -1)
{0}.median(-1).values
{0} / ({0}.abs().sum(-1, keepdim=True) + 1)
{0} - {0}.mean(-1, keepdim=True)
{0}.narrow(-1, 0, 2)
{0}.unsqueeze(-2).expand(*{0}.shape[:-1], 2, {0}.shape[-1])
{0}.split(2, -1)[0]
{0}.unbind(-1)[0]
torch.gather({0}, -1, {0}.argsort(-1))
{0}.cummax(-1).values
{0}.tanh().cumprod(-1)
F.hardtanh({0}).logcumsumexp(-1)
{0}.take_along_dim({0}.argmax(-1, keepdim=True), -1)
F.softmin({0}, -1)
torch.linalg.vector_norm({0}, 3, dim=-1)
{0}.aminmax(dim=-1).max
F.one_hot({0}.argmax(-1), {0}.shape[-1]).to({0}.dtype)
"""

_PAIRS = """
{0} + {1}
{0} - {1}
{0} * {1}
{0} / ({1}.abs() + 1)
torch.where({0} > {1}, {0}, {1})
torch.maximum({0}, {1})
torch.minimum({0}, {1})
torch.lerp({0}, {1}, 0.2)
torch.addcmul({0}, {0}, {1}, value=0.5)
F.mse_loss({0}, {1}, reduction="none")
F.smooth_l1_loss({0}, {1}, reduction="none")
F.huber_loss({0}, {1}, reduction="none")
torch.hypot({0} + 3, {1})
torch.stack([{0}, {1}]).mean(0)
torch.addcdiv({0}, {1}, {1}.abs() + 1)
F.binary_cross_entropy_with_logits({0}, {1}.sigmoid(), reduction="none")
torch.fmod({0}, {1}.abs() + 1)
torch.copysign({0}, {1})
"""

_WHOLE = """
{0}.mean()
{0}.sum(0)
{0}.norm()
{0}.reshape(-1)
{0}.flatten()
{0}.flip(0)
{0}[1:]
{0}[0]
{0}[::2]
{0}.cumsum(0)
torch.softmax({0}, 0)
{0}.sum()
{0}.std()
{0}.amax()
{0}.logsumexp(0)
torch.cat([{0}, {0}])
torch.stack([{0}, {0}])
{0} - {0}.mean(0)
{0}.unsqueeze(0)
{0}.sort(0).values
{0}.roll(1, 0)
{0}.index_select(0, torch.tensor([0, 1, 1]))
{0}[[0, 1]]
{0}.view({0}.shape)
{0}.unsqueeze(0).expand(2, *{0}.shape)
{0}.movedim(0, -1)
{0}.repeat(2, *[1] * ({0}.dim() - 1))
{0}.as_strided((2,), (1,))
{0}.tile(2)
{0}.split(1)[0]
torch.tensor_split({0}, 2)[0]
{0}.max()
{0}.argmax()
{0}.var(0)
torch.zeros_like({0}).index_add(0, torch.tensor([0, 0]), {0}[:2])
{0}.index_put((torch.tensor([0, 1]),), {0}[:2] * 2)
{0}.abs().amax(0, keepdim=True)
torch.vmap(lambda r: r.sin().sum())({0})
torch.func.grad(lambda u: u.sin().square().sum())({0})
ftrain.grad(lambda u: u.tanh().square().sum())({0})
torch.func.jvp(torch.sin, ({0},), ({0}.detach(),))[1]
torch.einsum('i...->...', {0})
{0}.flip(0).clone()
F.normalize({0}, dim=0, eps=1e-2)
"""

_MATRICES = """
{0}.mT
{0}.transpose(-1, -2).contiguous()
{0}.tril()
{0}.triu(1)
{0} @ {0}.mT
{0}.mT @ {0}
torch.einsum('...ij,...kj->...ik', {0}, {0})
{0}.diagonal(dim1=-2, dim2=-1)
{0}.swapaxes(0, 1)
{0}.permute(*range(1, {0}.dim()), 0)
F.pad({0}, (0, 0, 1, 0))
{0}[:, 1:]
{0}[:, 0]
{0}[..., 0, :]
{0}.sum((0, 1))
{0}.mean((-1, -2))
{0}.flatten(0, 1)
torch.cov({0}[:, :2]) if {0}.dim() == 2 else {0}.sin()
F.scaled_dot_product_attention({0}, {0}, {0}) if {0}.dim() > 2 else {0}.exp().log()
torch.cdist({0}, {0} + 1)
{0}.unflatten(-1, (1, -1))
{0}.t() if {0}.dim() == 2 else {0}
F.avg_pool1d({0}, 2)
F.max_pool1d({0}, 2)
{0}.bmm({0}.mT) if {0}.dim() == 3 else {0}.mm({0}.mT)
F.interpolate({0}[None], scale_factor=2.0)[0] if {0}.dim() == 2 else {0}.cos()
torch.kron({0}, torch.eye(2, dtype={0}.dtype)) if {0}.dim() == 2 else {0}
"""

_SQUARE = """
torch.linalg.solve({0} @ {0}.mT + torch.eye({0}.shape[-1], dtype={0}.dtype), {0})
torch.linalg.cholesky({0} @ {0}.mT + torch.eye({0}.shape[-1], dtype={0}.dtype))
{0} @ {0}
torch.linalg.inv({0} @ {0}.mT + torch.eye({0}.shape[-1], dtype={0}.dtype))
torch.trace({0})
torch.linalg.matrix_exp({0} * 0.1)
{0} + {0}.t()
"""

_PRODUCTS = """
vw: {0} @ {1}
vw: F.linear({0}, {1}.t())
vw: torch.einsum('...i,ij->...j', {0}, {1})
vw: F.linear({0}, {1}.t(), {1}.sum(0))
vw: torch.matmul({0}, {1}.sigmoid())
vc: {0} + {1}
vc: {0} * {1}
vc: F.layer_norm({0}, {0}.shape[-1:], {1})
vc: F.layer_norm({0}, {0}.shape[-1:], {1}, {1})
vc: F.rms_norm({0}, {0}.shape[-1:], {1})
vc: ({0} * {1}).sum(-1)
vc: F.prelu({0}, {1}.abs().mean())
vc: {0} @ {1}
fs: {0} * {1}
fs: {0} + {1}.tanh()
fn: {0} * {1}
fn: {0} + {1}
fr: {0} * {1}
fr: {0} + {1}
fs: torch.addcmul({0}, {1}, {1})
"""

_INDEXED = """
lm: F.embedding({0} % {1}.shape[0], {1})
lm: {1}[{0} % {1}.shape[0]]
lm: {1}.index_select(0, {0}.flatten() % {1}.shape[0])
me: F.cross_entropy({0}, {1} % {0}.shape[-1], reduction='none')
me: {0}.gather(-1, ({1} % {0}.shape[-1]).unsqueeze(-1))
l: F.one_hot({0} % 3, 3).double()
l: {0}.double() * 0.1
l: {0} + 1
v: torch.zeros_like({0}).scatter_add(-1, {0}.argsort(-1), {0})
me: torch.where(({1} > 1).unsqueeze(-1), {0}, 0.0)
f: torch.bucketize({0}, torch.linspace(-1, 1, 4, dtype={0}.dtype))
f: torch.where({0}.isfinite(), {0}, 0.0)
f: {0} > 0
b: {0}.to(torch.float64)
v: torch.searchsorted({0}.sort(-1).values, {0})
v: {0}.argsort(-1)
"""

_INDEXED_OF_ALL = """
me: torch.zeros(4, *{0}.shape[1:], dtype={0}.dtype).index_add(0, {1} % 4, {0})
"""

_VIEWS = """
{0}.view_as({0})
{0}.view(-1)
{0}.detach()
{0}[0]
{0}.T
{0}.unsqueeze(0)
{0}.expand(2, *{0}.shape)
{0}[...]
{0}.narrow(0, 0, 1)
{0}.squeeze()
{0}.real
{0}.contiguous()
{0}.to({0}.dtype)
{0}.reshape({0}.shape)
"""


def ops_of(block: str, feature: str, weight: float, *, holes: str | None = None, rows: bool = True) -> list[Op]:
    """The ops of a block of lines: each is a text, after its holes where `holes` does not say them for all."""
    makes = not feature.startswith(("in place", "writes"))
    found = []
    for line in block.strip().splitlines():
        kinds, text = (holes, line) if holes is not None else line.split(": ", 1)
        found.append(Op(text, kinds, feature, rows, makes, weight))
    return found


PURE = (
    *ops_of(_ELEMENTWISE, "elementwise", 0.5, holes="f"),
    *ops_of(_CASTS, "cast", 0.4, holes="f"),
    *ops_of(_LAST_DIM, "along the last dim", 0.6, holes="v"),
    *ops_of(_PAIRS, "pairs", 1.0, holes="f="),
    *ops_of(_WHOLE, "whole", 0.4, holes="v", rows=False),
    *ops_of(_MATRICES, "matrix", 0.5, holes="m", rows=False),
    *ops_of(_SQUARE, "linear algebra", 0.4, holes="q", rows=False),
    *ops_of(_PRODUCTS, "product", 1.5),
    *ops_of(_INDEXED, "indexed", 0.8),
    *ops_of(_INDEXED_OF_ALL, "indexed", 0.8, rows=False),
    *ops_of(_VIEWS, "view", 0.5, holes="f", rows=False),
)
"""Ops that do nothing beside computing their result."""
