"""Pictures and recordings: transformers' encoders as pure functions, equal to the plain module, in and out of folders.

Legend: B rows.
"""

import copy

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.bridge import check, from_transformers
from ftrain.bridge.skeleton import flatten, nest, parameters
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")

ROWS = 4
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
WAVES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 12,
    "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "pad_token_id": 0, "layerdrop": 0.0,
}  # fmt: skip


def vit():
    return transformers.ViTConfig(**VIT)


def resnet():
    return transformers.ResNetConfig(**STAGES)


def wav2vec2(**options):
    return transformers.Wav2Vec2Config(**WAVES, **options)


def pictures(size=16):
    pixels = torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixels": pixels, "labels": torch.arange(ROWS) % 2}


def recordings():
    sound = torch.randn(ROWS, 200, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200) < torch.tensor([200, 160, 200, 130])[:, None]
    labels = torch.tensor([[3, 4, 3], [5, 5, -100], [6, -100, -100], [7, 8, 9]])
    return {"sound": sound * mask, "mask": mask, "labels": labels}


def plain(auto, config):
    torch.manual_seed(0)
    return auto.from_config(copy.deepcopy(config), attn_implementation="eager").train()


def numbers(module):
    return nest({name: p.detach().clone() for name, p in parameters(module).items()})


def step(model, **options):
    return ftrain.jit(lambda params, batch, key=None: ftrain.value_and_grad(model.loss)(params, batch, key), **options)


@pytest.mark.parametrize("plan", [None, Plan(Mesh(shard=2, kind="virtual"), Layout())], ids=["one device", "shard"])
def test_classes_of_pictures_are_those_of_the_plain_module(plan):
    found = check(from_transformers(vit(), task="image_classification"), pictures(), plan=plan)
    assert found.equal, str(found)


def test_texts_of_recordings_of_several_lengths_are_those_of_the_plain_module():
    undropped = dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout"), 0.0)
    config = wav2vec2(
        **undropped, feat_extract_norm="layer", do_stable_layer_norm=True, ctc_loss_reduction="sum", mask_time_prob=0.0
    )
    module = plain(transformers.AutoModelForCTC, config)
    batch = recordings()
    out = module(batch["sound"], attention_mask=batch["mask"].long(), labels=batch["labels"])
    tokens = int((batch["labels"] >= 0).sum())
    (out.loss / tokens).backward()
    value, grads = step(from_transformers(config, task="ctc"))(numbers(module), batch)
    torch.testing.assert_close(value, out.loss.detach() / tokens)
    for name, grad in flatten(grads).items():
        expected = dict(module.named_parameters())[name].grad
        torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected, rtol=1e-4, atol=1e-6)


def test_features_are_those_of_the_plain_module_and_have_no_loss():
    config = transformers.CLIPVisionConfig(**VIT)
    module = plain(transformers.AutoModel, config)
    model = from_transformers(config, task="features")
    found = model.hidden(numbers(module), {"pixels": pictures()["pixels"]})
    torch.testing.assert_close(found, module(pictures()["pixels"]).last_hidden_state)
    with pytest.raises(ValueError, match="features have no loss: make one of"):
        model.loss(numbers(module), {"pixels": pictures()["pixels"]})


def test_statistics_of_the_batch_come_back_and_go_in_and_out_of_a_folder(tmp_path):
    module = plain(transformers.AutoModelForImageClassification, resnet())
    model = from_transformers(resnet(), task="image_classification")
    params, state = numbers(module), model.state
    expected = torch.nn.functional.cross_entropy(module(pictures(32)["pixels"]).logits, pictures()["labels"])
    mean, state = model.loss(params, pictures(32), None, state)
    torch.testing.assert_close(mean.value(), expected)
    buffers = dict(module.named_buffers())
    for name, x in flatten(state).items():
        torch.testing.assert_close(x, buffers[name], msg=name)
    model.save(params, tmp_path, state)
    again = from_transformers(tmp_path, task="image_classification")
    assert all(torch.equal(x, flatten(state)[name]) for name, x in flatten(again.state).items())
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(x, flatten(state)[name]) for name, x in theirs.named_buffers() if name in flatten(state))


def test_tables_that_are_not_trained_are_no_parameters_and_have_the_numbers_of_the_module():
    config = transformers.WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
                                        num_mel_bins=4, max_source_positions=10, pad_token_id=0)  # fmt: skip
    module = plain(transformers.AutoModelForAudioClassification, config)
    model = from_transformers(config, task="audio_classification")
    assert "encoder.embed_positions.weight" in dict(module.named_parameters())
    assert "encoder.embed_positions.weight" not in flatten(model.specs)
    sound = torch.randn(2, 4, 20)
    torch.testing.assert_close(model.logits(numbers(module), {"sound": sound}), module(sound).logits)


def test_initial_numbers_that_only_a_constructor_gives_are_kept():
    config = transformers.BeitConfig(**VIT, layer_scale_init_value=0.1)
    inits = {path: spec.init for path, spec in flatten(from_transformers(config, task="features").specs).items()}
    scale = next(init for path, init in inits.items() if path.endswith("lambda_1"))
    assert abs(scale.value - 0.1) < 1e-6
    params = ftrain.init(from_transformers(wav2vec2(), task="ctc").specs, ftrain.key(0))
    assert all(x.isfinite().all() for x in tree.leaves(params))
    found = from_transformers(wav2vec2(), task="ctc").logits(params, {"sound": recordings()["sound"]})
    assert found.isfinite().all()  # a weight that is divided by its norm begins with none that is zero


def test_dropped_paths_draw_from_the_key_and_are_the_same_under_recompute_and_on_a_mesh():
    config = transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=2,
                                     drop_path_rate=0.5)  # fmt: skip
    model = from_transformers(config, task="image_classification")
    params = ftrain.init(model.specs, ftrain.key(0))
    first = step(model)(params, pictures(), ftrain.key(1))
    again = step(model, remat="all")(params, pictures(), ftrain.key(1))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(again), strict=True))
    assert float(step(model)(params, pictures(), ftrain.key(2))[0]) != float(first[0])
    on_mesh = step(model, plan=Plan(Mesh(shard=2, kind="virtual"), Layout()), specs=model.specs)
    torch.testing.assert_close(on_mesh(params, pictures(), ftrain.key(1))[0], first[0])
    assert float(step(model)(params, pictures())[0]) != float(first[0])


def test_masks_of_features_that_numpy_draws_are_off_without_a_key_and_refused_with_one():
    model = from_transformers(wav2vec2(mask_time_prob=0.5, mask_time_length=2), task="ctc")
    params = ftrain.init(model.specs, ftrain.key(0))
    batch = {name: x for name, x in recordings().items() if name != "mask"}
    assert torch.equal(step(model)(params, batch)[0], step(model)(params, batch)[0])
    with pytest.raises(ValueError, match="random"):
        step(model)(params, batch, ftrain.key(1))


def test_rows_on_a_sequence_axis_are_refused():
    model = from_transformers(vit(), task="image_classification")
    params = ftrain.init(model.specs, ftrain.key(0))
    plan = Plan(Mesh(sequence=2, kind="virtual"), Layout())
    with pytest.raises(ValueError, match="its batch is rows"):
        step(model, plan=plan, specs=model.specs)(params, pictures())


def test_labels_that_do_not_fit_are_refused():
    model = from_transformers(vit(), task="image_classification")
    params = ftrain.init(model.specs, ftrain.key(0))
    with pytest.raises(ValueError, match=r"'labels' have shape \[4, 1\], and the scores are of \[4\]"):
        model.loss(params, {**pictures(), "labels": torch.zeros(4, 1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="the batch has no 'pixels'"):
        model.loss(params, {"labels": torch.zeros(4, dtype=torch.int64)})
