"""Ops that do something beside computing their result: they write, draw random numbers, or depend on data.

For the kinds of holes see `fuzzing.grammar`; "C" is a temporary with one number for each channel of the first hole.
"""

from experiments.bench.fuzzing.grammar import ops_of

_WRITES = """
t: {0}.mul_(0.5)
t: {0}.add_(1.0)
t: {0}.clamp_(-1, 1)
t: {0}.relu_()
t=: {0}.sub_({1})
t=: {0}.copy_({1})
t: {0}.zero_()
t=: {0}.addcmul_({1}, {1})
T: {0}[..., 0] = 0.0
T: {0}[..., 0] += {0}[..., 1]
T: {0}[..., :2].mul_(2.0)
t: {0}.masked_fill_({0} > 0, 0.5)
t: {0}[{0} > 0.5] = 0.25
t=: torch.add({1}, {1}, out={0})
t: F.relu({0}, inplace=True)
t=: {0}.lerp_({1}, 0.1)
t: {0}.exp_()
t: {0}.fill_(0.5)
T: {0}.scatter_(-1, {0}.argmax(-1, keepdim=True), 0.5)
t: {0}.data.mul_(0.5)
t: {0}.detach().mul_(0.5)
"""

_WRITES_OF_ALL = """
T: {0}.view(-1)[0] = 1.0
T: {0}[0].add_(1.0)
T: {0}.T.mul_(0.5)
T: {0}[0] = {0}[1]
T: {0}.index_fill_(0, torch.tensor([0]), 0.5)
t: {0}.unsqueeze_(0)
T: {0}.t_()
T: {0}.index_add_(0, torch.tensor([0]), {0}[1:2])
T: {0}.diagonal().add_(1.0)
"""

_WRITES_OF_LISTS = """
t: torch._foreach_mul_([{0}], 0.5)
t=: torch._foreach_add_([{0}], [{1}])
"""

_RANDOM = """
F.dropout({0}, 0.5, training=True)
F.dropout({0}, 0.25)
{0} + torch.rand_like({0})
{0} * torch.randn_like({0})
torch.bernoulli({0}.sigmoid())
F.alpha_dropout({0}, 0.3, training=True)
F.rrelu({0}, training=True)
F.gumbel_softmax({0}, dim=-1)
torch.normal({0}, 0.1)
torch.poisson({0}.abs())
{0} + torch.rand({0}.shape)
F.feature_alpha_dropout({0}, 0.2, training=True)
{0}[..., torch.randperm({0}.shape[-1])]
{0} * torch.empty_like({0}).bernoulli_(0.5)
{0} + torch.empty_like({0}).uniform_(-1, 1)
F.dropout1d({0}, 0.5)
{0} + torch.randint(0, 3, {0}.shape)
torch.multinomial(torch.softmax({0}, -1), 2)
F.scaled_dot_product_attention({0}, {0}, {0}, dropout_p=0.5)
{0} + torch.randn_like({0}).detach()
"""

_KEYED = """
fk: {0} + ftrain.normal({1}, tuple({0}.shape), dtype={0}.dtype)
fk: {0} * ftrain.bernoulli({1}, tuple({0}.shape), p=0.5)
fk: {0} + ftrain.uniform(ftrain.fold_in({1}, 7), tuple({0}.shape), dtype={0}.dtype)
fk: {0} * ftrain.bernoulli(ftrain.split({1}, 2)[1], tuple({0}.shape), p=0.25)
vk: {0}[..., ftrain.permutation({1}, {0}.shape[-1])]
"""

_BATCH_NORMS = """
mCC: F.batch_norm({0}, {1}, {2}, training=True)
mCC: F.batch_norm({0}, {1}, {2}, training=False)
mCC: F.instance_norm({0}.unsqueeze(-1).expand(*{0}.shape, 3).sin(), {1}, {2}, use_input_stats=True).sum(-1)
mCC: F.batch_norm({0}, {1}, {2}, {1}.sin(), {2}.cos(), training=True, momentum=0.5)
"""

_CONSTANTS = """
torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
torch.arange(4, dtype=torch.float64)
torch.eye(3, dtype=torch.float64)
torch.linspace(-1, 1, 5, dtype=torch.float64)
torch.tensor(0.75, dtype=torch.float64)
torch.full((3, 4), 0.5, dtype=torch.float64)
torch.zeros(4, dtype=torch.float64)
torch.tensor([2, 0, 1])
"""

_DATA = """
{0}[{0} > 0].sum()
{0} * {0}.sum().item()
{0}.nonzero().sum()
{0} if {0}.sum() > 0 else -{0}
torch.masked_select({0}, {0} > 0).mean()
{0}.unique().sum()
torch.cond({0}.sum() > 0, torch.sin, torch.cos, ({0},))
{0} * float({0}.mean())
torch.tensor({0}.tolist(), dtype={0}.dtype)
{0}.numpy().sum() * {0}
"""

_CAPTURED_WRITES = """
a: {0}.mul_(0.5)
a: {0}.add_(1.0)
a=: {0}.copy_({1})
"""

EFFECTS = (
    *ops_of(_WRITES, "in place", 0.8),
    *ops_of(_WRITES_OF_LISTS, "in place, of lists", 0.8),
    *ops_of(_WRITES_OF_ALL, "in place", 0.8, rows=False),
    *ops_of(_RANDOM, "random of torch", 0.25, holes="f"),
    *ops_of(_KEYED, "random of keys", 0.6),
    *ops_of(_BATCH_NORMS, "batch norm", 0.8, rows=False),
    *ops_of(_CONSTANTS, "constant", 0.3, holes=""),
    *ops_of(_DATA, "depends on data", 0.03, holes="v"),
    *ops_of(_CAPTURED_WRITES, "writes an argument", 0.08),
)
"""Ops with effects, and constants."""
