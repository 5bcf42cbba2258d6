"""The two pictures of a run: `curves.png`, how it learned, and `samples.png`, what it answers, for a person to judge.

Legend: H rows, W columns, C channels, S frames (of a wave: samples), F mel frames, M mel bands.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from experiments.omni import font
from experiments.omni.digits import CLASSES
from experiments.omni.language import LANGUAGES
from experiments.omni.listener import word_number
from experiments.omni.tasks import Example

_NEIGHBOURS = 10  # steps on either side of one, over which curves are averaged
_CELL = (2.2, 2.2)  # inches
_HEAD = 0.4  # inches, of the line over all samples
_TITLED = ("drawn", "spoken", "real")
_LINE = 34  # letters
_SMALL, _TINY = 8, 6  # points, of a short answer and of one of several lines


@dataclass(frozen=True)
class Answer:
    """What the model answered to an example: words; an image `[H, W, C]`, with the digit that the judge saw in it; or a
    sound, as mel frames `[F, M]` and as the wave `[S]` in which the listener heard a word (`listener.word_number`).
    """

    example: Example
    words: str = ""
    image_HWC: np.ndarray | None = None
    mel_FM: np.ndarray | None = None
    wave_S: np.ndarray | None = None
    recognised: int = -1

    @property
    def right(self) -> bool:
        """Whether all words are right, or the drawing or sound was recognised as what was asked for."""
        if self.image_HWC is not None:
            return self.recognised == self.example.digit
        if self.mel_FM is not None:
            return self.recognised == word_number(self.example.spoken, self.example.digit)
        return self.words == " ".join(self.example.answer)

    @property
    def told(self) -> str:
        """What the model answered, and if that is wrong the truth, for people."""
        if self.image_HWC is not None:
            said, truth = f"looks like {self.recognised}", str(self.example.digit)
        elif self.mel_FM is not None:
            said = f"sounds like {_spoken(*divmod(self.recognised, CLASSES))}"
            truth = _spoken(self.example.spoken, self.example.digit)
        else:
            said, truth = self.words or "(nothing)", " ".join(self.example.answer)
        return said if self.right else f"{said}, truth: {truth}"


def _spoken(language: int, digit: int) -> str:
    return f"{LANGUAGES[language].tag} {LANGUAGES[language].numbers[digit]}"


def curves(rows: Sequence[Mapping[str, Any]], file: Path, *, title: str) -> None:
    """Losses, learning rate and tokens a second over the steps, from the rows of metrics.jsonl, as a PNG.

    Thin lines are the values of single steps, thick ones their average; the learning rate is as it was.
    """
    if not rows:
        raise ValueError("there are no metrics to draw")
    figure = Figure(figsize=(9, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1, 1))
    losses = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith("loss")]
    for name in losses:
        _line(top, rows, name, label="total" if name == "loss" else name.removeprefix("loss/"))
    if any(_series(rows, name)[1].min(initial=1.0) > 0 for name in losses):
        top.set_yscale("log")
    top.set_ylabel("loss")
    figure.suptitle(title)
    if losses:
        top.legend(ncols=2, title="thin: each step; thick: average of 21 around it", title_fontsize="small")
    middle.plot(*_series(rows, "lr"), linewidth=1.6)
    middle.set_ylabel("learning rate")
    _line(bottom, rows, "tokens_per_s")
    bottom.set_ylabel("tokens/s")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    _save(figure, file)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it is there and finite."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None and np.isfinite(row[name])]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, label: str | None = None) -> None:
    """A metric as it was, and over it the average of 21 steps around each."""
    steps, values = _series(rows, name)
    (line,) = axes.plot(steps, smoothed(values), label=label, linewidth=1.6)
    axes.plot(steps, values, color=line.get_color(), alpha=0.45, linewidth=0.7, zorder=1)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The average of each value with its ten neighbours on either side, or with those that it has."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, end = np.maximum(at - _NEIGHBOURS, 0), np.minimum(at + _NEIGHBOURS + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def samples(
    answers: Mapping[str, Sequence[Answer]], reals: Mapping[int, np.ndarray], file: Path, *, title: str
) -> None:
    """A grid as a PNG, one row of examples for each task: what was shown and asked, the answer and the truth.

    Drawings stand beside a real image of the digit, from `reals` (digit to `[H, W, C]`), sounds beside a real one of
    the word. Right answers are green. ValueError where the font of Chinese words is not installed.
    """
    if not answers or not all(answers.values()):
        counts = {task: len(row) for task, row in answers.items()}
        raise ValueError(f"samples need at least one answer for each task, got {counts or 'no task'}")
    columns = max(len(row) for row in answers.values())
    height = _CELL[1] * len(answers)
    picture = Figure(figsize=(_CELL[0] * columns, height + _HEAD))
    head, figure = picture.subfigures(2, 1, height_ratios=(_HEAD, height))
    told = f"{title}\ngreen: right; red: wrong"
    head.text(0.5, 0.5, told, ha="center", va="center", size=8)
    for down, (task, row) in enumerate(answers.items()):
        for across, answer in enumerate(row):
            _cell(figure, answer, reals, (across / columns, 1 - (down + 1) / len(answers)), (columns, len(answers)))
        heading = task.replace("_to_", " → ").replace("_", " ")
        figure.text(0.5, 1 - (down + 0.02) / len(answers), heading, ha="center", va="top", weight="bold", size=10)
    _save(picture, file)


def _cell(
    figure: FigureBase,
    answer: Answer,
    reals: Mapping[int, np.ndarray],
    corner: tuple[float, float],
    parts: tuple[int, int],
) -> None:
    """One example: prompt, its media side by side, answer and truth; `corner` is the lower left, of 1/`parts` size."""
    panels = [(kind, value) for kind, value in answer.example.shown if isinstance(value, np.ndarray)]
    if answer.image_HWC is not None:
        panels += [("drawn", answer.image_HWC), ("real", reals[answer.example.digit])]
    if answer.mel_FM is not None:
        panels += [("spoken", answer.mel_FM), ("real", answer.example.document[-1].array)]  # type: ignore[union-attr]

    def place(x: float, y: float) -> tuple[float, float]:
        return corner[0] + x / parts[0], corner[1] + y / parts[1]

    for number, (kind, value) in enumerate(panels):
        width = 0.9 / len(panels)
        size = (width * 0.9 / parts[0], _height(kind) / parts[1])
        _panel(figure.add_axes((*place(0.06 + number * width, 0.16), *size)), kind, value)
    asked = (value if isinstance(value, str) else f"<{kind}>" for kind, value in answer.example.shown)
    figure.text(*place(0.5, 0.83), " ".join(asked), ha="center", va="center", fontproperties=font.of_size(7))
    text, color = textwrap.fill(answer.told, _LINE, max_lines=4, placeholder=" …"), "green" if answer.right else "red"
    letters = font.of_size(_TINY if "\n" in text else _SMALL)
    figure.text(*place(0.5, 0.08), text, ha="center", va="center", fontproperties=letters, color=color)


def _height(kind: str) -> float:
    """Of a panel, whose title, if it has one, lies over it."""
    return 0.5 if kind in _TITLED else 0.58


def _panel(axes: Axes, kind: str, value: np.ndarray) -> None:
    """An image, a video's frames side by side, or a spectrogram."""
    axes.set_xticks([])
    axes.set_yticks([])
    if kind in _TITLED:
        axes.set_title(kind, fontsize=7)
    if value.ndim == 2:
        axes.imshow(value.T, origin="lower", aspect="auto", cmap="magma")
        return
    if kind == "video":
        value = np.concatenate([np.pad(frame, ((0, 0), (0, 1), (0, 0)), constant_values=1) for frame in value], axis=1)
    axes.imshow(value[..., 0], cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure).print_figure(file, dpi=110, format="png")
