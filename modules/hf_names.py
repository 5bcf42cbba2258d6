"""Where each tensor of a Hugging Face model is in our trees: names, and how the numbers lie.

Plain data about families, in the order in which `save_pretrained` of transformers 5 writes them, so that files come out
alike. `ftrain.hf` streams weights by it. Legend: V vocabulary, D model width, F hidden width, E experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ftrain.modules.decoder_config import DecoderConfig, layer_block
from ftrain.modules.spec import Tree, leaves_with_paths


@dataclass(frozen=True)
class HfTensor:
    """The tensor `name` of a Hugging Face model holds our leaf at path `leaf`.

    `index`: it holds only this entry of the leaf's first dim (one expert of a stack). `transposed`: its last two dims
    are swapped (a linear layer, stored `[out, in]` there). `copy`: it repeats what another name holds (a tied weight):
    files may have it, and then it must be equal; it is only written if `written`, and then lies as the other does.
    """

    name: str
    leaf: str
    index: int | None = None
    transposed: bool = False
    copy: bool = False
    written: bool = False


Names = tuple[HfTensor, ...]

# What older files hold besides weights, and what follows from the configuration.
DERIVED = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")

# Their name, our leaf, and the field of AttentionConfig that says whether there is one.
_ATTENTION = (
    ("q_proj.weight", "w_q_DHK", None),
    ("q_proj.bias", "b_q_HK", "bias"),
    ("k_proj.weight", "w_k_DGK", None),
    ("k_proj.bias", "b_k_GK", "bias"),
    ("v_proj.weight", "w_v_DGK", None),
    ("v_proj.bias", "b_v_GK", "bias"),
    ("o_proj.weight", "w_o_HKD", None),
    ("o_proj.bias", "b_o_D", "out_bias"),
    ("q_norm.weight", "q_norm_K", "qk_norm"),
    ("k_norm.weight", "k_norm_K", "qk_norm"),
)
_MLP = (("gate_proj.weight", "w_gate_DF"), ("up_proj.weight", "w_up_DF"), ("down_proj.weight", "w_down_FD"))
_EXPERTS = (("down_proj.weight", "w_down_EFD"), ("gate_proj.weight", "w_gate_EDF"), ("up_proj.weight", "w_up_EDF"))

_MIXTRAL_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def decoder_names(cfg: DecoderConfig) -> Names:
    """The tensors of Llama, Mistral, Qwen2 or Qwen3 for causal language modelling with this configuration, or, with
    experts, of Qwen3-MoE or (without norms of queries and keys) Mixtral.

    A layer of your own (`DecoderConfig.pattern`) has the names of those of its leaves that the usual layer has too, at
    the same path and of the same shape; other leaves have none (see `named`).

    Raises `ValueError` for what those families do not have (shared experts, a router with biases).

    >>> from ftrain.modules.decoder import preset
    >>> decoder_names(preset("llama-tiny"))[1]
    HfTensor(name='model.layers.0.self_attn.q_proj.weight', leaf='layers.0.attention.w_q_DHK', index=None, \
transposed=True, copy=False, written=False)
    """
    if cfg.moe is not None and (cfg.moe.shared is not None or cfg.moe.balance == "bias" or cfg.moe.router_bias):
        raise ValueError(
            f"no Hugging Face name is known for experts with shared_experts={cfg.moe.shared_experts}, "
            f"balance={cfg.moe.balance!r}: the families here have neither shared experts nor router biases"
        )
    found = [HfTensor("model.embed_tokens.weight", "embedding.table_VD")]
    for layer in range(cfg.layers):
        found += _layer(cfg, layer) if cfg.own(layer) is None else _of_own(cfg, layer)
    found.append(HfTensor("model.norm.weight", "norm.weight_D"))
    if cfg.tie_embeddings:
        found.append(HfTensor("lm_head.weight", "embedding.table_VD", copy=True))
    else:
        found.append(HfTensor("lm_head.weight", "head.w_DV", transposed=True))
    # Experts are stacked in memory there too; when transformers takes them apart it sorts all names it has in memory.
    if cfg.moe is None:
        return tuple(found)
    found.sort(key=natural_order)
    return tuple(found) if cfg.attention.qk_norm else tuple(map(_as_mixtral, found))


def named(tree: Tree, names: Iterable[HfTensor]) -> Tree:
    """The part of a tree (of specs or parameters) whose leaves have names here; a layer without any is an empty dict.

    To start a model with layers of your own from a folder, load what has names and put it over new parameters:
    `spec.put(ftrain.init(specs, key), load_hf(folder, named(specs, names), names, unexpected="ignore"))`.

    >>> names = [HfTensor("x.weight", "layers.1.w")]
    >>> named({"layers": [{"w": 0}, {"w": 1, "mine": 2}], "top": 3}, names)
    {'layers': [{}, {'w': 1}]}
    """
    return _part(tree, "", {name.leaf for name in names})


def _part(tree: Tree, path: str, leaves: set[str]) -> Tree:
    if isinstance(tree, list):
        return [_part(child, f"{path}{i}.", leaves) for i, child in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    kept = {key: child for key, child in tree.items() if any(f"{leaf}.".startswith(f"{path}{key}.") for leaf in leaves)}
    return {key: _part(child, f"{path}{key}.", leaves) for key, child in kept.items()}


def under(names: Iterable[HfTensor], leaf: str, *, name: str = "") -> Names:
    """The same tensors where our tree is a branch at path `leaf` of a larger one, and theirs begin with `name`."""
    return tuple(replace(n, leaf=f"{leaf}.{n.leaf}", name=f"{name}{n.name}") for n in names)


def _layer(cfg: DecoderConfig, layer: int) -> Iterator[HfTensor]:
    there, here = f"model.layers.{layer}", f"layers.{layer}"
    for name, leaf, field in _ATTENTION:
        if field is None or getattr(cfg.attention, field):
            yield HfTensor(f"{there}.self_attn.{name}", f"{here}.attention.{leaf}", transposed=leaf.startswith("w_"))
    if cfg.moe is not None and cfg.has_experts(layer):
        for name, leaf in _EXPERTS:
            for e in range(cfg.moe.experts):
                yield HfTensor(f"{there}.mlp.experts.{e}.{name}", f"{here}.moe.{leaf}", index=e, transposed=True)
        yield HfTensor(f"{there}.mlp.gate.weight", f"{here}.moe.w_router_DE", transposed=True)
    else:
        for name, leaf in _MLP:
            yield HfTensor(f"{there}.mlp.{name}", f"{here}.mlp.{leaf}", transposed=True)
    yield HfTensor(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight_D")
    yield HfTensor(f"{there}.post_attention_layernorm.weight", f"{here}.mlp_norm.weight_D")


def _of_own(cfg: DecoderConfig, layer: int) -> Iterator[HfTensor]:
    """Names of a layer of one's own: those of the usual layer whose leaf is there, and of the same shape."""
    usual = replace(cfg, pattern=(), d_hidden=cfg.d_hidden or 1)
    of_usual, of_own = (_shapes(layer_block(c, layer).specs(1.0), layer) for c in (usual, cfg))
    return (name for name in _layer(usual, layer) if of_own.get(name.leaf) == of_usual[name.leaf])


def _shapes(specs: Tree, layer: int) -> dict[str, tuple[int, ...]]:
    return {path: spec.shape for path, spec in leaves_with_paths(specs, f"layers.{layer}")}


def natural_order(tensor: HfTensor) -> list[tuple[int, int, str]]:
    """A key that sorts by the parts of the name, numbers as numbers; the number of an expert last.

    So transformers orders the tensors that it writes where it takes stacked experts apart.
    """
    parts = tensor.name.split(".")
    if tensor.index is not None and "experts" in parts:
        parts.append(parts.pop(parts.index("experts") + 1))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _as_mixtral(tensor: HfTensor) -> HfTensor:
    if tensor.index is not None:
        head, matrix, weight = tensor.name.rsplit(".", 2)
        tensor = replace(tensor, name=f"{head}.{_MIXTRAL_EXPERTS[matrix]}.{weight}")
    return replace(tensor, name=tensor.name.replace(".mlp.", ".block_sparse_moe."))
