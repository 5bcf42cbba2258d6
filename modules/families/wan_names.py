"""What tensors of Wan are called in diffusers' folders and in the authors', which ComfyUI and most adapters follow.

The two differ in a trap: the affine norm before the text is `norm2` there and `norm3` here.
"""

from collections.abc import Iterator
from types import MappingProxyType

from ftrain.modules.families.wan_config import AUTHORS, DIFFUSERS, WanConfig
from ftrain.modules.hf_names import HfTensor, Names

# Module of ours; module of diffusers; module of the authors. A weight and a bias each.
_LINEAR = (
    ("time.in", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time.hidden", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time.six", "condition_embedder.time_proj", "time_projection.1"),
    ("text.in", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text.out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
)
_IMAGE = (
    ("norm_in", "norm1", "proj.0"),
    ("in", "ff.net.0.proj", "proj.1"),
    ("out", "ff.net.2", "proj.3"),
    ("norm_out", "norm2", "proj.4"),
)
# Within an attention: letter of ours, module of diffusers, module of the authors.
_ATTENTION = (("q", "to_q", "q"), ("k", "to_k", "k"), ("v", "to_v", "v"), ("o", "to_out.0", "o"))
_NORMS = (("q_norm_HK", "norm_q", "norm_q"), ("k_norm_HK", "norm_k", "norm_k"))
_OF_IMAGE = (("k_image", "add_k_proj", "k_img"), ("v_image", "add_v_proj", "v_img"))
_MLP = (("up_DF", "up_F", "ffn.net.0.proj", "ffn.0"), ("down_FD", "down_D", "ffn.net.2", "ffn.2"))

_Row = tuple[str, str, str, bool]  # name of diffusers, name of the authors, our leaf, transposed


def diffusers(cfg: WanConfig) -> Names:
    """The tensors of `WanTransformer3DModel`, in the order of its state.

    >>> from ftrain.modules.families.wan_config import WanConfig
    >>> cfg = WanConfig(4, 4, d_model=24, layers=1, heads=2, d_hidden=32)
    >>> [name.name for name in diffusers(cfg)][:2]
    ['scale_shift_table', 'patch_embedding.weight']
    """
    return tuple(HfTensor(there, leaf, transposed=turned) for there, _, leaf, turned in _rows(cfg))


def authors(cfg: WanConfig) -> Names:
    """The tensors of the authors' `WanModel`; with `diffusion_model.` before them, those of ComfyUI.

    >>> from ftrain.modules.families.wan_config import WanConfig
    >>> cfg = WanConfig(4, 4, d_model=24, layers=1, heads=2, d_hidden=32)
    >>> [name.name for name in authors(cfg)][:2]
    ['head.modulation', 'patch_embedding.weight']
    """
    return tuple(HfTensor(there, leaf, transposed=turned) for _, there, leaf, turned in _rows(cfg))


LAYOUTS = MappingProxyType({DIFFUSERS: diffusers, AUTHORS: authors})
"""The names by what `_class_name` of a `config.json` says."""


def _rows(cfg: WanConfig) -> Iterator[_Row]:
    yield "scale_shift_table", "head.modulation", "out.table_12D", False
    yield "patch_embedding.weight", "patch_embedding.weight", "patch.w_DCFHW", False
    yield "patch_embedding.bias", "patch_embedding.bias", "patch.b_D", False
    for leaf, there, here in _LINEAR:
        yield from _linear(there, here, f"{leaf}.w", f"{leaf}.b")
    if cfg.d_image:
        yield from _image(cfg)
    for i in range(cfg.layers):
        yield from _layer(cfg, f"blocks.{i}", f"layers.{i}")
    yield from _linear("proj_out", "head.head", "out.w_DQ", "out.b_Q")


def _image(cfg: WanConfig) -> Iterator[_Row]:
    there, here = "condition_embedder.image_embedder", "img_emb"
    if cfg.image_places:
        yield f"{there}.pos_embed", f"{here}.emb_pos", "image.places_1IC", False
    for leaf, own, theirs in _IMAGE:
        if leaf.startswith("norm"):
            yield from _norm(f"{there}.{own}", f"{here}.{theirs}", f"image.{leaf}")
        else:
            yield from _linear(f"{there}.{own}", f"{here}.{theirs}", f"image.{leaf}.w", f"image.{leaf}.b")


def _layer(cfg: WanConfig, there: str, leaf: str) -> Iterator[_Row]:
    yield f"{there}.scale_shift_table", f"{there}.modulation", f"{leaf}.table_16D", False
    yield from _attention(f"{there}.attn1", f"{there}.self_attn", f"{leaf}.attention")
    yield from _attention(f"{there}.attn2", f"{there}.cross_attn", f"{leaf}.text")
    if cfg.d_image:
        here = f"{leaf}.text"
        for x, own, theirs in _OF_IMAGE:
            weight, bias = f"{here}.w_{x}_DHK", f"{here}.b_{x}_HK"
            yield from _linear(f"{there}.attn2.{own}", f"{there}.cross_attn.{theirs}", weight, bias)
        own, theirs = f"{there}.attn2.norm_added_k.weight", f"{there}.cross_attn.norm_k_img.weight"
        yield own, theirs, f"{here}.k_image_norm_HK", False
    if cfg.text_norm:
        yield from _norm(f"{there}.norm2", f"{there}.norm3", f"{leaf}.text_norm")
    for weight, bias, own, theirs in _MLP:
        yield from _linear(f"{there}.{own}", f"{there}.{theirs}", f"{leaf}.mlp.w_{weight}", f"{leaf}.mlp.b_{bias}")


def _attention(there: str, here: str, leaf: str) -> Iterator[_Row]:
    for x, own, theirs in _ATTENTION:
        weight, bias = ("w_o_HKD", "b_o_D") if x == "o" else (f"w_{x}_DHK", f"b_{x}_HK")
        yield from _linear(f"{there}.{own}", f"{here}.{theirs}", f"{leaf}.{weight}", f"{leaf}.{bias}")
    for name, own, theirs in _NORMS:
        yield f"{there}.{own}.weight", f"{here}.{theirs}.weight", f"{leaf}.{name}", False


def _linear(there: str, here: str, weight: str, bias: str) -> Iterator[_Row]:
    yield f"{there}.weight", f"{here}.weight", weight, True
    yield f"{there}.bias", f"{here}.bias", bias, False


def _norm(there: str, here: str, leaf: str) -> Iterator[_Row]:
    yield f"{there}.weight", f"{here}.weight", f"{leaf}.weight_D", False
    yield f"{there}.bias", f"{here}.bias", f"{leaf}.bias_D", False
