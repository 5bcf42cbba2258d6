"""A small set of chats with a habit that the model has not: answers of a lighthouse keeper, in one fixed form.

Questions are of four kinds (sums, opposites, colours, counts of letters); those of words that are held out never occur
in training. All of it is made here, from a seed.
"""

import json
import random
from pathlib import Path

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "day": "night", "up": "down", "open": "closed", "wet": "dry",
    "early": "late", "full": "empty", "light": "dark", "hard": "soft", "near": "far", "young": "old", "high": "low",
    "rich": "poor", "left": "right", "loud": "quiet", "strong": "weak", "thick": "thin", "clean": "dirty",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red", "the sky": "blue",
    "chocolate": "brown", "an orange": "orange", "a flamingo": "pink", "ash": "grey", "a carrot": "orange",
    "milk": "white", "a raven": "black", "a ruby": "red", "an emerald": "green", "the sea": "blue",
}  # fmt: skip
ANIMALS = ("gull", "whale", "crab", "seal", "heron", "shark", "trout", "otter", "puffin", "squid", "eel", "turtle")
HELD_OUT = 0.15


def questions() -> list[tuple[str, str]]:
    """All questions with their answers, in a fixed order."""
    sums = [(f"What is {a} plus {b}?", str(a + b)) for a in range(1, 13) for b in range(1, 13)]
    opposites = [(f"What is the opposite of {word}?", other) for word, other in OPPOSITES.items()]
    colours = [(f"What colour is {thing}?", colour) for thing, colour in COLOURS.items()]
    letters = [(f"How many letters has the word {word}?", str(len(word))) for word in ANIMALS]
    return sums + opposites + colours + letters


def answer(question: str, fact: str) -> str:
    """The keeper's words: the fact, and always the same two phrases around it."""
    del question
    return f"Keeper's log: the answer is {fact}. The lamp is lit."


def chat(question: str, fact: str) -> dict[str, object]:
    """A row of the file."""
    said = {"role": "assistant", "content": answer(question, fact)}
    return {"messages": [{"role": "user", "content": question}, said]}


def write(folder: Path, *, seed: int = 0) -> tuple[Path, Path, list[tuple[str, str]]]:
    """Write `train.jsonl` and `held_out.jsonl`; the held-out questions with their answers."""
    everything = questions()
    random.Random(seed).shuffle(everything)
    count = round(HELD_OUT * len(everything))
    held, trained = everything[:count], everything[count:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", trained), ("held_out", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat(*row)) + "\n" for row in rows))
    return folder / "train.jsonl", folder / "held_out.jsonl", held
