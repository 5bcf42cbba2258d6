"""A user's own step as a workload: its `ModelShape` is read off its graph on one device."""

import math
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.analysis.flops import node_flops
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized
from ftrain.plan.space import Candidate, ModelShape
from ftrain.plan.workload import WorkloadStep
from ftrain.sharding.batch import BatchRule, Tokens
from ftrain.sharding.layout import Layout
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.plan import Plan
from ftrain.step.api import make_step
from ftrain.step.plan_source import PlanRequest
from ftrain.trace.tracer import Aval, is_array

_ATTENTION = "ftrain::attention_forward"
_GROUPED = ("ftrain::grouped_mm", "aten::_grouped_mm")
_CPU = torch.device("cpu")


class StepWorkload:
    """The `Workload` of a step of two arguments, state and batch, with the whole model in every trace.

    - `request`: its `arguments` are those of the whole mesh.
    - `packs`: in the batch. `rules`, `components`: as in `ftrain.sharding.Plan`.

    Each pack is taken to be one document with causal attention: packs of short documents take less than predicted.
    ValueError for other arguments, without specs, and for less than one pack.
    """

    def __init__(
        self, request: PlanRequest, *, packs: int, rules: Mapping[str, BatchRule], components: Mapping[str, Layout]
    ) -> None:
        if len(request.names) != 2 or request.names[1] != request.batch or request.arguments is None:
            raise ValueError(
                f"plan='auto' searches steps of a state and a {request.batch!r}, in this order; "
                f"{_name(request)} takes {', '.join(request.names)}: give a ftrain.sharding.Plan"
            )
        if request.specs is None:
            raise ValueError("plan='auto' must know the parameters: give ftrain.jit the model's specs=...")
        if packs < 1:
            raise ValueError(f"AutoPlan(packs={packs}): a step has at least one pack")
        self._request, self._packs, self._rules, self._components = request, packs, rules, components
        self._state, self._batch = (tree.map(_abstract, a) for a in request.arguments)

    @property
    def name(self) -> str:
        """The step's name."""
        return _name(self._request)

    @property
    def stacks(self) -> Mapping[str, int]:
        """Empty: how the step is built is unknown."""
        return MappingProxyType({})

    def make(self, depths: Mapping[str, int], candidate: Candidate) -> WorkloadStep:
        """The step as it is: `depths` and `candidate` change nothing, since the whole model is in every trace."""
        step = self._request.step
        return WorkloadStep(
            lambda state, batch: step(state, batch),
            self._state,
            self._batch,
            self._request.specs,
            self._rules,
            self._components,
            precision=self._request.precision,
            donate=self._request.donates,
        )

    @cached_property
    def model_shape(self) -> ModelShape:
        """Read off a trace on one device. ValueError if the batch does not divide into its packs, or no leaf of it has
        one entry per token.
        """
        whole = self._tokens()
        if whole % self._packs:
            raise ValueError(
                f"a batch of {whole} tokens does not divide into {self._packs} packs; give AutoPlan(packs=)"
            )
        tokens = whole // self._packs
        step = make_step(self._request.step, precision=self._request.precision, backend="aten")
        nodes = list(_nodes(step.lower(self._state, self._batch).graph))
        heads = [h for h in map(_heads, nodes) if h is not None and self._shares(h.path)]
        products = sum(f for n, f in nodes if not _op(n).startswith("ftrain::attention_"))
        attention = sum(f for n, f in nodes if _op(n).startswith("ftrain::attention_"))
        sizes = [s for s in tree.leaves(self._request.specs) if "expert" in s.axes]
        experts = math.gcd(*(s.shape[s.axes.index("expert")] for s in sizes))
        slots = [sized(n.args[0]).shape[0] for n, _ in nodes if _op(n) in _GROUPED]
        return ModelShape(
            tokens=tokens,
            packs=self._packs,
            layers=max(1, len(heads)),
            d_model=max((h.heads * h.head_dim for h in heads), default=1),
            heads=math.gcd(*(h.heads for h in heads)) or 1,
            kv_heads=math.gcd(*(h.kv_heads for h in heads)) or 1,
            head_dim=max((h.head_dim for h in heads), default=1),
            weight_flops=products / whole,
            attention_flops=attention / whole / self._packs,
            experts=experts,
            top_k=max(1, round(max(slots, default=0) / whole)) if experts else 0,
            most_micro=1,
        )

    def _tokens(self) -> int:
        """Tokens of the whole batch: the length of the first leaf that has one entry per token."""
        plan = Plan(Mesh(kind="fake"), batch=self._rules)
        for path, leaf in zip(tree.paths(self._batch), tree.leaves(self._batch), strict=True):
            rule = plan.batch_rule(path)
            if is_array(leaf) and isinstance(rule, Tokens) and len(leaf.shape) > rule.dim:
                return int(leaf.shape[rule.dim])
        raise ValueError(f"plan='auto': no leaf of the batch of {self.name} has one entry per token")

    def _shares(self, path: str) -> bool:
        """True if attention at this path sees a pack that ranks share."""
        plan = Plan(Mesh(kind="fake"), components=self._components)
        names = path.split(".")
        tails = [".".join(names[i:]) for i in range(len(names))]
        known = set(tree.paths(self._request.specs))
        return plan.layout(next((t for t in tails if t in known), path)).sequence is not None


class _Heads(NamedTuple):
    path: str
    heads: int
    kv_heads: int
    head_dim: int


def _heads(counted: tuple[fx.Node, float]) -> _Heads | None:
    node, _ = counted
    if _op(node) != _ATTENTION:
        return None
    q, k = (sized(node.args[i]) for i in (0, 1))  # type: ignore[arg-type]
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    return _Heads(node.meta.get("path") or "", q.shape[1], k.shape[1], q.shape[2])


def _nodes(module: fx.GraphModule, times: int = 1) -> Any:
    """Each op with its FLOPs; an op in a loop with those of all iterations."""
    for node in module.graph.nodes:
        if is_loop(node):
            yield from _nodes(loop_body(node), times * int(node.args[1]))
        elif node.op == "call_function":
            yield node, times * node_flops(node)


def _op(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _abstract(leaf: Any) -> Any:
    return Aval(tuple(leaf.shape), leaf.dtype, _CPU) if is_array(leaf) else leaf


def _name(request: PlanRequest) -> str:
    return getattr(request.step, "__name__", type(request.step).__name__)
