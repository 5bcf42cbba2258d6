"""CLIP and SigLIP equal transformers' for the same weights: points, loss, every gradient, files; and on meshes."""

import json

import pytest
import torch
from torch.nn.functional import normalize

import ftrain
from ftrain.bridge.described import described
from ftrain.modules import image_text, picture_encoder, spec
from ftrain.modules.families.registry import PAIRED
from ftrain.sharding import Mesh
from tests.helpers import mesh_models
from tests.helpers.text_families import require_equal_gradients, saved

transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {**SIZES, "vocab_size": 40, "max_position_embeddings": 7, "eos_token_id": 39}
EYES = {**SIZES, "image_size": 8, "patch_size": 4}
END = 39


def config(kind, text=None, eyes=None):
    both = {"text_config": {**WORDS, **(text or {})}, "vision_config": {**EYES, **(eyes or {})}}
    if kind == "clip":
        return transformers.CLIPConfig(**both, projection_dim=12)
    return transformers.SiglipConfig(**both)


def random_model(config, seed=0):
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(0.5 * float("norm" in name) + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model


def pairs(count=5, *, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, END, (count, 7), generator=generator)
    ends = torch.randint(2, 7, (count,), generator=generator)
    tokens[torch.arange(count), ends] = END
    tokens[0, 6] = END  # a second end behind the first
    return {"tokens": tokens, "pixels": torch.randn(count, 3, size, size, generator=generator)}


@pytest.mark.parametrize(
    ("kind", "text", "eyes", "seed"),
    [
        ("clip", {}, {}, 0),
        ("clip", {"eos_token_id": 2}, {"hidden_act": "gelu", "hidden_size": 12, "patch_size": 2}, 1),
        ("siglip", {}, {}, 0),
        (
            "siglip",
            {"num_hidden_layers": 1, "max_position_embeddings": 9},
            {"patch_size": 2, "num_hidden_layers": 1},
            1,
        ),
    ],
)
def test_points_loss_and_gradients_are_those_of_transformers(kind, text, eyes, seed, tmp_path):
    model, batch = random_model(config(kind, text, eyes), seed), pairs(seed=seed)
    native = ftrain.hf.open(saved(model, tmp_path / "weights"))
    assert native.why == f"native: {kind} is a family of the library"
    params = native.load()
    spec.check(params, native.specs)
    grads, mean = torch.func.grad_and_value(lambda p: native.loss(p, batch).value())(params)
    wanted = model(input_ids=batch["tokens"], pixel_values=batch["pixels"], return_loss=True)
    assert abs(mean.item() - wanted.loss.item()) < 2e-5
    points = torch.cat([wanted.text_embeds, wanted.image_embeds])
    torch.testing.assert_close(native.hidden(params, batch), points, rtol=0, atol=2e-5)
    native.save(params, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "weights" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    wanted.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    require_equal_gradients(grads, ftrain.hf.open(saved(model, tmp_path / "gradients")).load(), within=1e-4)


def test_a_folder_of_transformers_4_is_read(tmp_path):
    """It says more of each encoder, and holds the numbers of its places."""
    from safetensors.torch import load_file, save_file

    model = random_model(config("clip"))
    told = json.loads((saved(model, tmp_path) / "config.json").read_text())
    said = {"tie_word_embeddings": True, "pruned_heads": {}, "top_k": 50, "return_dict": True, "dropout": 0.0}
    for part in ("text_config", "vision_config"):
        told[part] |= said
    (tmp_path / "config.json").write_text(json.dumps({**told, "text_config_dict": None}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    native = ftrain.hf.open(tmp_path, native="always")
    wanted = model(input_ids=pairs()["tokens"], pixel_values=pairs()["pixels"], return_loss=True).loss
    torch.testing.assert_close(native.loss(native.load(), pairs()).value(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_of_another_size_have_interpolated_places(kind, tmp_path):
    model, batch = random_model(config(kind)), pairs(2, size=12)
    params = ftrain.hf.open(saved(model, tmp_path)).load()
    cfg = PAIRED[kind].config(model.config.to_dict())
    wanted = model.get_image_features(batch["pixels"], interpolate_pos_encoding=True).pooler_output
    found = image_text.picture_points(params, batch["pixels"], cfg)
    torch.testing.assert_close(found, normalize(wanted, dim=-1), rtol=0, atol=2e-5)


def test_pictures_of_any_sizes_side_by_side_are_as_each_alone():
    cfg = PAIRED["siglip"].config(config("siglip").to_dict()).picture
    params = ftrain.init(picture_encoder.specs(cfg), ftrain.key(0))
    pictures = [
        torch.randn(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 8), (12, 4), (16, 20))
    ]
    alone = torch.cat([picture_encoder.apply(params, picture[None], cfg)[0] for picture in pictures])
    laid = picture_encoder.lay(pictures, cfg)
    torch.testing.assert_close(picture_encoder.apply_laid(params, laid, cfg), alone, rtol=0, atol=1e-5)


def test_a_mesh_compares_the_pairs_of_all_ranks(tmp_path):
    small = config("clip", {"num_hidden_layers": 1}, {"num_hidden_layers": 1})
    native = ftrain.hf.open(saved(random_model(small), tmp_path))

    def batch(packs):
        made = pairs(6)
        return {**made, "pixels": made["pixels"].double()}

    made = mesh_models.Model(native.specs, lambda p, b: (native.loss(p, b), ()), batch, dict(native.rules))
    plan = mesh_models.plan_for(made, Mesh(shard=3, kind="virtual"))
    loss, gradients = mesh_models.compare(made, plan, dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_losses_are_what_their_papers_say():
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    own = torch.arange(5)
    both = torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)
    torch.testing.assert_close(image_text.choice_loss(scores).mean(), both / 2)
    signs = 2 * torch.eye(5).double() - 1
    wanted = -torch.nn.functional.logsigmoid(signs * scores).sum() / 5
    torch.testing.assert_close(image_text.pairwise_loss(scores).mean(), wanted)


PUBLISHED = {  # what transformers counts of the models that these configurations describe by what they leave out
    ("clip", "{}"): 151_277_313,  # openai/clip-vit-base-patch32
    ("siglip", "{}"): 203_155_970,  # google/siglip-base-patch16-224
}


@pytest.mark.parametrize(("kind", "entries"), PUBLISHED)
def test_published_models_are_counted_from_their_configuration(kind, entries, tmp_path):
    shared = json.loads(entries)
    text = {"text_config": shared, "vision_config": shared}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **text}))
    assert spec.count(described(tmp_path).specs) == PUBLISHED[kind, entries]


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (
            "siglip",
            lambda b: {**b, "pixels": b["pixels"][:3]},
            r"5 texts and 3 pictures: a text belongs to each picture",
        ),
        ("siglip", lambda b: {**b, "pixels": b["pixels"][..., :7]}, r"sides that are multiples of 4 pixels"),
        ("clip", lambda b: {**b, "pixels": b["pixels"].long()}, r"give floating numbers, normed as the model learned"),
        ("clip", lambda b: {**b, "tokens": b["tokens"].repeat(1, 2)}, r"give tokens \[B, L\] with 1 to 7 tokens"),
        ("clip", lambda b: {**b, "labels": b["tokens"]}, r"has 'labels', which the model does not read"),
    ],
)
def test_what_does_not_fit_is_refused(kind, wrong, says, tmp_path):
    native = ftrain.hf.open(saved(random_model(config(kind)), tmp_path))
    with pytest.raises(ValueError, match=says):
        native.loss(native.load(), wrong(pairs()))


@pytest.mark.parametrize(
    ("kind", "entry", "says"),
    [
        ("siglip", {"vision_use_head": False}, "no picture becomes a point without a head"),
        ("siglip", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not understood"),
        ("clip", {"hidden_act": "silu"}, "hidden_act='silu' is not one of gelu,"),
    ],
)
def test_a_configuration_that_nobody_follows_is_refused(kind, entry, says):
    with pytest.raises(ValueError, match=says):
        PAIRED[kind].config(config(kind, eyes=entry).to_dict())
