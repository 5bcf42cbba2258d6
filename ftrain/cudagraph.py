"""Run a program as a CUDA graph: one launch for the whole step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARMUP_RUNS = 3


def cudagraph_program(
    program: Callable[[Sequence[Tensor]], list[Tensor]],
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Capture `program` on its first call and replay it afterwards.

    A graph reads and writes fixed addresses. Arguments whose address stays the same from call to call (a donated state)
    are used in place; others (batches) are copied into buffers of the graph. Before the capture the program runs a few
    times on a side stream, so that compilers and allocators settle; what these runs write into their arguments is put
    back. Results are copied out, since the next replay overwrites them.
    """
    captured: list[_Captured] = []

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        if not captured:
            captured.append(_Captured(program, inputs))
        return captured[0].replay(inputs)

    return run


class _Captured:
    """A captured graph, the addresses it works on, and its results."""

    def __init__(self, program: Callable[[Sequence[Tensor]], list[Tensor]], inputs: Sequence[Tensor]) -> None:
        backup = [x.clone() for x in inputs]
        self._buffers = list(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                program(self._buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = program(self._buffers)
        for x, before in zip(inputs, backup, strict=True):
            x.copy_(before)

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on these arguments."""
        moved = []
        for buffer, x in zip(self._buffers, inputs, strict=True):
            if buffer.data_ptr() != x.data_ptr():
                moved.append((x, buffer))
                buffer.copy_(x)
        self._graph.replay()
        for x, buffer in moved:
            x.copy_(buffer)
        return [r.clone() for r in self._results]
