"""In bfloat16 the families that see, hear and talk are as near to float32 as transformers' modules are.

Both have equal weights, which bfloat16 holds exactly, and equal inputs; each is compared with itself in float32.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

import ftrain
from ftrain.bridge.native_talking import open_talking, talking_config
from ftrain.modules import audio_tower, spec, vq_image
from ftrain.modules.families import mimi, whisper
from ftrain.modules.families.picture_codecs import codec_tensors, janus_codec
from ftrain.modules.families.registry import SEEING
from tests.helpers import hearing_families as hearing
from tests.helpers import seeing_families as seeing
from tests.helpers import talking_models, tiny_mimi, tiny_thinkers
from tests.helpers.seeing_folders import qwen_config
from tests.helpers.text_families import saved

transformers = pytest.importorskip("transformers", minversion="5.24")

ALLOWED = 1.1
"""Of transformers' error. Both round at places of their own, so that over these seeds the errors of equally careful
computations differ by some hundredths."""
OF_A_PART = 1.5
"""The same of the gradients of one part of a model: those of a tower so narrow go few ways, along which errors of equal
size differ by half from seed to seed, and by nothing over sixteen of them."""
SEEDS = 3
LOOKED: tuple[seeing.Part, ...] = (20, (8, 8), 20, (4, 4, 4), 30)
LISTENED: tuple[hearing.Part, ...] = (20, (8, 8), 20, ("sound", 420), 30, (4, 4, 4), 10)
"""Words, a picture, a recording and a video."""
EVERY_EXPERT = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
"""Each token has every expert: a rounded score sends none elsewhere, which would be an error of another kind."""


Computed = tuple[torch.Tensor, torch.Tensor | None]


class Twin(NamedTuple):
    """A model of ours and a module of transformers; what each computes of its weights: a loss, and an array or none."""

    params: Any
    ours: Callable[[Any], Computed]
    module: Any
    theirs: Callable[[], Computed]


def in_dtype_of(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What is seen and heard in the dtype of the module, as transformers' processors are asked to give it."""
    media = ("pixel_values", "pixel_values_videos", "input_features")
    dtype = next(module.parameters()).dtype
    return {name: leaf.to(dtype) if name in media else leaf for name, leaf in given.items()}


def rounded(module: Any) -> Any:
    """With weights that bfloat16 holds."""
    with torch.no_grad():
        for leaf in module.state_dict().values():
            leaf.copy_(leaf.bfloat16())
    return module


def opened(module: Any) -> tuple[Any, Any]:
    """The native model and its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        native = ftrain.hf.open(saved(module, Path(folder)), native="always")
        return native, native.load()


def language(params: Any, native: Any, batch: Any) -> Computed:
    return native.loss(params, batch).value(), native.logits(params, batch)


def seen(kind: str, seed: int) -> Twin:
    ids = {"image_pad": seeing.IMAGE, "video_pad": seeing.VIDEO, "vision_start": seeing.START}
    ids = {f"<|{name}|>": token for name, token in {**ids, "vision_end": seeing.END}.items()}
    config = qwen_config(kind, SimpleNamespace(convert_tokens_to_ids=ids.__getitem__))
    if kind == "qwen3_vl_moe":
        config.text_config.update(EVERY_EXPERT)
    module = rounded(seeing.random_model(config, seed))
    given = seeing.documents(SEEING[kind].config(config.to_dict()).media, (LOOKED,), seed=seed)
    native, params = opened(module)
    batch, labels = native.media(seeing.pack(given)), torch.cat([one["labels"] for one in given])

    def theirs() -> Computed:
        asked = [in_dtype_of(module, seeing.asked(module, one, use_cache=False)) for one in given]
        scores = torch.cat([module(**one).logits[0] for one in asked])
        return cross_entropy(scores.float(), labels), scores

    return Twin(params, lambda p: language(p, native, batch), module, theirs)


def heard(kind: str, seed: int) -> Twin:
    words = EVERY_EXPERT if kind == "qwen3" else {}
    ears = {"d_model": 32, "encoder_ffn_dim": 48}
    made, config = getattr(tiny_thinkers, kind)(ears=ears, eyes={"hidden_size": 16}, **words)
    module = rounded(hearing.random_model(made, config, seed))
    given = hearing.documents(SEEING[config.model_type].config(config.to_dict()).media, (LISTENED,), seed=seed)
    native, params = opened(module)
    batch, labels = native.media(seeing.pack(given)), torch.cat([one["labels"] for one in given])

    def theirs() -> Computed:
        asked = [in_dtype_of(module, hearing.asked(one, use_cache=False)) for one in given]
        scores = torch.cat([module(**one).logits[0] for one in asked])
        return cross_entropy(scores.float(), labels), scores

    return Twin(params, lambda p: language(p, native, batch), module, theirs)


def talking(kind: str, seed: int) -> Twin:
    """Thinker and talker together: their gradients alone."""
    new = kind == "qwen3_omni_moe"
    experts = {"words": EVERY_EXPERT, "stack": EVERY_EXPERT}
    config = talking_models.qwen3_omni(**experts) if new else talking_models.qwen2_5_omni()
    name = "Qwen3OmniMoeForConditionalGeneration" if new else "Qwen2_5OmniForConditionalGeneration"
    module = rounded(hearing.random_model(getattr(transformers, name), config, seed))
    with tempfile.TemporaryDirectory() as folder:
        native = open_talking(saved(module, Path(folder)), flows=True)
        params, media = native.load(), talking_config(folder).thinker.media
    voice = {"groups": 4, "voice": 20} if new else {"groups": 1, "voice": talking_models.BEGIN}
    given = [talking_models.conversation(LISTENED, 20, 30, media, seed=seed, **voice)]
    batch = native.media(seeing.pack(given, tokens=600))
    frames = sum(len(one["speech"]) for one in given)
    counts = {"text": sum(int((one["labels"] >= 0).sum()) for one in given), "codes": frames + len(given)}
    counts["residuals"] = 3 * frames

    def theirs() -> Computed:
        told = talking_models.theirs if new else talking_models.theirs_of_old
        sums = [told(module, in_dtype_of(module, one)) for one in given]
        return sum(sum(one[name] for one in sums) / counts[name] for name in sums[0]), None

    return Twin(params, lambda p: (native.loss(p, batch).value(), None), module, theirs)


def paired(kind: str, seed: int) -> Twin:
    """Pictures and texts; the array are their points."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**size, "vocab_size": 40, "max_position_embeddings": 7, "eos_token_id": 39}
    both = {"text_config": words, "vision_config": {**size, "image_size": 8, "patch_size": 2}}
    config = transformers.CLIPConfig(**both, projection_dim=16) if kind == "clip" else transformers.SiglipConfig(**both)
    auto = transformers.AutoModel.from_config(config, attn_implementation="eager")
    module = rounded(filled(auto, seed))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 39, (8, 7), generator=generator)
    tokens[:, 6] = 39
    pixels = torch.randn(8, 3, 8, 8, generator=generator)
    native, params = opened(module)
    batch = {"tokens": tokens, "pixels": pixels}

    def theirs() -> Computed:
        asked = in_dtype_of(module, {"input_ids": tokens, "pixel_values": pixels})
        found = module(**asked, return_loss=True)
        return found.loss.float(), torch.cat([found.text_embeds, found.image_embeds])

    return Twin(params, lambda p: (native.loss(p, batch).value(), native.hidden(p, batch)), module, theirs)


def filled(module: Any, seed: int, width: float = 0.5) -> Any:
    """With random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in module.named_parameters():
            leaf.copy_(0.5 * float("norm" in name) + torch.randn(leaf.shape, generator=generator) * width)
    return module.float().eval()


def squares(*arrays: torch.Tensor) -> Computed:
    """A loss of arrays that have none, and all of them."""
    flat = torch.cat([x.float().flatten() for x in arrays])
    return flat.sin().mean(), flat


def whispers(kind: str, seed: int) -> Twin:
    config = transformers.WhisperConfig(
        num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, d_model=16,
        max_source_positions=20, vocab_size=9, decoder_layers=1, pad_token_id=0,
    )  # fmt: skip
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config._attn_implementation = "eager"
    module = rounded(filled(WhisperEncoder(config).requires_grad_(True), seed))
    cfg = whisper.encoder_config(config.to_dict())
    stored = module.state_dict()
    leaves = {
        name.leaf.removeprefix("audio."): stored[name.name].mT.clone() if name.transposed else stored[name.name].clone()
        for name in whisper.encoder_names(cfg, "", "audio")
    }
    params = spec.map_with_paths(lambda path, _: leaves[path], audio_tower.specs(cfg))
    mel_CMW = torch.randn(6, 8, 40, generator=torch.Generator().manual_seed(seed))
    sound = {"mel": mel_CMW, "heard": torch.full((6,), 40), "parts": torch.arange(6).repeat_interleave(20)}

    def theirs() -> Computed:
        return squares(module(mel_CMW.to(module.conv1.weight.dtype)).last_hidden_state)

    return Twin(params, lambda p: squares(audio_tower.apply(p, sound, cfg)), module, theirs)


def coded_sound(kind: str, seed: int) -> Twin:
    """Latents of audio, and audio of codes."""
    module = rounded(tiny_mimi.module(tiny_mimi.TINY, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        cfg, params, state = tiny_mimi.ours(saved(module, Path(folder)), tiny_mimi.TINY)
    given, generator = tiny_mimi.audio(240, seed=seed), torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (2, 4, 30), generator=generator)

    def theirs() -> Computed:
        cast = given.to(next(module.parameters()).dtype)
        for book in module.modules():
            if hasattr(book, "_embed"):  # kept from a run in another dtype
                book._embed = None
        return squares(module.encoder(cast).latents, module.decode(codes).audio_values)

    def ours(params: Any) -> Computed:
        return squares(mimi.latents(params, given, cfg), mimi.decode(params, state, codes, cfg))

    return Twin(params, ours, module, theirs)


def coded_picture(kind: str, seed: int) -> Twin:
    """Latents of pictures, and pictures of codes."""
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = transformers.JanusVQVAEConfig(
        embed_dim=4, num_embeddings=12, latent_channels=32, base_channels=32, channel_multiplier=[1, 2],
        num_res_blocks=1, num_patches=4,
    )  # fmt: skip
    module = rounded(filled(JanusVQVAE(config), seed, 0.1))
    cfg, generator = janus_codec(config.to_dict(), grid=4), torch.Generator().manual_seed(seed)
    names, stored = {one.name[3:]: one.leaf[3:] for one in codec_tensors(cfg, "vq", "it")}, module.state_dict()
    shapes = {path: leaf.shape for path, leaf in spec.leaves_with_paths(vq_image.specs(cfg))}
    leaves = {leaf: stored[name].clone().reshape(shapes[leaf]) for name, leaf in names.items()}
    params = spec.map_with_paths(lambda path, _: leaves[path], vq_image.specs(cfg))
    pictures, codes = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 12, (4, 16), generator=generator)

    def ours(params: Any) -> Computed:
        cast = pictures.to(params["codebooks_QKZ"].dtype)
        latents = vq_image.latent_grid(params, cast, cfg=cfg)
        return squares(latents, vq_image.decode(params, codes, cfg=cfg))

    def theirs() -> Computed:
        cast = pictures.to(next(module.parameters()).dtype)
        return squares(module.quant_conv(module.encoder(cast)), module.decode(codes))

    return Twin(params, ours, module, theirs)


def draws(kind: str, seed: int) -> Twin:
    """Janus reads a picture and draws another; the array are the scores of words."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**size, "model_type": "llama", "vocab_size": 40, "intermediate_size": 24, "num_key_value_heads": 1}
    words |= {"max_position_embeddings": 128, "pad_token_id": None, "eos_token_id": None}
    eyes = {**size, "image_size": 8, "patch_size": 2, "projection_dim": 16, "num_image_tokens": 16, "mlp_ratio": 2.0}
    hand = {
        "embed_dim": 4, "num_embeddings": 12, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "projection_dim": 16, "image_token_embed_dim": 16,
    }  # fmt: skip
    config = transformers.JanusConfig(text_config=words, vision_config=eyes, vq_config=hand, image_token_id=39)
    auto = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    module, generator = rounded(filled(auto, seed, 0.2)), torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 38, (80,), generator=generator)
    tokens[20:36] = 39
    labels = torch.cat([tokens[1:], torch.tensor([-100])]).masked_fill(tokens == 39, -100)
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    native, params = opened(module)
    raw = {"tokens": tokens, "labels": labels, "pixels": pixels, "drawn": torch.tensor([False])}
    batch = native.media({**raw, "segments": torch.zeros(80, dtype=torch.int64)})

    def theirs() -> Computed:
        asked = in_dtype_of(module, {"input_ids": tokens[None], "pixel_values": pixels})
        scores = module(**asked, use_cache=False).logits[0]
        return cross_entropy(scores.float(), labels), scores

    return Twin(params, lambda p: language(p, native, batch), module, theirs)


KINDS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), seen),
    **dict.fromkeys(("qwen2_5", "qwen3"), heard),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), talking),
    **dict.fromkeys(("clip", "siglip"), paired),
    "whisper": whispers,
    "janus": draws,
    "mimi": coded_sound,
    "vq": coded_picture,
}
PARTS = {"vision": "vision", "visual": "vision", "picture": "vision", "audio": "audio", "talker": "talker"}


def by_part(named: Any) -> dict[str, torch.Tensor]:
    """The gradients of each part of a model as one array."""
    found: dict[str, list[torch.Tensor]] = {}
    for path, leaf in named:
        part = next((part for name, part in PARTS.items() if name in path), "rest")
        found.setdefault(f"gradients of {part}", []).append(leaf.double().flatten())
    return {part: torch.cat(leaves) for part, leaves in found.items()}


def as_named(array: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if array is None else {"array": array.detach().double().flatten()}


def run_ours(twin: Twin, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Differentiated once, as a jitted step does; `torch.func` would take formulas that may be differentiated again."""
    params = spec.map_with_paths(lambda _, x: x.detach().to(dtype).requires_grad_(), twin.params)
    loss, array = twin.ours(params)
    loss.backward()
    named = [(path, leaf.grad) for path, leaf in spec.leaves_with_paths(params) if leaf.grad is not None]
    return {**as_named(array), **by_part(named)}


def run_theirs(twin: Twin, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Buffers stay in float32, as in a module that was loaded in bfloat16."""
    stored = [buffer for name, buffer in twin.module.named_buffers() if name in twin.module.state_dict()]
    for leaf in (*twin.module.parameters(), *stored):
        leaf.data, leaf.grad = leaf.data.to(dtype), None
    loss, array = twin.theirs()
    loss.backward()
    grads = ((name, leaf.grad) for name, leaf in twin.module.named_parameters() if leaf.grad is not None)
    return {**as_named(array), **by_part(grads)}


def errors(twin: Twin, run: Callable[[Twin, torch.dtype], dict[str, torch.Tensor]]) -> dict[str, float]:
    """The relative error in bfloat16 of each array that `run` gives."""
    exact, found = (run(twin, dtype) for dtype in (torch.float32, torch.bfloat16))
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in exact.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_no_larger_than_those_of_transformers(kind):
    twins = [KINDS[kind](kind, seed) for seed in range(SEEDS)]
    ours, theirs = ([errors(twin, run) for twin in twins] for run in (run_ours, run_theirs))
    assert ours[0].keys() == theirs[0].keys()
    logs = {name: sum(math.log(a[name] / b[name]) for a, b in zip(ours, theirs, strict=True)) for name in ours[0]}
    ratios = {name: math.exp(log / SEEDS) for name, log in logs.items()}
    assert ratios.pop("array", 0.0) < ALLOWED
    assert math.prod(ratios.values()) ** (1 / len(ratios)) < ALLOWED, ratios
    assert max(ratios.values()) < OF_A_PART, ratios
