"""What checkpoints are measured against: torch.distributed.checkpoint, and plain large writes and reads."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

_BLOCK = 64 * 2**20


class Dcp:
    """Saves of torch.distributed.checkpoint; the stagers keep their memory between saves."""

    def __init__(self) -> None:
        self._stagers = {kind: _stager(share=kind == "process") for kind in ("thread", "process")}
        # Of its own: its thread must not meet the collectives of the training loop.
        self._group = dist.new_group()
        self._pending: Any = None
        self.blocked = 0.0

    def save(self, state: Any, folder: Path) -> None:
        """Save below `folder` and wait; files are synced, as is DCP's default."""
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp_sync"))

    def begin(self, state: Any, folder: Path, kind: str) -> None:
        """Save below `folder`; return when the training loop could go on, after `blocked` seconds.

        `kind` is "thread" or "process".
        """
        began = time.perf_counter()
        self._pending = dcp.async_save(
            state,
            storage_writer=dcp.FileSystemWriter(folder / f"dcp_{kind}"),
            async_checkpointer_type=AsyncCheckpointerType[kind.upper()],
            async_stager=self._stagers[kind],
            process_group=self._group,
        )
        self.blocked = time.perf_counter() - began

    def wait(self) -> None:
        """Return when the save that was begun is on the disk."""
        self._pending.result()

    def load(self, state: Any, folder: Path) -> None:
        """Load what `save` has written into the state's own memory."""
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "dcp_sync"))

    def close(self) -> None:
        """Give the stagers' memory back."""
        for stager in self._stagers.values():
            stager.close()


def _stager(*, share: bool) -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=share, use_async_staging=False, use_non_blocking_copy=False
        )
    )


def plain_write(file: Path, tensors: Sequence[Tensor]) -> None:
    """Write the tensors' bytes one after the other in large blocks into a new file, and sync it."""
    with open(file, "wb", buffering=0) as out:
        for view in map(_bytes, tensors):
            for start in range(0, len(view), _BLOCK):
                out.write(view[start : start + _BLOCK])
        os.fsync(out.fileno())


def plain_read(file: Path, tensors: Sequence[Tensor]) -> None:
    """Read the bytes back into the tensors' memory, in large blocks."""
    with open(file, "rb", buffering=0) as source:
        for view in map(_bytes, tensors):
            for start in range(0, len(view), _BLOCK):
                wanted = view[start : start + _BLOCK]
                if source.readinto(wanted) != len(wanted):
                    raise OSError(f"{file} is shorter than what was written")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
