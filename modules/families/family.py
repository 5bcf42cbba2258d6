"""What a family of text models is to whoever opens a folder, and the names that all of them share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import HfTensor, Names


@dataclass(frozen=True)
class TextFamily:
    """A family of text models that our decoder computes.

    - `config(config)`: the decoder that a `config.json` describes. ValueError names an entry that it cannot follow.
    - `names(cfg)`: the tensors of such a decoder, in the order in which `save_pretrained` of transformers 5 has them.
    - `stacked`: a layer's experts are one tensor there, so that their number is no number of tensors.
    """

    config: Callable[[Config], DecoderConfig]
    names: Callable[[DecoderConfig], Names]
    stacked: bool = False


def stack_names(
    cfg: DecoderConfig, layer: Callable[[int], Iterable[HfTensor]], *, norm: str = "norm.weight_D"
) -> Names:
    """The tensors of a whole model: the table, those of `layer(i)` for each layer, the last norm, the head.

    `norm`: the path of the last norm's leaf.
    """
    found = [HfTensor("model.embed_tokens.weight", "embedding.table_VD")]
    for i in range(cfg.layers):
        found += layer(i)
    found.append(HfTensor("model.norm.weight", norm))
    if cfg.tie_embeddings:
        return (*found, HfTensor("lm_head.weight", "embedding.table_VD", copy=True))
    return (*found, HfTensor("lm_head.weight", "head.w_DV", transposed=True))


def tensors(there: str, here: str, table: Iterable[tuple[str, str]]) -> Iterator[HfTensor]:
    """Tensors `there.name` for the leaves `here.leaf` of a table of `(name, leaf)`.

    The weight of a linear layer is transposed: a tensor that ends with ".weight" of a leaf "w_...".

    >>> from ftrain.modules.families.family import tensors
    >>> [t.transposed for t in tensors("mlp", "mlp", [("up_proj.weight", "w_up_DF"), ("up_proj.bias", "b_up_F")])]
    [True, False]
    """
    for name, leaf in table:
        linear = name.endswith(".weight") and leaf.rsplit(".", 1)[-1].startswith("w_")
        yield HfTensor(f"{there}.{name}", f"{here}.{leaf}", transposed=linear)


def expert_tensors(there: str, here: str, experts: int) -> Iterator[HfTensor]:
    """Routed experts with a tensor each, and their router, as Qwen's and DeepSeek's files have them.

    `there`: their MLP, `here`: the path of our block of experts.
    """
    for name in ("down", "gate", "up"):
        leaf = f"{here}.w_{name}_{'EFD' if name == 'down' else 'EDF'}"
        for e in range(experts):
            yield HfTensor(f"{there}.experts.{e}.{name}_proj.weight", leaf, index=e, transposed=True)
    yield _router(there, here)


def fused_expert_tensors(there: str, here: str) -> Iterator[HfTensor]:
    """The same with one tensor for the gates and ups of all experts, `[E, 2 F, D]`, and one for their downs."""
    yield HfTensor(f"{there}.experts.gate_up_proj", f"{here}.w_gate_up_EDF", transposed=True)
    yield HfTensor(f"{there}.experts.down_proj", f"{here}.w_down_EFD", transposed=True)
    yield _router(there, here)


def _router(there: str, here: str) -> HfTensor:
    return HfTensor(f"{there}.gate.weight", f"{here}.w_router_DE", transposed=True)
