"""The folder of a run: `runs/<experiment>/<time>/` with its config, its metrics step by step, and its final table.

After a crash every file is whole: `config.json` and `summary.json` are renamed into place, and of `metrics.jsonl` at
most the last line is torn, which resuming drops. One process writes: it holds a lock from before its first write to its
end.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ftrain.checkpoint.durable import is_leftover, write_text
from ftrain.checkpoint.lock import NAME as LOCK
from ftrain.checkpoint.lock import WriterLock
from ftrain.files.beneath import Folder
from ftrain.files.outside import JSON_BYTES, anything, check, mapped, parse, record, whole
from ftrain.run.row_log import RowLog

METRICS, CONFIG, SUMMARY = "metrics.jsonl", "config.json", "summary.json"
_METRICS_BYTES = 2**31
_ROW = record({"step": whole()}, others=True)
_log = logging.getLogger("ftrain.run")


def default_path(experiment: str, *, root: Path = Path("runs"), now: datetime | None = None) -> Path:
    """`root/experiment/<time>`, the time in seconds; with `-2`, `-3`, ... appended where another run has this path."""
    name = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    path, number = root / experiment / name, 1
    while path.exists():
        number += 1
        path = root / experiment / f"{name}-{number}"
    return path


def latest(experiment: str, *, root: Path = Path("runs")) -> Path | None:
    """The run of this experiment that began last, of those with a config; None if there is none."""
    runs = sorted(path.parent for path in (root / experiment).glob(f"*/{CONFIG}"))
    return runs[-1] if runs else None


class RunFolder:
    """One run's files, and the right to write them, which no second process has. Use `create` or `resume`.

    `path`: the folder.
    """

    def __init__(self, path: Path, lock: WriterLock) -> None:
        self.path = path
        self._lock = lock
        self._metrics = RowLog(path / METRICS)

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """A new run with this config. ValueError if the folder holds anything, is in use, or cannot be written."""
        require_empty(path)
        lock = _locked(path)
        try:
            require_empty(path)  # another process may have been here before the lock
            write_json(path / CONFIG, config)
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: Path, *, step: int) -> "RunFolder":
        """Continue a run whose state is that after `step`. Metrics of later steps are dropped, since these steps run
        again; missing rows of earlier steps are logged as a warning.

        ValueError if the folder is not a run's, another process writes it, or its metrics up to `step` cannot be read.
        """
        if not (path / CONFIG).is_file():
            raise ValueError(f"cannot resume: {path} is not the folder of a run (it has no {CONFIG})")
        lock = _locked(path)
        try:
            kept = _drop_after(path, step)
            missing = sorted(set(range(1, step + 1)) - {row["step"] for row in kept})
            if missing:
                _log.warning(
                    "%s lacks %d of the steps up to %d (%s): they were trained, and their numbers are lost",
                    path / METRICS,
                    len(missing),
                    step,
                    f"{missing[0]} to {missing[-1]}",
                )
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    def configure(self, config: Mapping[str, Any]) -> None:
        """Replace the run's config, e.g. when the run is extended."""
        write_json(self.path / CONFIG, config)

    def go_back(self, step: int) -> None:
        """Drop the metrics of the steps after `step`, which run again. ValueError if the metrics cannot be read."""
        self._metrics.close()
        _drop_after(self.path, step)
        self._metrics = RowLog(self.path / METRICS)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one step's metrics, a JSON object with an int `step`. The row is in the file when this returns, or
        waits in memory until the disk takes it.

        ValueError for a row without an int `step`.
        """
        if not isinstance(row.get("step"), int):
            raise ValueError(f"metrics need an int `step`, got {row.get('step')!r} among {sorted(row)}")
        self._metrics.append(_line(row))

    def sync(self) -> None:
        """Flush the metrics to the disk: before a checkpoint of a later step."""
        self._metrics.sync()

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the final table, `summary.json`."""
        write_json(self.path / SUMMARY, summary)

    def close(self) -> None:
        """Close the metrics, and release the lock."""
        self._metrics.close()
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """The config of the run in the folder `path`. ValueError if there is none, or if it is no JSON object."""
    try:
        with Folder(path) as folder:
            config = parse(folder.read(CONFIG, limit=JSON_BYTES), str(path / CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not the folder of a run (it has no {CONFIG})") from None
    return check(config, mapped(anything), str(path / CONFIG))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics in the folder `path`, step by step. A torn last line is left out; any other malformed line is a
    ValueError.
    """
    return [row for row, _ in _rows(path)]


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that at every moment the file is the old one or the new one, whole. OSError where it cannot be
    written.
    """
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _rows(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The metrics, each with the offset at which its line ends."""
    file = path / METRICS
    try:
        with Folder(path) as folder:
            lines = folder.read(METRICS, limit=_METRICS_BYTES).splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows, end = [], 0
    for number, line in enumerate(lines, start=1):
        end += len(line)
        try:
            row = check(parse(line, f"{file}, line {number}"), _ROW, f"{file}, line {number}")
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(f"{error}: {line.decode(errors='replace').strip()[:80]!r}") from error
        rows.append((row, end))
    return rows


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows of later steps and a torn last line; returns the others. Needs no space where rows are in order, as
    a run writes them.
    """
    rows = _rows(path)
    kept = [(row, end) for row, end in rows if row["step"] <= step]
    file = path / METRICS
    if kept != rows[: len(kept)]:
        write_text(file, "".join(_line(row) for row, _ in kept))
    elif file.exists():
        os.truncate(file, kept[-1][1] if kept else 0)
    return [row for row, _ in kept]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def require_empty(path: Path) -> None:
    """ValueError for a folder that holds anything but what a run that never began has left."""
    entries = path.iterdir() if path.is_dir() else ()
    held = sorted(entry.name for entry in entries if entry.name != LOCK and not is_leftover(entry))
    if held:
        raise ValueError(
            f"run folder {path} is in use: it holds {', '.join(held[:5])}{' ...' if len(held) > 5 else ''}. "
            "Give another --out, or --resume this one; nothing was changed"
        )


def _locked(path: Path) -> WriterLock:
    """Make the folder and take its lock before anything in it is touched. ValueError names the folder if that fails, or
    if another process has the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return WriterLock(path)
    except OSError as error:
        raise ValueError(
            f"run folder {path} cannot be written: {error.strerror or error}; give another --out"
        ) from error
