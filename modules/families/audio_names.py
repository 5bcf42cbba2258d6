"""What files call the parts of a tower of sound (`ftrain.modules.audio_tower`), in Whisper's way."""

from collections.abc import Iterator

from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.hf_names import HfTensor


def audio_names(
    cfg: AudioTowerConfig, prefix: str, here: str, out: tuple[tuple[str, str], ...], *, last_norm: str = "ln_post"
) -> Iterator[HfTensor]:
    """The tensors of a tower of sound at the path `here`, called `prefix` and something. `out`: the linear maps behind
    it, as (theirs, ours).
    """
    kernel, called = ("w_OIt", "conv") if cfg.channels is None else ("w_OIyt", "conv2d")
    for i in range(2 if cfg.channels is None else 3):
        yield HfTensor(f"{prefix}{called}{i + 1}.weight", f"{here}.convs.{i}.{kernel}")
        yield HfTensor(f"{prefix}{called}{i + 1}.bias", f"{here}.convs.{i}.b_O")
    if cfg.channels is not None:
        yield HfTensor(f"{prefix}conv_out.weight", f"{here}.w_in_HD", transposed=True)
    if cfg.table:
        yield HfTensor(f"{prefix}embed_positions.weight", f"{here}.table_RD")
    if cfg.marks:
        yield HfTensor(f"{prefix}audio_bos_eos_token.weight", f"{here}.marks_NV")
    for i in range(cfg.layers):
        yield from _audio_layer(f"{prefix}layers.{i}", f"{here}.layers.{i}", cfg)
    yield from _normed(f"{prefix}{last_norm}", f"{here}.norm_out")
    for theirs, weight in out:
        name = weight.split("_")[0]
        yield from _linear(f"{prefix}{theirs}", f"{here}.out", weight, f"{name}_{weight[-1]}")


def _audio_layer(there: str, here: str, cfg: AudioTowerConfig) -> Iterator[HfTensor]:
    heads = {"k_proj": ("k_DGK", "k_GK"), "v_proj": ("v_DGK", "v_GK"), "q_proj": ("q_DHK", "q_HK")}
    for name, (weight, bias) in {**heads, "out_proj": ("o_HKD", "o_D")}.items():
        biased = name != "k_proj" or cfg.key_bias
        yield from _linear(f"{there}.self_attn.{name}", f"{here}.attention", weight, bias if biased else None)
    yield from _normed(f"{there}.self_attn_layer_norm", f"{here}.norm1")
    yield from _linear(f"{there}.fc1", f"{here}.mlp", "up_DF", "up_F")
    yield from _linear(f"{there}.fc2", f"{here}.mlp", "down_FD", "down_D")
    yield from _normed(f"{there}.final_layer_norm", f"{here}.norm2")


def _linear(there: str, here: str, weight: str, bias: str | None) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w_{weight}", transposed=True)
    if bias is not None:
        yield HfTensor(f"{there}.bias", f"{here}.b_{bias}")


def _normed(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.weight_D")
    yield HfTensor(f"{there}.bias", f"{here}.bias_D")
