"""How fast texts become batches: the loader, torch's DataLoader doing the same work, and processes that only tokenise.

All on the same texts and tokenizer, with two worker processes. T tokens of a pack.
"""

import multiprocessing
import os
import time
from collections.abc import Collection, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset

from experiments.bench.data_packing import lengths
from ftrain.data.documents import IGNORE, Document, Group, shifted
from ftrain.data.encoding_ahead import Workers
from ftrain.data.loader import Loader
from ftrain.data.order import Order
from ftrain.data.packing import Packing

WORKERS = 2
_CHARACTERS = 4  # of a token, about
_TOGETHER = 32  # documents that DataLoader's workers hand over at once, as ours do
_FIRST_FIT_BUFFER = 200


def make_texts(count: int, longest: int) -> list[str]:
    """Pieces of Python's documentation, as long as chats are (`lengths`)."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    starts = np.random.default_rng(1).integers(0, len(whole), count)
    sizes = lengths(count, longest) * _CHARACTERS
    twice = whole + whole
    return [twice[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]


def make_tokenizer(file: Path | None) -> Tokenizer:
    """The tokenizer of a file, or one that learns 8192 pieces of bytes from the documentation."""
    if file is not None:
        return Tokenizer.from_file(str(file))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8192, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(topics.values(), trainer)
    return made


class Encode:
    """From a text to its document; the tokenizer travels to workers as its JSON."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest

    def ids(self, text: str) -> np.ndarray:
        """Int64 `[n]`."""
        return np.array(self._tokenizer.encode(text).ids[: self._longest], np.int64)

    def __call__(self, text: str) -> Group:
        """All of the text is trained on."""
        ids = self.ids(text)
        return Group((Document(ids, shifted(ids)),))


def ours(texts: list[str], encode: Encode, tokens: int) -> Generator[int]:
    """Tokens of each batch that the loader gives."""
    loader = Loader(
        Order([len(texts)], key=0),
        [texts],
        encode,
        Packing(tokens),
        steps=2**30,
        workers=Workers(WORKERS, chunk=_TOGETHER),
    )
    for step in loader:
        yield step.facts.tokens


class _Texts(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, texts: list[str], encode: Encode) -> None:
        self._texts, self._encode = texts, encode

    def __len__(self) -> int:
        return 2**30

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._encode.ids(self._texts[index % len(self._texts)]))
        labels = torch.cat([ids[1:], ids.new_tensor([IGNORE])])
        return {"tokens": ids, "labels": labels}


def _as_they_are(samples: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return samples


def torchs(texts: list[str], encode: Encode, tokens: int) -> Generator[int]:
    """Tokens of each batch: samples from torch's workers, packed first fit in the main process (VeOmni's way)."""
    data = DataLoader(
        _Texts(texts, encode), batch_size=_TOGETHER, num_workers=WORKERS, collate_fn=_as_they_are, prefetch_factor=4
    )
    buffer: list[dict[str, torch.Tensor]] = []
    for samples in data:
        buffer += samples
        while len(buffer) >= _FIRST_FIT_BUFFER:
            taken, left, used = list[dict[str, torch.Tensor]](), list[dict[str, torch.Tensor]](), 0
            for sample in buffer:
                size = len(sample["tokens"])
                (taken if used + size <= tokens else left).append(sample)
                used += size if used + size <= tokens else 0
            buffer = left
            _collated(taken, tokens)
            yield used


def _collated(taken: list[dict[str, torch.Tensor]], tokens: int) -> dict[str, torch.Tensor]:
    sizes = [len(sample["tokens"]) for sample in taken]
    rest = tokens - sum(sizes)
    pad = {"tokens": 0, "labels": IGNORE}
    batch = {
        name: torch.cat([*(sample[name] for sample in taken), torch.full((rest,), fill)]) for name, fill in pad.items()
    }
    batch["positions"] = torch.cat([torch.arange(size) for size in [*sizes, rest]])
    batch["segments"] = torch.repeat_interleave(torch.arange(len(sizes) + 1), torch.tensor([*sizes, rest]))
    return batch


def raw(texts: list[str], encode: Encode, tokens: int) -> Generator[int]:
    """Tokens that two processes make of texts and throw away, told every `tokens` of them."""
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(WORKERS)]
    processes = [
        context.Process(target=_tokenise, args=(texts[i::WORKERS], encode, tokens, writer), daemon=True)
        for i, (_, writer) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            for ready in multiprocessing.connection.wait([reader for reader, _ in ends]):
                assert isinstance(ready, Connection)
                yield ready.recv()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _tokenise(texts: list[str], encode: Encode, tokens: int, writer: Connection) -> None:
    made, at = 0, 0
    while True:
        made, at = made + len(encode.ids(texts[at % len(texts)])), at + 1
        if made >= tokens:
            writer.send(made)
            made = 0


class Speed(NamedTuple):
    """Tokens a second of wall-clock time, and CPU seconds of all processes for a token."""

    per_second: float
    cpu: float


def speed_of(batches: Iterator[int], *, first: int, tokens: int, others: Collection[int] = ()) -> Speed:
    """After `first` tokens, which fill what is read ahead, over as many tokens as are asked for.

    `others`: processes of another side, whose CPU time is not counted.
    """
    for made in batches:
        first -= made
        if first <= 0:
            break
    begun, cpu, done = time.perf_counter(), cpu_seconds(others), 0
    for made in batches:
        done += made
        if done >= tokens:
            break
    return Speed(done / (time.perf_counter() - begun), (cpu_seconds(others) - cpu) / done)


def processes() -> list[int]:
    """This process and its children."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [os.getpid(), *(int(child) for task in tasks for child in task.read_text().split())]


def cpu_seconds(others: Collection[int] = ()) -> float:
    """What this process and its children, but for the `others`, have used so far."""
    counted = [pid for pid in processes() if pid not in others]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in counted]
    return sum(int(found[11]) + int(found[12]) for found in fields) / os.sysconf("SC_CLK_TCK")
