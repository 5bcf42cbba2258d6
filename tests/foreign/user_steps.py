"""Updates and losses as people write them in their own training scripts, on whole arrays and with no mesh in mind."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ftrain
from ftrain import Mean

LEAVES = ("w", "v", "b")
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state():
    shapes = {"w": (6, 8), "v": (8, 4), "b": (4,)}
    weights = {k: numbers(i, *shape) for i, (k, shape) in enumerate(shapes.items())}
    return {**weights, "m": {k: numbers(i + 3, *shape).abs() for i, (k, shape) in enumerate(shapes.items())}}


def batch():
    return {"x": numbers(6, 12, 6), "y": numbers(7, 12, 4), "t": torch.arange(12) % 4}


def hidden(p, b):
    return torch.tanh(b["x"] @ p["w"]) @ p["v"] + p["b"]


def mean(e):
    return Mean(e.sum(), torch.full((), float(e.numel()), dtype=e.dtype))


def base(p, b):
    return mean((hidden(p, b) - b["y"]).square())


def matrices(update: Update) -> Update:
    return lambda w, g, m: update(w, g, m) if w.dim() == 2 else w - 0.1 * g


def adaptive_clip(w, g, m):
    size, of_g = w.norm(dim=0, keepdim=True).clamp_min(1e-3), g.norm(dim=0, keepdim=True)
    return w - torch.where(of_g > 0.01 * size, g * (0.01 * size / of_g.clamp_min(1e-6)), g)


def lamb(w, g, m):
    u = (0.9 * m + 0.1 * g) / (g.square().sqrt() + 1e-6) + 0.01 * w
    return w - 0.1 * torch.where(w.norm() > 0, w.norm() / u.norm(), 1.0) * u


def adafactor(w, g, m):
    s = g.square() + 1e-30
    rows, columns = s.mean(-1), s.mean(-2)
    u = g * (torch.outer(rows, columns) / rows.mean()).rsqrt()
    return w - 0.1 * u / u.square().mean().sqrt().clamp(min=1.0)


def topk_residual(w, g, m):
    total = (m + g).reshape(-1)
    mask = torch.zeros_like(total)
    mask[total.abs().topk(3).indices] = 1
    return w - (total * mask).view(w.shape)


def shampoo(w, g, m):
    values, vectors = torch.linalg.eigh(g @ g.T + torch.eye(g.shape[0], dtype=g.dtype))
    return w - vectors @ torch.diag(values.pow(-0.25)) @ vectors.T @ g


def whitened(w, g, m):
    c = g - g.mean(0)
    covariance = c.T @ c / (g.shape[0] - 1) + torch.eye(g.size(1), dtype=g.dtype)
    return w - c @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def newton_schulz(w, g, m):
    x = g / (g.norm() + 1e-7)
    x = x.mT if g.size(0) > g.size(1) else x
    for _ in range(3):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return w - 0.1 * (x.mT if g.size(0) > g.size(1) else x) * max(1, g.size(0) / g.size(1)) ** 0.5


def spectral(w, g, m):
    v = torch.ones(w.shape[1], dtype=w.dtype)
    for _ in range(4):
        u = F.normalize(w @ v, dim=0)
        v = F.normalize(w.T @ u, dim=0)
    return (w - 0.1 * g) / torch.dot(u, w @ v)


def standardised(w, g, m):
    variance, middle = torch.var_mean(w, dim=0, keepdim=True, correction=0)
    return (w - middle) * torch.rsqrt(variance + 1e-5) - g


def simplex(w, g, m):
    v = (w - 0.1 * g).reshape(-1)
    u = v.sort(descending=True).values
    above = u.cumsum(0) - 1
    count = (u - above / torch.arange(1, v.numel() + 1, dtype=v.dtype) > 0).sum()
    return (v - above.gather(0, (count - 1)[None]) / count).clamp(min=0).view_as(w)


def low_rank(w, g, m):
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return w - (u[:, :2] * s[:2]) @ v[:2]


def first_rows_frozen(w, g, m):
    g = g.clone()
    g[:2] = 0
    return w - g


def in_place(w, g, m):
    w = w.clone()
    w -= 0.1 * g
    w /= w.std()
    w.clamp_(max=w.mean(0))
    return w


def neighbours(w, g, m):
    d = torch.zeros_like(w)
    d[1:] += w.diff(dim=0)
    d[:-1] -= w.diff(dim=0)
    return w - 0.1 * d - g


def quantised(w, g, m):
    scale = g.abs().amax() / 127
    return w - (g / scale).round().clamp(-127, 127).to(torch.int8).to(g.dtype) * scale


UPDATES: dict[str, Update] = {
    "gradient centralisation": matrices(lambda w, g, m: w - 0.1 * (g - g.mean(1, keepdim=True))),
    "row clip": lambda w, g, m: w - g * (1 / g.norm(dim=-1, keepdim=True)).clamp(max=1),
    "column clip": lambda w, g, m: w - g * (1 / g.norm(dim=0, keepdim=True)).clamp(max=1),
    "adaptive clip": matrices(adaptive_clip),
    "lamb": lamb,
    "lars": lambda w, g, m: w - 0.001 * w.norm() / (g.norm() + 1e-4 * w.norm()) * g,
    "adafactor": matrices(adafactor),
    "lion": lambda w, g, m: w - 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.1 * w),
    "scaled sign": lambda w, g, m: w - 0.01 * g.sign() * g.abs().mean(),
    "top-k": lambda w, g, m: w - g * (g.abs() >= g.abs().flatten().topk(2).values[-1]),
    "top-k residual": topk_residual,
    "shampoo": matrices(shampoo),
    "right preconditioner": matrices(
        lambda w, g, m: w - torch.linalg.solve(g.T @ g + torch.eye(g.shape[1], dtype=g.dtype), g.T).T
    ),
    "whitening": matrices(whitened),
    "newton-schulz": matrices(newton_schulz),
    "spectral norm": matrices(spectral),
    "weight norm": lambda w, g, m: F.normalize(w - 0.1 * g, dim=0) * w.norm(dim=0, keepdim=True),
    "weight standardisation": standardised,
    "by the deviation of all": lambda w, g, m: w - 0.1 * g / (g.std() + 1e-8),
    "median clip": lambda w, g, m: w - g.clamp(-g.abs().median(), g.abs().median()),
    "order statistic clip": lambda w, g, m: w - g.clamp(max=g.abs().flatten().kthvalue(3).values),
    "histogram": lambda w, g, m: w - g * (torch.histc(g, 8, -1.0, 1.0) / g.numel()).max(),
    "noise of a key": lambda w, g, m: w - g + 0.1 * ftrain.normal(ftrain.key(3), tuple(w.shape)).to(w.dtype),
    "polar": matrices(lambda w, g, m: w - torch.linalg.svd(g, full_matrices=False)[0][:, :4].sum()),
    "low rank": matrices(low_rank),
    "retraction": matrices(lambda w, g, m: torch.linalg.qr((w - 0.1 * g).T)[1].abs().sum() * w),
    "tangent": matrices(lambda w, g, m: w - 0.1 * (g - 0.5 * (g @ w.T + w @ g.T) @ w)),
    "simplex": simplex,
    "mirror descent": lambda w, g, m: torch.softmax(m.log() - g, dim=0),
    "log of a sum": lambda w, g, m: w - g / torch.logsumexp(g.flatten(), 0),
    "perturbation of SAM": lambda w, g, m: w + 0.05 * g * w.abs() / (g * w.abs()).norm(),
    "cosine": lambda w, g, m: w - g * F.cosine_similarity(w.flatten(), g.flatten(), dim=0),
    "first rows frozen": first_rows_frozen,
    "joined rows": lambda w, g, m: torch.cat([w[:2], w[2:] - g[2:]]),
    "a rate for each row": lambda w, g, m: (
        w - g * torch.linspace(0.1, 1, w.shape[0], dtype=w.dtype).view(-1, *[1] * (w.dim() - 1))
    ),
    "max norm": matrices(lambda w, g, m: torch.renorm(w - g, 2, 0, 1.0)),
    "block scale": lambda w, g, m: (
        w - (g.reshape(-1, 2) / g.reshape(-1, 2).abs().amax(1, keepdim=True)).reshape(g.shape)
    ),
    "int8": quantised,
    "lower triangle": matrices(lambda w, g, m: w - g.tril()),
    "rolled": lambda w, g, m: w - 0.1 * g.roll(1, 0) - 0.1 * g.flip(0),
    "in place": in_place,
    "neighbours": neighbours,
}


def clip_of_lists(s, g):
    grads = [g[k] for k in LEAVES]
    scale = (1 / (torch.stack(list(torch._foreach_norm(grads))).norm() + 1e-6)).clamp(max=1.0)
    return dict(zip(LEAVES, torch._foreach_sub([s[k] for k in LEAVES], torch._foreach_mul(grads, scale)), strict=True))


def average_of_lists(s, g):
    average = [s["m"][k].clone() for k in LEAVES]
    torch._foreach_lerp_(average, [s[k] - 0.1 * g[k] for k in LEAVES], 0.1)
    return dict(zip(LEAVES, average, strict=True))


def one_flat_vector(s, g):
    flat = torch.cat([g[k].reshape(-1) for k in LEAVES])
    parts = (flat / flat.norm() - flat.mean()).split([g[k].numel() for k in LEAVES])
    return {k: s[k] - part.view_as(s[k]) for k, part in zip(LEAVES, parts, strict=True)}


def noise_scale(s, g):
    size = sum(g[k].square().sum() for k in LEAVES)
    return {k: s[k] - g[k] * (sum(g[j].var() * g[j].numel() for j in LEAVES) / size) for k in LEAVES}


WHOLE_STEPS = {
    "clip by lists": clip_of_lists,
    "an average by lists": average_of_lists,
    "torch's total norm": lambda s, g: {
        k: s[k] - g[k] / torch.nn.utils.get_total_norm([g[j] for j in LEAVES]) for k in LEAVES
    },
    "torch's vector of parameters": lambda s, g: {
        k: s[k] - g[k] * torch.nn.utils.parameters_to_vector([g[j] for j in LEAVES]).std() for k in LEAVES
    },
    "one flat vector": one_flat_vector,
    "noise scale": noise_scale,
    "leaves with one another": lambda s, g: {**s, "w": s["w"] - g["w"] @ s["v"] @ g["v"].T, "b": s["v"].sum(0)},
}


def added(p, b, penalty):
    loss = base(p, b)
    return Mean(loss.total + penalty * loss.count, loss.count)


def of_spectral_norm(p, b, s):
    w, v = p["w"], torch.ones(8, dtype=torch.float64)
    for _ in range(3):
        u = F.normalize(w @ v, dim=0)
        v = F.normalize(w.T @ u, dim=0)
    return base({**p, "w": w / (u @ w @ v)}, b)


def distilled(p, b, s):
    ours, theirs = (F.log_softmax(hidden(q, b) / 2, -1) for q in (p, s["m"]))
    return mean(4 * F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1))


def preferred(p, b, s):
    ours, theirs = (F.log_softmax(hidden(q, b), -1) for q in (p, s["m"]))
    margin = (ours - theirs)[:, 0] - (ours - theirs)[:, 1]
    return mean(-F.logsigmoid(0.1 * margin))


def info_nce(p, b, s):
    q, k = (ftrain.whole_rows(F.normalize(x, dim=-1)) for x in (hidden(p, b), b["y"]))
    return mean(F.cross_entropy(q @ k.T / 0.1, torch.arange(len(q)), reduction="none"))


def triplet(p, b, s):
    h, t = ftrain.whole_rows(hidden(p, b)), ftrain.whole_rows(b["t"])
    distance, alike = (h[:, None] - h[None]).square().sum(-1), t[:, None] == t[None]
    far, near = (distance * alike).amax(1), distance.masked_fill(alike, torch.inf).amin(1)
    return mean((far - near + 0.5).relu())


def batch_norm_by_hand(p, b, s):
    h = b["x"] @ p["w"]
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    return mean((torch.tanh(h) @ p["v"] + p["b"] - b["y"]).square())


def mixup(p, b, s):
    return base(p, {**b, **{k: 0.7 * b[k] + 0.3 * b[k].flip(0) for k in ("x", "y")}})


LOSSES = {
    "InfoNCE": info_nce,
    "triplets": triplet,
    "batch norm by hand": batch_norm_by_hand,
    "mixup": mixup,
    "decorrelated means": lambda p, b, s: mean((hidden(p, b) - hidden(p, b).mean(0)).square() - b["y"].std(0)),
    "L2": lambda p, b, s: added(p, b, sum(p[k].square().sum() for k in LEAVES)),
    "L1": lambda p, b, s: added(p, b, sum(p[k].abs().sum() for k in LEAVES)),
    "orthogonal": lambda p, b, s: added(p, b, (p["w"].T @ p["w"] - torch.eye(8, dtype=torch.float64)).square().sum()),
    "spectral norm": of_spectral_norm,
    "weight standardisation": lambda p, b, s: base({**p, "w": (p["w"] - p["w"].mean(0)) / (p["w"].std(0) + 1e-5)}, b),
    "near an average": lambda p, b, s: added(p, b, sum((p[k] - s["m"][k]).square().sum() for k in LEAVES)),
    "elastic weights": lambda p, b, s: added(p, b, sum((s["m"][k] * (p[k] - s[k]).square()).mean() for k in LEAVES)),
    "label smoothing": lambda p, b, s: mean(
        F.cross_entropy(hidden(p, b), b["t"], label_smoothing=0.1, reduction="none")
    ),
    "distillation": distilled,
    "preferences": preferred,
    "quantiles": lambda p, b, s: mean(torch.maximum(0.9 * (b["y"] - hidden(p, b)), 0.1 * (hidden(p, b) - b["y"]))),
    "with a teacher's matrix": lambda p, b, s: added(p, b, (p["w"] @ s["m"]["w"].T).trace()),
    "scaled by a teacher": lambda p, b, s: added(p, b, s["m"]["w"].norm() / s["w"].std()),
}
