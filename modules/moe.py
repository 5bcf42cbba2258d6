"""The mixture-of-experts block: a router, experts, shared experts, and two ways to keep the load even.

Each token goes to the `top_k` experts that its router scores highest; no token is dropped. Balance comes from an
auxiliary loss (Switch Transformer, Fedus et al. 2021) or, without a loss, from a bias per expert that is added to the
scores for the choice only and nudged against the load after each step (Wang et al. 2024, DeepSeek-V3).

Legend: T tokens, D model width, E experts, K experts per token, F hidden width of one expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.experts import dropped_rows, experts_swiglu
from ftrain.kernels.mean import Mean, share, sum_over_batch
from ftrain.kernels.wide_mm import wide_mm
from ftrain.modules import mlp
from ftrain.modules.spec import ParamSpec, fan_in, zeros

BIAS_RATE = 1e-3
"""How far a step moves a balancing bias (DeepSeek-V3)."""


@dataclass(frozen=True)
class MoEConfig:
    """`experts` experts `d_expert` wide, of which each token uses `top_k`, and `shared_experts` that every token uses.

    `d_shared`: the width of the shared experts together, `shared_experts * d_expert` if None; with `shared_gate` their
    output is multiplied by a sigmoid of the token (Qwen3-Next). `router_bias`: the router is an affine map (gpt-oss).
    `groups`, `top_groups`: a token uses experts of the `top_groups` groups, of `groups` equal ones in order, whose best
    two experts score highest (DeepSeek-V3).

    `score`: softmax over experts, or a sigmoid of each (DeepSeek-V3). `normalize`: weights of the chosen experts sum to
    one; they are then multiplied by `scale`. `balance`: "aux" (the caller adds `aux_coefficient * aux_loss(stats)`),
    "bias" (the caller keeps a tree of biases and moves it with `update_bias` at `bias_rate`), or "none".

    Raises:
        ValueError: `top_k` is not from 1 to `experts`, or more than the chosen groups have; groups do not divide the
            experts or have less than two; `score` or `balance` is none of these.
    """

    d_model: int
    d_expert: int
    experts: int
    top_k: int
    shared_experts: int = 0
    d_shared: int | None = None
    shared_gate: bool = False
    router_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    balance: Literal["aux", "bias", "none"] = "aux"
    aux_coefficient: float = 1e-3
    bias_rate: float = BIAS_RATE

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"MoEConfig: top_k={self.top_k} must be between 1 and experts={self.experts}")
        if self.groups != 1:
            self._check_groups()
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"MoEConfig: score={self.score!r} is not one of 'softmax', 'sigmoid'")
        if self.balance not in ("aux", "bias", "none"):
            raise ValueError(f"MoEConfig: balance={self.balance!r} is not one of 'aux', 'bias', 'none'")

    def _check_groups(self) -> None:
        if self.experts % self.groups or self.experts < 2 * self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"MoEConfig: groups={self.groups} must divide experts={self.experts} into at least two each, of which "
                f"top_groups={self.top_groups} are chosen"
            )
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(
                f"MoEConfig: top_k={self.top_k} is more than the {self.experts // self.groups} experts of each of "
                f"top_groups={self.top_groups}"
            )

    @property
    def shared(self) -> mlp.MlpConfig | None:
        """The shared experts as one MLP; `None` without any."""
        width = self.shared_experts * self.d_expert if self.d_shared is None else self.d_shared
        return mlp.MlpConfig(self.d_model, width) if width else None


class RouterStats(NamedTuple):
    """What a router did, as sums over its tokens (padding left out), so that ranks and micro-batches can be added up.

    Float32 (float64 for float64 inputs). `load_E`: tokens sent to each expert, a constant. `probability_E`: the sum
    over tokens of the probability of each expert, differentiable. `count`: tokens, a scalar. `dropped`: pairs of token
    and expert (padding counted) that a plan's static capacity left out, a constant; zero without one. Stacked over
    layers each gains a leading dim.
    """

    load_E: Tensor
    probability_E: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuple, which nobody needs
    dropped: Tensor


class RouterLoad(NamedTuple):
    """Where a router sent the tokens of a pass, as sums over its tokens: of any model, ours or bridged.

    Constants, floating. `load_E`: tokens sent to each expert. `count`: tokens, 0-d. `dropped`: pairs of token and
    expert that no expert computed, 0-d: zero without a static capacity.
    """

    load_E: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuple, which nobody needs
    dropped: Tensor


def specs(cfg: MoEConfig, *, out_gain: float = 1.0) -> dict[str, Any]:
    """`w_router_DE`, `w_gate_EDF`, `w_up_EDF`, `w_down_EFD`, as configured `b_router_E`, `shared` (an MLP), and
    `w_shared_gate_D1`.

    `out_gain` scales the initial deviation of the last weights, for deep residual stacks.

    >>> {name: spec.shape for name, spec in specs(MoEConfig(8, 16, experts=4, top_k=2)).items()}
    {'w_router_DE': (8, 4), 'w_gate_EDF': (4, 8, 16), 'w_up_EDF': (4, 8, 16), 'w_down_EFD': (4, 16, 8)}
    """
    d, e, f = cfg.d_model, cfg.experts, cfg.d_expert
    tree: dict[str, Any] = {
        **router_specs(cfg),
        "w_gate_EDF": ParamSpec((e, d, f), ("expert", "embed", "mlp"), fan_in(d)),
        "w_up_EDF": ParamSpec((e, d, f), ("expert", "embed", "mlp"), fan_in(d)),
        "w_down_EFD": ParamSpec((e, f, d), ("expert", "mlp", "embed"), fan_in(f, gain=out_gain)),
    }
    return {**tree, **shared_specs(cfg, out_gain=out_gain)}


def shared_specs(cfg: MoEConfig, *, out_gain: float = 1.0) -> dict[str, Any]:
    """As configured `shared` (an MLP) and `w_shared_gate_D1`; `out_gain` as in `specs`."""
    if cfg.shared is None:
        return {}
    gate = ParamSpec((cfg.d_model, 1), ("embed", None), fan_in(cfg.d_model))
    tree = {"shared": mlp.specs(cfg.shared, out_gain=out_gain)}
    return {**tree, "w_shared_gate_D1": gate} if cfg.shared_gate else tree


def router_specs(cfg: MoEConfig) -> dict[str, ParamSpec]:
    """`w_router_DE`, and as configured `b_router_E`."""
    weight = ParamSpec((cfg.d_model, cfg.experts), ("embed", None), fan_in(cfg.d_model))
    bias = {"b_router_E": ParamSpec((cfg.experts,), (None,), zeros())} if cfg.router_bias else {}
    return {"w_router_DE": weight, **bias}


def balance_specs(cfg: MoEConfig) -> dict[str, ParamSpec]:
    """State beside the parameters: `router_bias_E`, zeros, where the balance is "bias"; else nothing."""
    return {"router_bias_E": ParamSpec((cfg.experts,), (None,), zeros())} if cfg.balance == "bias" else {}


def apply(
    params: dict[str, Any],
    x_TD: Tensor,
    *,
    cfg: MoEConfig,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, RouterStats]:
    """`[T, D]` to `[T, D]`, with what the router did.

    `bias_E`: the `router_bias_E` of the balance state, given exactly where the balance is "bias". `valid_T`: bool,
    false for padding, which is computed but not counted.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = MoEConfig(8, 16, experts=4, top_k=2)
    >>> out_TD, stats = apply(spec.init(specs(cfg), random.key(0)), torch.eye(5, 8), cfg=cfg)
    >>> list(out_TD.shape), stats.load_E.sum().item(), stats.count.item()
    ([5, 8], 10.0, 5.0)
    """
    b_router_E = params.get("b_router_E")
    expert_TK, weights_TK, stats = route(
        params["w_router_DE"], x_TD, cfg=cfg, b_router_E=b_router_E, bias_E=bias_E, valid_T=valid_T
    )
    stats = stats._replace(dropped=dropped_rows(expert_TK, params["w_gate_EDF"]))
    out_TD = experts_swiglu(x_TD, expert_TK, weights_TK, params["w_gate_EDF"], params["w_up_EDF"], params["w_down_EFD"])
    return with_shared(params, x_TD, out_TD, cfg=cfg), stats


def with_shared(params: dict[str, Any], x_TD: Tensor, out_TD: Tensor, *, cfg: MoEConfig) -> Tensor:
    """What the chosen experts made of the tokens `x_TD`, with what the shared ones add, `[T, D]`."""
    if cfg.shared is None:
        return out_TD
    shared_TD = mlp.apply(params["shared"], x_TD, cfg=cfg.shared)
    return out_TD + (shared_TD * (x_TD @ params["w_shared_gate_D1"]).sigmoid() if cfg.shared_gate else shared_TD)


def route(
    w_router_DE: Tensor,
    x_TD: Tensor,
    *,
    cfg: MoEConfig,
    b_router_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, RouterStats]:
    """Choose experts: ids `[T, K]` (int64), weights `[T, K]` (differentiable), statistics (of which none is dropped).

    Computed in float32, or float64 for float64 inputs: near ties, the choice must not hang on a rounded score. Tokens
    and router in bfloat16 are multiplied as they are, with float32 sums (`ftrain.kernels.wide_mm`).

    Args:
        w_router_DE, x_TD: the router's weight and the tokens. b_router_E: what is added to its scores.
        cfg: how many experts a token uses, and how their weights are made.
        bias_E: the balancing biases, which move the choice and not the weights; only with `balance="bias"`.
        valid_T: bool, False for tokens that the statistics leave out.

    Raises:
        ValueError: biases without `balance="bias"`, or the other way round; or `valid_T` is no bool `[T]`.
    """
    if (bias_E is None) != (cfg.balance != "bias"):
        raise ValueError(f"moe: balance={cfg.balance!r}, but router_bias_E was {'not ' if bias_E is None else ''}given")
    logits_TE = wide_mm(x_TD, w_router_DE)
    logits_TE = logits_TE if b_router_E is None else logits_TE + b_router_E
    scores_TE = logits_TE.softmax(-1) if cfg.score == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E.detach()
    expert_TK = _of_best_groups(choice_TE, cfg).topk(cfg.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, expert_TK)
    if cfg.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    probability_TE = scores_TE if cfg.score == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    return expert_TK, weights_TK * cfg.scale, _statistics(expert_TK, probability_TE, valid_T)


def _of_best_groups(choice_TE: Tensor, cfg: MoEConfig) -> Tensor:
    """The scores, and minus infinity for experts of groups that are not chosen."""
    if cfg.top_groups == cfg.groups:
        return choice_TE
    choice_TGE = choice_TE.unflatten(-1, (cfg.groups, -1))
    score_TG = choice_TGE.topk(2, dim=-1).values.sum(-1)
    chosen_TG = torch.zeros_like(score_TG).scatter(-1, score_TG.topk(cfg.top_groups, dim=-1).indices, 1.0)
    return choice_TGE.masked_fill(chosen_TG[..., None] == 0, -torch.inf).flatten(-2)


def _statistics(expert_TK: Tensor, probability_TE: Tensor, valid_T: Tensor | None) -> RouterStats:
    tokens = probability_TE.shape[0]
    if valid_T is None:
        one_T = torch.ones_like(probability_TE[:, 0])
    elif valid_T.shape == (tokens,) and valid_T.dtype == torch.bool:
        one_T = valid_T.to(probability_TE.dtype)
        # selected, not multiplied: padding may hold NaN
        probability_TE = torch.where(valid_T[:, None], probability_TE, 0)
    else:
        found = f"shape {list(valid_T.shape)}, expected [{tokens}], and dtype {valid_T.dtype}, expected bool"
        raise ValueError(f"moe: valid_T has {found}")
    one_TK = one_T.detach()[:, None].expand_as(expert_TK)
    probability_E = probability_TE.sum(0)
    load_E = torch.zeros_like(probability_E).scatter_add(0, expert_TK.flatten(), one_TK.flatten())
    return RouterStats(load_E.detach(), probability_E, one_T.sum(), one_T.new_zeros(()))


def load_of(expert_TK: Tensor, experts: int, dropped: Tensor) -> RouterLoad:
    """What a router did whose choice is `expert_TK`, int64: ids of `experts` experts, others being of none.

    `dropped`: 0-d, pairs that no expert computed.

    >>> load_of(torch.tensor([[0, 2], [2, 1]]), 3, torch.zeros(())).load_E.tolist()
    [1.0, 1.0, 2.0]
    """
    known_N = expert_TK.flatten().clamp(max=experts)
    load_E = torch.zeros(experts + 1, device=expert_TK.device).scatter_add(0, known_N, torch.ones_like(known_N.float()))
    return RouterLoad(load_E[:experts], torch.full_like(load_E[0], len(expert_TK)), dropped.detach())


def loads_of(stats: RouterStats) -> list[RouterLoad]:
    """Of statistics stacked over routers what each of them did."""
    routers = range(len(stats.load_E))
    return [RouterLoad(stats.load_E[i].detach(), stats.count[i].detach(), stats.dropped[i].detach()) for i in routers]


def load_metrics(loads: Mapping[str, RouterLoad]) -> dict[str, dict[str, Tensor]]:
    """For each router, by its name, what a log wants of the whole batch of the mesh.

    `shares_E` (of the pairs of token and expert, sum 1), `entropy` (of the shares, 0-d, in nats; at even load the
    logarithm of the number of experts), `busiest` (the largest share over the even one, 0-d, 1 at even load), and
    `dropped` (pairs, 0-d).

    >>> even = RouterLoad(torch.full((4,), 6.0), torch.tensor(12.0), torch.tensor(0.0))
    >>> found = load_metrics({"layers.0": even})["layers.0"]
    >>> round(found["entropy"].exp().item(), 3), found["busiest"].item()
    (4.0, 1.0)
    """
    return {name: _metrics(load) for name, load in loads.items()}


def _metrics(load: RouterLoad) -> dict[str, Tensor]:
    load_E = sum_over_batch(load.load_E)
    shares_E = share(load_E, load_E.sum()[None].expand_as(load_E))
    return {
        "shares_E": shares_E,
        "entropy": -torch.special.xlogy(shares_E, shares_E).sum(),
        "busiest": shares_E.amax() * shares_E.numel(),
        "dropped": sum_over_batch(load.dropped),
    }


def aux_loss(stats: RouterStats) -> Mean:
    """The Switch loss `E * sum_e f_e P_e`, `f_e` the share of tokens sent to e, `P_e` the mean probability of e.

    At even load it is `top_k`, its least value. Of stats stacked over layers it is the mean of the layers' losses; the
    loss of `pool(stats)` is that of transformers, which treats all layers' tokens as one. As a `Mean` it adds up over
    ranks and micro-batches; the shares `f_e` are constants and are taken over all ranks and micro-batches, which under
    `ftrain.accumulate` costs a forward pass of its own (see there).

    >>> even = RouterStats(torch.full((4,), 6.0), torch.full((4,), 3.0), torch.tensor(12.0), torch.tensor(0.0))
    >>> aux_loss(even).value().item()  # 12 tokens with two experts each, of four
    2.0
    """
    shares_E = share(sum_over_batch(stats.load_E), sum_over_batch(stats.count)[..., None])
    experts = stats.load_E.shape[-1]
    return Mean(experts * (shares_E.detach() * stats.probability_E).sum(), stats.count.sum())


def pool(stats: RouterStats) -> RouterStats:
    """Statistics stacked over layers, `[L, E]`, as if all layers were one router."""
    return RouterStats(*(sums.sum(0) for sums in stats))


def update_bias(bias_E: Tensor, load_E: Tensor, *, rate: float) -> Tensor:
    """The biases after a step: up by `rate` for experts below the mean load, down for those above (Wang et al. 2024).

    `load_E`: the step's tokens per expert (of `RouterStats`), this rank's or already summed over ranks.

    >>> update_bias(torch.zeros(3), torch.tensor([9.0, 3.0, 3.0]), rate=0.5).tolist()
    [-0.5, 0.5, 0.5]
    """
    load_E = sum_over_batch(load_E)
    return bias_E + rate * torch.sign(load_E.mean(-1, keepdim=True) - load_E).to(bias_E.dtype)
