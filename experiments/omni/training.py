"""The training step of the experiment: losses by task, one optimizer, experts balanced without a loss.

Legend: T tokens of the pack, D model width, n codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import ftrain
from ftrain import TrainState, optim
from ftrain.kernels.mean import Mean, share, sum_over_batch
from ftrain.kernels.pack import pack_tokens, take_rows
from ftrain.modules import decoder as foundation
from ftrain.modules import omni
from ftrain.modules.decoder import DecoderStats
from ftrain.modules.mesh_packing import BATCH
from ftrain.modules.omni import Decoder, OmniModel
from ftrain.sharding import BatchRows, Layout, Mesh, Plan

IGNORE = foundation.IGNORE


@dataclass(frozen=True)
class TrainConfig:
    """`learning_rate` is the peak, reached after `warmup_steps`; the cosine ends at `floor` of it after `steps`.

    `earlier`: of a run that was made longer, in order: up to how many updates it had how many steps. `decay` "constant"
    stays at the peak, and does not depend on the length.
    """

    steps: int
    earlier: tuple[tuple[int, int], ...] = ()
    decay: Literal["cosine", "constant"] = "cosine"
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    floor: float = 0.02
    weight_decay: float = 0.05
    max_norm: float = 5.0


# The loss of a drawing or a sound is large to the end (many are right); at 1 its gradient drowns those of the words.
_MEDIA_WEIGHT = 0.3


def loss_weights(tasks: tuple[str, ...]) -> dict[str, float]:
    """How much each task's mean loss counts."""
    return {task: 1.0 if made_by(task) is None else _MEDIA_WEIGHT for task in tasks}


def made_by(task: str) -> str | None:
    """The name of the decoder that makes a task's answer, None where the answer is words.

    >>> made_by("audio_to_image"), made_by("audio_to_text")
    ('image', None)
    """
    made = task.rpartition("_to_")[2]
    return made if made in ("image", "audio") else None


def schedule(cfg: TrainConfig) -> optim.Schedule:
    """Warm-up and cosine over the run; one that was made longer goes by its new length from there on."""
    if cfg.decay == "constant":
        return optim.join([optim.linear(0.0, cfg.learning_rate, steps=cfg.warmup_steps),
                           optim.constant(cfg.learning_rate)], boundaries=[cfg.warmup_steps])  # fmt: skip
    now, before = _of_length(cfg, cfg.steps), [(until, _of_length(cfg, steps)) for until, steps in cfg.earlier]

    def at(count: Tensor) -> Tensor:
        value = now(count)
        for until, piece in reversed(before):
            value = torch.where(count < until, piece(count), value)
        return value

    return at


def _of_length(cfg: TrainConfig, steps: int) -> optim.Schedule:
    floor, warmup = cfg.floor * cfg.learning_rate, min(cfg.warmup_steps, steps // 5)
    return optim.warmup_cosine(cfg.learning_rate, warmup_steps=warmup, total_steps=steps, floor=floor)


def transform(cfg: TrainConfig) -> optim.Transform:
    """Muon on the matrices of layers, AdamW on all else but the frozen tokenizers, which have no optimizer state.

    Muon's steps are scaled to AdamW's size, so that both take one rate; with AdamW alone audio stays at chance for 200
    steps longer. A step whose gradients are not finite changes nothing.
    """
    rate = schedule(cfg)
    groups = {
        "matrices": optim.muon(rate, weight_decay=cfg.weight_decay, adjust="match_rms_adamw", ns_dtype=None),
        "others": optim.adamw(rate, b2=0.98, weight_decay=cfg.weight_decay, mask=_decays),
        "frozen": optim.freeze(),
    }
    labels = [("decoders.*.tokenizer.**", "frozen"), ("**.layers.*.**.w_*", "matrices"), ("**", "others")]
    by_path = optim.multi_transform(groups, labels)
    return optim.chain(optim.clip_by_global_norm(cfg.max_norm), optim.skip_nonfinite(by_path))


def _decays(params: Any) -> Any:
    """Matrices decay; vectors (norms, biases) and embeddings of places do not."""
    return ftrain.tree.map(lambda leaf: leaf.dim() >= 2, params)


def init_state(model: OmniModel, tx: optim.Transform, key: Tensor) -> TrainState:
    """Fresh parameters, optimizer state and balance of the experts, on the key's device."""
    params = ftrain.init(omni.specs(model), ftrain.fold_in(key, 0))
    balance = ftrain.init(foundation.balance_specs(model.foundation), ftrain.fold_in(key, 1))
    return TrainState.create(params, tx, extra={"balance": balance})


def task_losses(
    params: Any, batch: Mapping[str, Any], *, model: OmniModel, balance: Any, tasks: tuple[str, ...]
) -> tuple[dict[str, Mean], DecoderStats]:
    """The loss of each task of the mixture as a `Mean`; `batch["task_T"]` says which task a token belongs to.

    A task's loss is over its text labels, or over its codes where it draws or speaks.
    """
    rows, places, codes = omni.media_rows(params, batch, model=model)
    x_TD = omni.merge(foundation.embed(params["foundation"], batch["tokens_T"]), rows, places)
    hidden_TD, stats = omni.hidden_states(params, x_TD, batch, model=model, balance=balance)
    terms = {}
    for number, task in enumerate(tasks):
        decoder = made_by(task)
        if decoder is not None:
            terms[task] = _code_loss(params, hidden_TD, batch, codes[decoder], model.decoder(decoder), decoder, number)
        else:
            labels_T = torch.where(batch["task_T"] == number, batch["labels_T"], IGNORE)
            terms[task] = foundation.loss(params["foundation"], hidden_TD, labels_T, model.foundation)
    return terms, stats


def _code_loss(
    params: Any, hidden_TD: Tensor, batch: Mapping[str, Any], codes_n: Tensor, decoder: Decoder, name: str, number: int
) -> Mean:
    """The loss of task `number` over the codes that the decoder called `name` makes."""
    place_n = batch["decoders"][name]["index_n"]
    nowhere = pack_tokens(hidden_TD.shape[0])
    labels_n = torch.where(batch["decoders"][name]["task_n"] == number, codes_n, IGNORE)
    hidden_nD = take_rows(hidden_TD, torch.where(place_n < nowhere, place_n - 1, nowhere))
    return decoder.lm_head(params["decoders"][name], hidden_nD, labels_n)


def _dropped(stats: DecoderStats) -> Tensor:
    """The share of routed rows that a static capacity left out."""
    if stats.router is None:
        return torch.zeros(())
    return share(sum_over_batch(stats.router.dropped.sum()), sum_over_batch(stats.router.load_E.sum()))


def plan(mesh: Mesh) -> Plan:
    """Encoders and decoders hold whole items on each rank; the foundation shares sequences and experts."""
    whole = Layout(sequence=None)
    rules = {**BATCH, "decoders.*.task_n": BatchRows()}
    return Plan(mesh, Layout(), batch=rules, components={"encoders": whole, "decoders": whole})


def train_step(
    model: OmniModel, tx: optim.Transform, tasks: tuple[str, ...], weights: Mapping[str, float]
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The pure step `(state, batch) -> (state, metrics)`."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        balance = state.extra["balance"]

        def loss_fn(params: Any, batch: Any) -> tuple[Any, Any]:
            terms, stats = task_losses(params, batch, model=model, balance=balance, tasks=tasks)
            return ftrain.weighted_sum(terms, weights), (terms, stats)

        (loss, (terms, stats)), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        rate = model.foundation.moe.bias_rate if model.foundation.moe is not None else 0.0
        updated = state.apply(tx, grads)
        extra = {"balance": foundation.update_balance(balance, stats, rate=rate)}
        metrics = {
            "loss": loss,
            "terms": {task: mean.value() for task, mean in terms.items()},
            "tokens": sum_over_batch(batch["valid_T"].sum()),
            "grad_norm": updated.opt_state[0].norm,
            "updates": state.step - state.opt_state[1].skipped_total,  # made before this one: what the rate goes by
            "dropped": _dropped(stats),
        }
        return updated.replace(extra=extra), metrics

    return step
