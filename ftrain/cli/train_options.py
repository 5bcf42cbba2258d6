"""The options of `ftrain train`: what all tasks have, and what each has of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from ftrain import optim
from ftrain.cli.lora_flags import LoraFlags
from ftrain.data.encoding import ChatEncoder
from ftrain.resilience.anomalies import BadSteps, Spikes
from ftrain.run.data import DataOptions
from ftrain.run.ranks import MeshFlags
from ftrain.run.training import Every
from ftrain.tasks import Classify, Dpo, Embed, Kd, Kto, NextToken, Reward, Task
from ftrain.tasks.rows import ClassedRows, JudgedRows, PairRows, PreferenceRows, TextRows, WithNeighbour


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW: its rate over the run, and what holds it back."""

    rate: float | None = None
    """The largest learning rate; default 2e-4 with an adapter, 2e-5 without."""
    warmup: float = 0.03
    """The share of the steps in which the rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the rate after that, to a tenth of it at the end, or not at all."""
    weight_decay: float = 0.0
    """Of matrices."""
    clip: float = 1.0
    """The largest norm of all gradients together."""

    def schedule(self, steps: int, adapter: bool) -> optim.Schedule:
        """The rate of a run of so many steps."""
        peak = self.rate if self.rate is not None else 2e-4 if adapter else 2e-5
        warm = min(round(self.warmup * steps), max(steps - 1, 0))
        if self.decay == "cosine":
            return optim.warmup_cosine(peak, warmup_steps=warm, total_steps=max(steps, warm + 1), floor=peak / 10)
        after = optim.linear(peak, peak / 10, steps=steps - warm) if self.decay == "linear" else optim.constant(peak)
        return optim.join([optim.linear(0.0, peak, steps=warm), after], boundaries=[warm]) if warm else after


@dataclass(frozen=True)
class BadFlags:
    """What happens to steps that go wrong. Without these a step whose gradients are not finite changes nothing, and
    many in a row end the run."""

    skip_bad: bool = False
    """Go back to the last checkpoint before bad steps, and leave out their batches."""
    bad_steps: int = 3
    """With --skip-bad: so many bad steps in a row, whose loss or gradients are not finite or whose loss is a spike."""
    spike: float = 0.0
    """With --skip-bad: a loss so many robust deviations above the median of the last 64 is a spike; 0: none is."""

    def policy(self) -> BadSteps | None:
        """What counts as bad; None where nothing is undone. ValueError for numbers out of range, and for those that are
        given without --skip-bad.
        """
        if not self.skip_bad:
            if (self.bad_steps, self.spike) != (BadFlags.bad_steps, BadFlags.spike):
                raise ValueError("--bad-steps and --spike say when bad steps are undone: give --skip-bad too")
            return None
        if self.bad_steps < 1 or self.spike < 0:
            raise ValueError(f"--bad-steps {self.bad_steps} must be at least 1, and --spike {self.spike} at least 0")
        return BadSteps(self.bad_steps, Spikes(z=self.spike) if self.spike else None)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What runs of all kinds have."""

    model: Path
    """A folder in Hugging Face's format."""
    out: Path | None = None
    """The run's folder; default runs/<task>/<time>. A folder that holds a run of the same options goes on."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run in --out if there is one."""
    lora: LoraFlags = field(default_factory=LoraFlags)
    freeze: tuple[str, ...] = ()
    """Globs over paths of parameters that are not trained; one that names a node is about all below it."""
    only: tuple[str, ...] = ()
    """Globs over paths of the parameters that alone are trained."""
    optimizer: OmitArgPrefixes[OptimizerFlags] = field(default_factory=OptimizerFlags)
    ema: float = 0.0
    """Keep a running average of what is trained, with this decay, such as 0.999; 0: none."""
    ema_use: tuple[Literal["evaluate", "export"], ...] = ("evaluate", "export")
    """What the average is taken for, in the place of the last parameters: held-out losses and answers, and folders."""
    every: Every = field(default_factory=Every)
    bad: OmitArgPrefixes[BadFlags] = field(default_factory=BadFlags)
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters that are not trained. auto: bfloat16 on CUDA, float32 on a CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which dtype the loss is computed. auto: bfloat16 on CUDA, float32 on a CPU."""
    remat: Literal["none", "layer", "all"] = "none"
    """What the backward pass computes again instead of keeping it."""
    budget: str | None = None
    """Memory of the step, such as 70GiB: as little is computed again as fits it."""
    backend: Literal["auto", "aten", "inductor", "cudagraph"] = "auto"
    """How the step's graph is run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    mesh: OmitArgPrefixes[MeshFlags] = field(default_factory=MeshFlags)
    """Ranks: under torchrun one per process; otherwise sizes above 1 run in lockstep in this process."""
    seed: int = 0
    """Of new parameters, the order of the data, and dropout."""
    track: tuple[str, ...] = ()
    """Further logs: tensorboard, trackio, wandb, swanlab, mlflow."""
    save_merged: bool = False
    """With an adapter, also write the model with it, as a folder."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """What all tasks of language models have."""

    data: OmitArgPrefixes[DataOptions]
    native: Literal["auto", "always", "never"] = "auto"
    """auto: a family of the library where it has the model's, transformers' own module elsewhere."""
    train_on: Literal["assistant", "last", "everything"] = "assistant"
    """Of a chat: the turns of the assistant, its last one, or all tokens."""
    truncate: Literal["refuse", "left", "right"] = "refuse"
    """What happens to a row of more tokens than a pack."""
    plan: str | None = None
    """auto: search the fastest layout within --budget on these ranks at start-up; or a file that `ftrain plan --apply`
    wrote, whose mesh and packs are then taken."""


@dataclass(frozen=True, kw_only=True)
class Sft(TrainOptions):
    """Supervised fine-tuning: chats, of which the assistant's turns are learned, or texts."""

    sft: NextToken = field(default_factory=NextToken)
    speech: bool = False
    """Train thinker and talker of a whole Qwen3-Omni or Qwen2.5-Omni: assistant's turns may have speech."""
    speech_flows: bool = False
    """The gradient of speech goes on into the thinker."""
    speech_codec: Path | None = None
    """A folder of Mimi's, which makes codes of the recordings of speech; default: rows give codes."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainOptions):
    """Next tokens of plain texts; of chats, all tokens."""

    train_on: Literal["assistant", "last", "everything"] = "everything"
    pretrain: NextToken = field(default_factory=NextToken)


@dataclass(frozen=True, kw_only=True)
class OfPairs(TrainOptions):
    """Tasks whose rows are two answers to one question."""

    share_prompts: bool = True
    """Compute what both answers of a row begin with once, where the model's tokens meet in causal attention alone."""


@dataclass(frozen=True, kw_only=True)
class DpoTrain(OfPairs):
    """Preferences: an answer that was chosen beside one that was rejected. With an adapter, the reference is the base
    without it."""

    dpo: Dpo = field(default_factory=Dpo)


@dataclass(frozen=True, kw_only=True)
class KtoTrain(OfPairs):
    """Answers that were judged good or bad, one by one."""

    kto: Kto = field(default_factory=Kto)


@dataclass(frozen=True, kw_only=True)
class KdTrain(TrainOptions):
    """A student that learns the distributions of a teacher over the tokens of texts or of an assistant's turns."""

    teacher: Path
    """The teacher's folder, with the same vocabulary."""
    kd: Kd = field(default_factory=Kd)


@dataclass(frozen=True, kw_only=True)
class RewardTrain(OfPairs):
    """A reward model from preferences: a head of one number, by which a chosen answer is above the rejected one."""

    reward: Reward = field(default_factory=Reward)


@dataclass(frozen=True, kw_only=True)
class ClassifyTrain(TrainOptions):
    """Classes of texts, told by a head at the last token."""

    classify: Classify = field(default_factory=Classify)


@dataclass(frozen=True, kw_only=True)
class EmbedTrain(TrainOptions):
    """Embeddings: a question lies near the text that answers it, and far from all others of the step's batch."""

    embed: Embed = field(default_factory=Embed)


@dataclass(frozen=True)
class TaskKind:
    """How a task's options become its loss and its documents. `leaf`: that documents have beside tokens and labels.
    `whole_batch`: its loss looks at all of the batch at once, so there are no micro-batches."""

    task: Callable[[Any], Task]
    rows: Callable[[ChatEncoder], Any]
    leaf: str = ""
    paired: Callable[[Any], Any] | None = None
    whole_batch: bool = False


KINDS: Mapping[str, tuple[type, TaskKind]] = {
    "sft": (Sft, TaskKind(lambda o: o.sft, TextRows)),
    "pretrain": (Pretrain, TaskKind(lambda o: o.pretrain, TextRows)),
    "dpo": (DpoTrain, TaskKind(lambda o: o.dpo, PreferenceRows, "side")),
    "kto": (KtoTrain, TaskKind(lambda o: o.kto, JudgedRows, "judged", WithNeighbour)),
    "kd": (KdTrain, TaskKind(lambda o: o.kd, TextRows)),
    "reward": (RewardTrain, TaskKind(lambda o: o.reward, PreferenceRows, "side")),
    "embed": (EmbedTrain, TaskKind(lambda o: o.embed, PairRows, "part", whole_batch=True)),
    "classify": (ClassifyTrain, TaskKind(lambda o: o.classify, ClassedRows, "kind")),
}


def kind_of(options: TrainOptions) -> tuple[str, TaskKind]:
    """The name of the task that these are the options of, and what becomes of them."""
    return next((name, kind) for name, (made, kind) in KINDS.items() if type(options) is made)
