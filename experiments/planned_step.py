"""The training step of a model on paper, of which plans of decoders, of models that see and of Wan search layouts."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

import ftrain
from ftrain import Aval, Precision, TrainState, optim, tree
from ftrain.plan.workload import WorkloadStep
from ftrain.sharding import Layout
from ftrain.sharding.batch import BatchRule

_CPU = torch.device("cpu")


def planned_step(
    loss_fn: Callable[[Any, Any], Any],
    specs: Any,
    batch: Any,
    *,
    rate: float,
    micro_batches: int,
    precision: Precision,
    rules: Mapping[str, BatchRule] = MappingProxyType({}),
    components: Mapping[str, Layout] = MappingProxyType({}),
) -> WorkloadStep:
    """AdamW of a loss behind clipped gradients, in so many micro-batches; `batch` is abstract, of the whole mesh."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate))
    loss = ftrain.accumulate(loss_fn, micro_batches) if micro_batches > 1 else loss_fn

    def step(state: TrainState, batch: Any) -> Any:
        value, grads = ftrain.value_and_grad(loss)(state.params, batch)
        return state.apply(tx, grads), {"loss": value}

    def init(key: Any) -> TrainState:
        return TrainState.create(ftrain.init(specs, key), tx)

    state = _abstract_state(specs, tx)
    return WorkloadStep(step, state, batch, specs, rules, components, precision=precision, init=init)


def _abstract_state(specs: Any, tx: Any) -> Any:
    """The shapes of a fresh training state, made of meta tensors."""
    params = tree.map(lambda s: torch.empty(s.shape, dtype=s.dtype, device="meta"), specs)
    return tree.map(lambda x: Aval(tuple(x.shape), x.dtype, _CPU), TrainState.create(params, tx))
