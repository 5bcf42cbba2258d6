"""Recompute: what the backward pass computes a second time instead of keeping it from the forward pass."""

import functools
import operator
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.graph.layers import has_layers, layer_of_node
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.op_effects import is_pure
from ftrain.graph.torch_memory import storage_id
from ftrain.graph.torch_private import value_of
from ftrain.graph.torch_sizes import free_sizes
from ftrain.sharding.paths import Rules


@dataclass(frozen=True)
class Remat:
    """What the backward recomputes, fetches from the host or gathers a second time.

    - `policy`: "none" keeps every tensor that the backward reads. "layer" keeps, of each member of a list of layers
      (subtrees of parameters that are alike, whatever the list's name; see `ftrain.graph.layers`), only what it hands
      to others. "all" does so outside of layers too.
    - `budget`: the most bytes that the step may hold at once, its arguments included: a number, "60GiB", "70%" of the
      device's memory, or "fit" (what is free now). What frees most bytes per microsecond of recompute is recomputed
      first, and no more than needed (see `remat.planner`). Replaces a policy.
    - `us_per_mb`: recompute all that costs fewer microseconds per MB freed than this. Replaces a budget.
    - `gathered`: on a mesh, whether parameters are gathered "again" for the backward (ZeRO stage 3), or the whole ones
      of the forward are kept ("keep"). None is "again" under a policy, and under a budget whichever pays.
    - `offload`: under a budget or an exchange rate, tensors may also wait on the host, at the price of the part of
      their copies that does not hide behind compute. "auto" takes the link that the device is known to have (a CPU has
      none, so nothing is offloaded); a number is the link's bytes per second. None: only what `paths` name.
    - `paths`: globs over parameter paths (see `ftrain.sharding.paths`; each may begin anywhere in a path, and covers
      all below what it names) to "keep", "recompute" or "offload". They override the rest.

    ValueError for an unknown choice, for several of policy, budget and `us_per_mb`, and for `offload` that decides
    nothing.

    >>> from ftrain import Remat
    >>> Remat(budget="60GiB", paths={"layers.*.mlp": "recompute"}).choice_at("model.layers.3.mlp.w")
    'recompute'
    """

    policy: str = "none"
    budget: int | str | None = None
    us_per_mb: float | None = None
    gathered: str | None = None
    offload: str | float | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in ("none", "layer", "all"):
            raise ValueError(f"Remat({self.policy!r}): the policy is 'none', 'layer' or 'all'")
        chosen = [self.policy != "none", self.budget is not None, self.us_per_mb is not None]
        if sum(chosen) > 1:
            raise ValueError(f"{self}: give a policy, a budget or us_per_mb, not several of them")
        if self.budget is not None:
            parse_budget(self.budget)
        if self.gathered not in (None, "again", "keep"):
            raise ValueError(f"Remat(gathered={self.gathered!r}) is None, 'again' or 'keep'")
        for glob, choice in self.paths.items():
            if choice not in ("keep", "recompute", "offload"):
                raise ValueError(
                    f"Remat(paths={{{glob!r}: {choice!r}}}): a path is to 'keep' or to 'recompute' or to 'offload'"
                )
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        speed = self.offload
        known = speed == "auto" if isinstance(speed, str) else not isinstance(speed, bool) and 0 < speed < float("inf")
        if not known:
            raise ValueError(
                f"Remat(offload={speed!r}): give 'auto', the link's bytes per second (a PCIe 5 link: 55e9), or None"
            )
        if not self.by_price and not self.offloads_paths:
            raise ValueError(
                f"Remat(offload={speed!r}) decides nothing by itself: add budget=... or us_per_mb=..., or name tensors "
                "with paths={'layers.*': 'offload'}"
            )

    def __hash__(self) -> int:
        return hash((self.policy, self.budget, self.us_per_mb, self.gathered, self.offload, tuple(self.paths.items())))

    @staticmethod
    def of(value: "Remat | str") -> "Remat":
        """A `Remat` as it is, or the one with this policy. ValueError for an unknown policy."""
        return value if isinstance(value, Remat) else Remat(value)

    @property
    def gathers_again(self) -> bool:
        """True if every gather is repeated in the backward, whatever else is decided."""
        return self.gathered == "again" or (self.gathered is None and not self.by_price)

    @property
    def by_price(self) -> bool:
        """True if a budget or an exchange rate decides."""
        return self.budget is not None or self.us_per_mb is not None

    @property
    def offloads_paths(self) -> bool:
        """True if some path is to be offloaded."""
        return "offload" in self.paths.values()

    def choice_at(self, path: str) -> str | None:
        """ "keep", "recompute" or "offload" where `paths` decide about this parameter path, by the most specific glob;
        else None. ValueError where two globs are equally specific and decide differently.
        """
        return self._rules.find(path) if self.paths else None

    @functools.cached_property
    def _rules(self) -> Rules[str]:
        return _anywhere(self.paths)


def _anywhere(paths: Mapping[str, str]) -> Rules[str]:
    return Rules({f"**.{glob}": choice for glob, choice in paths.items()}, "Remat(paths=...)", below=True)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_budget(budget: int | str) -> int | float | str:
    """Bytes as an int, a share of the device as a float in (0, 1], or "fit". ValueError for other spellings.

    >>> from ftrain.remat.policy import parse_budget
    >>> parse_budget("2KiB"), parse_budget("70%"), parse_budget("fit")
    (2048, 0.7, 'fit')
    """
    if isinstance(budget, int):
        return budget
    text = budget.strip().upper().replace(" ", "")
    if re.fullmatch("[0-9]+", text):
        return int(text)
    if text == "FIT":
        return "fit"
    found = re.fullmatch(r"([0-9.]+)(%|[KMG]I?B|B)", text)
    if found is None:
        raise ValueError(f"Remat(budget={budget!r}): give bytes, '60GiB', '70%' or 'fit'")
    number = float(found.group(1))
    return number / 100 if found.group(2) == "%" else int(number * _UNITS[found.group(2)])


def rematerialize(module: fx.GraphModule, remat: Remat, *, gathers: Collection[fx.Node] = ()) -> None:
    """Recompute in the backward of the graph `module` what `remat` does not keep: its readers there read copies, each
    just before its first use.

    `gathers`: the nodes that make whole parameters. They are decided together with the rest, so that what a layer
    recomputes and its backward read the same copies. The same ops run on the same inputs: results are equal to the bit.
    """
    recomputed, whole = recomputed_by_policy(module, remat), set(gathers)
    if remat.gathers_again:
        recomputed |= whole
    elif remat.gathered == "keep":
        recomputed -= whole
    if recomputed:
        recompute(module, recomputed)


def require_matches(module: fx.GraphModule, remat: Remat) -> None:
    """ValueError that names a glob of `remat.paths` which matches no parameter of the forward pass. A warning where
    "layer" finds no layers.
    """
    paths = _forward_paths(module)
    if remat.policy == "layer" and paths and not has_layers(module):
        warnings.warn(
            "remat='layer' found no list of layers among the parameters (two subtrees that are alike, such as blocks.0 "
            f"and blocks.1; paths are like {min(paths)!r}), so nothing is recomputed: take remat='all', a budget, or "
            "Remat(paths={...: 'recompute'})",
            stacklevel=2,
        )
    for glob in remat.paths:
        if paths and not any(_anywhere({glob: ""}).glob_of(path) for path in paths):
            near = tree.nearest(glob, sorted(paths))
            hint = f"; nearest: {near!r}" if near else f"; paths are like {min(paths)!r}"
            raise ValueError(f"Remat(paths={{{glob!r}: ...}}) matches no parameter that the forward pass uses{hint}")


def _forward_paths(module: fx.GraphModule) -> set[str]:
    found = {node.meta.get("path") or "" for node in module.graph.nodes if is_forward(node)} - {""}
    return found.union(*(_forward_paths(loop_body(node)) for node in module.graph.nodes if is_loop(node)))


def recomputed_by_policy(module: fx.GraphModule, remat: Remat) -> set[fx.Node]:
    """The forward nodes of the graph `module` that the policy and the globs over paths of `remat` recompute."""
    if remat.policy == "none" and not remat.paths:
        return set()
    forward = [n for n in module.graph.nodes if is_forward(n)]
    layer_of = {n: layer_of_node(n) for n in forward}
    recomputed = set()
    for node in forward:
        choice = remat.choice_at(node.meta.get("path") or "")
        by_policy = remat.policy != "none" and not _is_kept(node, layer_of, remat.policy)
        if must_keep(node) or choice in ("keep", "offload"):
            continue
        if by_policy or choice == "recompute":
            recomputed.add(node)
    return recomputed


def recompute(
    module: fx.GraphModule, recomputed: Collection[fx.Node], fetched: Mapping[fx.Node, fx.Node] | None = None
) -> None:
    """Give the backward copies of the forward nodes `recomputed`, each just before its first use.

    Copies read copies of what is recomputed, and the originals of what is kept. `fetched`: from forward nodes to copies
    of them that exist already.
    """
    copies: dict[fx.Node, fx.Node] = dict(fetched or {})
    position = {n: i for i, n in enumerate(module.graph.nodes) if n in recomputed or n in copies}
    moved: dict[fx.Node, set[int]] = {}  # nodes whose value has other memory now, and the memory it had before
    for node in list(module.graph.nodes):
        if is_forward(node) or node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is torch.ops.aten.sym_size.int:  # has no phase, and the forward reads it
            continue
        before = set().union(*(moved[n] for n in node.all_input_nodes if n in moved))
        for source in node.all_input_nodes:
            if source in position:
                before |= _memory(source)
                node.replace_input_with(source, _recompute(module.graph, source, position, copies, before=node))
        if before & _memory(node):  # a view of what is now a copy
            moved[node] = _memory(node)
            node.meta["val"] = value_of(node)
    module.graph.lint()
    module.recompile()


def must_keep(node: fx.Node) -> bool:
    """True for what is never recomputed.

    These are loops, sizes, what has a new size that depends on data (the copy must have the same), and ops that do more
    than compute (`op_effects`): dropout would draw another mask, batch norm would update its statistics twice. Parts of
    a tuple are kept with the tuple.
    """
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and must_keep(source)
    value = node.meta.get("val")
    return is_loop(node) or not isinstance(value, Tensor | list | tuple) or not is_pure(node) or _makes_size(node)


def _makes_size(node: fx.Node) -> bool:
    """True if the result has a size that depends on data and that no input has."""
    made = free_sizes(node.meta.get("val"))
    return bool(made) and not made <= set().union(*(free_sizes(n.meta.get("val")) for n in node.all_input_nodes))


def is_forward(node: fx.Node) -> bool:
    """True for an op of the forward pass."""
    return node.op == "call_function" and node.meta.get("phase") == "forward"


def _is_kept(node: fx.Node, layer_of: dict[fx.Node, str], policy: str) -> bool:
    """True for a node outside of layers (under "layer"), and for a tensor that another layer reads."""
    mine = layer_of[node]
    if policy == "layer" and not mine:
        return True
    if isinstance(node.meta.get("val"), list | tuple):
        return False
    return any(layer_of[u] != mine for u in node.users if u in layer_of)


def _memory(node: fx.Node) -> set[int]:
    """Identities of the memory of a node's value."""
    value = node.meta.get("val")
    return {storage_id(v) for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)}


def _recompute(
    graph: fx.Graph,
    node: fx.Node,
    position: dict[fx.Node, int],
    copies: dict[fx.Node, fx.Node],
    *,
    before: fx.Node,
) -> fx.Node:
    """A copy of `node` for the backward, with copies of all nodes in `position` that it is computed from."""
    chain: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in position and current not in copies and current not in chain:
            chain.add(current)
            stack.extend(current.all_input_nodes)
    for current in sorted(chain, key=position.__getitem__):
        with graph.inserting_before(before):
            copy = graph.node_copy(current, lambda n: copies.get(n, n))
        copy.meta = {**current.meta, "val": value_of(copy), "phase": "backward", "recomputed": current.name}
        copies[current] = copy
    return copies[node]
