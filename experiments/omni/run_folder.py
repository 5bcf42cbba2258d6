"""The folder of a run: `runs/<experiment>/<time>/` with its config, its metrics step by step, and its final table.

Whatever is there after a crash is whole: `config.json` and `summary.json` are renamed into place, and of
`metrics.jsonl` at most the last line is torn, which resuming drops.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

METRICS, CONFIG, SUMMARY = "metrics.jsonl", "config.json", "summary.json"


def default_path(experiment: str, *, root: Path = Path("runs"), now: datetime | None = None) -> Path:
    """`root/experiment/<time>`, the time in seconds; with `-2`, `-3`, ... behind it where another run began then."""
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
    """One run's files. Use `create` or `resume`; `path` is the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = (path / METRICS).open("a", encoding="utf-8")

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """A new run with this config; ValueError if the folder holds anything or cannot be written."""
        _check_writable(path)
        held = sorted(entry.name for entry in path.iterdir())
        if held:
            raise ValueError(
                f"run folder {path} is in use: it holds {', '.join(held[:5])}{' ...' if len(held) > 5 else ''}. "
                "Give another --out, or --resume this one; nothing was changed"
            )
        write_json(path / CONFIG, config)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, *, step: int) -> "RunFolder":
        """Go on with a run whose state is that after `step`: metrics of later steps are dropped, for they come again.

        ValueError if the folder is not a run's, or its metrics up to `step` cannot be read.
        """
        if not (path / CONFIG).is_file():
            raise ValueError(f"cannot resume: {path} is not the folder of a run (it has no {CONFIG})")
        _check_writable(path)
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        _replace(path / METRICS, "".join(_line(row) for row in kept))
        return cls(path)

    def go_back(self, step: int) -> None:
        """Drop the metrics of the steps after `step`, which are run again."""
        self._metrics.close()
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        _replace(self.path / METRICS, "".join(_line(row) for row in kept))
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one step's metrics, an object with `step`; it is in the file when this returns."""
        if not isinstance(row.get("step"), int):
            raise ValueError(f"metrics need an int `step`, got {row.get('step')!r} among {sorted(row)}")
        self._metrics.write(_line(row))
        self._metrics.flush()

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the final table, `summary.json`."""
        write_json(self.path / SUMMARY, summary)

    def close(self) -> None:
        """Close the metrics."""
        self._metrics.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """The config of the run in the folder `path`."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} is not the folder of a run (it has no {CONFIG})")
    return json.loads((path / CONFIG).read_text(encoding="utf-8"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics in the folder `path`, step by step; a torn last line is left out, any other is a ValueError."""
    file = path / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with an int `step`")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{file}, line {number}: {error}: {line.strip()[:80]!r}") from error
        rows.append(row)
    return rows


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that at every moment the file is the old one or the new one, whole."""
    _replace(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _replace(file: Path, text: str) -> None:
    """The text in a new file beside, flushed to the disk, renamed over the old one."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _check_writable(path: Path) -> None:
    """Make the folder and try to write in it; ValueError that names it if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"run folder {path} cannot be written: {error.strerror or error}; give another --out"
        ) from error
