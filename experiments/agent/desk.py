"""A little desktop to act in: it is drawn, an action changes it, and a task is done or not.

A page has icons, each a shape of a colour in one of the cells of a grid. A task names an icon that opens a form, a word
that is typed into it, and an icon that sends it: `open red circle, type moon, send blue cross`. Wrong clicks open wrong
forms, which are drawn as right ones are; only the end tells.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID, CELL = 4, 16
SIDE = GRID * CELL
"""Pixels of a screenshot's side."""

COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 230), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "cross", "bar")
WORDS = ("moon", "tree", "lamp", "fish", "bird", "coin")
_PAPER, _FORM, _INK = (245, 245, 245), (205, 220, 235), (20, 20, 20)
ICONS = 4
"""Icons of a page, where nothing else is said."""
_FIELD = 0  # the row of a form in which the word is shown


class Icon(NamedTuple):
    """A shape of a colour, and what the task calls it."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        """Its name in a task: `red circle`."""
        return f"{self.colour} {self.shape}"


class Action(NamedTuple):
    """What is done: `kind` "click" at a `row` and `column`, "type" a `text`, or "finish"."""

    kind: str
    row: int = -1
    column: int = -1
    text: str = ""

    def __str__(self) -> str:
        if self.kind == "click":
            return f"click({self.row},{self.column})"
        return f"type({self.text})" if self.kind == "type" else "finish()"


def parse(text: str) -> Action:
    """The action of a text such as `click(1,3)`. ValueError for a text that is none.

    >>> parse("click(1,3)")
    Action(kind='click', row=1, column=3, text='')
    """
    name, opened, rest = text.strip().partition("(")
    inner, closed, behind = rest.partition(")")
    if opened and closed and not behind.strip():
        if name == "finish" and not inner:
            return Action("finish")
        if name == "type" and inner:
            return Action("type", text=inner)
        row, comma, column = inner.partition(",")
        if name == "click" and comma and row.isdecimal() and column.isdecimal():
            return Action("click", int(row), int(column))
    raise ValueError(f"{text!r} is no action: click(ROW,COLUMN), type(WORD) or finish()")


@dataclass(frozen=True)
class Task:
    """Which icon opens the form, what is typed, which icon sends it."""

    opens: Icon
    word: str
    sends: Icon

    def __str__(self) -> str:
        return f"open {self.opens.name}, type {self.word}, send {self.sends.name}"


Page = tuple[tuple[Icon, int, int], ...]
"""Icons with their rows and columns."""


@dataclass(frozen=True)
class Desk:
    """A state of the desktop: the `task`, its pages, and what was done so far."""

    task: Task
    home: Page
    form: Page
    opened: Icon | None = None
    typed: str = ""
    sent: Icon | None = None
    finished: bool = False
    done: tuple[Action, ...] = field(default=())

    @property
    def success(self) -> bool:
        """Whether the task is done, and the agent said so."""
        return self.finished and (self.opened, self.typed, self.sent) == (
            self.task.opens,
            self.task.word,
            self.task.sends,
        )

    @property
    def page(self) -> Page:
        """The icons that can be clicked on."""
        return self.home if self.opened is None else self.form

    def after(self, action: Action) -> "Desk":
        """The desktop after an action; one that hits nothing changes nothing."""
        now = replace(self, done=(*self.done, action))
        if action.kind == "finish":
            return replace(now, finished=True)
        if action.kind == "type":
            return replace(now, typed=action.text) if self.opened is not None and self.sent is None else now
        hit = next((icon for icon, row, column in self.page if (row, column) == (action.row, action.column)), None)
        if hit is None or self.sent is not None:
            return now
        return replace(now, opened=hit) if self.opened is None else replace(now, sent=hit)

    def right_action(self) -> Action:
        """What a user who knows does next."""
        if self.sent is not None:
            return Action("finish")
        if self.opened is None:
            return _click(self.page, self.task.opens)
        return _click(self.page, self.task.sends) if self.typed else Action("type", text=self.task.word)

    def screenshot(self) -> Image.Image:
        """What is seen, `SIDE` x `SIDE` pixels in colours."""
        picture = Image.new("RGB", (SIDE, SIDE), _PAPER if self.opened is None else _FORM)
        draw = ImageDraw.Draw(picture)
        if self.opened is not None:
            draw.rectangle((2, 2, SIDE - 3, CELL - 3), fill=(255, 255, 255), outline=_INK)
            draw.text((5, 2), self.typed, fill=_INK, font=ImageFont.load_default(10))
        if self.sent is not None:
            draw.text((SIDE // 2 - 12, SIDE // 2 - 6), "sent", fill=_INK, font=ImageFont.load_default(12))
            return picture
        for icon, row, column in self.page:
            _draw(draw, icon, column * CELL, row * CELL)
        return picture


def _click(page: Page, wanted: Icon) -> Action:
    return next(Action("click", row, column) for icon, row, column in page if icon == wanted)


def _draw(draw: ImageDraw.ImageDraw, icon: Icon, x: int, y: int) -> None:
    fill, low, high = COLOURS[icon.colour], 2, CELL - 3
    if icon.shape == "circle":
        draw.ellipse((x + low, y + low, x + high, y + high), fill=fill)
    elif icon.shape == "square":
        draw.rectangle((x + low, y + low, x + high, y + high), fill=fill)
    elif icon.shape == "bar":
        draw.rectangle((x + low, y + 6, x + high, y + CELL - 7), fill=fill)
    else:
        draw.line((x + low, y + low, x + high, y + high), fill=fill, width=3)
        draw.line((x + low, y + high, x + high, y + low), fill=fill, width=3)


def make(rng: np.random.Generator, *, held_out: bool, icons: int = ICONS) -> Desk:
    """A task on pages that are drawn at random, with so many icons each.

    Of the pairs of an icon that opens and one that sends, one in eight is held out, and never among those of training.
    """
    every = [Icon(colour, shape) for colour in COLOURS for shape in SHAPES]
    while True:
        opens, sends = (int(i) for i in rng.integers(len(every), size=2))
        if ((3 * opens + sends) % 8 == 0) == held_out:
            break
    home = _page(rng, every, opens, icons, rows=range(GRID))
    form = _page(rng, every, sends, icons, rows=range(_FIELD + 1, GRID))
    task = Task(every[opens], WORDS[int(rng.integers(len(WORDS)))], every[sends])
    return Desk(task, home, form)


def _page(rng: np.random.Generator, every: list[Icon], wanted: int, count: int, *, rows: range) -> Page:
    others = [i for i in rng.permutation(len(every)) if i != wanted][: count - 1]
    places = rng.permutation(len(rows) * GRID)[:count]
    return tuple(
        (every[i], rows[int(place) // GRID], int(place) % GRID)
        for i, place in zip([wanted, *others], places, strict=True)
    )
