"""What the ranks of one save tell each other."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ftrain.checkpoint.errors import SaveFailed
from ftrain.checkpoint.manifest import Scalar
from ftrain.checkpoint.store import FileRecord


@dataclass(frozen=True)
class Report:
    """What a rank tells the others: that it failed (`error`), the `folder` it made, the `files` it wrote, a digest of
    its `leaves`, its `scalars`, the `sums` of the chunks it wrote by leaf and place.
    """

    error: str | None = None
    folder: str = ""
    files: Mapping[str, FileRecord] | None = None
    leaves: str = ""
    scalars: Mapping[str, Scalar] | None = None
    sums: Mapping[str, Mapping[int, int]] | None = None

    def text(self) -> str:
        """As it is sent."""
        return json.dumps(asdict(self))

    @staticmethod
    def of(error: BaseException) -> "Report":
        """That this failed."""
        return Report(words(error))

    @staticmethod
    def parse(text: str) -> "Report":
        """From what was sent."""
        body = json.loads(text)
        files = {name: FileRecord(**record) for name, record in (body.pop("files") or {}).items()}
        sums = {path: {int(at): n for at, n in known.items()} for path, known in (body.pop("sums") or {}).items()}
        return Report(**body, files=files, sums=sums)


def words(error: BaseException) -> str:
    """An error for the other ranks."""
    return f"{type(error).__name__}: {error}" if not isinstance(error, SaveFailed) else str(error)
