"""Optimizers as pairs of pure functions, as in optax: `tx.init(params)` and `tx.update(grads, state, params)`."""

from ftrain.optim.adafactor import AdafactorState, adafactor
from ftrain.optim.adamw import AdamWState, adamw
from ftrain.optim.clip import ClipState, clip_by_global_norm, clip_by_value
from ftrain.optim.combine import (
    ScheduleState,
    add_decayed_weights,
    chain,
    freeze,
    label_tree,
    masked,
    multi_transform,
    scale,
    scale_by_schedule,
)
from ftrain.optim.ema import EmaState, ema
from ftrain.optim.lion import LionState, lion
from ftrain.optim.muon import MuonState, muon, orthogonalize
from ftrain.optim.nonfinite import SkipState, all_finite, skip_nonfinite
from ftrain.optim.norms import global_norm
from ftrain.optim.schedules import constant, cosine, join, linear, warmup_cosine, wsd
from ftrain.optim.sgd import SGDState, TraceState, sgd, trace
from ftrain.optim.transform import EmptyState, LearningRate, Mask, Schedule, Transform, apply_updates

__all__ = [
    "AdafactorState",
    "AdamWState",
    "ClipState",
    "EmaState",
    "EmptyState",
    "LearningRate",
    "LionState",
    "Mask",
    "MuonState",
    "SGDState",
    "Schedule",
    "ScheduleState",
    "SkipState",
    "TraceState",
    "Transform",
    "adafactor",
    "adamw",
    "add_decayed_weights",
    "all_finite",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "ema",
    "freeze",
    "global_norm",
    "join",
    "label_tree",
    "linear",
    "lion",
    "masked",
    "multi_transform",
    "muon",
    "orthogonalize",
    "scale",
    "scale_by_schedule",
    "sgd",
    "skip_nonfinite",
    "trace",
    "warmup_cosine",
    "wsd",
]
