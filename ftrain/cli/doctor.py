"""`ftrain doctor`: what is installed, what this machine has, and what is missing for what."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

EXTRAS = {
    "train": ("transformers", "jinja2", "grain", "pyarrow", "fsspec", "pyyaml"),
    "media": ("pillow", "av", "soundfile"),
    "hf": ("transformers",),
    "diffusers": ("diffusers",),
    "cuda": ("flash-attn", "liger-kernel"),
}
"""What each extra of the distribution brings, beside the base."""
BASE = ("torch", "optree", "safetensors", "tensorstore", "crc32c", "tyro", "rich", "numpy", "scipy")


@dataclass(frozen=True)
class DoctorOptions:
    """Show versions, devices, memory and disk, and what to install for what is missing. The exit code is 1 if the base
    itself is not whole."""


def run(options: DoctorOptions) -> int:
    """The command; 1 where a package of the base install is missing."""
    del options
    console = Console(highlight=False)
    console.print(f"Python {platform.python_version()} on {platform.platform()}")
    console.print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads an op, {_memory()}, {_disk()}")
    console.print(_devices())
    table = Table("for", "installed", "missing", "install")
    missing_base = [name for name in BASE if _version(name) is None]
    table.add_row("base", _installed(BASE), ", ".join(missing_base), "pip install ftrain-omni" if missing_base else "")
    for extra, names in EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        advice = f'pip install "ftrain-omni\\[{extra}]"' if missing else ""
        table.add_row(extra, _installed(names), ", ".join(missing), advice)
    console.print(table)
    return 1 if missing_base else 0


def _installed(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {version}" for name in names if (version := _version(name)) is not None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "memory unknown"
    return f"{size / 2**30:.0f} GiB of memory"


def _disk() -> str:
    return f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}: no CUDA device, so all runs on the CPU"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}: {shown}"


COMMANDS = {"doctor": (DoctorOptions, run)}
