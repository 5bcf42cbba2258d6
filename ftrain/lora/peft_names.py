"""Where PEFT's files hold a delta: names of tensors, and how the numbers lie.

Legend: I inputs, O outputs, E experts, r rank, V rows of a table, D its width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ftrain.lora.adapter import Adapter
from ftrain.lora.targets import Target
from ftrain.lora.trees import leaf
from ftrain.modules.hf_names import HfTensor

PREFIX = "base_model.model."
Form = Literal["linear", "embedding", "convolution", "stack"]


@dataclass(frozen=True)
class Place:
    """Where PEFT holds a delta, or that of one expert.

    - `module`: the name of the module in Hugging Face's model.
    - `target`: ours. `index`: of the expert, None for all of the target.
    - `form`: how the factors lie. "stack" is PEFT's form for parameters that hold all experts. `swapped`: a head that
      is tied to the table, whose inputs are the table's width.
    - `depth`: how many wrappers of other parameters of the same module lie around it.
    - `outputs_first`: the module's own weight is `[O, I]`, as those of linear layers.
    """

    module: str
    target: Target
    form: Form
    index: int | None = None
    depth: int = 0
    swapped: bool = False
    outputs_first: bool = True

    @property
    def parameter(self) -> str | None:
        """The parameter that is named to PEFT beside the modules; None for a module."""
        return self.target.path if self.form == "stack" else None

    def keys(self) -> dict[str, str]:
        """The names of the tensors, by what they are: "A", "B" and "magnitude"."""
        within = PREFIX + self.module + ".base_layer" * self.depth
        if self.form == "embedding":
            return {"A": f"{within}.lora_embedding_A", "B": f"{within}.lora_embedding_B"}
        if self.swapped:
            return {"A": f"{within}.lora_B.weight", "B": f"{within}.lora_A.weight"}
        found = {"A": f"{within}.lora_A.weight", "B": f"{within}.lora_B.weight"}
        return {**found, "magnitude": f"{within}.lora_magnitude_vector"}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of those tensors."""
        t, r = self.target, self.target.rank
        if self.form == "stack":
            many = t.experts or 1
            return {"A": (many * r, t.inputs), "B": (t.outputs, r * many)}
        if self.form == "convolution":
            return {"A": (r, *t.shape[1:]), "B": (t.outputs, r, *(1 for _ in t.shape[2:])), "magnitude": _norms(t)}
        if self.swapped:
            return {"A": (t.inputs, r), "B": (r, t.outputs)}
        return {"A": (r, t.inputs), "B": (t.outputs, r), "magnitude": (t.outputs,)}

    def written(self, what: str, x: Tensor) -> Tensor:
        """The factor `what`, as our tree has it, as PEFT's file has it."""
        x = x if self.index is None or what == "magnitude" else x[self.index]
        if self.form == "stack":
            return (x.mT if what == "A" else x.permute(2, 1, 0)).reshape(self.shapes()[what])
        if what == "magnitude":
            return x.reshape(self.shapes()[what])
        if self.swapped:
            return x
        return x.mT.reshape(self.shapes()[what])

    def read(self, what: str, x: Tensor) -> Tensor:
        """The inverse of `written`, for one expert where there is an `index`."""
        t = self.target
        if self.form == "stack":
            if what == "A":
                return x.reshape(t.experts or 1, t.rank, t.inputs).mT
            return x.reshape(t.outputs, t.rank, t.experts or 1).permute(2, 1, 0)
        if what == "magnitude":
            return x.flatten()
        return x if self.swapped else x.flatten(1).mT


def places(adapter: Adapter) -> list[Place]:
    """All places of an adapter, in the order of its targets. ValueError for a kernel that PEFT has no form for."""
    return [place for target in adapter.targets for place in places_of(adapter, target)]


def places_of(adapter: Adapter, target: Target) -> Iterator[Place]:
    """The places of a target: one, or one for each expert, and with a tied head that too. ValueError as in `places`."""
    own = [name for name in adapter.names if name.leaf == target.path] or [HfTensor(target.path, target.path)]
    for name in own:
        module = name.name.removesuffix(".weight")
        if target.kind == "embedding":
            yield Place(module, target, "linear" if name.copy else "embedding", swapped=name.copy)
        elif name.copy:
            continue
        elif target.kind == "convolution":
            if target.inputs_first:
                raise ValueError(f"lora: {target.path!r} is a kernel with its taps first, for which PEFT has no form")
            yield Place(module, target, "convolution")
        elif target.kind == "experts" and name.index is None:
            above, _, _ = module.rpartition(".")
            yield Place(above, target, "stack", depth=_wrappers_around(adapter, target))
        else:
            yield Place(module, target, "linear", name.index, outputs_first=target.inputs_first == name.transposed)


def _wrappers_around(adapter: Adapter, target: Target) -> int:
    """PEFT wraps the parameters of a module one around the other, in the module's order: how many lie around this."""
    above, _, own = target.path.rpartition(".")
    order = list(leaf(adapter.base, above)) if above else list(adapter.base)
    changed = {t.path.rpartition(".")[2] for t in adapter.targets if t.path.rpartition(".")[0] == above}
    return sum(name in changed for name in order[order.index(own) + 1 :])


def _norms(target: Target) -> tuple[int, ...]:
    return (1, target.outputs, *(1 for _ in target.shape[2:]))
