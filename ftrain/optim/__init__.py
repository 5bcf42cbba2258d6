"""Optimizers as pairs of pure functions, as in optax: `tx.init(params)` and `tx.update(grads, state, params)`."""

from ftrain.optim.adafactor import AdafactorState, adafactor
from ftrain.optim.adamw import AdamWState, adamw
from ftrain.optim.clip import ClipState, clip_by_global_norm, clip_by_value
from ftrain.optim.combine import (
    ScheduleState,
    add_decayed_weights,
    chain,
    freeze,
    identity,
    label_tree,
    masked,
    multi_transform,
    scale,
    scale_by_schedule,
    set_to_zero,
)
from ftrain.optim.ema import EmaState, ema
from ftrain.optim.lion import LionState, lion
from ftrain.optim.master import MasterState, master_weights
from ftrain.optim.muon import MuonState, muon, orthogonalize
from ftrain.optim.nonfinite import SkipState, all_finite, skip_nonfinite
from ftrain.optim.norms import global_norm
from ftrain.optim.optax_names import (
    adam,
    clip,
    constant_schedule,
    cosine_decay_schedule,
    join_schedules,
    linear_schedule,
    scale_by_adam,
    scale_by_learning_rate,
    warmup_cosine_decay_schedule,
)
from ftrain.optim.schedules import constant, cosine, join, linear, warmup_cosine, wsd
from ftrain.optim.sgd import SGDState, TraceState, sgd, trace
from ftrain.optim.stochastic import RoundingState, stochastic_rounding
from ftrain.optim.transform import EmptyState, LearningRate, Mask, Schedule, Transform, apply_updates, trainable

__all__ = [
    "AdafactorState",
    "AdamWState",
    "ClipState",
    "EmaState",
    "EmptyState",
    "LearningRate",
    "LionState",
    "Mask",
    "MasterState",
    "MuonState",
    "RoundingState",
    "SGDState",
    "Schedule",
    "ScheduleState",
    "SkipState",
    "TraceState",
    "Transform",
    "adafactor",
    "adam",
    "adamw",
    "add_decayed_weights",
    "all_finite",
    "apply_updates",
    "chain",
    "clip",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "constant_schedule",
    "cosine",
    "cosine_decay_schedule",
    "ema",
    "freeze",
    "global_norm",
    "identity",
    "join",
    "join_schedules",
    "label_tree",
    "linear",
    "linear_schedule",
    "lion",
    "masked",
    "master_weights",
    "multi_transform",
    "muon",
    "orthogonalize",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "set_to_zero",
    "sgd",
    "skip_nonfinite",
    "stochastic_rounding",
    "trace",
    "trainable",
    "warmup_cosine",
    "warmup_cosine_decay_schedule",
    "wsd",
]
