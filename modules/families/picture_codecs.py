"""The picture tokenizers of other libraries by what they write: Janus's (LlamaGen's VQ-16), by transformers' names.

Source: Sun et al., arXiv 2406.06525. transformers encodes without bringing latents and entries to length one first, as
the models were trained and as we do: its codes of an image differ (Janus's own code gives ours).
"""

from collections.abc import Iterator
from typing import Any

from ftrain.modules.hf_fields import Config, require_understood, size
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.picture_networks import decoder_specs, encoder_specs
from ftrain.modules.spec import Tree
from ftrain.modules.vq_image import VqConfig

_READ = (
    "base_channels", "channel_multiplier", "embed_dim", "hidden_act", "image_token_embed_dim", "in_channels",
    "latent_channels", "num_embeddings", "num_hidden_layers", "num_patches", "num_res_blocks", "out_channels",
    "projection_dim",
)  # fmt: skip


def janus_codec(config: Config, *, grid: int) -> VqConfig:
    """The tokenizer that `vq_config` of a `config.json` of Janus describes, of `grid` codes a side.

    ValueError names an entry that it cannot follow.
    """
    require_understood(config, _READ)
    base, channels = size(config, "base_channels", 128), size(config, "in_channels", 3)
    times = config.get("channel_multiplier", (1, 1, 2, 2, 4))
    if not isinstance(times, list | tuple) or not times or any(not isinstance(n, int) or n < 1 for n in times):
        raise ValueError(f"config.json: vq_config.channel_multiplier={times!r} must be whole numbers of at least 1")
    if times[0] != 1 or size(config, "out_channels", 3) != channels:
        raise ValueError(
            f"config.json: vq_config.channel_multiplier={times!r} must begin with 1, and as many channels come out "
            "as go in"
        )
    return VqConfig(
        size=grid * 2 ** (len(times) - 1),
        channels=channels,
        widths=tuple(base * n for n in times),
        blocks=size(config, "num_res_blocks", 2),
        codes=size(config, "num_embeddings", 16384),
        d_code=size(config, "embed_dim", 8),
        groups=32,
        networks="vqgan",
        latent=size(config, "latent_channels", 256),
        attention=(len(times) - 1,),
    )


def codec_tensors(cfg: VqConfig, there: str, here: str) -> Iterator[HfTensor]:
    """The tensors of a tokenizer with VQGAN's networks, called `there` and something; `here`: its path in our tree."""
    yield from _network(encoder_specs(cfg.network), f"{there}.encoder", f"{here}.encoder", "down")
    yield HfTensor(f"{there}.quantize.embedding.weight", f"{here}.codebooks_QKZ", index=0)
    yield from _conv(f"{there}.quant_conv", f"{here}.to_code")
    yield from _conv(f"{there}.post_quant_conv", f"{here}.from_code")
    yield from _network(decoder_specs(cfg.network), f"{there}.decoder", f"{here}.decoder", "up")


def _network(specs: Tree, there: str, here: str, way: str) -> Iterator[HfTensor]:
    for name in ("conv_in", "conv_out"):
        yield from _conv(f"{there}.{name}", f"{here}.{name}")
    yield from _norm(f"{there}.norm_out", f"{here}.norm_out")
    for i, block in enumerate(specs["middle"]):
        yield from _block(block, f"{there}.mid.block_{i + 1}", f"{there}.mid.attn_{i + 1}", f"{here}.middle.{i}")
    for i, stage in enumerate(specs["stages"]):
        at = f"{there}.{way}.{i}"
        for j, block in enumerate(stage):
            yield from _block(block, f"{at}.block.{j}", f"{at}.attn.{j}", f"{here}.stages.{i}.{j}")
        if i < len(specs["stages"]) - 1:
            yield from _conv(f"{at}.{way}sample.conv", f"{here}.{way}.{i}")


def _block(specs: Any, there: str, attention: str, here: str) -> Iterator[HfTensor]:
    for i in (1, 2):
        yield from _norm(f"{there}.norm{i}", f"{here}.norm{i}")
        yield from _conv(f"{there}.conv{i}", f"{here}.conv{i}")
    if "skip" in specs:
        yield from _conv(f"{there}.nin_shortcut", f"{here}.skip")
    if "attention" in specs:
        yield from _norm(f"{attention}.norm", f"{here}.attention.norm")
        for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
            yield from _conv(f"{attention}.{name}", f"{here}.attention.{own}")


def _conv(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w_OIhw")
    yield HfTensor(f"{there}.bias", f"{here}.b_O")


def _norm(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.weight_C")
    yield HfTensor(f"{there}.bias", f"{here}.bias_C")
