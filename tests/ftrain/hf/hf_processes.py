"""Several gloo processes that fill the parameters of one model, for test_hf_processes."""

import json
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ftrain
from ftrain.hf import fill_hf, load_hf, save_hf
from modules import decoder
from modules.decoder import DecoderConfig
from modules.hf_names import Names, decoder_names
from sharding import Layout, Mesh, Plan
from sharding.layout import Exact


def run(folder: str, cfg: DecoderConfig, mesh: Mesh) -> list[tuple[bool, int, str]]:
    """By rank: are the gathered parameters those of the files, how many numbers does the rank hold, and what is said
    where they cannot be saved? They are also saved into `FOLDER.again`.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.set_forkserver_preload(["torch.distributed.tensor", "ftrain.hf", "sharding.processes"])
    with mp.get_context("forkserver").Manager() as manager:
        found = manager.dict()
        mp.start_processes(_process, args=(mesh, port, folder, cfg, found), nprocs=mesh.size, start_method="forkserver")
        return [found[rank] for rank in range(mesh.size)]


def _process(rank: int, mesh: Mesh, port: int, folder: str, cfg: DecoderConfig, found: dict) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=mesh.size, timeout=timedelta(seconds=30))
    found[rank] = _fill(folder, cfg, mesh)
    dist.destroy_process_group()


def _fill(folder: str, cfg: DecoderConfig, mesh: Mesh) -> tuple[bool, int, str]:
    specs, names = decoder.specs(cfg), decoder_names(cfg)
    step = ftrain.jit(lambda state: state, plan=Plan(mesh, Layout(experts=Exact())), specs=specs)
    params = step.init(lambda key: ftrain.init(specs, key), ftrain.key(0))
    fill_hf(params, folder, names)
    # Through the step: what it computes with is what was filled.
    whole = step.whole(step(params))
    equal = ftrain.tree.map(torch.equal, whole, load_hf(folder, specs, names))
    held = [leaf.to_local() if hasattr(leaf, "to_local") else leaf for leaf in ftrain.tree.leaves(params)]
    return all(ftrain.tree.leaves(equal)), sum(part.numel() for part in held), _save(params, folder, names)


def _save(params: dict, folder: str, names: Names) -> str:
    """Write the parameters again into `FOLDER.again`, after a try in a place where that is not possible; its error."""
    config = json.loads((Path(folder) / "config.json").read_text())
    try:
        save_hf(params, f"{folder}/config.json/no", config, names)
    except (OSError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    save_hf(params, f"{folder}.again", config, names, max_shard="40KB")
    return message
