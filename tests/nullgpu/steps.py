"""The training steps that the laws are about, each with its state and a batch on the device.

T tokens, N latent rows, P numbers in a row, S text rows, C width of text.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from case import Case
from torch import Tensor

import ftrain
from experiments.bench.card.packs import decoder_step, on_device, pack
from experiments.omni import batches as omni_batches
from experiments.omni import model as omni_model
from experiments.omni import sources, tasks, training
from experiments.omni.corpus import Silence
from ftrain import TrainState, optim
from ftrain.kernels.documents import Documents, aligned_documents
from ftrain.modules import decoder, dit
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.dit import DitConfig
from ftrain.remat.policy import Remat
from ftrain.trace.precision import Precision

DOCUMENTS = 4
"""Of equal length, in a pack."""

DECODERS = {"dense": "llama-tiny", "moe": "qwen3-moe-tiny", "30b-a3b": "30b-a3b"}


@dataclass(frozen=True)
class Training:
    """A pure step, the function that makes its state from a key, the parameters' specs, and a batch on the host."""

    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    init: Callable[[Tensor], TrainState]
    specs: Any
    batch: Any


def training_of(case: Case, *, packs: int = 1) -> Training:
    """The step of a case; `packs`: of a decoder's batch, which is the whole mesh's."""
    if case.model in DECODERS:
        config = dataclasses.replace(decoder.preset(DECODERS[case.model]), layers=case.layers)
        return _decoder_training(config, case.tokens, packs)
    if case.model in ("dit", "dit_text"):
        text = 32 if case.model == "dit_text" else 0
        return _dit_training(DitConfig(16, 128, case.layers, heads=4, d_hidden=256, d_text=text), case.tokens)
    return _omni_training()


def jitted(training: Training, case: Case, **options: Any) -> ftrain.Step:
    """The step as a user would jit it for a card: donated, bfloat16."""
    make = lambda remat: ftrain.jit(  # noqa: E731
        training.step,
        donate="state",
        backend=case.backend,
        precision=Precision(compute="bfloat16"),
        remat=remat,
        **options,
    )
    if case.remat != "budget":
        return make({"offload": Remat(paths={"layers.*": "offload"})}.get(case.remat, case.remat))
    plain = make("none").lower(training.init(ftrain.key(0, device="cuda")), on_device(training.batch, "cuda")).memory()
    return make(Remat(budget=int(plain.inputs + 0.6 * plain.peak)))


def _ids(tokens: int) -> Tensor:
    """Which document each of `tokens` belongs to."""
    return torch.arange(tokens) // (tokens // DOCUMENTS)


def _decoder_training(config: DecoderConfig, tokens: int, packs: int) -> Training:
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4))
    specs = decoder.specs(config)
    batch = pack(torch.arange(tokens) % config.vocab, length=tokens // DOCUMENTS, packs=packs)
    init = lambda key: TrainState.create(ftrain.init(specs, key), tx)  # noqa: E731
    return Training(decoder_step(config, tx), init, specs, batch)


def _dit_training(config: DitConfig, rows: int) -> Training:
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4))
    specs = dit.specs(config)

    def loss_fn(params: Any, batch: Any) -> Any:
        velocity_NP = dit.apply(
            params,
            dit.noised(batch["data"], batch["noise"], batch["time"]),
            time_N=batch["time"],
            positions_AN=batch["positions"],
            segments_N=batch["segments"],
            cfg=config,
            text_SC=batch["text"] if config.d_text else None,
            text_segments_S=batch["text_segments"] if config.d_text else None,
        )
        return dit.flow_loss(velocity_NP, batch["data"], batch["noise"])

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        loss, grads = ftrain.value_and_grad(loss_fn)(state.params, batch)
        return state.apply(tx, grads), {"loss": loss}

    half = torch.bfloat16
    batch = {
        "data": torch.zeros(rows, config.d_in, dtype=half),
        "noise": torch.zeros(rows, config.d_in, dtype=half),
        "time": torch.rand(rows),
        "positions": torch.arange(rows).expand(3, rows).contiguous(),
        "segments": Documents.of(_ids(rows)),
    }
    if config.d_text:
        latents, texts = aligned_documents(_ids(rows), _ids(rows // 4))
        batch |= {
            "segments": latents,
            "text": torch.zeros(rows // 4, config.d_text, dtype=half),
            "text_segments": texts,
        }
    return Training(train_step, lambda key: TrainState.create(ftrain.init(specs, key), tx), specs, batch)


def _omni_training() -> Training:
    """The main job's model in its smallest size, on its own examples; speech, which takes seconds to make, is left out
    of the examples and with it of the model.
    """
    data = sources.load(omni_model.readers("tiny"), speech=Silence("not made for this test"), copies=1)
    model = omni_model.omni_model("tiny", data.words, audio=False)
    names, mixture = tasks.possible(data), tasks.Mixture(data, 0)
    documents = omni_model.parts("tiny").documents
    feed = omni_batches.Batches(
        mixture=mixture,
        model=model,
        tasks=names,
        documents=documents,
        budget=omni_batches.fitting_budget(mixture, model, documents=documents),
        device=torch.device("cpu"),
    )
    tx = training.transform(training.TrainConfig(steps=100))
    step = training.train_step(model, tx, names, training.loss_weights(names))
    specs = training.omni.specs(model)
    return Training(step, lambda key: training.init_state(model, tx, key), specs, feed.at(0))
