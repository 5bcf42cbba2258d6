"""Tiny talkers of transformers with random weights, their documents, and the same in our trees."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.hf import load_hf, save_hf
from ftrain.hf.files import HfFolder
from ftrain.modules import spec
from ftrain.modules.hf_names import Names
from tests.helpers.text_families import require_equal_gradients, saved

WIDTH, GROUPS, CODES = 16, 4, 12
"""Of the thinker's rows; codes of a frame; codes of each codebook."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "interleaved": True}
STACK = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_parameters": ROPE,
}
PREDICTOR = {
    "vocab_size": CODES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_code_groups": GROUPS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SPEECH = {
    "num_code_groups": GROUPS,
    "thinker_hidden_size": WIDTH,
    "accept_hidden_layer": 1,
    "codec_pad_id": 13,
    "codec_bos_id": 14,
    "codec_eos_token_id": 15,
    "codec_nothink_id": 16,
    "codec_think_bos_id": 17,
    "codec_think_eos_id": 18,
    "speaker_id": {"ethan": 20, "chelsie": 21},
    "spatial_merge_size": 2,
    "position_id_per_seconds": 13,
}
DOCUMENTS = ((6, 5), (3, 1), (9, 4), (4, 0))
"""Tokens of the prompt and frames of each document."""


def config(*, stack: Any = None, predictor: Any = None, **speech: Any) -> Any:
    """A configuration of transformers' Qwen3-Omni talker."""
    import transformers

    return transformers.Qwen3OmniMoeTalkerConfig(
        text_config={**STACK, **(stack or {})},
        code_predictor_config={**PREDICTOR, **(predictor or {})},
        **{**copy.deepcopy(SPEECH), **speech},
    )


def random_model(kind: Any, given: Any, seed: int = 0) -> Any:
    """transformers' module of a configuration, eager, in float32, every parameter random."""
    given = copy.deepcopy(given)
    model = kind._from_config(given, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            leaf.copy_(float("norm" in path) * 0.5 + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model


def document(prompt: int, frames: int, *, seed: int) -> dict[str, Any]:
    """A document of a talker: words and media of a prompt, then frames; places on three axes that differ."""
    generator = torch.Generator().manual_seed(seed)
    length = prompt + frames
    codes_NG = torch.randint(0, CODES, (frames, GROUPS), generator=generator)
    first = torch.full((length,), -1)
    first[prompt - 1] = SPEECH["codec_bos_id"]
    first[prompt:] = codes_NG[:, 0]
    labels = torch.full((length,), -100)
    labels[prompt - 1 :] = torch.cat([codes_NG[:, 0], torch.tensor([SPEECH["codec_eos_token_id"]])])
    place = torch.arange(length)[:, None] + torch.randint(0, 2, (length, 3), generator=generator)
    return {
        "rows": torch.randn(length, WIDTH, generator=generator),
        "words": torch.where((torch.arange(length) % 3 == 0) & (torch.arange(length) < prompt - 1), -1, 7),
        "codes": first,
        "positions": place,
        "labels": labels,
        "frames": {"codes": codes_NG, "index": torch.arange(prompt, length)},
    }


def pack(given: Sequence[dict[str, Any]], *, tokens: int | None = None, frames: int | None = None) -> dict[str, Any]:
    """One pack of documents, filled up to `tokens` and `frames`."""
    given = list(given)
    lengths = [len(one["codes"]) for one in given]
    if tokens is not None:
        rest = tokens - sum(lengths)
        nothing = document(rest, 0, seed=99)
        given.append({**nothing, "labels": torch.full((rest,), -100)})
        lengths.append(rest)
    begin, rows = 0, list[Tensor]()
    for one, length in zip(given, lengths, strict=True):
        rows.append(one["frames"]["index"] + begin)
        begin += length
    made: dict[str, Any] = {name: torch.cat([one[name] for one in given]) for name in given[0] if name != "frames"}
    codes, index = torch.cat([one["frames"]["codes"] for one in given]), torch.cat(rows)
    spare = 0 if frames is None else frames - len(index)
    codes = torch.cat([codes, torch.full((spare, GROUPS), -1)])
    made["frames"] = {"codes": codes, "index": torch.cat([index, torch.full((spare,), begin)])}
    return {**made, "segments": torch.repeat_interleave(torch.tensor(lengths))}


def theirs(model: Any, one: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' scores of one document, and the sums of the two cross entropies, by its modules one by one."""
    rest, tables = one["frames"]["codes"][:, 1:], model.code_predictor.get_input_embeddings()
    x = torch.where(one["words"][:, None] < 0, model.hidden_projection(one["rows"]), model.text_projection(one["rows"]))
    coded = one["codes"] >= 0
    x = x + model.get_input_embeddings()(one["codes"].clamp(min=0)) * coded[:, None]
    if len(rest):
        added = torch.stack([table(rest[:, g]) for g, table in enumerate(tables)]).sum(0)
        x = x.index_add(0, one["frames"]["index"], added)
    hidden = model.model(inputs_embeds=x[None], position_ids=one["positions"].T[:, None], use_cache=False)[0][0]
    scores = model.codec_head(hidden)
    entropy = torch.nn.functional.cross_entropy
    found = {"codes": entropy(scores, one["labels"], ignore_index=-100, reduction="sum"), "residuals": scores.sum() * 0}
    if len(rest):
        found["residuals"] = residuals(model, hidden[one["frames"]["index"] - 1], one["frames"]["codes"])
    return scores, found


def residuals(model: Any, states: Tensor, codes: Tensor) -> Tensor:
    """The sum of the cross entropies of the codes behind the first, by transformers' code predictor."""
    tables, found = model.code_predictor.get_input_embeddings(), torch.zeros(())
    first = model.get_input_embeddings()(codes[:, 0])
    for g in range(1, GROUPS):  # one prefix after the other, as in generation
        before = [tables[k - 1](codes[:, k]) for k in range(1, g)]
        logits = model.code_predictor(inputs_embeds=torch.stack([states, first, *before], 1), use_cache=False).logits
        found = found + torch.nn.functional.cross_entropy(logits[:, -1].float(), codes[:, g], reduction="sum")
    return found


def as_ours(model: Any, folder: Path, family: Any, *, told: bool = True) -> tuple[Any, Any, Names, HfFolder]:
    """Configuration, parameters, names and folder of a module of transformers that was saved there.

    `told`: the family looks at the shapes of the folder's tensors.
    """
    found = HfFolder.open(saved(model, folder))
    shapes = {name: stored.shape for name, stored in found.tensors.items()}
    cfg = family.config(found.config(), **({"shapes": shapes} if told else {}))
    names = family.names(cfg, *([shapes] if told else []))
    params = load_hf(found, family.specs(cfg), names)
    spec.check(params, family.specs(cfg))
    return cfg, params, names, found


def require_saved_as_it_was(params: Any, names: Names, folder: HfFolder, again: Path) -> None:
    """What is saved of untouched weights is, to the byte, what transformers wrote: weights and configuration."""
    save_hf(params, again, folder.config(), names)
    for file in ("model.safetensors", "config.json"):
        assert (folder.path / file).read_bytes() == (again / file).read_bytes()


def gradients_of(model: Any, folder: Path, specs: Any, names: Names) -> Any:
    """The gradients that a module of transformers holds, as our tree."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return load_hf(saved(model, folder), specs, names)


__all__ = ["require_equal_gradients"]
