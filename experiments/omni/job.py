"""Everything a run of the experiment is made of, from its options: data, model, step, state."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

import ftrain
from experiments.omni import (
    batches,
    corpus,
    judge,
    listener,
    model,
    planning,
    sources,
    tasks,
    tokenizer_training,
    training,
)
from experiments.omni.batches import Batches
from experiments.omni.judge import Judge
from experiments.omni.listener import Listener
from experiments.omni.sources import Sources
from experiments.omni.tasks import Mixture
from experiments.omni.training import TrainConfig
from ftrain import Precision, TrainState, optim, tree
from ftrain.analysis.hardware import free_bytes
from ftrain.modules import omni, spec, vq_audio
from ftrain.modules.omni import OmniModel
from ftrain.sharding import Mesh

_MEASURED = 256  # sounds, of which the tokenizer's error is said
_BYTES_PER_PARAMETER = 16  # float32 master, two moments, gradient


@dataclass(frozen=True)
class Job:
    """A run made ready. `step`: the jitted step; `tasks`: names in the order of `batch["task_T"]`; `listener`: None
    without speech.
    """

    size: str
    model: OmniModel
    sources: Sources
    tasks: tuple[str, ...]
    batches: Batches
    config: TrainConfig
    transform: optim.Transform
    step: ftrain.Step
    judge: Judge
    listener: Listener | None
    seed: int
    device: torch.device
    precision: Precision
    tokenizer_steps: int

    def abstract_state(self) -> Any:
        """The state's shapes, for restoring into."""
        params = spec.abstract(omni.specs(self.model))
        balance = spec.abstract(training.foundation.balance_specs(self.model.foundation))
        return TrainState.create(params, self.transform, extra={"balance": balance})

    def fresh_state(self, say: Callable[[str], None]) -> TrainState:
        """The state at step 0, with tokenizers of the real images and sounds that are trained on."""
        key = ftrain.key(self.seed).to(self.device)
        state = self.step.init(lambda key: training.init_state(self.model, self.transform, key), key)
        made = {"image": self._image_tokenizer(say)}
        if self.sources.train.speech is not None:
            made["audio"] = self._audio_tokenizer(say)
        held = self.step.shard({"decoders": {name: {"tokenizer": tokenizer} for name, tokenizer in made.items()}})
        decoders = {name: {**state.params["decoders"][name], **part} for name, part in held["decoders"].items()}
        return state.replace(params={**state.params, "decoders": decoders})

    def _image_tokenizer(self, say: Callable[[str], None]) -> Any:
        began = time.monotonic()
        images_NCHW = self.sources.train.drawn.images_NHWC.transpose(0, 3, 1, 2).copy()
        config = model.vq_config(self.size)
        tokenizer, error = tokenizer_training.train_tokenizer(
            images_NCHW,
            cfg=config,
            steps=self.tokenizer_steps,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )
        say(f"image tokenizer: {config.codes_per_image} codes an image, squared error {error:.4f}, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip
        return tokenizer

    def _audio_tokenizer(self, say: Callable[[str], None]) -> Any:
        """Fitted on the CPU, so that its codes do not depend on the device."""
        assert self.sources.train.speech is not None
        began = time.monotonic()
        mels_NFM, config = torch.from_numpy(self.sources.train.speech.said_NFM), model.vq_audio_config(self.size)
        tokenizer = vq_audio.fit(mels_NFM, cfg=config, key=ftrain.key(self.seed))
        some_NFM = mels_NFM[:: max(1, len(mels_NFM) // _MEASURED)]
        made_NFM = vq_audio.decode(tokenizer, vq_audio.encode(tokenizer, some_NFM, cfg=config), cfg=config)
        error = (made_NFM - some_NFM).square().mean().item()
        say(f"audio tokenizer: {config.codes_per_clip} codes a word, squared error {error:.4f}, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip
        return tree.map(lambda leaf: leaf.to(self.device), tokenizer)


def make(
    *,
    size: str,
    steps: int,
    tokenizer_steps: int,
    seed: int,
    device: torch.device,
    backend: str,
    remat: str,
    precision: Precision,
    mesh: Mesh | None = None,
    plan: str | None = None,
    earlier: tuple[tuple[int, int], ...] = (),
    decay: Literal["cosine", "constant"] = "cosine",
    say: Callable[[str], None],
) -> Job:
    """Read the data, build the model of this size, and jit its step on the ranks of a mesh.

    `steps`, `earlier` and `decay`: see `TrainConfig`. `plan`: "auto" or a plan file, by which the ranks then share the
    work; it also says what is recomputed. ValueError if the state cannot fit the device.
    """
    began = time.monotonic()
    readers = model.readers(size)
    documents, amount = model.parts(size).documents, model.parts(size).data
    data = sources.load(readers, speech=corpus.load(cfg=amount.speech), copies=amount.copies, seed=seed)
    spoken = data.train.speech is not None
    clips = f"{len(data.train.speech.mels_NFM):,} spoken words" if data.train.speech else f"no audio: {data.silence}"
    shapes = f"{len(data.train.drawn.labels_N):,} handwritten digits in {amount.copies + 1} shapes"
    say(f"data: {shapes}, {clips} ({time.monotonic() - began:.0f} s)")
    net = model.omni_model(size, data.words, audio=spoken)
    parameters = spec.count(omni.specs(net))
    _check_memory(size, parameters, device)
    names = tasks.possible(data)
    mixture = Mixture(data, seed)
    laid, packs, parts = planning.laid_out(plan, mesh)
    feed = Batches(
        mixture=mixture,
        model=net,
        tasks=names,
        documents=documents,
        budget=batches.fitting_budget(mixture, net, documents=documents, packs=packs, parts=parts),
        device=device,
        packs=packs,
        parts=parts,
    )
    config = TrainConfig(steps=steps, earlier=earlier, decay=decay)
    tx = training.transform(config)
    step = ftrain.jit(
        training.train_step(net, tx, names, training.loss_weights(names)),
        donate="state",
        backend=backend,
        remat=remat if plan is None else None,
        precision=precision,
        plan=laid,
        specs=omni.specs(net),
    )
    say(f"model: {size}, {parameters / 1e6:.2f} M parameters, {packs * feed.budget.tokens:,} tokens a step")
    grader = judge.train(data.train.drawn, data.held_out.drawn, copies=amount.graded, seed=seed)
    ear = None
    if data.train.speech is not None and data.held_out.speech is not None and readers.audio is not None:
        ear = listener.train(data.train.speech, data.held_out.speech, cfg=readers.audio)
    work = Job(size, net, data, names, feed, config, tx, step, grader, ear, seed, device, precision, tokenizer_steps)
    chosen = step.choose(work.abstract_state(), feed.at(0))
    if chosen is not None:
        say(f"mesh: {chosen.mesh} ({chosen.mesh.kind})")
    return work


def _check_memory(size: str, parameters: int, device: torch.device) -> None:
    needed, free = parameters * _BYTES_PER_PARAMETER, free_bytes(device)
    if needed > free:
        raise ValueError(
            f"--size {size}: the state of {parameters / 1e9:.1f} B parameters takes {needed / 2**30:,.0f} GiB and "
            f"{device} has {free / 2**30:,.0f} GiB free: take a smaller --size, or more devices"
        )
