"""Adapters of Wan: each form of file is loaded by diffusers or PEFT and equals the merged weights."""

import functools

import pytest
import torch
from safetensors.torch import load_file

import ftrain
from ftrain import lora, tree
from ftrain.bridge.native_wan import native_wan
from ftrain.modules.families.wan_config import config
from ftrain.modules.families.wan_latents import lay
from tests.helpers import tiny_wan
from tests.helpers.tiny_wan import TINY, WITH_IMAGE

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

AUTHORS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
OF_DIFFUSERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
PICTURES = ("k_img", "v_img")


@functools.cache
def adapted(kind, rslora=False):
    """The model, an adapter with open deltas, and the parameters."""
    told = WITH_IMAGE if kind == "image" else TINY
    module, cfg = tiny_wan.module(told), config(told)
    model = native_wan(told)
    targets = [*AUTHORS, *(PICTURES if kind == "image" else ())]
    adapter = lora.add(model, targets, rank=4, alpha=8, rslora=rslora)
    generator = torch.Generator().manual_seed(2)
    moved = lambda x: x + 0.1 * torch.randn(x.shape, generator=generator)  # noqa: E731
    delta = tree.map(moved, adapter.init(ftrain.key(0)))
    return told, model, adapter, tiny_wan.tree_of(module.state_dict(), cfg), delta


def predicted(module, told):
    with torch.no_grad():
        return tiny_wan.theirs(module, tiny_wan.clips(config(told))[0])


def apart(found, wanted):
    """The largest difference, of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@functools.cache
def merged(kind, rslora=False):
    """What diffusers' module with the merged weights predicts."""
    told, model, adapter, base, delta = adapted(kind, rslora)
    module, whole = tiny_wan.module(told), lora.merge(base, delta, adapter)
    by_name = {n.name: n for n in model.names}
    held = dict(ftrain.modules.spec.leaves_with_paths(whole))
    turned = {name: held[n.leaf].mT if n.transposed else held[n.leaf] for name, n in by_name.items()}
    module.load_state_dict(turned)
    return predicted(module, told)


@pytest.mark.parametrize("style", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize(("kind", "rslora"), [("text", False), ("text", True), ("image", False)])
def test_a_file_is_loaded_by_diffusers_pipeline(style, kind, rslora, tmp_path):
    told, _, adapter, _, delta = adapted(kind, rslora)
    name = f"{style}.safetensors"
    lora.save_file(delta, adapter, tmp_path / name, style=style, dtype=torch.float32)
    read = diffusers.WanPipeline.lora_state_dict(tmp_path, weight_name=name, return_lora_metadata=True)
    module = tiny_wan.module(told)
    module.load_lora_adapter(read[0], metadata=read[1], adapter_name="ours")
    found = predicted(module, told)
    assert apart(found, merged(kind, rslora)) < 1e-6
    assert apart(found, predicted(tiny_wan.module(told), told)) > 0.05
    assert len(read[0]) == 2 * len(adapter.targets)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_folder_is_loaded_by_peft(kind, tmp_path):
    told, model, adapter, _, delta = adapted(kind)
    lora.save(delta, adapter, tmp_path, task=None)
    module = peft.PeftModel.from_pretrained(tiny_wan.module(told), tmp_path).base_model.model
    assert apart(predicted(module, told), merged(kind)) < 1e-6
    again, read = lora.load(tmp_path, model, like=adapter)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(read), tree.leaves(delta), strict=True))
    lora.save_file(read, again, tmp_path / "again.safetensors")
    assert "diffusion_model.blocks.1.cross_attn.o.lora_A.weight" in load_file(tmp_path / "again.safetensors")


def test_what_is_bound_is_what_is_merged():
    told, model, adapter, base, delta = adapted("image")
    batch = lay([tiny_wan.clips(config(told))], config(told))
    found = model.outputs(lora.bind(base, delta, adapter), batch)
    torch.testing.assert_close(found, model.outputs(lora.merge(base, delta, adapter), batch), rtol=0, atol=1e-5)


def test_targets_have_the_names_of_either():
    _, model, _, _, _ = adapted("text")
    both = [lora.add(model, names, rank=4) for names in (AUTHORS, OF_DIFFUSERS)]
    assert both[0].targets == both[1].targets
    assert len(both[0].targets) == 2 * 10
    (path,) = {t.path.split(".", 2)[2] for t in lora.add(model, "self_attn.q", rank=2).targets}
    assert path == "attention.w_q_DHK"
    numbers = ftrain.modules.spec.count(both[0].specs)
    assert numbers == 2 * 4 * (8 * (40 + 40) + 2 * (40 + 48))
