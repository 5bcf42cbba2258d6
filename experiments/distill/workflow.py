"""The stages: a teacher, a student of four steps without guidance, of one step, and one that goes frame by frame.

Legend: B films, N rows.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ftrain
from experiments.distill.films import NOTHING, Batch, Source
from experiments.distill.painter import Painter
from ftrain import Mean, optim
from ftrain.kernels import random
from ftrain.modules.velocity import timetable
from ftrain.run.stages import Stage, When, always
from ftrain.tasks.distill import Consistency, Dmd, Role
from ftrain.tasks.distill.roles import updated
from ftrain.tasks.distill.rollout import causal_rollout, exit_step, from_data, with_history
from ftrain.tasks.flow import Flow, Times, dropped, noise_like

TEACHER, STUDENT, CRITIC = Role("teacher"), Role("student"), Role("critic")
FOUR, ONE = timetable(4), timetable(1)
FRAMES = (1.0, 0.6, 0.0)
"""The times of the student that goes frame by frame."""

_WITHOUT = 0.15  # of the teacher's films have no words
_SLOW = 0.98  # decay of the averages that are measured and handed on


@dataclass(frozen=True)
class Lengths:
    """Steps of each stage."""

    teacher: int = 1200
    consistency: int = 300
    four: int = 400
    one: int = 300
    causal: int = 300
    frames: int = 300


@dataclass(frozen=True)
class Setting:
    """What the stages share. `batch`: films of a step. `guidance`: the teacher's. `every`: a student's update for so
    many of its critic's.
    """

    painter: Painter
    source: Source
    lengths: Lengths = field(default_factory=Lengths)
    batch: int = 64
    guidance: float = 2.0
    every: int = 2
    seed: int = 0
    dmd: Dmd = field(default_factory=lambda: Dmd(Times(low=0.02, high=0.98)))

    @property
    def ids_N(self) -> Tensor:
        """The film of each row."""
        return self.painter.ids(self.batch)

    def data(self, stage: str) -> Callable[[int], Batch]:
        """The batches of a stage."""
        seed = self.seed ^ zlib.crc32(stage.encode())
        return lambda number: self.source.batch(self.batch, seed=seed, number=number)


def stages(s: Setting) -> list[Stage]:
    """The workflow. What each stage leaves: `result` of its tree."""
    n = s.lengths
    return [
        teacher(s, n.teacher),
        consistency(s, n.consistency),
        matching(s, "four", n.four, FOUR),
        matching(s, "one", n.one, ONE),
        causal(s, n.causal),
        frames(s, n.frames),
    ]


def result(tree: Any, name: str) -> Any:
    """The averaged parameters of a trained role."""
    return tree[f"{name}_opt"][-1].average[name]


def optimizer(rate: float, steps: int) -> optim.Transform:
    """Muon on the matrices of layers and AdamW on all else, with a cosine, and the average of what is trained.

    With AdamW alone the teacher needs four times the steps.
    """
    schedule = _cosine(rate, steps)
    groups = {
        "matrices": optim.muon(schedule, weight_decay=0.01, adjust="match_rms_adamw", ns_dtype=None),
        "others": optim.adamw(schedule, b2=0.98, weight_decay=0.01),
    }
    labels = [("**.layers.*.*.w_*", "matrices"), ("**.layers.*.text.*.w", "matrices"), ("**", "others")]
    return _averaging(optim.multi_transform(groups, labels))


def game_optimizer(rate: float, steps: int) -> optim.Transform:
    """AdamW without memory of old gradients, as is published for a student and a critic that follow each other."""
    return _averaging(optim.adamw(_cosine(rate, steps), b1=0.0, b2=0.98, weight_decay=0.01))


def _cosine(rate: float, steps: int) -> optim.Schedule:
    return optim.warmup_cosine(rate, warmup_steps=max(1, steps // 20), total_steps=steps + 1, floor=rate / 20)


def _averaging(inner: optim.Transform) -> optim.Transform:
    return optim.chain(optim.clip_by_global_norm(1.0), inner, optim.ema(_SLOW, warmup=True))


def trained(role: Role, tx: optim.Transform, loss: Callable[[Any, Any, Batch, Tensor], Any]) -> Any:
    """A jitted step that updates a role by a loss of its parameters, the tree, a batch and a key."""

    def step(tree: Any, batch: Batch, key: Tensor) -> tuple[Any, dict[str, Tensor]]:
        tree, value, _ = updated(tree, role, tx, lambda own, seen, batch: (loss(own, seen, batch, key), ()), batch)
        return tree, {role.own: value}

    return ftrain.jit(step, donate="tree")


def teacher(s: Setting, steps: int) -> Stage:
    """Flow matching, of films with and without their words."""
    tx, flow, ids_N = optimizer(3e-3, steps), Flow(Times("logit_normal")), s.ids_N

    def loss(own: Any, tree: Any, batch: Batch, key: Tensor) -> Mean:
        without_B1 = dropped(key, torch.arange(s.batch), _WITHOUT)[:, None]
        words_BW = torch.where(without_B1, NOTHING, batch.words_BW)
        return flow.loss(s.painter.velocity(own, words_BW), batch.rows_NP, ids_N=ids_N, key=key)

    def start(tree: Any, key: Tensor) -> Any:
        return TEACHER.begun({}, ftrain.init(s.painter.specs, key), tx)

    return Stage("teacher", steps, [(always, trained(TEACHER, tx, loss))], s.data("teacher"), start)


def consistency(s: Setting, steps: int) -> Stage:
    """The student predicts one film along each path of the guided teacher."""
    tx, ids_N = optimizer(1e-3, steps), s.ids_N
    task = Consistency(timetable(16))

    def loss(own: Any, tree: Any, batch: Batch, key: Tensor) -> Mean:
        student = s.painter.velocity(own, batch.words_BW)
        guided = s.painter.guided(tree["teacher"], batch.words_BW, s.guidance)
        return task.loss(student, student, guided, batch.rows_NP, ids_N=ids_N, key=key)

    def start(tree: Any, key: Tensor) -> Any:
        own = result(tree, "teacher")
        return STUDENT.begun({"teacher": own}, own, tx)

    return Stage("consistency", steps, [(always, trained(STUDENT, tx, loss))], s.data("consistency"), start)


def matching(s: Setting, name: str, steps: int, times: tuple[float, ...]) -> Stage:
    """Distribution matching of a student of few steps, on noisy real films of its times."""
    return _matched(s, name, steps, [(always, partial(_predicted, s, times))], rate=5e-4, first=name == "four")


def frames(s: Setting, steps: int) -> Stage:
    """Self-forcing: films made frame by frame, each step of `FRAMES` at its turn."""
    made = [(partial(_exits, s.seed, exit), partial(_rolled_out, s, exit)) for exit in range(len(FRAMES) - 1)]
    return _matched(s, "frames", steps, made, rate=5e-4, first=True)


Made = Callable[[Any, Batch, Tensor], Tensor]


def _exits(seed: int, exit: int, number: int) -> bool:
    return exit_step(seed, number, len(FRAMES) - 1) == exit


def _predicted(s: Setting, times: tuple[float, ...], own: Any, batch: Batch, key: Tensor) -> Tensor:
    """A student's films of noisy real ones."""
    return from_data(s.painter.velocity(own, batch.words_BW), batch.rows_NP, times, ids_N=s.ids_N, key=key)


def _rolled_out(s: Setting, exit: int, own: Any, batch: Batch, key: Tensor) -> Tensor:
    """A causal student's films of noise."""
    noise = noise_like(batch.rows_NP, key)
    chunk = s.painter.chunk(own, batch.words_BW)
    return s.painter.joined(causal_rollout(chunk, (), s.painter.frames(noise), FRAMES, key=key, exit=exit))


def _matched(s: Setting, name: str, steps: int, made: list[tuple[When, Made]], *, rate: float, first: bool) -> Stage:
    """A stage of distribution matching. `made`: when which films are made. `first`: the critic begins as the teacher,
    and not as it was left.
    """
    slow, fast, ids_N = game_optimizer(rate, steps // s.every), game_optimizer(2 * rate, steps), s.ids_N

    def critic_loss(make: Made, own: Any, tree: Any, batch: Batch, key: Tensor) -> Mean:
        with torch.no_grad():
            films_NP = make(tree["student"], batch, random.fold_in(key, 1))
        return s.dmd.critic_loss(s.painter.velocity(own, batch.words_BW), films_NP, ids_N=ids_N, key=key)

    def student_loss(make: Made, own: Any, tree: Any, batch: Batch, key: Tensor) -> Mean:
        guided = s.painter.guided(tree["teacher"], batch.words_BW, s.guidance)
        critic = s.painter.velocity(tree["critic"], batch.words_BW)
        return s.dmd.loss(make(own, batch, random.fold_in(key, 1)), guided, critic, ids_N=ids_N, key=key)

    def start(tree: Any, key: Tensor) -> Any:
        critic = tree["teacher"] if first else result(tree, "critic")
        begun = STUDENT.begun({"teacher": tree["teacher"]}, result(tree, "student"), slow)
        return CRITIC.begun(begun, critic, fast)

    def both(when: When) -> When:
        return lambda number: when(number) and number % s.every == 0

    schedule = [(when, trained(CRITIC, fast, partial(critic_loss, make))) for when, make in made]
    schedule += [(both(when), trained(STUDENT, slow, partial(student_loss, make))) for when, make in made]
    return Stage(name, steps, schedule, s.data(name), start)


def causal(s: Setting, steps: int) -> Stage:
    """The teacher learns to go frame by frame after true frames, before it learns to go after its own."""
    tx, flow = optimizer(1e-3, steps), Flow(Times("logit_normal", mean=0.5))
    ids_n = torch.arange(s.batch).repeat_interleave(s.painter.film.squares)

    def loss(own: Any, tree: Any, batch: Batch, key: Tensor) -> Mean:
        parts = s.painter.frames(batch.rows_NP)
        fields = with_history(s.painter.chunk(own, batch.words_BW), (), parts)
        each = [
            flow.loss(velocity, rows, ids_N=ids_n, key=random.fold_in(key, number))
            for number, (velocity, rows) in enumerate(zip(fields, parts, strict=True))
        ]
        return Mean.pool(each)

    def start(tree: Any, key: Tensor) -> Any:
        return STUDENT.begun({"teacher": tree["teacher"]}, tree["teacher"], tx)

    return Stage("causal", steps, [(always, trained(STUDENT, tx, loss))], s.data("causal"), start)
