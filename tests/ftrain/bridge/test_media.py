"""Language models with pictures among their tokens: equal to the plain module, and their shapes are data of a step.

Legend: B rows, L tokens of a row.
"""

import copy

import pytest
import torch

import ftrain
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest, parameters
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5.24")

IMAGE, START, END = 60, 61, 62
WORDS = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "num_key_value_heads": 1, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
EYES = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 2}
NAMES = {"input_ids": "tokens", "pixel_values": "pixels"}
SHARD = Plan(Mesh(shard=2, kind="virtual"), Layout())
WIDE, TALL = [[1, 4, 8], [1, 8, 4]], [[1, 8, 4], [1, 2, 16]]


def seeing():
    """Pictures in windows, at places of three numbers."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eyes = {**EYES, "depth": 2, "fullatt_block_indexes": [1], "window_size": 8, "out_hidden_size": 16}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 63}
    return transformers.Qwen2_5_VLConfig(
        text_config={**WORDS, "rope_parameters": rope}, vision_config={**eyes, "model_type": "qwen2_5_vl"}, **ids
    )


def marking():
    """Hidden states that are read and written at the places of pictures, and a table of places that is resampled."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eyes = {**EYES, "depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "out_hidden_size": 16}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 63}
    return transformers.Qwen3VLConfig(
        text_config={**WORDS, "head_dim": 8, "rope_parameters": rope}, vision_config=eyes, **ids
    )


def rows(grid, *, seed=0, tokens=(8, 8)):
    """A row for each picture: text, the picture's tokens, text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 50, (2, 20), generator=generator)
    ids = words.clone()
    for row, count in enumerate(tokens):
        ids[row, 3], ids[row, 4 : 4 + count], ids[row, 4 + count] = START, IMAGE, END
    labels = torch.where(ids < IMAGE, words, -100)
    grid = torch.tensor(grid)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 2 * 2, generator=generator)
    kinds = (ids == IMAGE).long()
    given = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_grid_thw": grid}
    return {**given, "mm_token_type_ids": kinds}


def plain(config):
    torch.manual_seed(0)
    auto = transformers.AutoModelForImageTextToText
    return auto.from_config(copy.deepcopy(config), attn_implementation="eager").train()


def expected(module, batch):
    module.zero_grad()
    given = {name: x for name, x in batch.items() if name != "labels"}
    scores = module(**given, use_cache=False).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, batch["labels"].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters()}


def numbers(module):
    return nest({name: p.detach().clone() for name, p in parameters(module).items()})


def prepared(model, batch):
    return model.media({NAMES.get(name, name): x for name, x in batch.items()})


def step(model, **options):
    return ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch), **options)


def require_equal(found, wanted):
    (loss, grads), (value, plains) = found, wanted
    torch.testing.assert_close(loss, value)
    for name, grad in flatten(grads).items():
        own = plains[name]
        torch.testing.assert_close(grad, torch.zeros_like(grad) if own is None else own, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", [seeing, marking])
@pytest.mark.parametrize("where", ["one device", "recompute", "shard"])
def test_rows_with_pictures_are_those_of_the_plain_module(config, where):
    module, model = plain(config()), from_transformers(config(), task="image_text_to_text")
    options = {"recompute": {"remat": "layer"}, "shard": {"plan": SHARD, "specs": model.specs}}.get(where, {})
    found = step(model, **options)(numbers(module), prepared(model, rows(WIDE)))
    require_equal(found, expected(module, rows(WIDE)))


def test_hidden_states_that_a_model_collects_with_hooks_are_the_same_at_every_call():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**WORDS), image_token_index=IMAGE, vision_feature_select_strategy="full",
        vision_config=transformers.SiglipVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                      intermediate_size=24, image_size=8, patch_size=4),
    )  # fmt: skip
    module, model = plain(config), from_transformers(config, task="image_text_to_text")
    batch = rows(WIDE, tokens=(4, 4))
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "pixel_values": torch.randn(2, 3, 8, 8)}
    wanted = expected(module, batch)
    for _ in range(2):
        require_equal(step(model)(numbers(module), prepared(model, batch)), wanted)


def test_shapes_of_pictures_are_data_of_a_step():
    module, model = plain(seeing()), from_transformers(seeing(), task="image_text_to_text")
    run = step(model)
    for grid in (WIDE, TALL, WIDE):
        require_equal(run(numbers(module), prepared(model, rows(grid))), expected(module, rows(grid)))
    assert run.traces == 1


def test_rows_with_more_or_less_of_pictures_run_on_one_device_and_on_a_mesh_are_refused():
    grid = [[1, 4, 4], [1, 8, 6]]
    batch = rows(grid, tokens=(4, 12))
    module, model = plain(seeing()), from_transformers(seeing(), task="image_text_to_text")
    require_equal(step(model)(numbers(module), prepared(model, batch)), expected(module, batch))
    with pytest.raises(ValueError, match=r"'batch\.labels' has 2 entries and 'batch\.media"):
        step(model, plan=SHARD, specs=model.specs)(numbers(module), prepared(model, batch))


def test_tokens_and_places_of_pictures_that_are_not_equally_many_are_refused():
    model = from_transformers(seeing(), task="image_text_to_text")
    with pytest.raises(ValueError, match="the batch has 15 tokens of images, and its images have 16 places"):
        prepared(model, rows(WIDE, tokens=(8, 7)))


def test_features_without_as_many_tokens_give_no_number():
    model = from_transformers(seeing(), task="image_text_to_text")
    params = ftrain.init(model.specs, ftrain.key(0))
    batch = prepared(model, rows(WIDE))
    changed = {**batch, "tokens": torch.where(batch["tokens"] == END, IMAGE, batch["tokens"])}
    run = ftrain.jit(lambda params, batch: model.loss(params, batch).value())
    assert run(params, batch).isfinite()
    assert run(params, changed).isnan()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.loss(params, changed)


def test_ranks_of_a_sequence_and_packs_are_refused():
    model = from_transformers(seeing(), task="image_text_to_text")
    params = ftrain.init(model.specs, ftrain.key(0))
    batch = prepared(model, rows(WIDE))
    plan = Plan(Mesh(sequence=2, kind="virtual"), Layout())
    with pytest.raises(ValueError, match="divide rows among data axes"):
        step(model, plan=plan, specs=model.specs)(params, batch)
    with pytest.raises(ValueError, match="documents cannot share its tokens"):
        model.loss(params, {"tokens": batch["tokens"][0], "labels": batch["labels"][0]})


def test_shapes_that_a_tower_reads_in_a_way_of_its_own_are_refused_by_name():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Glm4vConfig(
        text_config={**WORDS, "rope_parameters": rope},
        vision_config={**EYES, "depth": 1, "image_size": 8, "out_hidden_size": 16},
        image_token_id=IMAGE, image_start_token_id=START, image_end_token_id=END, video_token_id=63,
    )  # fmt: skip
    model = from_transformers(config, task="image_text_to_text")
    params = ftrain.init(model.specs, ftrain.key(0))
    with pytest.raises(ValueError, match="it reads the shapes of its pictures"):
        model.loss(params, prepared(model, rows(WIDE)))
