"""MoVQGAN and VQGAN as diffusers writes them (`VQModel`, of Kandinsky 2 among others): `config.json`, and names.

Source of MoVQGAN: Zheng et al., arXiv 2209.09002. diffusers' attention has linear layers where our networks have
convolutions of 1 x 1: the same numbers, in a tree of `stored_specs` until `from_stored`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ftrain.modules import vq_image
from ftrain.modules.hf_fields import Config, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.picture_networks import decoder_specs, encoder_specs
from ftrain.modules.spec import Tree, leaves_with_paths, map_with_paths
from ftrain.modules.vq_image import VqConfig

CLASS = "VQModel"
"""What `_class_name` says in a `config.json`."""
_READ = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "norm_type", "num_vq_embeddings", "out_channels", "up_block_types",
    "vq_embed_dim",
)  # fmt: skip
_SAYS_NOTHING = ("force_upcast", "sample_size", "scaling_factor")
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_GUIDED_GROUPS = 32
"""Groups of norms that the codes' entries scale and shift, in diffusers."""


def config(config: Config, *, grid: int) -> VqConfig:
    """The tokenizer that a `config.json` of `VQModel` describes, of pictures of `grid` codes a side.

    ValueError names an entry that it cannot follow.
    """
    if config.get("_class_name") != CLASS:
        raise ValueError(f"config.json: _class_name={config.get('_class_name')!r} is no {CLASS} of diffusers'")
    require_understood({n: v for n, v in config.items() if n not in _SAYS_NOTHING}, _READ)
    widths, channels = _widths(config), size(config, "in_channels", 3)
    for name, wanted in (("act_fn", "silu"), ("out_channels", channels), ("mid_block_add_attention", True)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"config.json: {name}={config[name]!r}; the networks here compute {wanted!r}")
    norm, groups = config.get("norm_type", "group"), size(config, "norm_num_groups", 32)
    if norm not in ("group", "spatial") or (norm == "spatial" and groups != _GUIDED_GROUPS):
        raise ValueError(
            f"config.json: norm_type={norm!r} with norm_num_groups={groups}: norms are of type 'group', or 'spatial' "
            f"with {_GUIDED_GROUPS} groups"
        )
    latent = size(config, "latent_channels", 3)
    return VqConfig(
        size=grid * 2 ** (len(widths) - 1),
        channels=channels,
        widths=widths,
        blocks=size(config, "layers_per_block", 1),
        codes=size(config, "num_vq_embeddings", 256),
        d_code=size(config, "vq_embed_dim", latent),
        normalise=False,
        groups=groups,
        networks="movq" if norm == "spatial" else "vqgan",
        latent=latent,
        attention=_attention(config, len(widths)),
    )


def _widths(config: Config) -> tuple[int, ...]:
    widths = config.get("block_out_channels", (64,))
    if not isinstance(widths, list | tuple) or not widths or any(not isinstance(n, int) or n < 1 for n in widths):
        raise ValueError(f"config.json: block_out_channels={widths!r} must be whole numbers of at least 1")
    return tuple(widths)


def _attention(config: Config, resolutions: int) -> tuple[int, ...]:
    """The resolutions with attention, which both networks must have at the same."""
    found = list[list[bool]]()
    for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        kinds = config.get(name, [next(iter(known))] * resolutions)
        if not isinstance(kinds, list | tuple) or len(kinds) != resolutions or any(kind not in known for kind in kinds):
            raise ValueError(f"config.json: {name}={kinds!r} must be {resolutions} of {list(known)}")
        found.append([known[kind] for kind in kinds])
    down, up = found[0], found[1][::-1]
    if down != up:
        raise ValueError(
            "config.json: down_block_types and up_block_types have attention at different resolutions: the networks "
            "here have it at the same"
        )
    return tuple(i for i, has in enumerate(down) if has)


def names(cfg: VqConfig) -> Names:
    """The tensors of a tokenizer, in a tree as `stored_specs`."""
    return tuple(_names(cfg))


def _names(cfg: VqConfig) -> Iterator[HfTensor]:
    yield from _network(encoder_specs(cfg.network), "encoder", "down")
    yield from _network(decoder_specs(cfg.network), "decoder", "up")
    yield HfTensor("quantize.embedding.weight", "codebooks_QKZ", index=0)
    yield from _map("quant_conv", "to_code")
    yield from _map("post_quant_conv", "from_code")


def stored_specs(cfg: VqConfig) -> Tree:
    """`vq_image.specs` with the shapes that tensors have there."""
    return map_with_paths(
        lambda path, one: replace(one, shape=one.shape[:2], axes=one.axes[:2]) if _is_linear(path) else one,
        vq_image.specs(cfg),
    )


def from_stored(tree: Tree, cfg: VqConfig) -> Tree:
    """The parameters of a tree as `stored_specs`."""
    shapes = {path: one.shape for path, one in leaves_with_paths(vq_image.specs(cfg))}
    return map_with_paths(lambda path, leaf: leaf.reshape(shapes[path]), tree)


def _is_linear(path: str) -> bool:
    return path.endswith(tuple(f"attention.{own}.w_OIhw" for own in ("q", "k", "v", "out")))


def _network(specs: Mapping[str, Any], at: str, way: str) -> Iterator[HfTensor]:
    for name in ("conv_in", "conv_out"):
        yield from _map(f"{at}.{name}", f"{at}.{name}")
    yield from _norm(specs["norm_out"], f"{at}.conv_norm_out", f"{at}.norm_out")
    for i, block in enumerate(specs["middle"]):
        yield from _block(block, f"{at}.mid_block", i, f"{at}.middle.{i}")
    for i, stage in enumerate(specs["stages"]):
        for j, block in enumerate(stage):
            yield from _block(block, f"{at}.{way}_blocks.{i}", j, f"{at}.stages.{i}.{j}")
    for i in range(len(specs[way])):
        yield from _map(f"{at}.{way}_blocks.{i}.{way}samplers.0.conv", f"{at}.{way}.{i}")


def _block(specs: Mapping[str, Any], there: str, number: int, here: str) -> Iterator[HfTensor]:
    block, attention = f"{there}.resnets.{number}", f"{there}.attentions.{number}"
    for i in (1, 2):
        yield from _norm(specs[f"norm{i}"], f"{block}.norm{i}", f"{here}.norm{i}")
        yield from _map(f"{block}.conv{i}", f"{here}.conv{i}")
    if "skip" in specs:
        yield from _map(f"{block}.conv_shortcut", f"{here}.skip")
    if "attention" in specs:
        norm = specs["attention"]["norm"]
        yield from _norm(
            norm, f"{attention}.{'spatial' if 'scale' in norm else 'group'}_norm", f"{here}.attention.norm"
        )
        for theirs, own in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
            yield from _map(f"{attention}.{theirs}", f"{here}.attention.{own}")


def _norm(specs: Mapping[str, Any], there: str, here: str) -> Iterator[HfTensor]:
    guided = "scale" in specs
    own = f"{there}.norm_layer" if guided else there
    yield HfTensor(f"{own}.weight", f"{here}.weight_C")
    yield HfTensor(f"{own}.bias", f"{here}.bias_C")
    if guided:
        yield from _map(f"{there}.conv_y", f"{here}.scale")
        yield from _map(f"{there}.conv_b", f"{here}.shift")


def _map(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w_OIhw")
    yield HfTensor(f"{there}.bias", f"{here}.b_O")
