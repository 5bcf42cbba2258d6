"""Qwen2.5-Omni's Token2Wav in Hugging Face's folders: its configuration, and what its tensors are called."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ftrain.modules.bigvgan import BigVganConfig
from ftrain.modules.families.qwen2_5_omni_token2wav import FieldConfig, Token2WavConfig
from ftrain.modules.hf_fields import Config, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names, natural_order
from ftrain.modules.hf_rope import rope_of
from ftrain.modules.speaker_encoder import SpeakerConfig

_FIELD, _VOCODER = "code2wav_dit_model.", "code2wav_bigvgan_model."
_OF_FIELD = (
    "block_size", "depth", "dim", "dropout", "emb_dim", "enc_attention_channels", "enc_channels", "enc_dilations",
    "enc_dim", "enc_emb_dim", "enc_kernel_sizes", "enc_res2net_scale", "enc_se_channels", "ff_mult", "head_dim",
    "heads", "hidden_size", "look_ahead_layers", "look_backward_layers", "mel_dim", "num_attention_heads",
    "num_embeds", "num_hidden_layers", "repeats", "rope_parameters", "rope_scaling", "rope_theta",
)  # fmt: skip
_OF_VOCODER = (
    "mel_dim", "resblock_dilation_sizes", "resblock_kernel_sizes", "upsample_initial_channel", "upsample_kernel_sizes",
    "upsample_rates", "use_bias_at_final",
)  # fmt: skip
_AHEAD, _BACK = (10,), (0, 20)


def config(config: Config) -> Token2WavConfig:
    """What a `config.json` of Token2Wav, or its `token2wav_config`, describes. ValueError names an entry that it cannot
    follow.
    """
    return Token2WavConfig(_field(_part(config, "dit_config")), _vocoder(_part(config, "bigvgan_config")))


def _part(config: Config, name: str) -> Mapping[str, Any]:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json: {name}={found!r} must be an object, what a part of Token2Wav is made of")
    return found


def _field(said: Config) -> FieldConfig:
    require_understood(said, _OF_FIELD)
    base, scaling = rope_of(said, default_base=10_000.0)
    if scaling is not None:
        raise ValueError(f"config.json: dit_config has rotary positions stretched by {scaling}; here they are not")
    mels, d = size(said, "mel_dim", 80), size(said, "hidden_size", 1024)
    return FieldConfig(
        d,
        layers=size(said, "num_hidden_layers", 22),
        heads=size(said, "num_attention_heads", 16),
        head_dim=size(said, "head_dim", 64),
        d_hidden=int(d * number(said, "ff_mult", 2)),
        codes=size(said, "num_embeds", 8193),
        d_code=size(said, "emb_dim", 512),
        d_voice=size(said, "enc_emb_dim", 192),
        repeats=size(said, "repeats", 2),
        block=size(said, "block_size", 24),
        ahead=_numbers(said, "look_ahead_layers", _AHEAD, least=0),
        back=_numbers(said, "look_backward_layers", _BACK, least=0),
        speaker=SpeakerConfig(
            mels,
            size(said, "enc_dim", 128),
            channels=_numbers(said, "enc_channels", (256, 256, 256, 256, 768)),
            taps=_numbers(said, "enc_kernel_sizes", (5, 3, 3, 3, 1)),
            dilations=_numbers(said, "enc_dilations", (1, 2, 3, 4, 1)),
            d_attention=size(said, "enc_attention_channels", 64),
            scale=size(said, "enc_res2net_scale", 2),
            squeezed=size(said, "enc_se_channels", 64),
        ),
        rope_base=base,
    )


def _vocoder(said: Config) -> BigVganConfig:
    require_understood(said, _OF_VOCODER)
    dilations = said.get("resblock_dilation_sizes") or ((1, 3, 5),) * 3
    return BigVganConfig(
        size(said, "mel_dim", 80),
        channels=size(said, "upsample_initial_channel", 1536),
        rates=_numbers(said, "upsample_rates", (5, 3, 2, 2, 2, 2)),
        taps=_numbers(said, "upsample_kernel_sizes", (11, 7, 4, 4, 4, 4)),
        block_taps=_numbers(said, "resblock_kernel_sizes", (3, 7, 11)),
        dilations=tuple(_numbers({"resblock_dilation_sizes": own}, "resblock_dilation_sizes", ()) for own in dilations),
    )


def _numbers(said: Config, name: str, usual: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
    found = said.get(name, usual)
    if not isinstance(found, list | tuple) or not all(type(n) is int and n >= least for n in found):
        raise ValueError(f"config.json: {name}={found!r} must be whole numbers of at least {least}")
    return tuple(found)


def names(cfg: Token2WavConfig, *, prefix: str = "") -> Names:
    """The tensors, called `prefix` and something."""
    found = [*_of_field(cfg.field), *_of_vocoder(cfg.vocoder)]
    return tuple(sorted((replace(n, name=prefix + n.name) for n in found), key=natural_order))


def _of_field(cfg: FieldConfig) -> Iterator[HfTensor]:
    yield HfTensor(f"{_FIELD}text_embed.codec_embed.weight", "field.table_VD")
    for i in (0, 1):
        yield from _linear(f"{_FIELD}time_embed.time_mlp.{2 * i}", f"field.time.{i}")
    for there, here in (("input_embed.proj", "into"), ("norm_out.linear", "shift"), ("proj_out", "out")):
        yield from _linear(f"{_FIELD}{there}", f"field.{here}")
    for i in range(cfg.layers):
        there, here = f"{_FIELD}transformer_blocks.{i}", f"field.layers.{i}"
        yield from _linear(f"{there}.attn_norm.linear", f"{here}.gates")
        for own in ("q", "k", "v"):
            yield from _linear(f"{there}.attn.to_{own}", f"{here}.{own}")
        yield from _linear(f"{there}.attn.to_out.0", f"{here}.o")
        yield from _linear(f"{there}.ff.ff.0", f"{here}.up")
        yield from _linear(f"{there}.ff.ff.3", f"{here}.down")
    yield from _of_speaker(cfg.speaker)


def _of_speaker(cfg: SpeakerConfig) -> Iterator[HfTensor]:
    there, here = f"{_FIELD}input_embed.spk_encoder", "field.speaker"
    yield from _conv(f"{there}.blocks.0.conv", f"{here}.first")
    for i in range(len(cfg.channels) - 2):
        block, own = f"{there}.blocks.{i + 1}", f"{here}.blocks.{i}"
        yield from _conv(f"{block}.tdnn1.conv", f"{own}.into")
        yield from _conv(f"{block}.tdnn2.conv", f"{own}.out")
        for k in range(cfg.scale - 1):
            yield from _conv(f"{block}.res2net_block.blocks.{k}.conv", f"{own}.groups.{k}")
        yield from _conv(f"{block}.se_block.conv1", f"{own}.squeeze")
        yield from _conv(f"{block}.se_block.conv2", f"{own}.spread")
    for name, own in (("mfa.conv", "all"), ("asp.tdnn.conv", "attend"), ("asp.conv", "weigh"), ("fc", "voice")):
        yield from _conv(f"{there}.{name}", f"{here}.{own}")


def _of_vocoder(cfg: BigVganConfig) -> Iterator[HfTensor]:
    yield from _conv(f"{_VOCODER}conv_pre", "vocoder.first")
    kinds = len(cfg.block_taps)
    for i in range(len(cfg.rates)):
        yield from _conv(f"{_VOCODER}ups.{i}.0", f"vocoder.stretch.{i}")
        for k in range(kinds):
            there, here = f"{_VOCODER}resblocks.{i * kinds + k}", f"vocoder.blocks.{i}.{k}"
            for j in range(3):
                yield from _conv(f"{there}.convs1.{j}", f"{here}.wide.{j}")
                yield from _conv(f"{there}.convs2.{j}", f"{here}.near.{j}")
            for j in range(6):
                yield from _snake(f"{there}.activations.{j}.act", f"{here}.snakes.{j}")
    yield from _snake(f"{_VOCODER}activation_post.act", "vocoder.snake")
    yield HfTensor(f"{_VOCODER}conv_post.weight", "vocoder.last.weight")


def _linear(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w", transposed=True)
    yield HfTensor(f"{there}.bias", f"{here}.b")


def _conv(there: str, here: str) -> Iterator[HfTensor]:
    return (HfTensor(f"{there}.{kind}", f"{here}.{kind}") for kind in ("weight", "bias"))


def _snake(there: str, here: str) -> Iterator[HfTensor]:
    return (HfTensor(f"{there}.{name}", f"{here}.{name}_C") for name in ("alpha", "beta"))
