"""Several gloo processes that fill the parameters of one model, for test_hf_processes."""

import json
from pathlib import Path

import torch

import ftrain
from ftrain.hf import fill_hf, load_hf, save_hf
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_names import Names, decoder_names
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.layout import Dropless
from tests.helpers import rank_processes


def run(folder: str, cfg: DecoderConfig, mesh: Mesh) -> list[tuple[bool, int, str]]:
    """By rank: are the gathered parameters those of the files, how many numbers does the rank hold, and what is said
    where they cannot be saved? They are also saved into `FOLDER.again`.
    """
    found = rank_processes.run(_fill_and_tell, mesh.size, folder, cfg, mesh)
    return [found[rank] for rank in range(mesh.size)]


def _fill_and_tell(rank: int, folder: str, cfg: DecoderConfig, mesh: Mesh, found: dict) -> None:
    found[rank] = _fill(folder, cfg, mesh)


def _fill(folder: str, cfg: DecoderConfig, mesh: Mesh) -> tuple[bool, int, str]:
    specs, names = decoder.specs(cfg), decoder_names(cfg)
    step = ftrain.jit(lambda state: state, plan=Plan(mesh, Layout(experts=Dropless())), specs=specs)
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
