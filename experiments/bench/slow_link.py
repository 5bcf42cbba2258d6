"""A link as slow as one likes: collectives run as they are; each wait sleeps until its message would have arrived."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx

import ftrain
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import copy_graph
from ftrain.runtime.execute import python_program
from ftrain.sharding.link import sent_bytes
from ftrain.sharding.private import resolve_group


@dataclass
class SlowLink:
    """`latency` in seconds and `bandwidth` in bytes/s; messages go one after the other."""

    latency: float
    bandwidth: float
    _free: float = 0.0
    _arrives: dict[int, float] = field(default_factory=dict)

    def start(self, op: Any, *args: Any) -> Tensor:
        """Start a collective and note when its message arrives."""
        out = op(*args)
        now = time.perf_counter()
        sent = sent_bytes(COLLECTIVES[op], args[0].nbytes, dist.get_world_size(resolve_group(args[-1])))
        self._free = max(now, self._free) + self.latency + sent / self.bandwidth
        self._arrives[out.untyped_storage().data_ptr()] = self._free
        return out

    def wait(self, x: Tensor) -> Tensor:
        """Wait for the collective, and then for the message."""
        out = WAIT(x)
        left = self._arrives.pop(x.untyped_storage().data_ptr(), 0.0) - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return out


def run_over(link: SlowLink, step: ftrain.Step, state: Any, batch: Any) -> Any:
    """Run a step of a process mesh with its collectives over `link`."""
    runner = step.runner(state, batch)
    programs = runner.__dict__.setdefault("programs_by_link", {})
    if id(link) not in programs:
        module = copy_graph(runner.compiled.interpreted)
        _over(link, module)  # after all passes: they must see collectives as they are
        programs[id(link)] = (link, python_program(module))
    runner.use_program(programs[id(link)][1])
    return step(state, batch)


def _over(link: SlowLink, module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target in COLLECTIVES:
            node.args = (node.target, *node.args)
            node.target = link.start
        elif node.target is WAIT:
            node.target = link.wait
    module.recompile()
