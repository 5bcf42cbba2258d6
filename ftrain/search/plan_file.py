"""plan.json: a layout chosen by a search, written and read back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ftrain.search.cluster import cluster
from ftrain.search.layouts import Candidate, as_dict, from_dict
from ftrain.search.price import Price
from sharding.batch import BatchRule
from sharding.layout import Layout
from sharding.mesh import Kind
from sharding.plan import Plan

_VERSION = 1


@dataclass(frozen=True)
class PlanFile:
    """A layout, for whom it was chosen, and what was predicted of it.

    `tokens` and `packs` of a step, which decide the batch's shapes; `predicted`: tokens/s of one GPU, peak bytes, ...
    `candidate.recompute` is the `Remat` of its step, `candidate.micro_batches` what its loss accumulates over.
    """

    subject: str
    cluster: str
    tokens: int
    packs: int
    candidate: Candidate
    predicted: dict[str, float]

    @staticmethod
    def of(price: Price, *, subject: str, cluster: str, tokens: int, packs: int) -> "PlanFile":
        """The file of a priced layout."""
        predicted = {
            "seconds": price.seconds,
            "tokens_per_second_per_gpu": price.tokens_per_second,
            "mfu": price.mfu,
            "peak_bytes": float(round(price.peak)),
            "exposed_seconds": price.exposed,
        }
        return PlanFile(subject, cluster, tokens, packs, price.candidate, predicted)

    def plan(
        self,
        *,
        kind: Kind = "process",
        batch: Mapping[str, BatchRule] = MappingProxyType({}),
        components: Mapping[str, Layout] = MappingProxyType({}),
    ) -> Plan:
        """The plan for `ftrain.jit`, by the links of its cluster; `batch` and `components` as in `sharding.Plan`."""
        mesh = self.candidate.mesh(kind)
        link = cluster(self.cluster).link(mesh)
        return Plan(mesh, self.candidate.layout, batch=batch, link=link, **components)

    def save(self, file: str | Path) -> Path:
        """Write the file; one of this name is replaced at once."""
        file = Path(file)
        data = {
            "version": _VERSION,
            "subject": self.subject,
            "cluster": self.cluster,
            "tokens": self.tokens,
            "packs": self.packs,
            "layout": as_dict(self.candidate),
            "predicted": self.predicted,
        }
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text(json.dumps(data, indent=1) + "\n")
        fresh.replace(file)
        return file


def load_plan(file: str | Path) -> PlanFile:
    """Read what `PlanFile.save` wrote. ValueError names the file, and what is missing or not known in it."""
    file = Path(file)
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such plan; `ftrain plan ... --apply {file}` writes one") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); `ftrain plan ... --apply {file}` writes a new one") from None
    keys = {"version", "subject", "cluster", "tokens", "packs", "layout", "predicted"}
    if not isinstance(data, dict) or set(data) != keys or data["version"] != _VERSION:
        raise ValueError(f"{file} is not a plan of version {_VERSION} with {', '.join(sorted(keys))}; write a new one")
    try:
        candidate = from_dict(data["layout"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return PlanFile(data["subject"], data["cluster"], data["tokens"], data["packs"], candidate, data["predicted"])
