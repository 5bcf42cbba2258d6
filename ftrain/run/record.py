"""What a run's folder tells afterwards: what it trained, how its numbers went, what it left out, where it ended."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ftrain import checkpoint
from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES, anything, check, mapped, parse
from ftrain.graph.text import show_bytes
from ftrain.run.folder import SUMMARY, read_config, read_metrics

_LAST = 10  # steps over which the loss at the end is a mean
Fact = tuple[str, str]


@dataclass(frozen=True)
class Record:
    """A run as its folder has it.

    - `config`: its options. `summary`: what it wrote at its end; empty where it was killed, or goes on.
    - `steps`: the rows of its steps. `held_out`: pairs of a step and the loss there. `saved`: steps with a checkpoint.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    held_out: Sequence[tuple[int, float]]
    saved: Sequence[int]

    def series(self, *names: str) -> dict[str, list[tuple[float, float]]]:
        """Numbers of the steps by name, as pairs of a step and a number; names that no step has are left out."""
        found = {
            name: [(float(row["step"]), float(row[name])) for row in self.steps if _is_number(row.get(name))]
            for name in names
        }
        return {name: points for name, points in found.items() if points}

    @property
    def terms(self) -> list[str]:
        """The names of the numbers beside the loss that a task gives, such as "loss/margin"."""
        return sorted({name for row in self.steps for name in row if name.startswith("loss/")})

    def facts(self) -> list[Fact]:
        """What there is to tell, as pairs of a name and a sentence."""
        return [
            ("trained", self._trained()),
            ("data", self._data()),
            ("ended", self._ended()),
            *([("loss", self._loss())] if self.steps else []),
            *([("held-out loss", _held_out(self.held_out))] if self.held_out else []),
            *([("speed", self._speed())] if self.series("tokens_per_s") else []),
            ("left out", self._rejected()),
            *self._skipped(),
            ("memory", self._memory()),
            ("checkpoints", ", ".join(map(str, self.saved)) or "none"),
            ("folders", ", ".join(self._folders()) or "none written yet"),
        ]

    def _trained(self) -> str:
        if "trained" in self.summary:
            return str(self.summary["trained"])
        return str(self.config.get("model", self.path.parent.name))

    def _data(self) -> str:
        told = self.summary.get("data") or self.config.get("data") or "not told"
        return "; ".join(map(str, told)) if isinstance(told, list) else str(told)

    def _ended(self) -> str:
        last = max((row["step"] for row in self.steps), default=0)
        if "ended" in self.summary:
            return str(self.summary["ended"])
        return f"it goes on, or was killed: its last step is {last}"

    def _loss(self) -> str:
        losses = [value for _, value in self.series("loss").get("loss", [])]
        finite = [value for value in losses if math.isfinite(value)]
        if not finite:
            return f"not finite in all {len(losses)} steps"
        tail = finite[-_LAST:]
        return f"{finite[0]:.4f} at first, {sum(tail) / len(tail):.4f} over the last {len(tail)} of {len(losses)} steps"

    def _speed(self) -> str:
        rates = [rate for _, rate in self.series("tokens_per_s")["tokens_per_s"]]
        filled = [share for _, share in self.series("filled").get("filled", [])]
        full = f"; packs are filled to {sum(filled) / len(filled):.1%}" if filled else ""
        return f"{median(rates):,.0f} tokens/s in the middle{full}"

    def _rejected(self) -> str:
        count = max((row.get("rejected", 0) for row in self.steps), default=0)
        kinds = self.summary.get("rejected") or []
        return f"{count:,} rows" + (f": {'; '.join(map(str, kinds))}" if kinds else "")

    def _skipped(self) -> list[Fact]:
        skipped = sum(not math.isfinite(value) for _, value in self.series("grad_norm").get("grad_norm", []))
        bad = self.summary.get("bad") or []
        told = [f"{skipped} steps with gradients that are not finite, which changed nothing"] if skipped else []
        told += [str(line) for line in bad]
        return [("bad steps", "; ".join(told))] if told else []

    def _memory(self) -> str:
        peaks = [value for _, value in self.series("peak_bytes").get("peak_bytes", [])]
        return f"{show_bytes(int(max(peaks)))} of a rank at the peak of a step" if peaks else "not noted"

    def _folders(self) -> list[str]:
        return [name for name in ("model", "adapter", "ema") if (self.path / name).is_dir()]


def read_record(path: Path) -> Record:
    """The record of the run in a folder. ValueError for a folder that is no run's, or whose files cannot be read."""
    config, rows = read_config(path), read_metrics(path)
    held_out = [(row["step"], float(row["held_out"])) for row in rows if _is_number(row.get("held_out"))]
    saved = checkpoint.steps(path / "checkpoints") if (path / "checkpoints").is_dir() else []
    return Record(path, config, _summary(path), [row for row in rows if "loss" in row], held_out, saved)


def _summary(path: Path) -> Mapping[str, Any]:
    try:
        with Folder(path) as folder:
            found = parse(folder.read(SUMMARY, limit=JSON_BYTES), str(path / SUMMARY))
    except FileNotFoundError:
        return {}
    return check(found, mapped(anything), str(path / SUMMARY))


def _held_out(found: Sequence[tuple[int, float]]) -> str:
    best = min(found, key=lambda pair: pair[1])
    return (
        f"{found[0][1]:.4f} at step {found[0][0]}, {found[-1][1]:.4f} at step {found[-1][0]}; least {best[1]:.4f} "
        + (f"at step {best[0]}")
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
