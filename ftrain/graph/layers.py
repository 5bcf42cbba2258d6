"""Which parameters are of which layer: lists of subtrees that are alike, whatever their name is.

`layers.3.attention.w`, `transformer.h.3.attn.weight` and `blocks.3.0.bias` are of members of lists. Recompute by layer
keeps what a layer hands to others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ftrain.graph.loop import is_loop, loop_body

USUAL = frozenset({"layers", "layer", "h", "blocks", "block", "transformer_blocks", "resblocks", "decoder_layers"})
"""What lists of layers are usually called; one of these is preferred where lists lie within lists."""

_FEW = 3  # a list of so few, not called as usual, may be a pair of models rather than a stack of layers

_Leaf = tuple[str, Any]
"""A leaf within a member of a list: its path there, and what it is compared by."""


def layers_of(leaves: Mapping[str, Any]) -> dict[str, str]:
    """For each leaf of a member of a list of layers its layer, the path up to the member; other leaves are left out.

    `leaves`: path -> something comparable, such as shape and dtype. A list counts if it is called `layers`, or if two
    of its members have leaves of the same names and the same values here.

    >>> from ftrain.graph.layers import layers_of
    >>> layers_of({"h.0.attn.w": "f32[4]", "h.1.attn.w": "f32[4]", "embed.w": "f32[9]"})
    {'h.0.attn.w': 'h.0', 'h.1.attn.w': 'h.1'}
    """
    lists: dict[str, dict[str, set[_Leaf]]] = {}
    for path, value in leaves.items():
        for at, member, inside in _members(path):
            lists.setdefault(at, {}).setdefault(member, set()).add((inside, value))
    alike = {at: members for at, members in lists.items() if _name(at) == "layers" or _two_alike(members)}
    found = {path: _choose([(at, m) for at, m, _ in _members(path) if at in alike], alike) for path in leaves}
    return {path: layer for path, layer in found.items() if layer}


def _members(path: str) -> list[tuple[str, str, str]]:
    """Each place of a path at which a member of a list stands: the list's path, the member, what is inside of it."""
    parts = path.split(".")
    return [
        (".".join(parts[:i]), part, ".".join(parts[i + 1 :]))
        for i, part in enumerate(parts)
        if part.isdigit() and i and i + 1 < len(parts)
    ]


def _name(at: str) -> str:
    return at.rsplit(".", 1)[-1]


def _two_alike(members: Mapping[str, set[_Leaf]]) -> bool:
    kinds = [frozenset(leaves) for leaves in members.values()]
    return len(set(kinds)) < len(kinds)


def _choose(places: Sequence[tuple[str, str]], lists: Mapping[str, Mapping[str, set[_Leaf]]]) -> str:
    """Of lists within lists: the innermost with a usual name, else the outermost of more than a few, else the first."""
    usual = [p for p in places if _name(p[0]) in USUAL][-1:]
    many = [p for p in places if len(lists[p[0]]) >= _FEW][:1]
    return next((f"{at}.{member}" for at, member in [*usual, *many, *places]), "")


def mark_layers(module: fx.GraphModule, leaves: Mapping[str, Any]) -> None:
    """Note on each node, as `meta["layer"]`, the layer of the parameter that it is about; bodies of loops alike.

    `leaves`: as in `layers_of`; the parameter is `meta["path"]`.
    """
    _mark(module, layers_of(leaves))


def _mark(module: fx.GraphModule, layers: Mapping[str, str]) -> None:
    for node in module.graph.nodes:
        node.meta["layer"] = layers.get(node.meta.get("path") or "", "")
        if is_loop(node):
            _mark(loop_body(node), layers)


def layer_of_node(node: fx.Node) -> str:
    """The path of the member of a list of layers that a node belongs to; empty for none."""
    return node.meta.get("layer", "")


def has_layers(module: fx.GraphModule) -> bool:
    """True if a node of the forward pass belongs to a layer."""
    return any(
        (node.meta.get("phase") == "forward" and layer_of_node(node)) or (is_loop(node) and has_layers(loop_body(node)))
        for node in module.graph.nodes
    )
