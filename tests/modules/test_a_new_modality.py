"""A modality that the omni model has not is one file, which makes an `Encoder`, and one line in the model's dictionary.

Touch: what sixteen sensors of a fingertip feel at each moment, read by the stack that other encoders share.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import ftrain
from ftrain.kernels.documents import ids_of
from ftrain.kernels.mean import weighted_sum
from ftrain.modules import encoder_stack, linear, omni
from ftrain.modules.budget import Budget
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.mesh_packing import BATCH, pack_for_mesh
from ftrain.modules.omni import Encoder, OmniModel, Row
from ftrain.modules.packing import Document, Media, Text, exact_budget, pack
from ftrain.optim import adamw
from ftrain.sharding import Layout, Mesh
from ftrain.step.state import TrainState
from tests.helpers import mesh_models, tiny_omni

# --- the file ---

STACK = StackConfig(16, layers=1, heads=2, d_hidden=32)
SENSORS = 16


def encode(params: Any, features: Mapping[str, Any]) -> torch.Tensor:
    x_ND = linear.apply(params["in"], features["felt_NS"].to(params["in"]["w"].dtype))
    items = features["segments_N"]
    x_ND = encoder_stack.apply(
        params["stack"], x_ND, positions=features["moment_N"], segments_T=items, cfg=STACK, whole=True
    )
    return linear.apply(params["out"], x_ND)


def touch(d_out: int, *, begin: int, end: int) -> Encoder:
    """What is felt at a moment becomes a row of the foundation, `d_out` wide."""
    specs = {
        "in": linear.specs(SENSORS, STACK.d_model, (None, "embed"), bias=True),
        "stack": encoder_stack.specs(STACK),
        "out": linear.specs(STACK.d_model, d_out, ("mlp", "embed"), bias=True),
    }
    features = {"felt_NS": Row((SENSORS,), "float32"), "moment_N": Row((), "int64")}
    return Encoder(specs, encode, features, rows_per_token=1, begin=begin, end=end)


# --- the line ---

OTHERS = tiny_omni.MODEL
MODEL = OmniModel(
    OTHERS.foundation, {**OTHERS.encoders, "touch": touch(tiny_omni.D, begin=38, end=39)}, OTHERS.decoders
)

TOUCHED = OmniModel(OTHERS.foundation, {"touch": MODEL.encoders["touch"]})
"""A model that reads nothing else."""

# --- what is true of it ---


def felt(seed: int, *, up: bool = True, moments: int = 4) -> Media:
    """A finger that moves over the sensors, up or down."""
    noise = np.random.default_rng(seed).normal(size=(moments, SENSORS)) * 0.1
    path = 3 * np.eye(SENSORS)[3 * np.arange(moments) + 1]
    array = (noise + (path if up else path[::-1])).astype(np.float32)
    return Media("touch", {"felt_NS": array, "moment_N": np.arange(moments)})


def documents(seed: int = 0) -> list[Document]:
    """Which way did it move? And one of each task that the model had before."""
    asked: list[Document] = [
        [Text([1]), felt(seed + i, up=i % 2 == 0), Text([2 + i % 2], train=True)] for i in range(4)
    ]
    return [*asked, *tiny_omni.documents()]


def batch(given: list[Document]) -> dict[str, Any]:
    return pack(given, budget=exact_budget(given, model=MODEL), model=MODEL).batch


def loss(params: Any, given: dict[str, Any]) -> Any:
    return weighted_sum(omni.loss_terms(params, given, model=MODEL)[0], {"balance": 0.01})


def test_its_documents_are_packed_with_all_others() -> None:
    """The loss of a pack is that of its documents alone."""
    params = ftrain.init(omni.specs(MODEL), ftrain.key(0))
    assert set(ids_of(batch(documents())["encoders"]["touch"]["features"]["segments_N"]).tolist()) == {0, 1, 2, 3}
    together = omni.loss_terms(params, batch(documents()), model=MODEL)[0]["text"]
    alone = [omni.loss_terms(params, batch([one]), model=MODEL)[0]["text"] for one in documents()]
    assert together.count == sum(mean.count for mean in alone)
    torch.testing.assert_close(together.total, sum(mean.total for mean in alone), rtol=1e-6, atol=2e-6)


def test_what_was_felt_decides_the_answer() -> None:
    """Learned in a jitted step beside the other tasks, and asked of moves that were not seen."""
    tx = adamw(1e-2)

    def step(state: TrainState, given: dict[str, Any]) -> TrainState:
        return state.apply(tx, ftrain.grad(lambda params: loss(params, given))(state.params))

    jitted, state = ftrain.jit(step), TrainState.create(ftrain.init(omni.specs(MODEL), ftrain.key(0)), tx)
    for i in range(25):
        state = jitted(state, batch(documents(10 * i)))
    unseen = batch(documents(999)[:4])
    assert omni.loss_terms(state.params, unseen, model=MODEL)[0]["text"].value() < 0.1


def test_a_mesh_gives_what_one_device_gives() -> None:
    def packs(count: int) -> dict[str, Any]:
        given = [one for i in range(count) for one in documents(i)[:4]]
        return pack_for_mesh(given, budget=Budget(48, rows={"touch": 32}), model=TOUCHED, packs=count, parts=2).batch

    rules = {path: rule for path, rule in BATCH.items() if path.startswith("encoders")}
    specs = omni.specs(TOUCHED)
    made = mesh_models.Model(specs, lambda p, b: (omni.loss_terms(p, b, model=TOUCHED)[0]["text"], ()), packs, rules)
    plan = mesh_models.plan_for(made, Mesh(shard=2, sequence=2, kind="virtual"), Layout())
    found, gradients = mesh_models.compare(made, plan, dtype=torch.float64)
    assert found < 1e-12
    assert gradients < 1e-11
