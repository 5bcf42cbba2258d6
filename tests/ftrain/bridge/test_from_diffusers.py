"""diffusers' transformers as pure functions: equal to the plain module, on a mesh, and in and out of folders."""

import copy
import filecmp
import json

import pytest
import torch

import ftrain
from ftrain.bridge import from_diffusers
from ftrain.bridge.skeleton import flatten, nest
from ftrain.sharding import Layout, Mesh, Plan

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PIXART = {
    "_class_name": "PixArtTransformer2DModel", "sample_size": 8, "num_layers": 2, "in_channels": 4, "out_channels": 4,
    "cross_attention_dim": 16, "caption_channels": 16, "use_additional_conditions": False, **HEADS,
}  # fmt: skip
MOCHI = {
    "_class_name": "MochiTransformer3DModel", "num_layers": 2, "in_channels": 4, "pooled_projection_dim": 16,
    "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 8, **HEADS,
}  # fmt: skip
QWEN = {
    "_class_name": "QwenImageTransformer2DModel", "num_layers": 1, "in_channels": 16, "out_channels": 4,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8), "num_attention_heads": 1, "attention_head_dim": 16,
}  # fmt: skip
COUNTS = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pictures():
    text = {"encoder_hidden_states": draw(2, 4, 16), "encoder_attention_mask": COUNTS}
    return {"hidden_states": draw(2, 4, 8, 8), "timestep": torch.tensor([10, 700]), "target": draw(2, 4, 8, 8), **text}


def videos():
    return {**pictures(), "hidden_states": draw(2, 4, 2, 4, 4), "target": draw(2, 4, 2, 4, 4)}


def patches():
    text = {"encoder_hidden_states": draw(2, 4, 16), "img_shapes": [(1, 4, 4)] * 2}
    return {"hidden_states": draw(2, 16, 16), "timestep": torch.tensor([0.1, 0.7]), "target": draw(2, 16, 16), **text}


def plain(config, batch):
    """diffusers' own module, its loss and gradients."""
    torch.manual_seed(0)
    module = getattr(diffusers, config["_class_name"]).from_config(dict(config)).train()
    inputs = {name: x for name, x in batch.items() if name != "target"}
    loss = (module(**copy.deepcopy(inputs), return_dict=False)[0] - batch["target"]).square().mean()
    loss.backward()
    return module, loss.detach()


def numbers(module):
    return nest({name: p.detach().clone() for name, p in module.named_parameters()})


def assert_equal(model, batch, module, loss, **options):
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch), **options)
    value, grads = step(numbers(module), batch)
    torch.testing.assert_close(value, loss, rtol=1e-5, atol=1e-6)
    found = flatten(grads)
    largest = max(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)
    for name, p in module.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        assert float((found[name] - own).norm()) <= 1e-5 * largest + 1e-5 * float(own.norm()), name


@pytest.mark.parametrize("options", [{}, {"remat": "layer"}], ids=["kept", "recomputed"])
def test_loss_and_gradients_are_those_of_the_module(options):
    module, loss = plain(PIXART, pictures())
    assert_equal(from_diffusers(PIXART), pictures(), module, loss, **options)


def test_samples_divided_among_ranks():
    module, loss = plain(PIXART, pictures())
    model = from_diffusers(PIXART)
    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    assert_equal(model, pictures(), module, loss, plan=plan, specs=model.specs)


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # diffusers asks for float32, which torch takes for no autocast
def test_prompts_with_holes_need_no_number_on_the_host():
    module, _ = plain(MOCHI, videos())
    model, batch = from_diffusers(MOCHI), videos()
    del batch["target"]
    found = ftrain.jit(lambda params, batch: model.outputs(params, batch))(numbers(module), batch)
    torch.testing.assert_close(found, module(**batch, return_dict=False)[0].detach(), rtol=1e-5, atol=1e-5)


def test_tables_of_places_are_not_kept_from_trace_to_trace():
    model = from_diffusers(QWEN)
    module, loss = plain(QWEN, patches())
    for _ in range(2):  # a new step, and so a new trace, each time
        assert_equal(model, patches(), module, loss)


def test_a_pure_function_of_ones_own():
    module, _ = plain(PIXART, pictures())
    model, batch = from_diffusers(PIXART), pictures()
    target = batch.pop("target")
    found = ftrain.jit(lambda params, batch: model.outputs(params, batch))(numbers(module), batch)
    torch.testing.assert_close(found, module(**batch, return_dict=False)[0].detach(), rtol=1e-5, atol=1e-5)
    assert found.shape == target.shape


def test_nothing_is_allocated():
    wide = {"num_attention_heads": 64, "attention_head_dim": 128, "cross_attention_dim": 8192}
    model = from_diffusers({**PIXART, **wide})
    assert ftrain.modules.spec.count(model.specs) > 1_000_000_000


@pytest.mark.parametrize("most", ["10GB", "20KB"], ids=["one file", "several"])
def test_a_folder_goes_in_and_comes_out(most, tmp_path):
    module, _ = plain(PIXART, pictures())
    module.save_pretrained(tmp_path / "in", max_shard_size=most)
    model = from_diffusers(tmp_path / "in")
    params = model.load()
    assert all(torch.equal(flatten(params)[name], p) for name, p in module.named_parameters())
    model.save(params, tmp_path / "out")
    again, told = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert all(torch.equal(flatten(params)[name], p) for name, p in again.named_parameters())
    if most == "10GB":
        files = sorted(path.name for path in (tmp_path / "in").iterdir())
        assert filecmp.cmpfiles(tmp_path / "in", tmp_path / "out", files, shallow=False) == (files, [], [])


def test_numbers_are_read_into_a_state_that_exists(tmp_path):
    module, _ = plain(PIXART, pictures())
    module.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path)
    params = ftrain.init(model.specs, ftrain.key(0))
    assert model.load(params) is params
    assert all(torch.equal(flatten(params)[name], p) for name, p in module.named_parameters())


def test_half_precision_keeps_what_diffusers_keeps():
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1}
    config = {"_class_name": "WanTransformer3DModel", **HEADS, "attention_head_dim": 12, **sizes}
    specs = flatten(from_diffusers(config, dtype=torch.bfloat16).specs)
    assert specs["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert specs["blocks.0.scale_shift_table"].dtype == torch.float32


def test_ranks_that_share_a_sequence_are_refused_by_name():
    model = from_diffusers(PIXART)
    plan = Plan(Mesh(sequence=2, kind="virtual"), Layout())
    step = ftrain.jit(lambda params, batch: model.loss(params, batch).value(), plan=plan, specs=model.specs)
    with pytest.raises(ValueError, match=r"PixArtTransformer2DModel of diffusers: ranks of a sequence axis cannot"):
        step(ftrain.init(model.specs, ftrain.key(0)), pictures())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.pop("target"), "a loss needs the batch's 'target'"),
        (lambda b: b.pop("hidden_states"), "its forward needs 'hidden_states'"),
        (lambda b: b.update(noise=b["target"]), "has 'noise', which the model does not read"),
        (lambda b: b.update(target=b["target"][:1]), r"prediction has shape \[2, 4, 8, 8\] and .* \[1, 4, 8, 8\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, says):
    model, batch = from_diffusers(PIXART), pictures()
    change(batch)
    with pytest.raises(ValueError, match=says):
        model.loss(ftrain.init(model.specs, ftrain.key(0)), batch)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "OfTomorrow", "_diffusers_version": "9.0"}, "written by diffusers 9.0"),
        ({"_class_name": "AutoModel"}, "knows no model of class 'AutoModel'"),
        ({}, "knows no model of class None"),
        ({**PIXART, "quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantized"),
    ],
)
def test_a_configuration_that_diffusers_does_not_know_is_refused(config, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (config, tmp_path):
        with pytest.raises(ValueError, match=says):
            from_diffusers(source)


def test_a_pipeline_is_refused_with_its_parts(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(PIXART))
    with pytest.raises(ValueError, match="a pipeline of several models: give the folder of one, of transformer"):
        from_diffusers(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    module, _ = plain(PIXART, pictures())
    module.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**PIXART, "num_layers": 1}))
    with pytest.raises(ValueError, match=r"holds 'transformer_blocks\.1.*', which PixArtTransformer2DModel has not"):
        from_diffusers(tmp_path).load()
    (tmp_path / "config.json").write_text(json.dumps({**PIXART, "num_layers": 3}))
    with pytest.raises(ValueError, match=r"has nothing for 'transformer_blocks\.2"):
        from_diffusers(tmp_path).load()
