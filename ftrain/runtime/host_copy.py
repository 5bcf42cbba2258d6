"""Values of a step on their way to the host, so that the host can issue the next step before it reads them.

    state, metrics = step(state, batch)
    coming = HostCopy(metrics)
    state, metrics = step(state, next_batch)
    loss = float(coming.read()["loss"])  # of the first step; the second is under way

`float(metrics["loss"])` in the last line would wait for the second step too, since a copy is queued behind all work
that the device was given before it.
"""

from typing import Any

import torch
from torch import Tensor

from ftrain import tree


class HostCopy:
    """A copy of the tensors of a tree, of any shapes and dtypes, with the values they have at this point of the
    device's queue.

    On CUDA the copies are queued into pinned memory and nothing waits; work that is queued later may overwrite the
    tensors. Tensors on the host are not copied.

    >>> import torch
    >>> from ftrain.runtime.host_copy import HostCopy
    >>> HostCopy({"loss": torch.tensor(2.5), "step": 3}).read()
    {'loss': tensor(2.5000), 'step': 3}
    """

    def __init__(self, values: Any) -> None:
        leaves, self._treedef = tree.flatten(values)
        self._leaves = [_copied(leaf) for leaf in leaves]
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        self._copied = [_recorded(device) for device in devices]

    @property
    def queued(self) -> bool:
        """Whether a device makes the copies, so that `read` may have to wait."""
        return bool(self._copied)

    def read(self) -> Any:
        """The tree with its tensors on the host. Waits for the copies, and for nothing that was queued later."""
        for event in self._copied:
            event.synchronize()
        return tree.unflatten(self._treedef, self._leaves)


def _copied(leaf: Any) -> Any:
    # CUDA to the host without blocking: torch takes pinned memory for it
    return leaf.detach().to("cpu", non_blocking=True) if isinstance(leaf, Tensor) else leaf


def _recorded(device: torch.device) -> torch.cuda.Event:
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event
