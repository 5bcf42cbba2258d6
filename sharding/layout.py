"""Layouts: how one component of a model uses the axes of the mesh."""

from dataclasses import dataclass, fields

from ftrain.sharding.mesh import BASE_AXES


@dataclass(frozen=True)
class Ulysses:
    """Sequence parallelism by heads: tokens are exchanged for heads around attention (Jacobs et al., arXiv 2309.14509).

    Query heads must divide by the ranks; key/value heads need not.
    """


@dataclass(frozen=True)
class Ring:
    """Sequence parallelism by blocks: keys and values go around the ranks (Liu et al., arXiv 2310.01889).

    `zigzag`: rank i of n holds chunks i and 2n - 1 - i of a pack, so that causal attention is as much work everywhere
    (Llama 3, arXiv 2407.21783).
    """

    zigzag: bool = True


@dataclass(frozen=True)
class Hybrid:
    """Ulysses within `ulysses` neighbours, a ring across them: for more ranks than heads (Fang and Zhao, arXiv
    2405.07719).

    `ulysses` divides the mesh's `sequence`. `zigzag`: as in `Ring`.
    """

    ulysses: int
    zigzag: bool = True


@dataclass(frozen=True)
class Dropless:
    """Every token reaches all its experts; the sizes of the exchange are read by the host, once per layer."""


@dataclass(frozen=True)
class CapacityFactor:
    """Each rank sends an expert at most `factor` times its fair share of slots; the rest is dropped.

    All sizes are static, so the host never waits (GShard, Lepikhin et al., arXiv 2006.16668). ValueError for a factor
    that is not above 0.
    """

    factor: float = 1.25

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"CapacityFactor(factor={self.factor}) must be above 0")


@dataclass(frozen=True)
class Layout:
    """How one component of a model uses the axes of the mesh.

    - `parameters`: the axes over which its parameters are divided and gathered for use (FSDP): ("shard", "sequence"),
      ("shard",), ("sequence",), or () for a copy on every rank.
    - `sequence`: how its attention sees the whole pack where the sequence axis divides it: `Ulysses()`, `Ring()` or
      `Hybrid(n)`; None: each rank holds whole documents of this component (encoders of media).
    - `experts`: how tokens reach experts on other ranks: `Dropless()` or `CapacityFactor(f)`; None: experts are not
      divided.
    - `expert_chunks`: parts in which tokens are sent, so that one part's exchange hides behind another's computation.
    - `dtype`: name of the dtype of the stored parameters, in the place of the specs' own ("bfloat16" for a frozen
      teacher).

    ValueError for axes that do not divide parameters or come in another order, and for values of another kind.

    >>> from ftrain import Layout
    >>> from ftrain.sharding import CapacityFactor, Ring
    >>> Layout(("shard",), sequence=Ring(), experts=CapacityFactor(2.0)).experts.factor
    2.0
    >>> Layout(parameters=("replicate",))
    Traceback (most recent call last):
    ValueError: Layout(parameters=('replicate',)): 'replicate' is not an axis that divides parameters; ...
    """

    parameters: tuple[str, ...] = ("shard", "sequence")
    sequence: Ulysses | Ring | Hybrid | None = Ulysses()
    experts: Dropless | CapacityFactor | None = Dropless()
    expert_chunks: int = 1
    dtype: str | None = None

    def __post_init__(self) -> None:
        known = BASE_AXES[1:]
        for axis in self.parameters:
            if axis not in known:
                raise ValueError(
                    f"Layout(parameters={self.parameters}): {axis!r} is not an axis that divides parameters; those are "
                    f"{', '.join(known)} (copies along 'replicate' are made by the mesh)"
                )
        if tuple(a for a in known if a in self.parameters) != tuple(self.parameters):
            raise ValueError(f"Layout(parameters={self.parameters}): name each axis once, in the order {known}")
        if self.expert_chunks < 1:
            raise ValueError(f"Layout(expert_chunks={self.expert_chunks}) must be at least 1")
        for name, kinds in (("sequence", (Ulysses, Ring, Hybrid)), ("experts", (Dropless, CapacityFactor))):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                words = ", ".join(f"{k.__name__}({', '.join(f.name for f in fields(k))})" for k in kinds)
                raise ValueError(f"Layout({name}={value!r}) must be None or one of {words}")
