"""What the null device wrote down: launches, host waits, copies, captures and messages, in order.

A line of the log is a kind and its words; the C files in device/ write them. Kinds:

- launches: KERNEL (nvcc's), TRITON (Inductor's and Triton's), GEMM (cuBLAS), CUDNN, COPY, MEMSET, GRAPH, NCCL
- memory: MALLOC, FREE, HOSTALLOC
- order: SYNC, RECORD, WAIT, CAPTURE, BROKEN, GROUP
- MISSING: an entry point that the null device does not have
"""

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LAUNCHES = ("KERNEL", "TRITON", "GEMM", "CUDNN", "COPY", "MEMSET", "GRAPH")
"""What a card's front end is given one after the other; NCCL's calls are counted apart."""

_NAME_SHOWN = 100


@dataclass(frozen=True)
class Log:
    """The lines of a stretch of a program's life, as text."""

    lines: tuple[str, ...]

    def of(self, *kinds: str) -> list[str]:
        """The lines of these kinds."""
        return [line for line in self.lines if line.split(" ", 1)[0] in kinds]

    def launches(self) -> dict[str, int]:
        """How many of each kind of launch."""
        found = Counter(line.split(" ", 1)[0] for line in self.lines)
        return {kind: found[kind] for kind in LAUNCHES if found[kind]}

    def kernels(self) -> dict[str, int]:
        """Launches of kernels by their names as a reader knows them, the most frequent first."""
        named = [line.split(" ")[1] for line in self.of("KERNEL", "TRITON")]
        words = dict(zip(unique := list(dict.fromkeys(named)), demangled(unique), strict=True))
        return dict(Counter(words[name] for name in named).most_common())

    def host_waits(self) -> list[str]:
        """Calls that make the host wait for the device: a synchronize, a copy that returns when it is done, a free."""
        return [line for line in self.lines if line.startswith(("SYNC", "FREE")) or " waits" in line]

    def allocations(self) -> list[str]:
        """Calls that take memory from the driver, which a step in its steady state does not need."""
        return self.of("MALLOC", "HOSTALLOC")

    def copies(self) -> dict[str, int]:
        """How many copies of each direction (h2d, d2h, d2d)."""
        return dict(Counter(line.split(" ")[1] for line in self.of("COPY")))

    def captures(self) -> list[str]:
        """Beginnings and ends of captures, and what broke one."""
        return self.of("CAPTURE", "BROKEN")

    def messages(self) -> list[str]:
        """NCCL's calls in order, without the stream: what must be equal on all ranks but for peers."""
        return [line.removeprefix("NCCL ").rsplit(" stream ", 1)[0] for line in self.of("NCCL")]


def reset() -> None:
    """Forget what was written down so far."""
    _library().nullgpu_reset()


def read() -> Log:
    """What was written down since the last reset."""
    library = _library()
    return Log(tuple(library.nullgpu_line(i).decode() for i in range(library.nullgpu_size())))


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names as they were written, shortened to what tells them apart; other names stay."""
    if not names:
        return []
    found = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    return [_shortened(name) for name in found.stdout.splitlines()]


def _shortened(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if len(name) <= _NAME_SHOWN:
        return name
    tags = re.findall(r"\w*(?:[Ff]unctor|_kernel_cuda|_kernel_impl|Ops|_cuda)\w*", name)
    return f"{name[:60]} ... {'/'.join(dict.fromkeys(tags))[:80]}"


def _library() -> ctypes.CDLL:
    """The null device in this process. RuntimeError where the process was not started under it."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "nullgpu_line"):
        raise RuntimeError("this process does not run on the null device: start it with `make test-nullgpu`")
    library.nullgpu_line.restype = ctypes.c_char_p
    library.nullgpu_line.argtypes = [ctypes.c_long]
    library.nullgpu_size.restype = ctypes.c_long
    return library
