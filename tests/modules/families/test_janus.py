"""Janus equals transformers' for the same weights: what it sees, draws, writes; its folders; and on meshes itself."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import ftrain
from ftrain.bridge.described import described
from ftrain.cli.lora_flags import LoraFlags
from ftrain.cli.recipes import recipe_of
from ftrain.cli.train_options import KINDS, Sft
from ftrain.kernels.documents import Documents
from ftrain.modules import janus_generation, spec, vq_image
from ftrain.modules.autoregression import generate, generate_ids
from ftrain.modules.families import janus
from ftrain.modules.janus_media import prepare
from ftrain.run.data import DataOptions
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models
from tests.helpers.text_families import require_equal_gradients, saved

transformers = pytest.importorskip("transformers", minversion="5.24")

PAD, BOS, BEGIN, IMAGE, VOCAB = 0, 1, 38, 39, 40
WORDS = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
EYES = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "projection_dim": 16, "num_image_tokens": 4, "mlp_ratio": 2.0,
}  # fmt: skip
HAND = {
    "embed_dim": 4, "num_embeddings": 12, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1, "projection_dim": 16, "image_token_embed_dim": 16,
}  # fmt: skip
MIXED = ((4, "see", 3, "see", 2), (6,), (3, "draw", 2), (2, "draw"))


def config(*, layers=2, tied=False, times=(1, 2), **eyes):
    hand = {**HAND, "channel_multiplier": list(times)}
    parts = {"vision_config": {**EYES, "num_hidden_layers": layers, **eyes}, "vq_config": hand}
    words = {**WORDS, "num_hidden_layers": layers}
    return transformers.JanusConfig(text_config=words, **parts, image_token_id=IMAGE, tie_word_embeddings=tied)


def random_model(config, seed=0):
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            leaf.copy_(0.5 * float("norm" in path) + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model


def document(parts, seed=0):
    """Raw leaves: random words, pictures that are seen, and codes of those that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids, found = [BOS], {}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(2, BEGIN, (part,), generator=generator).tolist()
            continue
        ids += [BEGIN, *[IMAGE] * 4]
        if part == "see":
            found.setdefault("pixels", []).append(torch.randn(1, 3, 8, 8, generator=generator))
        else:
            found.setdefault("codes", []).append(torch.randint(0, 12, (1, 4), generator=generator))
        found.setdefault("drawn", []).append(torch.tensor([part == "draw"]))
    tokens = torch.tensor(ids)
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    labels[labels >= BEGIN] = -100
    return {"tokens": tokens, "labels": labels, **{name: torch.cat(leaves) for name, leaves in found.items()}}


def pack(given, *, length=None):
    made = {"segments": torch.repeat_interleave(torch.tensor([len(one["tokens"]) for one in given]))}
    for name in dict.fromkeys(name for one in given for name in one):
        made[name] = torch.cat([one[name] for one in given if name in one])
    if length is not None:
        rest = length - len(made["tokens"])
        fill = {"tokens": 0, "labels": -100, "segments": 99}
        made |= {name: torch.cat([made[name], torch.full((rest,), value)]) for name, value in fill.items()}
    return made


def theirs(model, one):
    """transformers' hidden states `[T, D]` of a document."""
    body = model.model
    if "codes" not in one:
        return body(input_ids=one["tokens"][None], pixel_values=one.get("pixels"), use_cache=False).last_hidden_state[0]
    rows = body.get_input_embeddings()(one["tokens"])
    rows = rows.index_put((one["tokens"] == IMAGE,), model.prepare_embeddings_for_image_generation(one["codes"])[0])
    return body.language_model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    ("parts", "options", "seed"),
    [(MIXED, {}, 0), ((("see",), (3, "see", 1)), {"tied": True}, 1), (((1, "draw"), (2, "draw", 4)), {"depth": 3}, 2)],
)
def test_losses_and_gradients_are_those_of_transformers(parts, options, seed, tmp_path):
    model, given = random_model(config(**options), seed), [document(own, seed=i) for i, own in enumerate(parts)]
    native = ftrain.hf.open(saved(model, tmp_path / "weights"))
    assert native.why == "native: janus is a family of the library"
    params, batch = native.load(), native.media(pack(given))
    spec.check(params, native.specs)
    grads, loss = torch.func.grad_and_value(lambda p: native.loss(p, batch).value())(params)
    hidden = [theirs(model, one) for one in given]
    scores = model.lm_head(torch.cat(hidden))
    wanted = cross_entropy(scores, torch.cat([one["labels"] for one in given]))
    before = [
        h[(one["tokens"] == IMAGE).nonzero()[:, 0] - 1] for h, one in zip(hidden, given, strict=True) if "codes" in one
    ]
    if before:
        codes = torch.cat([one["codes"].flatten() for one in given if "codes" in one])
        wanted = wanted + cross_entropy(model.model.generation_head(torch.cat(before)), codes)
    assert abs(loss.item() - wanted.item()) < 2e-5
    torch.testing.assert_close(native.logits(params, batch), scores, rtol=0, atol=2e-5)
    native.save(params, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "weights" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    wanted.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    require_equal_gradients(grads, ftrain.hf.open(saved(model, tmp_path / "gradients")).load(), within=1e-4)


def test_a_folder_that_says_nothing_of_tying_has_the_head_that_it_holds(tmp_path):
    model = random_model(config(layers=1))
    told = json.loads((saved(model, tmp_path) / "config.json").read_text())
    del told["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    native = ftrain.hf.open(tmp_path, native="always")
    torch.testing.assert_close(native.load()["text"]["head"]["w_DV"].mT, model.lm_head.weight, rtol=0, atol=0)


def test_it_writes_and_draws_what_transformers_does(tmp_path):
    """Greedily, prompts of different kinds and lengths side by side; transformers cannot draw without guidance."""
    model = random_model(config(), 2)
    with torch.no_grad():  # let what was drawn decide what is drawn
        model.model.generation_head.vision_head.bias.zero_()
        model.model.generation_embeddings.weight.mul_(5)
    native = ftrain.hf.open(saved(model, tmp_path))
    params, cfg = native.load(), janus.config(model.config.to_dict())
    prompts = [document(own, seed=i) for i, own in enumerate(((2, "see", 3), (5,), ("see", 1, "see", 1)))]
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    wanted = []
    for one in prompts:
        given = {
            "input_ids": one["tokens"][None],
            "attention_mask": torch.ones(1, len(one["tokens"]), dtype=torch.int64),
        }
        if "pixels" in one:
            given["pixel_values"] = one["pixels"]
        made = model.generate(**given, generation_mode="text", max_new_tokens=5, **options)
        wanted.append(made[0, len(one["tokens"]) :].tolist())
    assert generate(params, prompts, family=native.family, max_new=5) == wanted
    asked = [[BOS, 5, 9, 7, BEGIN], [BOS, 11, BEGIN]]
    empty = [janus_generation.without_words(one, keep=(BOS, BEGIN), fill=PAD) for one in asked]
    model.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
    drawn = dict[float, list[list[int]]]()
    for guidance in (1.5, 4.0):
        wanted = [
            model.generate(
                torch.tensor([one]), attention_mask=torch.ones(1, len(one), dtype=torch.int64), generation_mode="image",
                guidance_scale=guidance, max_length=20, bos_token_id=BOS, **options,
            )[0].tolist()
            for one in asked
        ]  # fmt: skip
        family = janus_generation.janus_codes(cfg, guidance=guidance, unconditional=empty)
        codes = generate_ids(params, asked, family=family, max_new=cfg.drawn_tokens)
        drawn[guidance] = codes.tolist()
        assert drawn[guidance] == wanted
    assert drawn[1.5] != drawn[4.0]
    picture = vq_image.decode(params["codec"], codes, cfg=cfg.codec)
    torch.testing.assert_close(picture.permute(0, 2, 3, 1), model.decode_image_tokens(codes), rtol=0, atol=2e-5)


def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """Ranks have pictures of their own, whole, and copies of the towers; they share a pack's tokens and the decoder, so
    a code may be on another rank than the token that it is predicted from."""
    native = ftrain.hf.open(saved(random_model(config(layers=1, times=(1,))), tmp_path))

    def batch(packs):
        given = [pack([document(own, seed=9 * i + j) for j, own in enumerate(MIXED)], length=48) for i in range(packs)]
        raw = {name: torch.cat([one[name] for one in given]) for name in given[0]}
        raw["segments"] = torch.cat([one["segments"] + 100 * i for i, one in enumerate(given)])
        made = native.media(raw, packs=packs, parts=2)
        made["segments"] = Documents.of(made["segments"], packs=packs)
        return made

    made = mesh_models.Model(native.specs, lambda p, b: (native.loss(p, b), ()), batch, dict(native.rules))
    towers = dict.fromkeys(("vision", "codec"), Layout(parameters=()))
    plan = mesh_models.plan_for(made, Mesh(shard=2, sequence=2, kind="virtual"), components=towers)
    loss, gradients = mesh_models.compare(made, plan, dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_pictures_to_be_drawn_become_their_codes_in_the_step(tmp_path):
    """Of "targets" the frozen tokenizer makes codes; room for more pictures changes nothing."""
    native = ftrain.hf.open(saved(random_model(config()), tmp_path))
    params, one = native.load(), document((3, "draw", 2))
    cfg = janus.config(random_model(config()).config.to_dict())
    targets = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    one["codes"] = vq_image.encode(params["codec"], targets, cfg=cfg.codec)
    wanted = native.loss(params, native.media(one)).value()
    del one["codes"]
    for pictures in (None, 3):
        found = native.loss(params, native.media({**one, "targets": targets}, pictures=pictures)).value()
        torch.testing.assert_close(found, wanted)


def test_a_run_leaves_the_tokenizer_as_it_is(tmp_path):
    """Nothing of a loss reaches it, and decay would."""
    native = ftrain.hf.open(saved(random_model(config(layers=1)), tmp_path))
    options = Sft(model=tmp_path, data=DataOptions(()), out=tmp_path)
    kind, given = KINDS["sft"][1], {"steps": 1, "micro_batches": 1, "device": torch.device("cpu")}
    trained = recipe_of(options, kind, native, **given).trained
    assert {path.split(".")[0] for path in trained} == {*native.specs} - {"codec"}
    only = recipe_of(replace(options, only=("codec",)), kind, native, **given).trained
    assert {path.split(".")[0] for path in only} == {"codec"}
    assert recipe_of(replace(options, lora=LoraFlags(rank=2)), kind, native, **given).trained is None


def test_a_published_model_is_counted_from_its_configuration(tmp_path):
    """Janus-Pro-1B, as transformers counts it: deepseek-community/Janus-Pro-1B."""
    text = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400,
    }  # fmt: skip
    told = {"model_type": "janus", "text_config": text, "vision_config": {}, "vq_config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": False}))
    assert spec.count(described(tmp_path).specs) == 2_076_636_811


WRONG = {
    "too few": (lambda b: {"pixels": b["pixels"][:1]}, "'drawn' says that 0 of 2 pictures are drawn, and the ba"),
    "integers": (lambda b: {"pixels": b["pixels"].long()}, r"pixels are torch.int64 .*: give floating pictures \["),
    "infinite": (lambda b: {"pixels": b["pixels"] / 0}, "picture 0 of pixels has a pixel that is no finite number"),
    "narrow": (lambda b: {"pixels": b["pixels"][..., :4]}, r"give floating pictures \[pictures, 3, 8, 8\], resized"),
    "no tokens": (lambda b: {"tokens": b["tokens"].clamp(max=38)}, r"has 0 tokens of pictures \(id 39\), and its 2"),
    "no codes": (lambda b: {"codes": torch.full((1, 4), 12)}, "codes reach 12: the tokenizer has 12, from 0 on"),
    "floats": (lambda b: {"codes": torch.zeros(1, 4)}, r"give int64 \[pictures, 4\]"),
    "which": (lambda b: {"codes": torch.zeros(1, 4).long(), "drawn": None}, "seen and 1 to be drawn: give 'drawn'"),
    "two documents": (lambda b: {"segments": torch.arange(20) // 8}, "begins at token 6 do not lie side by side"),
    "first": (lambda b: {"tokens": b["tokens"][6:10], "pixels": None, "drawn": None, "codes": torch.zeros(1, 4).long()},
              "the picture that is drawn at token 0 begins its document"),
}  # fmt: skip


def test_without_guidance_it_draws_what_follows_the_words_alone(tmp_path):
    """With the words' own scores guidance of any strength changes nothing."""
    native = ftrain.hf.open(saved(random_model(config(layers=1)), tmp_path))
    params, cfg, asked = native.load(), janus.config(config(layers=1).to_dict()), [[BOS, 5, 9, BEGIN], [BOS, BEGIN]]
    plain = generate_ids(params, asked, family=janus_generation.janus_codes(cfg), max_new=4)
    same = janus_generation.janus_codes(cfg, guidance=3.0, unconditional=asked)
    assert torch.equal(generate_ids(params, asked, family=same, max_new=4), plain)
    with pytest.raises(ValueError, match=r"guidance=3.0: other than 1 it goes with unconditional prompts"):
        janus_generation.janus_codes(cfg, guidance=3.0)
    with pytest.raises(ValueError, match="1 unconditional prompts for 2 prompts: give one for each"):
        janus_generation.janus_codes(cfg, guidance=3.0, unconditional=asked[:1]).prefill(params, asked, 4)


@pytest.mark.parametrize("case", WRONG)
def test_pictures_that_do_not_fit_their_tokens_are_refused(case):
    change, says = WRONG[case]
    one = document((4, "see", 3, "see", 2))
    raw = {name: leaf for name, leaf in {**one, **change(one)}.items() if leaf is not None}
    with pytest.raises(ValueError, match=says):
        prepare(raw, janus.config(config().to_dict()))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"use_qk_norm": True}, "use_qk_norm=True is not understood"),
        ({"attention_bias": False}, "this encoder's attention has biases"),
        ({"num_image_tokens": 9}, "num_image_tokens=9 of 2 x 2 patches"),
        ({"projection_dim": 8}, r"vision_config.projection_dim=8, and the decoder is 16 wide"),
    ],
)
def test_a_configuration_that_nobody_follows_is_refused(entry, says):
    with pytest.raises(ValueError, match=says):
        janus.config(config(**entry).to_dict())
