"""From a pure function to a compiled step: trace, then run the passes."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ftrain import tree
from ftrain.analysis.op_times import OpTimes
from ftrain.remat.planner import bytes_within
from ftrain.remat.policy import Remat
from ftrain.runtime.execute import choose
from ftrain.sharding.link import Link
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.step.artifact import Compiled
from ftrain.step.donated import Donation, match_donated
from ftrain.step.pipeline import DONATED, HIDDEN, PREPARED, Observe, PassRun, Setting, run_passes
from ftrain.step.program_text import program_lines, require_one_program
from ftrain.step.signature import Signature
from ftrain.trace.precision import Precision
from ftrain.trace.tracer import Aval, Traced, argument_paths, is_array, trace


def compile_step(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    names: Sequence[str],
    *,
    donate: int | None,
    backend: str,
    remat: Remat,
    precision: Precision | None,
    around: tuple[Any, ...] = (),
    mesh: Mesh | None = None,
    settle: Callable[[Traced], list[Placement]] | None = None,
    link: Link = Link(),  # noqa: B008  # frozen
    hide_communication: bool = True,
    observe: Observe | None = None,
) -> Compiled:
    """Trace `fn(*args)` and run the passes.

    - `args`: trees whose leaves are tensors, `Aval`s or constants; `names`: of the arguments, as paths begin.
    - `donate`: the position of the argument that the new state is written over, or None.
    - `backend`, `remat`, `precision`: as in `ftrain.jit`. `around`: what surrounds the call (`TraceCache.around`).
    - `mesh`: with `settle`, which finishes the trace for a rank and returns where each result's pieces are.
    - `link`: of the mesh; `hide_communication`: whether to reorder for overlap.
    - `observe`: see `ftrain.step.pipeline.Observe`.

    ValueError for what a trace refuses, for a result that cannot take the donated memory, and for offload under
    `backend="cudagraph"`.
    """
    started = time.perf_counter()
    recompile = partial(
        compile_step, fn, tree.map(_abstract, args), names, donate=donate, backend=backend, remat=remat,
        precision=precision, around=around, mesh=mesh, settle=settle, link=link, hide_communication=hide_communication,
    )  # fmt: skip
    leaves, treedef = tree.flatten(args)
    traced = trace(fn, args, names, precision=precision)
    options = f"remat={remat}, backend={backend}, precision={precision}"
    together = mesh is not None and mesh.kind == "process" and mesh.size > 1
    if together:
        require_one_program(program_lines(traced.module, options))
    placements = [] if settle is None else settle(traced)
    donation = Donation({}, traced.input_paths, len(traced.output_paths))
    if donate is not None:
        donation = match_donated(traced, args[donate], names[donate])
    device = traced.input_avals[0].device if traced.input_avals else torch.device("cpu")
    setting = Setting(
        leaves=dict(zip(traced.input_paths, traced.input_avals, strict=True)),
        state=names[0] if names else "",
        donated=donation.by_name(traced.module),
        device=device,
        backend=choose(backend, device),
        remat=remat,
        times=partial(OpTimes.on, device, mesh),
        mesh=mesh,
        link=link,
        hides=hide_communication,
        within=partial(bytes_within, remat=remat, device=device, mesh=mesh),
    )
    if backend == "cudagraph" and (remat.offload is not None or remat.offloads_paths):
        raise ValueError(f"{remat}: copies to the host are not captured in a CUDA graph; take backend='inductor'")
    if observe is not None:
        observe("trace", traced.module)
    runs: list[PassRun] = []
    graph = run_passes(traced.module, (*PREPARED, *HIDDEN, *DONATED), setting, runs=runs, observe=observe)
    return Compiled(
        name=name_of(fn),
        traced=traced,
        graph=graph,
        setting=setting,
        signature=Signature(treedef, argument_paths(args, names), leaves, traced.input_avals, around),
        donation=donation,
        placements=placements,
        passes=runs,
        seconds_to_compile=time.perf_counter() - started,
        recompile=recompile,
    )


def _abstract(leaf: Any) -> Any:
    return Aval.of(leaf) if is_array(leaf) else leaf


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a step in messages and reports."""
    return getattr(fn, "__name__", type(fn).__name__)
