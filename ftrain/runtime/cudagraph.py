"""Run a program as a CUDA graph: one launch for the whole step."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ftrain.graph.failing_node import failing_node
from ftrain.graph.writes import written_inputs
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.recordable import described, require_recordable

Program = Callable[[Sequence[Tensor]], list[Tensor]]
_FIRST_CALLS = 3


class Record(NamedTuple):
    """A recorded program: `replay` runs it on the memory it was recorded with, and its `results` are then in these
    tensors.
    """

    replay: Callable[[], None]
    results: list[Tensor]


def cudagraph_program(module: fx.GraphModule, program: Program, arguments: ArgumentMemory | None = None) -> Program:
    """`program`, the code of `module`, as a CUDA graph. ValueError if the graph holds what a CUDA graph cannot.

    The first three calls run the program as it is, on a side stream, while compilers and allocators settle. The fourth
    call records it; it and later calls replay the record. A donated state and other arguments that stay at their
    addresses are used in place; others are copied into memory of the graph. If an argument that was used in place moves
    (a restored state), or the value of one on the CPU changes, the program is recorded anew. Results that are no
    donated leaves are copied out, since the next replay overwrites them.

    `arguments`: holds the memory of the arguments; give one to know what it holds.
    """
    require_recordable(module)
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    paths = [n.meta.get("path", n.name) for n in given]
    device = next(n.meta["val"].device for n in given if n.meta["val"].device.type == "cuda")
    recorder = CudaRecorder(module, device)
    memory = ArgumentMemory(written_inputs(module)) if arguments is None else arguments
    return Recorded(program, recorder.run, recorder.record, memory, paths)


class Recorded:
    """A program that is recorded at its fourth call and replayed from then on."""

    def __init__(
        self,
        program: Program,
        run: Callable[[Program, Sequence[Tensor]], list[Tensor]],
        record: Callable[[Program, Sequence[Tensor]], Record],
        memory: ArgumentMemory,
        paths: Sequence[str],
    ) -> None:
        """`run` and `record` run and record a program with its arguments; `paths` name the arguments."""
        self._program, self._run, self._record_of, self._memory, self._paths = program, run, record, memory, paths
        self._calls = 0
        self._recorded_at: list[int] = []
        self._record: Record | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the program on these arguments, or replay its record."""
        self._calls += 1
        if self._calls <= _FIRST_CALLS:
            self._memory.watch(inputs)
            return self._run(self._program, inputs)
        moved = self._memory.moved(inputs)
        if self._record is None or moved:
            self._begin(inputs, moved)
        assert self._record is not None
        self._memory.load(inputs)
        self._record.replay()
        self._memory.store(inputs)
        return [x.clone() for x in self._record.results]

    def _begin(self, inputs: Sequence[Tensor], moved: list[int]) -> None:
        """Record the program for these arguments, and warn if that happens too often."""
        self._record = None  # its memory is free for the next one
        self._recorded_at.append(self._calls)
        if len(self._recorded_at) == 4 and self._calls - self._recorded_at[0] < 16:
            names = ", ".join(repr(self._paths[slot]) for slot in moved[:4])
            warnings.warn(
                f"a CUDA graph was captured four times in {self._calls} calls, since {names} changed: each costs as "
                "much as a step without a graph. A number that changes belongs on the GPU; or take backend='inductor'",
                stacklevel=2,
            )
        self._record = self._record_of(self._program, self._memory.settle(inputs))


class CudaRecorder:
    """Runs and records programs on a CUDA device."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        """`module`: the graph of the programs, by which the node where a recording fails is named."""
        self._module, self._device = module, device
        self._side = torch.cuda.Stream(device)

    def run(self, program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run `program` on its flat `inputs` on the side stream, between the work of the current stream before and
        after it.

        Only later runs reuse the memory of the side stream, and they wait for the current stream first.
        """
        here = torch.cuda.current_stream(self._device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            results = program(inputs)
        here.wait_stream(self._side)
        return results

    def record(self, program: Program, inputs: Sequence[Tensor]) -> Record:
        """Capture `program` on its flat `inputs`; nothing is computed. ValueError names the node at which that is
        impossible.

        Other threads may go on using CUDA: a data loader, a snapshot, NCCL's watchdog.
        """
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self._device)
        try:
            # a failed capture leaves its stream as the current one: the outer block restores it
            with torch.cuda.stream(here), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = program(inputs)
        except RuntimeError as error:
            causes = list(_causes(error))
            refused = next((e for e in causes if isinstance(e, torch.OutOfMemoryError)), None)
            if refused is not None:
                raise refused from None
            raise ValueError(self._explained(causes)) from error
        return Record(graph.replay, results)

    def _explained(self, causes: list[BaseException]) -> str:
        found = [(e, failing_node(self._module, e.__traceback__)) for e in causes]
        error, node = next(((e, n) for e, n in reversed(found) if n is not None), (causes[-1], None))
        where = "the step" if node is None else described(node)
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for e in causes:
            traceback.clear_frames(e.__traceback__)  # they hold memory of the failed graph
        return (
            f"backend='cudagraph': {where} cannot be captured: {text}. Likely the host waits for the GPU there, or "
            "copies memory that is not pinned: change that line, or take backend='inductor'. This call has changed "
            "none of its arguments, but after a failed capture CUDA may refuse further work in this process: start it "
            "again from a checkpoint"
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the errors in whose handling it was raised, the first one last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
