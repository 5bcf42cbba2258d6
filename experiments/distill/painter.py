"""The model: a diffusion transformer over the rows of films, which reads two words.

Legend: B films, N rows, P numbers in a row, W words of a film, C width of a word, A = 3 axes of places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.distill.films import NOTHING, PATCH, WORDS, Film
from ftrain.modules import dit, dit_chunks
from ftrain.modules.dit import DitConfig
from ftrain.modules.dit_chunks import Cache, chunks_of, equal_documents, joined_chunks
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.modules.velocity import Velocity
from ftrain.tasks.distill.rollout import Chunk

_D_WORD, _D_PLACE = 32, 16


@dataclass(frozen=True)
class Painter:
    """A model of films. `width`, `layers`: of the transformer."""

    film: Film
    width: int = 64
    layers: int = 4

    @property
    def cfg(self) -> DitConfig:
        """The transformer. Rotations tell it how far apart rows are, and a table where in a film a row is: its numbers
        stand beside those of the row, and what comes out in their place is left.
        """
        return DitConfig(
            d_in=PATCH * PATCH + _D_PLACE, d_model=self.width, layers=self.layers, heads=4, d_hidden=3 * self.width,
            d_text=_D_WORD, time_features=64,
        )  # fmt: skip

    @property
    def specs(self) -> dict[str, Any]:
        """`words` and `places`, tables, and `dit`."""
        return {
            "places": ParamSpec((self.film.rows, _D_PLACE), (None, None), Normal(1.0)),
            "words": ParamSpec((len(WORDS), _D_WORD), ("vocab", "embed"), Normal(1.0)),
            "dit": dit.specs(self.cfg),
        }

    def ids(self, films: int) -> Tensor:
        """The film of each row, int64 `[N]`."""
        return torch.arange(films).repeat_interleave(self.film.rows)

    def velocity(self, params: Any, words_BW: Tensor) -> Velocity:
        """The field of the films that the words tell."""
        B, W = words_BW.shape
        positions_AN = self.film.positions(B)

        def field(x_NP: Tensor, time_N: Tensor) -> Tensor:
            placed_NP = torch.cat([x_NP, params["places"].repeat(B, 1)], 1)
            velocity_NP = dit.apply(
                params["dit"], placed_NP, time_N=time_N, positions_AN=positions_AN,
                segments_N=equal_documents(B, self.film.rows), cfg=self.cfg,
                text_SC=torch.nn.functional.embedding(words_BW.flatten(), params["words"]),
                text_segments_S=equal_documents(B, W),
            )  # fmt: skip
            return velocity_NP[:, : PATCH * PATCH]

        return field

    def guided(self, params: Any, words_BW: Tensor, scale: float) -> Velocity:
        """The field with guidance: both sides of it in one pass, which counts as two calls."""
        both = self.velocity(params, torch.cat([words_BW, torch.full_like(words_BW, NOTHING)]))

        def field(x_NP: Tensor, time_N: Tensor) -> Tensor:
            told, untold = both(torch.cat([x_NP, x_NP]), torch.cat([time_N, time_N])).chunk(2)
            return untold + scale * (told - untold)

        return field

    def chunk(self, params: Any, words_BW: Tensor) -> Chunk:
        """The causal field, of which a chunk is a frame."""
        B = len(words_BW)
        places = chunks_of(self.film.positions(B).T, samples=B, chunks=self.film.video.frames)
        text_SC = torch.nn.functional.embedding(words_BW.flatten(), params["words"])

        def field(cache: Cache, x_nP: Tensor, time_n: Tensor, number: int) -> tuple[Tensor, Cache]:
            own = params["places"].unflatten(0, (self.film.video.frames, -1))[number]
            velocity_nP, cache = dit_chunks.apply(
                params["dit"], torch.cat([x_nP, own.repeat(B, 1)], 1), cache, samples=B, time_n=time_n,
                positions_An=places[number].T, cfg=self.cfg, text_SC=text_SC,
            )  # fmt: skip
            return velocity_nP[:, : PATCH * PATCH], cache

        return field

    def frames(self, rows_NP: Tensor) -> Sequence[Tensor]:
        """The rows of each frame, of all films."""
        return chunks_of(rows_NP, samples=len(rows_NP) // self.film.rows, chunks=self.film.video.frames)

    def joined(self, frames: Sequence[Tensor]) -> Tensor:
        """Films of frames' rows, `[N, P]`."""
        return joined_chunks(frames, samples=len(frames[0]) // self.film.squares)
