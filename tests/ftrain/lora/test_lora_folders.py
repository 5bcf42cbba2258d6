"""Folders and files of adapters: the native decoder's, merged ones, ComfyUI's and kohya's, and what is refused."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ftrain
from ftrain import lora, optim, tree
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten
from ftrain.lora.trees import joined
from ftrain.modules.spec import ParamSpec, of, zeros
from ftrain.sharding import Mesh
from tests.helpers import lora_processes
from tests.helpers.adapted_models import SIZES, bridged

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")
# what PEFT itself calls and says of this transformers, and of layouts that it guesses
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOKENS = torch.arange(5, 29)
BATCH = {"tokens": TOKENS, "labels": TOKENS + 1, "segments": torch.zeros(24, dtype=torch.int64)}
MATRICES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def config(kind):
    """A configuration of transformers of which the library has the family too."""
    if kind == "experts":
        own = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
        return transformers.Qwen3MoeConfig(**SIZES, **own)
    return transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")


def saved_model(kind, folder):
    """A folder of weights of transformers."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config(kind)).save_pretrained(folder)
    return folder


def moved(delta):
    """Deltas that are not zero."""
    generator = torch.Generator().manual_seed(2)
    return tree.map(lambda x: x + 0.1 * torch.randn(x.shape, generator=generator), delta)


def scores(module):
    with torch.no_grad():
        return module(TOKENS[None], use_cache=False).logits[0]


@pytest.mark.parametrize("opened", [ftrain.hf.open, from_transformers], ids=["native", "bridged"])
@pytest.mark.parametrize("kind", ["llama", "tied", "experts"])
def test_an_adapter_is_that_of_hugging_faces_model(kind, opened, tmp_path):
    model = opened(saved_model(kind, tmp_path / "base"))
    # transformers 5 keeps experts in one parameter, of which only a bridged model has the same
    targets = ["q_proj", "v_proj"] if kind == "experts" else [*MATRICES, "embed_tokens"]
    adapter = lora.add(model, targets, rank=3, alpha=6)
    base, delta = model.load(), moved(adapter.init(ftrain.key(0)))
    lora.save(delta, adapter, tmp_path / "adapter", base="base")
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(module, tmp_path / "adapter").eval()
    expected = model.logits(lora.bind(base, delta, adapter), BATCH)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-5)
    assert float((model.logits(base, BATCH) - expected).abs().max()) > 1e-3

    found, read = lora.load(tmp_path / "adapter", model, like=adapter)
    assert found.targets == adapter.targets
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(read), tree.leaves(delta), strict=True))

    model.save(lora.merge(base, delta, adapter), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(merged), expected, rtol=0, atol=1e-5)


def test_each_expert_is_a_module_where_names_say_so(tmp_path):
    model = ftrain.hf.open(saved_model("experts", tmp_path))
    assert "native" in model.name
    adapter = lora.add(model, ["gate_proj", "q_proj"], rank=3)
    delta = moved(adapter.init(ftrain.key(0)))
    lora.save(delta, adapter, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.experts.2.gate_proj.lora_A.weight"
    torch.testing.assert_close(held[name], delta["layers"][1]["moe"]["w_gate_EDF_lora"]["A"][2].mT)
    found, read = lora.load(tmp_path, model)
    assert found.targets == adapter.targets
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(read), tree.leaves(delta), strict=True))


def test_one_weight_with_two_deltas_is_refused(tmp_path):
    model = from_transformers(config("tied"))
    adapter = lora.add(model, ["embed_tokens"], rank=3)
    lora.save(moved(adapter.init(ftrain.key(0))), adapter, tmp_path)
    changed_tensors(tmp_path, lambda held: {n: x + 1 if "lm_head.lora_A" in n else x for n, x in held.items()})
    with pytest.raises(ValueError, match="are one weight of this model, and have two deltas"):
        lora.load(tmp_path, model)


@pytest.mark.parametrize("mesh", [Mesh(shard=2, kind="process"), Mesh(shard=2, expert=2, kind="process")], ids=str)
def test_processes_train_write_and_merge_what_one_device_does(mesh, tmp_path):
    told = lora_processes.run(tmp_path / "mesh", mesh)
    tx = optim.adamw(1e-3)
    state = lora_processes.begin(ftrain.key(0), tx)
    lora_processes.write(tmp_path / "one" / "before", state)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        assert filecmp.cmp(tmp_path / "mesh" / "before" / name, tmp_path / "one" / "before" / name, shallow=False), name
    for _ in range(2):
        state = lora_processes.train(state, lora_processes.batch(), tx)
    for divided, delta in told:
        assert divided > 10
        for a, b in zip(tree.leaves(delta), tree.leaves(state.params), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def drawing_model():
    """The weights of a linear layer and a convolution."""
    return {"blocks": [{"q": {"weight": torch.randn(4, 6)}}], "conv": {"weight": torch.randn(6, 3, 3, 3)}}


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_one_file_says_what_is_to_be_added(style, tmp_path):
    params = drawing_model()
    adapter = lora.add(of(params), "**", rank=2, alpha=6, rslora=True)
    delta = moved(adapter.init(ftrain.key(0)))
    lora.save_file(delta, adapter, tmp_path / "a.safetensors", style=style, dtype=torch.float32)
    held = load_file(tmp_path / "a.safetensors")
    names = {"comfyui": ("diffusion_model.blocks.0.q", "diffusion_model.conv", "lora_A", "lora_B"),
             "kohya": ("lora_unet_blocks_0_q", "lora_unet_conv", "lora_down", "lora_up")}[style]  # fmt: skip
    merged = flatten(lora.merge(params, delta, adapter))
    for module, path in zip(names, ("blocks.0.q.weight", "conv.weight"), strict=False):
        down, up = (held[f"{module}.{part}.weight"] for part in names[2:])
        scale = held[f"{module}.alpha"] / down.shape[0]  # as a reader does
        added = (scale * up.flatten(1) @ down.flatten(1)).reshape(merged[path].shape)
        torch.testing.assert_close(flatten(params)[path] + added, merged[path], rtol=0, atol=1e-6)
    assert len(held) == 6


def test_a_convolution_multiplies_by_its_parts():
    params = drawing_model()
    adapter = lora.add(of(params), ["conv"], rank=2, alpha=6, dora=True)
    delta = moved(adapter.init(ftrain.key(0), base=params))
    x = torch.randn(2, 3, 8, 8)
    bound, merged = lora.bind(params, delta, adapter), lora.merge(params, delta, adapter)
    for options in ({}, {"stride": 2, "padding": 1}):
        found = torch.nn.functional.conv2d(x, bound["conv"]["weight"], torch.ones(6), **options)
        expected = torch.nn.functional.conv2d(x, merged["conv"]["weight"], torch.ones(6), **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    """A folder that loads, and its model."""
    case = bridged("llama")
    lora.save(case.adapter.init(ftrain.key(0)), case.adapter, tmp_path / "a")
    return tmp_path / "a", case


def changed_config(folder: Path, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def changed_tensors(folder: Path, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def renamed(old, new):
    return lambda held: {name.replace(old, new): x for name, x in held.items()}


def cut(held):
    return {name: x[:, :-1].contiguous() if "1.self_attn.q_proj.lora_A" in name else x for name, x in held.items()}


def without(part):
    return lambda held: {name: x for name, x in held.items() if part not in name}


def with_another(held):
    return {**held, "x.weight": torch.ones(2)}


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


Q = "model.layers.1.self_attn.q_proj"
BROKEN = {
    "another base": (lambda f: changed_tensors(f, cut), f"'{Q}.weight' of this model, .* of another base"),
    "unknown module": (
        lambda f: changed_tensors(f, renamed("1.self_attn.q_proj", "1.self_attn.qproj")),
        f"the model has not; nearest: '{Q}'",
    ),
    "a part is missing": (
        lambda f: changed_tensors(f, without("1.self_attn.q_proj.lora_B")),
        f"lacks 'base_model.model.{Q}.lora_B.weight'",
    ),
    "not of low rank": (lambda f: changed_tensors(f, with_another), r"'x.weight' of shape \[2\] is no part"),
    "another method": (lambda f: changed_config(f, peft_type="IA3"), "peft_type"),
    "whole modules": (lambda f: changed_config(f, modules_to_save=["lm_head"]), r"'modules_to_save' is \['lm_head'\]"),
    "no rank": (lambda f: changed_config(f, r=-1), "a whole number from 1"),
    "pickle": (pickled, "adapter_model.bin is pickled and is not opened"),
    "damaged": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 40), "damaged"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_does_not_fit_is_refused_by_name(what, saved):
    folder, case = saved
    lora.load(folder, case.specs)
    BROKEN[what][0](folder)
    with pytest.raises(ValueError, match=BROKEN[what][1]):
        lora.load(folder, case.specs)


def test_links_lead_nowhere(saved, tmp_path):
    folder, case = saved
    file = folder / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="is a link to"):
        lora.load(folder, case.specs)


def test_an_adapter_of_another_rank_or_other_targets_is_refused(saved):
    folder, case = saved
    with pytest.raises(ValueError, match="has rank 3 in the folder and rank 2 in the adapter given"):
        lora.load(folder, case.specs, like=lora.add(case.specs, "all-linear", rank=2))
    with pytest.raises(ValueError, match="has rank 3 in the folder and no delta in the adapter given"):
        lora.load(folder, case.specs, like=lora.add(case.specs, ["q_proj"], rank=3))


def test_a_delta_does_not_hide_a_parameter():
    weight = ParamSpec((4, 4), ("any", "any"), zeros())
    with pytest.raises(ValueError, match="has a parameter 'w_lora'"):
        joined({"w": weight, "w_lora": weight}, lora.add({"w": weight}, "w", rank=1).specs)


def test_a_base_of_another_model_is_refused():
    case = bridged("llama")
    delta, base, _ = case.arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no 'model.layers.1.mlp.down_proj.weight' in the tree"):
        lora.bind({"model": {**base["model"], "layers": {"0": base["model"]["layers"]["0"]}}}, delta, case.adapter)
