"""Plan files: a layout chosen by a search, with all that `ftrain.jit` needs of it, written and read back.

The keys of a file keep their words when a name of the code changes: "subject" is the workload.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftrain.analysis.cluster import Cluster
from ftrain.files.outside import (
    Shape,
    check,
    either,
    flag,
    listed,
    mapped,
    number,
    one_of,
    read_json,
    record,
    text,
    whole,
)
from ftrain.plan.cost import Price
from ftrain.plan.layout_data import layout_as_dict, layout_from_dict, rule_as_dict, rule_from_dict
from ftrain.plan.space import Candidate, as_dict, from_dict
from ftrain.plan.workload import Workload
from ftrain.sharding.batch import BatchRule
from ftrain.sharding.layout import Layout
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Kind
from ftrain.sharding.plan import Plan

_VERSION = 2
_FILE_BYTES = 2**22
_RANKS, _GLOB = 2**20, 256
_KEYS = ("version", "subject", "cluster", "tokens", "packs", "layout", "components", "batch", "link", "predicted")


def _maybe(shape: Shape) -> Shape:
    return either(one_of(None), shape)


def _by_glob(item: Shape) -> Shape:
    """An object whose keys are globs. Each glob is matched against every path, so long ones would take too much
    time.
    """

    def shape(value: Any, at: str) -> None:
        mapped(item)(value, at)
        for glob in value:
            text(_GLOB)(glob, f"a name in {at}")

    return shape


_SIZE = whole(1, _RANKS)
_TAGGED = record(
    {"kind": text(_GLOB)},
    optional={
        "zigzag": flag,
        "ulysses": _SIZE,
        "factor": number(1e-6),
        "dim": whole(0, 16),
        "of": text(_GLOB),
        "optional": flag,
    },
)
_LAYOUT = record(
    {
        "parameters": listed(text(_GLOB)),
        "sequence": _maybe(_TAGGED),
        "experts": _maybe(_TAGGED),
        "expert_chunks": _SIZE,
        "dtype": _maybe(text(_GLOB)),
    }
)
_CANDIDATE = record(
    {
        **dict.fromkeys(("replicate", "shard", "sequence", "expert", "micro_batches"), _SIZE),
        "attention": _maybe(text(_GLOB)),
        "remat": either(text(_GLOB), number(0.0)),
    }
)
_PLAN = record(
    {
        "version": one_of(_VERSION),
        "subject": text(),
        "cluster": text(),
        "tokens": whole(1),
        "packs": whole(1),
        "layout": _CANDIDATE,
        "components": _by_glob(_LAYOUT),
        "batch": _by_glob(_TAGGED),
        "link": record({"latency": number(0.0), "bandwidth": number(1.0)}),
        "predicted": mapped(number()),
    }
)


@dataclass(frozen=True)
class PlanFile:
    """A layout, for whom it was chosen, and what was predicted of it.

    - `workload`, `cluster`: their names.
    - `tokens` of a pack and `packs` of a step, which decide the batch's shapes.
    - `candidate`: the layout. Its `recompute` is the `Remat` of the step, its `micro_batches` what the loss accumulates
      over.
    - `components`, `batch`, `link`: as in `ftrain.sharding.Plan`.
    - `predicted`: tokens/s of one GPU, peak bytes, seconds of a step, ...
    """

    workload: str
    cluster: str
    tokens: int
    packs: int
    candidate: Candidate
    components: Mapping[str, Layout] = field(default_factory=lambda: MappingProxyType({}))
    batch: Mapping[str, BatchRule] = field(default_factory=lambda: MappingProxyType({}))
    link: Link = field(default_factory=Link)
    predicted: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def of(price: Price, workload: Workload, cluster: Cluster) -> "PlanFile":
        """The file of a priced layout of a workload on a cluster."""
        candidate = price.candidate
        work = workload.make(dict.fromkeys(workload.stacks, 1), candidate)
        predicted = {
            "seconds": price.seconds,
            "tokens_per_second_per_gpu": price.tokens_per_second,
            "mfu": price.mfu,
            "peak_bytes": float(round(price.peak)),
            "exposed_seconds": price.exposed,
        }
        return PlanFile(
            workload=workload.name,
            cluster=cluster.name,
            tokens=workload.model_shape.tokens,
            packs=workload.model_shape.packs,
            candidate=candidate,
            components=dict(work.components),
            batch=dict(work.rules),
            link=cluster.link(candidate.mesh()),
            predicted=predicted,
        )

    def plan(self, *, kind: Kind = "process") -> Plan:
        """The plan for `ftrain.jit`, on a mesh of this kind. ValueError where the layout fits no mesh."""
        mesh, layout = self.candidate.mesh(kind), self.candidate.layout
        return Plan(mesh, layout, batch=self.batch, link=self.link, components=self.components)

    def save(self, file: str | Path) -> Path:
        """Write the file and return its path. A file of this name is replaced at once; OSError where it cannot be
        written.
        """
        file = Path(file)
        data = {
            "version": _VERSION,
            "subject": self.workload,
            "cluster": self.cluster,
            "tokens": self.tokens,
            "packs": self.packs,
            "layout": as_dict(self.candidate),
            "components": {glob: layout_as_dict(layout) for glob, layout in self.components.items()},
            "batch": {glob: rule_as_dict(rule) for glob, rule in self.batch.items()},
            "link": asdict(self.link),
            "predicted": dict(self.predicted),
        }
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text(json.dumps(data, indent=1) + "\n")
        fresh.replace(file)
        return file


def load_plan(file: str | Path) -> PlanFile:
    """Read what `PlanFile.save` wrote. ValueError names the file, and what is missing, unknown or out of range in it,
    or makes no plan together.
    """
    file = Path(file)
    try:
        data = read_json(file, limit=_FILE_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such plan; `ftrain plan ... --apply {file}` writes one") from None
    except ValueError as error:
        raise ValueError(f"{error}; `ftrain plan ... --apply {file}` writes a new one") from None
    if not isinstance(data, dict) or set(data) != set(_KEYS) or data["version"] != _VERSION:
        raise ValueError(f"{file} is not a plan of version {_VERSION} with {', '.join(_KEYS)}; write a new one")
    check(data, _PLAN, str(file))
    try:
        found = _from_data(data)
        found.plan(kind="fake")
        return found
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _from_data(data: dict[str, Any]) -> PlanFile:
    return PlanFile(
        workload=data["subject"],
        cluster=data["cluster"],
        tokens=data["tokens"],
        packs=data["packs"],
        candidate=from_dict(data["layout"]),
        components={glob: layout_from_dict(layout) for glob, layout in data["components"].items()},
        batch={glob: rule_from_dict(rule) for glob, rule in data["batch"].items()},
        link=Link(**data["link"]),
        predicted=data["predicted"],
    )
