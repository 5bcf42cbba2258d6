"""How large media may be: looked at before anything is decoded, since a small file can hold a picture of terabytes."""

from dataclasses import dataclass

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place


@dataclass(frozen=True)
class Limits:
    """The most that is decoded.

    Args:
        pixels: of a picture, or of one frame of a film.
        seconds: of a recording or a film.
        frames: that are taken of a film.
        file_bytes: of a file, or of what stands in a row.
        decoded_bytes: of the array that is made.
    """

    pixels: int = 64_000_000
    seconds: float = 3600.0
    frames: int = 2048
    file_bytes: int = 2**30
    decoded_bytes: int = 2**30

    def check(self, name: str, value: float, place: Place, what: str) -> None:
        """BadRow where `value` is more than the limit of this name."""
        most = getattr(self, name)
        if value > most:
            raise BadRow(place, "media too large", f"{what} has {value:g} {name.replace('_', ' ')}, more than {most:g}")
