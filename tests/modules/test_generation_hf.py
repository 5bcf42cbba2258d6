"""Greedy generation equals that of transformers for the same weights: `generate` with its own cache."""

import pytest
import torch

pytest.importorskip("transformers")

from ftrain.modules.generation import generate_text
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Text
from tests.helpers.hf_decoders import V, build, converted

LENGTHS, NEW = (7, 1, 12, 4), 16


def theirs(model, prompt: list[int], stop: int | None = None) -> list[int]:
    """The tokens after one prompt, up to and without `stop`."""
    model.generation_config.eos_token_id = stop
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, use_cache=True)
    made = made[0, len(prompt) :].tolist()
    return made[: made.index(stop)] if stop in made else made


@pytest.mark.parametrize("family", ["llama", "llama-3.1", "mistral", "qwen3", "qwen3-moe", "qwen3-moe-unnormalised"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model, cfg = build(family)
    model.eval()
    params = {"foundation": converted({path: param.detach() for path, param in model.named_parameters()}, cfg)}
    prompts = [torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    want = [theirs(model, prompt) for prompt in prompts]
    assert len({tuple(ids) for ids in want}) == len(prompts)  # a model that says one thing for ever would show nothing
    documents, options = [[Text(prompt)] for prompt in prompts], {"model": OmniModel(cfg), "max_new": NEW}
    assert generate_text(params, documents, **options) == want
    stop = want[0][NEW // 2]
    assert generate_text(params, documents, stop=stop, **options) == [theirs(model, p, stop) for p in prompts]
