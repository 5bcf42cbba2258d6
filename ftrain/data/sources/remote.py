"""Files of a URL through fsspec: memory://, file://, s3://, gs://, hf://, and what else is installed."""

from dataclasses import dataclass
from typing import IO, Any

try:
    import fsspec
except ImportError as absent:
    raise ValueError('data at a URL needs fsspec: pip install "ftrain-omni[train]"') from absent


@dataclass(frozen=True)
class RemoteFile:
    """The file at a URL."""

    path: str

    @property
    def size(self) -> int:
        """Bytes. ValueError where the file cannot be read."""
        return int(self._call("size"))

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from byte `start` on. ValueError where the file cannot be read."""
        return bytes(self._call("cat_file", start=start, end=start + size)) if size else b""

    def open(self) -> IO[bytes]:
        """A handle for reading, which the caller closes. ValueError where the file cannot be read."""
        handle: IO[bytes] = self._call("open", "rb")
        return handle

    def _call(self, method: str, *arguments: Any, start: int | None = None, end: int | None = None) -> Any:
        bounds = {} if start is None else {"start": start, "end": end}
        system, path = _resolved(self.path)
        try:
            return getattr(system, method)(path, *arguments, **bounds)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from error


def _resolved(url: str) -> tuple[Any, str]:
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error
    return system, path


def is_folder(url: str) -> bool:
    """Whether a URL names a folder. ValueError where fsspec does not know its kind."""
    system, path = _resolved(url)
    return bool(system.isdir(path))


def matching(url: str) -> list[str]:
    """The URLs of the files that a glob matches, sorted. ValueError where fsspec does not know its kind."""
    system, path = _resolved(url)
    return sorted(system.unstrip_protocol(found) for found in system.glob(path) if system.isfile(found))


def inside(url: str) -> dict[str, str]:
    """All files in a folder, sorted: their URLs, and their names within it.

    ValueError where fsspec does not know its kind.
    """
    system, path = _resolved(url)
    found = sorted(system.find(path))
    return {system.unstrip_protocol(file): file[len(path.rstrip("/")) :].lstrip("/") for file in found}
