"""Train a thinker and a talker: spoken questions in, spoken answers out, judged by a recogniser of real voices.

python -m experiments.spoken [--out FOLDER] [--json FILE] [--small]
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import ftrain
from experiments.bench.machine import Machine
from experiments.curve import Curve
from experiments.omni import vocoder
from experiments.omni.corpus import RATE
from experiments.omni.language import BOS, EOS, Tokenizer
from experiments.omni.sources import less_means, log_mels
from experiments.spoken import codec, listener, model, questions
from experiments.spoken.codec import SOUND, Codec
from experiments.spoken.listener import Listener
from experiments.spoken.model import Both, Talker
from experiments.spoken.questions import QUESTIONS, SPEAKERS, WORDS, Recordings, Said
from ftrain import TrainState
from ftrain.checkpoint import Checkpointer
from ftrain.modules.generation import generate_text
from ftrain.modules.packing import Document, Media, Text, exact_budget, pack
from ftrain.run.folder import write_json
from ftrain.run.stages import Stage, always, fold


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    out: Path = Path("runs/spoken")
    """Folder of checkpoints and of the sound of some answers; a run that was stopped goes on."""
    json: Path | None = None
    """Where figures are written."""
    small: bool = False
    """A few voices and steps, to see that all runs."""
    steps: int = 160
    """Training steps."""
    documents: int = 32
    """Questions of a step."""
    joint: bool = False
    """The talker's gradient reaches the thinker."""
    rate: float = 3e-3
    """Learning rate."""
    threads: int = 2
    """CPU threads of each op."""
    seed: int = 0
    """Of weights, deliveries and order."""


class World(NamedTuple):
    """What there is to learn from: recordings, features of the questions `[N, F, M]`, the codec, codes `[N, T, Q]`."""

    heard: Recordings
    asked_NFM: np.ndarray
    held_out_NFM: np.ndarray
    codec: Codec
    codes_NTQ: np.ndarray
    words: Tokenizer


def world(options: Options) -> World:
    """Record, and fit the codec to real words and answers."""
    heard = questions.record(takes=1, voices=4) if options.small else questions.record(takes=2, seed=options.seed)
    words_NFM, answers_NFM = (log_mels(said.waves_NS, SOUND) for said in (heard.words, heard.answers))
    entries = 16 if options.small else 128
    made = codec.fit(np.concatenate([words_NFM, *[answers_NFM] * 4]), entries=entries, seed=options.seed)
    asked, held_out = (_features(said) for said in (heard.asked, heard.held_out))
    return World(heard, asked, held_out, made, made.encode(answers_NFM), model.tokenizer())


def _features(said: Said) -> np.ndarray:
    """Log-mel features as the thinker hears them."""
    return less_means(log_mels(said.waves_NS, model.hearing()))


def main(options: Options) -> dict[str, Any]:
    """Train, answer the held-out voices, and listen."""
    torch.set_num_threads(options.threads)
    console, began = Console(width=110), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {line}", highlight=False)

    of = world(options)
    net = model.thinker(of.words)
    both = Both(net, Talker(net.foundation.d_model, *of.codes_NTQ.shape[1:], of.codec.entries), joint=options.joint)
    say(f"{len(of.heard.asked.what_N):,} questions, {len(of.codes_NTQ)} answers of {of.codes_NTQ.shape[1:]} codes")
    curve = Curve(options.out / "losses.jsonl", 1 if options.small else 20, say)
    state = train(both, of, options, curve)
    words, unseen = of.heard.words, of.heard.held_out_words
    judge = listener.train(words.waves_NS, words.what_N, unseen.waves_NS, unseen.what_N)
    answers = answer(both, of, state.params)
    heard = score(answers, of, judge)
    table(heard, console)
    keep(answers, of, options.out)
    found = {**asdict(Machine.here()), "seed": options.seed, "steps": options.steps, "joint": options.joint,
             "losses": curve.rows(), "held_out": heard}  # fmt: skip
    if options.json is not None:
        write_json(options.json, found)
    return found


def train(both: Both, of: World, options: Options, curve: Curve) -> TrainState:
    """The trained state. A folder that holds a part of the training is gone on from."""
    steps = 2 if options.small else options.steps
    tx, weights = model.optimizer(options.rate, steps), {"text": 1.0, "speech": 1.0}

    def loss_fn(params: Any, batch: Any) -> Any:
        terms = both.losses(params, batch)
        return ftrain.weighted_sum(terms, weights), {name: mean.value() for name, mean in terms.items()}

    @ftrain.jit(donate="state")
    def step(state: TrainState, batch: Any, key: Any) -> Any:
        del key
        (_, terms), grads = ftrain.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply(tx, grads), terms

    def data(number: int) -> dict[str, Any]:
        chosen = questions.chosen(of.heard.asked, options.documents, seed=options.seed, number=number)
        return training_batch(both, of, chosen, np.random.default_rng([options.seed, number]))

    def start(tree: Any, key: Any) -> TrainState:
        return TrainState.create(ftrain.init(both.specs(), key), tx)

    with Checkpointer(options.out / "checkpoints") as checkpoints:
        stage = Stage("both", steps, [(always, step)], data, start)
        state: TrainState = fold([stage], {}, seed=options.seed, checkpoints=checkpoints, save=40, log=curve.log)
    return state


def training_batch(both: Both, of: World, chosen: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Questions with their answers, each said by a voice that is drawn."""
    said, answers = of.heard.asked, of.heard.answers
    right = np.array([QUESTIONS[i][1] for i in said.what_N[chosen]])
    speaker = rng.integers(len(SPEAKERS), size=len(chosen))
    drawn = [
        rng.choice(np.flatnonzero((answers.what_N == word) & (answers.voice_N == who)))
        for word, who in zip(right, speaker, strict=True)
    ]
    codes_NTQ = of.codes_NTQ[drawn]
    moved = [_moved(of.asked_NFM[i], int(rng.integers(-1, 2))) for i in chosen]
    documents = [
        (*prompt(of.words, mel_FM), Text(of.words.encode((WORDS[w], EOS)), train=True))
        for mel_FM, w in zip(moved, right, strict=True)
    ]
    batch, order = laid(both, documents, [len(d[-1].ids) for d in documents])
    return {**batch, "speaker_B": torch.from_numpy(speaker[order]), "codes_BTQ": torch.from_numpy(codes_NTQ[order])}


def _moved(mel_FM: np.ndarray, bands: int) -> np.ndarray:
    """All bands moved up, the edge repeated: another length of vocal tract."""
    return mel_FM[:, np.clip(np.arange(mel_FM.shape[1]) - bands, 0, mel_FM.shape[1] - 1)]


def prompt(words: Tokenizer, mel_FM: np.ndarray) -> Document:
    """What the thinker reads of a question."""
    return (Text([words.id(BOS)]), Media("audio", {"mel_FM": mel_FM}))


def laid(both: Both, documents: Sequence[Document], last: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """The packed documents with `answer_B`, the place of the first of each document's `last` tokens; their order."""
    made = pack(documents, budget=exact_budget(documents, model=both.thinker), model=both.thinker)
    ends = np.cumsum(np.bincount(made.batch["segments_T"].ids_T.numpy()))[: len(documents)]
    places = ends - np.array(last)[made.taken]
    return {**made.batch, "answer_B": torch.from_numpy(places)}, made.taken


class Answers(NamedTuple):
    """What was thought (numbers of words, -1 for none of them) and said (waves) to each held-out question, by whom."""

    thought_N: np.ndarray
    waves_NS: np.ndarray
    speaker_N: np.ndarray


def answer(both: Both, of: World, params: Any) -> Answers:
    """Each held-out question is thought about, and what was thought is said, with voices in turn."""
    prompts = [prompt(of.words, mel_FM) for mel_FM in of.held_out_NFM]
    written = generate_text(params["thinker"], prompts, model=both.thinker, max_new=2, stop=of.words.id(EOS))
    ids = [list(said[:1]) or [of.words.id(BOS)] for said in written]
    documents = [(*p, Text(said)) for p, said in zip(prompts, ids, strict=True)]
    batch, order = laid(both, documents, [1] * len(documents))
    speaker_N = np.arange(len(prompts)) % len(SPEAKERS)
    batch["speaker_B"] = torch.from_numpy(speaker_N[order])
    with torch.no_grad():
        thoughts_BE = both.thoughts(params, batch)
    codes_BTQ = both.talker.say(params["talker"], thoughts_BE).numpy()
    back = np.argsort(order)
    known = {of.words.id(word): number for number, word in enumerate(WORDS)}
    thought_N = np.array([known.get(said[0], -1) for said in ids])
    return Answers(thought_N, vocoder.waves(of.codec.decode(codes_BTQ[back]), cfg=SOUND), speaker_N)


def score(answers: Answers, of: World, judge: Listener) -> dict[str, Any]:
    """Shares of right answers of held-out voices: as thought, as heard; by kind of question; and the judge's own."""
    asked = of.heard.held_out.what_N
    right_N = np.array([QUESTIONS[i][1] for i in asked])
    kind_N = np.array([QUESTIONS[i][0].split()[0] for i in asked])
    heard_N = judge.hears(answers.waves_NS)
    return {
        "questions": len(right_N),
        "thought": float((answers.thought_N == right_N).mean()),
        "heard": float((heard_N == right_N).mean()),
        "heard_as_thought": float((heard_N == answers.thought_N).mean()),
        "heard_by_kind": {k: float((heard_N == right_N)[kind_N == k].mean()) for k in dict.fromkeys(kind_N.tolist())},
        "judge_held_out_accuracy": judge.held_out_accuracy,
    }


def table(found: dict[str, Any], console: Console) -> None:
    """What was measured."""
    shown = Table(title=f"{found['questions']} spoken questions by voices that were never heard")
    shown.add_column("")
    shown.add_column("share", justify="right")
    shown.add_row("answered right in text", f"{found['thought']:.1%}")
    shown.add_row("answered right in speech, as the judge hears it", f"{found['heard']:.1%}")
    for kind, share in found["heard_by_kind"].items():
        shown.add_row(f"  of questions '{kind} ...'", f"{share:.1%}")
    shown.add_row("said as thought", f"{found['heard_as_thought']:.1%}")
    shown.add_row("the judge on real words by voices it never heard", f"{found['judge_held_out_accuracy']:.1%}")
    console.print(shown)


def keep(answers: Answers, of: World, folder: Path) -> None:
    """Some held-out questions and their answers, as WAV files."""
    for i in range(0, len(answers.waves_NS), 24):
        said = [wave_S / np.abs(wave_S).max() for wave_S in (of.heard.held_out.waves_NS[i], answers.waves_NS[i])]
        name = QUESTIONS[of.heard.held_out.what_N[i]][0].replace(" ", "-")
        vocoder.write_wav(folder / f"{name}.wav", said, rate=RATE)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except ValueError as error:
        sys.exit(f"spoken: {error}")
