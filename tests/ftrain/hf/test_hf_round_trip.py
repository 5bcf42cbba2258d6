"""What transformers saves, we load, compute with and save again: equal files, and equal answers."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from ftrain.hf import HfFolder, load_hf, save_hf
from ftrain.modules import decoder
from ftrain.modules.hf_config import decoder_config, hf_config
from ftrain.modules.hf_names import decoder_names, under
from tests.helpers.hf_twins import FAMILIES, V, build, specs

# Written by transformers for its own generate(); nothing of it is in the weights.
NOT_OURS = {"generation_config.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in NOT_OURS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard", ["40KB", "5GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_come_out_as_save_pretrained_wrote_them(
    family: str, max_shard: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, cfg = build(family, dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard)
    here = HfFolder.open(tmp_path / "theirs")

    params = load_hf(here, specs(cfg, dtype), decoder_names(cfg))
    config = hf_config(cfg, base=here.config())
    save_hf(params, tmp_path / "ours", config, decoder_names(cfg), max_shard=max_shard)

    theirs = contents(tmp_path / "theirs")
    assert len(theirs) > 4 if max_shard == "40KB" else len(theirs) == 2
    assert contents(tmp_path / "ours") == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_and_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model, expected = build(family)
    model.save_pretrained(tmp_path)
    cfg = decoder_config(HfFolder.open(tmp_path).config())
    assert cfg == expected
    params = load_hf(tmp_path, decoder.specs(cfg), decoder_names(cfg))

    tokens = torch.randint(1, V, (30,), generator=torch.Generator().manual_seed(1))
    hidden, _ = decoder.apply(params, tokens, positions=torch.arange(30), segments=None, cfg=cfg)
    with torch.no_grad():
        theirs = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(decoder.logits(params, hidden, cfg), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_save_without_a_file_of_theirs(family: str, tmp_path: Path) -> None:
    import transformers

    from ftrain.kernels import random
    from ftrain.modules import spec

    cfg = FAMILIES[family][2]
    params = spec.init(decoder.specs(cfg), random.key(3))
    save_hf(params, tmp_path, hf_config(cfg), decoder_names(cfg), max_shard="40KB")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.randint(1, V, (30,), generator=torch.Generator().manual_seed(1))
    hidden, _ = decoder.apply(params, tokens, positions=torch.arange(30), segments=None, cfg=cfg)
    with torch.no_grad():
        theirs = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(decoder.logits(params, hidden, cfg), theirs, rtol=1e-4, atol=1e-4)


def test_float_weights_are_cast_to_the_dtypes_of_the_specs_and_back(tmp_path: Path) -> None:
    model, cfg = build("qwen3-moe", torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    params = load_hf(tmp_path / "theirs", specs(cfg, torch.float32), decoder_names(cfg))
    assert {leaf.dtype for layer in params["layers"] for leaf in layer["moe"].values()} == {torch.float32}
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    save_hf(params, tmp_path / "ours", config, decoder_names(cfg), dtype=torch.bfloat16)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_a_decoder_is_a_branch_of_a_larger_tree(tmp_path: Path) -> None:
    _, cfg = build("qwen3-moe")
    names = under(decoder_names(cfg), "foundation", name="thinker.")
    params = {"foundation": load_branch(cfg, tmp_path / "alone")}
    save_hf(params, tmp_path / "within", {}, names, max_shard="40KB")
    loaded = load_hf(tmp_path / "within", {"foundation": decoder.specs(cfg)}, names)
    assert all(
        name.startswith("thinker.model.") for name in HfFolder.open(tmp_path / "within").tensors if "head" not in name
    )
    torch.testing.assert_close(loaded, params, rtol=0, atol=0)


def load_branch(cfg, folder: Path):
    model, _ = build("qwen3-moe")
    model.save_pretrained(folder)
    return load_hf(folder, decoder.specs(cfg), decoder_names(cfg))
