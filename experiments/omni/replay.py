"""What `ftrain replay` needs of a run of the experiment."""

from collections.abc import Mapping
from typing import Any

import torch

from experiments.omni import job, run_length
from ftrain import Precision
from ftrain.resilience.replay import Replayable
from ftrain.sharding import Mesh


def replayable(config: Mapping[str, Any]) -> Replayable:
    """The run with these options (its config.json), in this process: on a virtual mesh if it had several ranks.

    A run with --plan auto is laid out by a search again; where that finds another layout its numbers differ.
    """
    if config["resolved_device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("the run was made on CUDA, and this machine has no CUDA device: replay it where there is one")
    torch.set_num_threads(config["threads"])
    sizes = config["resolved_mesh"]
    mesh = Mesh(**sizes, kind="virtual") if sizes is not None else None
    made = job.make(
        size=config["size"],
        steps=config["steps"],
        earlier=run_length.earlier_of(config),
        decay=config.get("decay", "cosine"),
        tokenizer_steps=config["tokenizer_steps"],
        seed=config["seed"],
        device=torch.device(config["resolved_device"]),
        backend=config["backend"],
        remat=config["remat"],
        precision=Precision(compute=config.get("resolved_precision", "float32")),
        mesh=mesh,
        plan=config.get("plan"),
        say=print,
    )
    return Replayable(
        step=made.step,
        abstract_state=made.abstract_state(),
        fresh_state=lambda: made.fresh_state(print),
        batch_at=made.batches.at,
        device=made.device,
    )
