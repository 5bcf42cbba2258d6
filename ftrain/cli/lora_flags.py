"""The options of an adapter, as `ftrain train` and `ftrain plan` take them."""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class LoraFlags:
    """An adapter of low rank, which is trained in the place of the model's parameters."""

    rank: int = 0
    """0: no adapter, all parameters are trained."""
    alpha: float | None = None
    """Deltas are scaled by alpha / rank; default: twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Which parameters: all-linear, last parts of names (q_proj), or globs over paths."""
    dropout: float = 0.0
    """Share of a layer's input that its delta does not see."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Directions and magnitudes apart."""
    pissa: bool = False
    """Begin with the largest singular directions of the weights, which the frozen model gives up; the adapter that is
    written has twice the rank, upon the model as it is in its folder."""
    plus: float = 1.0
    """LoRA+: how much faster the factors next to outputs learn than those next to inputs."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """How the matrices of the model below are kept, which are not trained."""

    def require_sense(self) -> None:
        """ValueError for a negative rank, and for options of an adapter without one."""
        if self.rank < 0:
            raise ValueError(f"--lora.rank {self.rank} must be at least 0")
        given = [f.name for f in fields(self) if f.name != "rank" and getattr(self, f.name) != f.default]
        if given and not self.rank:
            raise ValueError(f"--lora.{given[0]} is of an adapter, and --lora.rank is 0: give a rank, such as 16")
