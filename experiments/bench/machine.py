"""When and on what figures were measured: what each file of results says of itself."""

import os
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """The day, as "2026-11-21"; the CPU's name and the `cores` of it that the process may use; the `card` that figures
    were measured on, None for the CPU; the versions of torch and Python. In older files what was not noted is None.
    """

    date: str
    cpu: str | None
    cores: int | None
    card: str | None
    torch: str | None
    python: str | None

    @staticmethod
    def here(*, card: str | None = None) -> "Machine":
        """Of this process, today. `card`: of other processes that measured; default: the one that this process uses."""
        used = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
        return Machine(
            date=date.today().isoformat(),
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            card=card or used,
            torch=torch.__version__,
            python=platform.python_version(),
        )


def device_title(device: str) -> str:
    """What a figure was measured on, for titles: the `device` ("cpu" or "cuda"), and torch."""
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    return f"{device} ({where}), torch {torch.__version__}"


def _cpu() -> str:
    """The model as Linux tells it, else what Python knows."""
    lines = _CPUS.read_text().splitlines() if _CPUS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
