"""A small world of people and short films, which says who clicks on what, what they buy, and how long they watch.

A film has a cover (a real handwritten digit), a title (words), a maker, a price and a length. People like digits and
topics, each in their own measure, and it is only in what they did before that one sees which. What they do depends on
both sides together: on the topic a digit comes with, and on whether the last films they saw were alike and skipped.
People who are held out are never trained on; they are shown new films too, whose covers are by other hands.

Legend: N impressions, I films, U people, H events of a history, C digits, K topics.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.omni import digits
from experiments.omni.digits import CLASSES, Digits

TOPICS = (
    "cats",
    "chess",
    "cooking",
    "dance",
    "football",
    "history",
    "jazz",
    "maths",
    "ocean",
    "space",
    "trains",
    "yoga",
)
MOODS = ("calm", "easy", "fast", "funny", "grand", "loud", "odd", "short")
HISTORY = 10
"""Events of a person that are told with each impression."""
_SEGMENTS, _MAKERS, _PRICES, _COUNTRIES, _AGES = 10, 400, 5, 12, 6


class Films(NamedTuple):
    """Of each film: its cover's digit and image, topic, mood, maker, price from 0, and length in seconds; `[I]`."""

    digit_I: np.ndarray
    cover_IHWC: np.ndarray
    topic_I: np.ndarray
    mood_I: np.ndarray
    maker_I: np.ndarray
    price_I: np.ndarray
    length_I: np.ndarray


class People(NamedTuple):
    """Of each person: what they like of digits `[U, C]` and topics `[U, K]`, thrift, country, age group; `[U]`."""

    digits_UC: np.ndarray
    topics_UK: np.ndarray
    thrift_U: np.ndarray
    country_U: np.ndarray
    age_U: np.ndarray


class Impressions(NamedTuple):
    """What happened: person and film `[N]`; the events before, oldest first, `[N, H]`: film, clicked, converted,
    seconds; and what was done, `[N]`.
    """

    person_N: np.ndarray
    film_N: np.ndarray
    past_film_NH: np.ndarray
    past_clicked_NH: np.ndarray
    past_converted_NH: np.ndarray
    past_watch_NH: np.ndarray
    clicked_N: np.ndarray
    converted_N: np.ndarray
    watch_N: np.ndarray

    def __len__(self) -> int:  # type: ignore[override]  # of impressions, not of fields
        return len(self.person_N)


@dataclass(frozen=True)
class Split:
    """Films, people, and what happened between them. `known`: how many of the films, the first, are trained on."""

    films: Films
    people: People
    seen: Impressions
    known: int


@dataclass(frozen=True)
class WorldConfig:
    """How many `people` and `films` there are to train on, people who are held out, and films that only those see; each
    person is shown `impressions` films after those of the first history.
    """

    people: int = 1500
    films: int = 2000
    held_out_people: int = 300
    new_films: int = 600
    impressions: int = 20
    seed: int = 0


def make(cfg: WorldConfig) -> tuple[Split, Split]:
    """What is trained on, and what is held out: other people, more films, one law of what they do."""
    trained, others = digits.split()
    law = _Law.draw(np.random.default_rng(cfg.seed))
    shelf = _films(law, trained, cfg.films, np.random.default_rng((cfg.seed, 1)))
    new = _films(law, others, cfg.new_films, np.random.default_rng((cfg.seed, 2)))
    whole = Films(*(np.concatenate(pair) for pair in zip(shelf, new, strict=True)))
    return (
        _split(law, cfg, cfg.people, shelf, np.random.default_rng((cfg.seed, 3))),
        _split(law, cfg, cfg.held_out_people, whole, np.random.default_rng((cfg.seed, 4))),
    )


@dataclass(frozen=True)
class _Law:
    """What all of the world shares: the tastes of segments, how well digits go with topics, the makers' quality."""

    segment_digits_SC: np.ndarray
    segment_topics_SK: np.ndarray
    pairs_CK: np.ndarray
    quality_M: np.ndarray

    @staticmethod
    def draw(rng: np.random.Generator) -> "_Law":
        return _Law(
            rng.normal(0, 1.3, (_SEGMENTS, CLASSES)),
            rng.normal(0, 1.3, (_SEGMENTS, len(TOPICS))),
            rng.normal(0, 1.0, (CLASSES, len(TOPICS))),
            rng.normal(0, 1.0, _MAKERS),
        )

    def people(self, count: int, rng: np.random.Generator) -> People:
        segment_U = rng.integers(_SEGMENTS, size=count)
        return People(
            self.segment_digits_SC[segment_U] + rng.normal(0, 0.4, (count, CLASSES)),
            self.segment_topics_SK[segment_U] + rng.normal(0, 0.4, (count, len(TOPICS))),
            rng.uniform(0, 1, count),
            rng.integers(_COUNTRIES, size=count),
            rng.integers(_AGES, size=count),
        )

    def react(self, people: People, who_U: np.ndarray, films: Films, what_U: np.ndarray, past: "_Past") -> "_Done":
        """What these people do with a film each."""
        digit_U, topic_U = films.digit_I[what_U], films.topic_I[what_U]
        likes_U = people.digits_UC[who_U, digit_U] + people.topics_UK[who_U, topic_U]
        click_U = 1.1 * likes_U + 0.9 * self.pairs_CK[digit_U, topic_U] - 0.9 + past.pull(films, what_U)
        thrift_U = people.thrift_U[who_U] * films.price_I[what_U]
        convert_U = 1.2 * self.quality_M[films.maker_I[what_U]] + 0.8 * people.topics_UK[who_U, topic_U] - thrift_U
        seconds_U = films.length_I[what_U] ** 0.7 * np.exp(0.35 * people.digits_UC[who_U, digit_U])
        return _Done(click_U, convert_U, seconds_U)


class _Done(NamedTuple):
    """Log-odds of a click and of a conversion after it, and the median seconds of a watch, `[U]`."""

    click_U: np.ndarray
    convert_U: np.ndarray
    seconds_U: np.ndarray


@dataclass
class _Past:
    """The last events of each person, `[U, H]`, newest last; film -1 before the first."""

    film_UH: np.ndarray
    clicked_UH: np.ndarray
    converted_UH: np.ndarray
    watch_UH: np.ndarray

    @staticmethod
    def none(people: int) -> "_Past":
        shape = people, HISTORY
        return _Past(np.full(shape, -1), np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape))

    def pull(self, films: Films, what_U: np.ndarray) -> np.ndarray:
        """Log-odds that the last three films add: who skipped the topic is tired of it, who clicked wants more."""
        recent_UH, clicked_UH = self.film_UH[:, -3:], self.clicked_UH[:, -3:]
        same_UH = (films.topic_I[recent_UH] == films.topic_I[what_U][:, None]) & (recent_UH >= 0)
        return np.asarray((same_UH * np.where(clicked_UH, 0.8, -1.6)).sum(1))

    def add(self, film_U: np.ndarray, clicked_U: np.ndarray, converted_U: np.ndarray, watch_U: np.ndarray) -> None:
        """One more event of each person."""
        for kept_UH, new_U in (
            (self.film_UH, film_U),
            (self.clicked_UH, clicked_U),
            (self.converted_UH, converted_U),
            (self.watch_UH, watch_U),
        ):
            kept_UH[:, :-1] = kept_UH[:, 1:]
            kept_UH[:, -1] = new_U


def _films(law: _Law, hands: Digits, count: int, rng: np.random.Generator) -> Films:
    place_I = rng.integers(len(hands.labels_N), size=count)
    maker_I = np.minimum(rng.zipf(1.3, count) - 1, len(law.quality_M) - 1)
    return Films(
        hands.labels_N[place_I],
        hands.images_NHWC[place_I],
        rng.integers(len(TOPICS), size=count),
        rng.integers(len(MOODS), size=count),
        maker_I,
        rng.integers(_PRICES, size=count),
        np.exp(rng.uniform(np.log(10), np.log(300), count)),
    )


def _split(law: _Law, cfg: WorldConfig, people: int, shelf: Films, rng: np.random.Generator) -> Split:
    crowd, past, everyone_U = law.people(people, rng), _Past.none(people), np.arange(people)
    told: list[Impressions] = []
    for turn in range(HISTORY + cfg.impressions):
        what_U = _shown(shelf, past, rng)
        done = law.react(crowd, everyone_U, shelf, what_U, past)
        clicked_U = rng.uniform(size=people) < _sigmoid(done.click_U)
        converted_U = clicked_U & (rng.uniform(size=people) < _sigmoid(done.convert_U))
        watch_U = clicked_U * np.clip(done.seconds_U * np.exp(rng.normal(0, 0.3, people)), 1, 600)
        if turn >= HISTORY:  # by then each has a history
            before = (past.film_UH, past.clicked_UH, past.converted_UH, past.watch_UH)
            told.append(Impressions(everyone_U, what_U, *(x.copy() for x in before), clicked_U, converted_U, watch_U))
        past.add(what_U, clicked_U, converted_U, watch_U)
    return Split(shelf, crowd, Impressions(*(np.concatenate(x) for x in zip(*told, strict=True))), cfg.films)


def _shown(films: Films, past: _Past, rng: np.random.Generator) -> np.ndarray:
    """A film for each person: one in three has the topic of the last."""
    people, count = len(past.film_UH), len(films.topic_I)
    what_U = rng.integers(count, size=people)
    by_topic = [np.flatnonzero(films.topic_I == topic) for topic in range(len(TOPICS))]
    for person in np.flatnonzero((rng.uniform(size=people) < 1 / 3) & (past.film_UH[:, -1] >= 0)):
        alike = by_topic[films.topic_I[past.film_UH[person, -1]]]
        what_U[person] = alike[rng.integers(len(alike))]
    return what_U


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
