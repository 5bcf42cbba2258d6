"""What both models read of an impression, as plain arrays, and the same as documents of the omni composition.

Legend: N impressions, E events (a person's facts, the history, what is shown), W words of a title, H rows, W columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from experiments.recommend.world import HISTORY, MOODS, TOPICS, Films, Split
from ftrain.modules.budget import Budget, total_budget
from ftrain.modules.hashed_tables import TablesConfig, hashed
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Document, Media, Text, lay, measure
from ftrain.modules.vision_encoder import VisionConfig, patchify

FIELDS = MappingProxyType(
    {
        "country": 64,
        "age": 16,
        "film": 8192,
        "topic": 64,
        "maker": 1024,
        "price": 16,
        "length": 32,
        "did": 16,
        "watch": 32,
    }
)
"""Rows of the table of each categorical feature."""
WORDS = ("<events>", "</events>", "<image>", "</image>", "<read>", *TOPICS, *MOODS)
"""The vocabulary of titles, and the marks."""
WATCH_S = (1.0, 3.0, 6.0, 10.0, 15.0, 22.0, 32.0, 47.0, 70.0, 100.0, 150.0, 220.0, 330.0, 600.0)
"""Centres of the buckets of watch time, in seconds."""
EVENTS = HISTORY + 2
"""A person's facts, the history, what is shown."""
_AFTER = 2  # tokens behind the event of what is shown: the mark that ends events, and the one that heads read
_SKIPPED, _CLICKED, _BOUGHT = "skipped", "clicked", "bought"


def id_of(word: str) -> int:
    """The id of a word of a title, or of a mark."""
    return WORDS.index(word)


@dataclass(frozen=True)
class Features:
    """Of each impression: rows of its events' fields, each int64 `[N, E]`; ids of its title `[N, W]`; the film's cover.

    `covers_IHWC`: the covers of all films; `labels`: what `recommender.loss_terms` reads, each `[N]`.
    """

    events: Mapping[str, np.ndarray]
    title_NW: np.ndarray
    film_N: np.ndarray
    covers_IHWC: np.ndarray
    labels: Mapping[str, np.ndarray]
    person_N: np.ndarray
    new_N: np.ndarray
    patches: list[dict[str, np.ndarray]] = field(default_factory=list)


def of_split(split: Split, *, tables: TablesConfig, vision: VisionConfig) -> Features:
    """The features of all impressions of a split."""
    seen, films = split.seen, split.films
    words_IW = np.array([[id_of(MOODS[m]), id_of(TOPICS[t])] for m, t in zip(films.mood_I, films.topic_I, strict=True)])
    return Features(
        events=_events(split, tables),
        title_NW=words_IW[seen.film_N],
        film_N=seen.film_N,
        covers_IHWC=films.cover_IHWC,
        labels={
            "clicked": seen.clicked_N,
            "converted": seen.converted_N,
            "watch_s": seen.watch_N.astype(np.float32),
            "counted": np.ones(len(seen), bool),
        },
        person_N=seen.person_N,
        new_N=seen.film_N >= split.known,
        patches=[patchify(cover, cfg=vision) for cover in films.cover_IHWC],
    )


def _events(split: Split, tables: TablesConfig) -> dict[str, np.ndarray]:
    """Rows `[N, E]` of each field; 0 where an event has no such field."""
    seen, people = split.seen, split.people
    found = {name: np.zeros((len(seen), EVENTS), np.int64) for name in tables.rows}
    found["country"][:, 0] = hashed(people.country_U, "country", cfg=tables)[seen.person_N]
    found["age"][:, 0] = hashed(people.age_U, "age", cfg=tables)[seen.person_N]
    for name, rows_I in _of_films(split.films, tables).items():
        found[name][:, 1:-1] = rows_I[seen.past_film_NH]
        if name != "topic":  # the title says what it is about
            found[name][:, -1] = rows_I[seen.film_N]
    did_N3 = hashed([_SKIPPED, _CLICKED, _BOUGHT], "did", cfg=tables)
    found["did"][:, 1:-1] = did_N3[seen.past_clicked_NH.astype(int) + seen.past_converted_NH]
    buckets_B = hashed(range(len(WATCH_S) + 1), "watch", cfg=tables)
    found["watch"][:, 1:-1] = buckets_B[np.digitize(seen.past_watch_NH, WATCH_S)]
    return found


def _of_films(films: Films, tables: TablesConfig) -> dict[str, np.ndarray]:
    """Rows of the fields of each film, `[I]`."""
    values = {
        "film": np.arange(len(films.topic_I)),
        "topic": films.topic_I,
        "maker": films.maker_I,
        "price": films.price_I,
        "length": np.digitize(films.length_I, WATCH_S),
    }
    return {name: hashed(x_I, name, cfg=tables) for name, x_I in values.items()}


def document(features: Features, n: int) -> Document:
    """Impression n: who it is and what they did, the title, the cover, what is shown, and the mark that heads read."""
    events = {name: rows_NE[n] for name, rows_NE in features.events.items()}
    return (
        Media("events", {name: rows_E[:-1] for name, rows_E in events.items()}),
        Text(features.title_NW[n]),
        Media("image", features.patches[features.film_N[n]]),
        Media("events", {name: rows_E[-1:] for name, rows_E in events.items()}),
        Text([id_of("<read>")]),
    )


def budget(features: Features, count: int, *, model: OmniModel) -> Budget:
    """A pack of `count` impressions, which are all of one size."""
    return total_budget([measure(document(features, 0), model=model)] * count)


def packed(features: Features, chosen_N: np.ndarray, *, model: OmniModel, size: Budget) -> dict[str, Any]:
    """The pack of the chosen impressions, with "read_N" and "shown_N", the places of each one's last token and of the
    event that says what is shown, and "labels", `[N]`.
    """
    batch, order = lay([document(features, n) for n in chosen_N], budget=size, model=model)
    ids_T = batch["segments_T"].ids_T.numpy()
    last_N = np.flatnonzero(np.append(ids_T[1:] != ids_T[:-1], True))[: len(chosen_N)]
    places = {"read_N": torch.from_numpy(last_N), "shown_N": torch.from_numpy(last_N - _AFTER)}
    return {**batch, **places, "labels": labels_of(features, chosen_N[order])}


def labels_of(features: Features, chosen_N: np.ndarray) -> dict[str, torch.Tensor]:
    """The labels of the chosen impressions, `[N]`."""
    return {name: torch.from_numpy(x_N[chosen_N]) for name, x_N in features.labels.items()}


def unpacked(features: Features, chosen_N: np.ndarray) -> dict[str, Any]:
    """The same as plain arrays: "events" by field `[N, E]`, "title_NW", "cover_NP" (pixels), "labels"."""
    covers_NHWC = features.covers_IHWC[features.film_N[chosen_N]]
    return {
        "events": {name: torch.from_numpy(rows_NE[chosen_N]) for name, rows_NE in features.events.items()},
        "title_NW": torch.from_numpy(features.title_NW[chosen_N]),
        "cover_NP": torch.from_numpy(covers_NHWC.reshape(len(chosen_N), -1)),
        "labels": labels_of(features, chosen_N),
    }
