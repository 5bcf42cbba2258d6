"""Transformers of diffusers, small: the mean squared error of a prediction against diffusers' own module."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from experiments.bench.covering.case import Built, Case, nothing_to_compare
from ftrain.bridge import from_diffusers
from ftrain.bridge.skeleton import flatten, nest
from ftrain.sharding import Replicated

ROWS, TEXT, WIDTH, LAYERS = 2, 6, 16, 2
"""Samples of a batch, tokens of a prompt, numbers of each, layers."""
_HEADS = MappingProxyType({"num_attention_heads": 2, "attention_head_dim": 8})
Inputs = Callable[[Callable[..., Tensor]], dict[str, Any]]


def _times(whole: bool = True) -> Tensor:
    return torch.tensor([10, 700]) if whole else torch.tensor([0.1, 0.7])


def _counts() -> Tensor:
    """Which tokens of the prompts count, `[ROWS, TEXT]`."""
    return torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0] * 2])


def _places(side: int) -> Tensor:
    index = torch.arange(side * side)
    return torch.stack([torch.zeros(side * side), index // side, index % side], 1)


def _wan(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": draw(ROWS, 4, 2, 8, 8), "timestep": _times()}


def _ltx(draw: Callable[..., Tensor]) -> dict[str, Any]:
    sizes = {"num_frames": 2, "height": 4, "width": 4}
    return {"hidden_states": draw(ROWS, 32, 4), "timestep": _times(), "encoder_attention_mask": _counts(), **sizes}


def _flux(draw: Callable[..., Tensor]) -> dict[str, Any]:
    about = {"pooled_projections": draw(ROWS, WIDTH), "guidance": torch.ones(ROWS), "timestep": _times(whole=False)}
    return {"hidden_states": draw(ROWS, 16, 4), "img_ids": _places(4), "txt_ids": torch.zeros(TEXT, 3), **about}


def _sd3(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": draw(ROWS, 4, 8, 8), "pooled_projections": draw(ROWS, WIDTH), "timestep": _times()}


def _qwen_image(draw: Callable[..., Tensor]) -> dict[str, Any]:
    about = {"encoder_hidden_states_mask": _counts(), "img_shapes": [(1, 4, 4)] * ROWS}
    return {"hidden_states": draw(ROWS, 16, 16), "timestep": _times(whole=False), **about}


def _hunyuan_video(draw: Callable[..., Tensor]) -> dict[str, Any]:
    about = {"encoder_attention_mask": _counts(), "guidance": torch.full((ROWS,), 6000.0)}
    return {**_wan(draw), "pooled_projections": draw(ROWS, 8), **about}


def _cogvideox(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": draw(ROWS, 2, 4, 8, 8), "timestep": _times()}


def _pixart(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": draw(ROWS, 4, 8, 8), "timestep": _times(), "encoder_attention_mask": _counts()}


def _mochi(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {**_wan(draw), "encoder_attention_mask": _counts().bool()}


MODELS: Mapping[str, tuple[str, Mapping[str, Any], Inputs]] = {
    "wan": (
        "WanTransformer3DModel",
        {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 32}
        | {"ffn_dim": 32, "rope_max_seq_len": 32},
        _wan,
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": WIDTH},
        _ltx,
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"in_channels": 4, "num_single_layers": 2, "attention_head_dim": 16, "joint_attention_dim": WIDTH}
        | {"pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        _flux,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "joint_attention_dim": WIDTH}
        | {"caption_projection_dim": 16, "pooled_projection_dim": WIDTH, "qk_norm": "rms_norm"}
        | {"dual_attention_layers": (0,), "num_layers": 3},
        _sd3,
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "joint_attention_dim": WIDTH}
        | {"axes_dims_rope": (4, 4, 8)},
        _qwen_image,
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2}
        | {"patch_size_t": 1, "text_embed_dim": WIDTH, "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4)},
        _hunyuan_video,
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": WIDTH, "sample_width": 8}
        | {"sample_height": 8, "sample_frames": 8, "max_text_seq_length": TEXT},
        _cogvideox,
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16}
        | {"caption_channels": WIDTH, "use_additional_conditions": False},
        _pixart,
    ),
    "sana": (
        "SanaTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
        | {"cross_attention_dim": 16, "caption_channels": WIDTH, "sample_size": 8},
        _pixart,
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"in_channels": 4, "pooled_projection_dim": 16, "text_embed_dim": WIDTH, "time_embed_dim": 4}
        | {"max_sequence_length": 16, "num_layers": 3},
        _mochi,
    ),
}
"""By name: the class of diffusers, the sizes that are its own, and the inputs beside the prompts."""


def cases() -> tuple[Case, ...]:
    """The rows of this set."""
    return tuple(Case("diffusion", name, partial(_build, name)) for name in MODELS)


def _build(name: str) -> Built:
    kind, sizes, inputs = MODELS[name]
    config = {"_class_name": kind, **_HEADS, "num_layers": LAYERS, **sizes}
    generator = torch.Generator().manual_seed(0)
    batch = inputs(lambda *shape: torch.randn(*shape, generator=generator))
    batch["encoder_hidden_states"] = torch.randn(ROWS, TEXT, WIDTH, generator=generator)
    plain = nothing_to_compare(lambda: _plain(config))
    shape = nothing_to_compare(lambda: plain(**batch, return_dict=False)[0].shape)
    batch["target"] = torch.randn(shape, generator=generator)
    model = from_diffusers(config)
    params = _nested(plain)
    return Built(
        model=model,
        params=params,
        batch=batch,
        expected=partial(_expected, plain, batch),
        roundtrip=partial(_roundtrip, plain),
        rules={leaf: Replicated() for leaf in ("img_ids", "txt_ids") if leaf in batch},
        about="rows",
    )


def _plain(config: Mapping[str, Any]) -> Any:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, config["_class_name"]).from_config(dict(config)).train()


def _nested(plain: torch.nn.Module) -> dict[str, Any]:
    return nest({name: p.detach().clone() for name, p in plain.named_parameters()})


def _expected(plain: Any, batch: Mapping[str, Any]) -> tuple[float, dict[str, Tensor]]:
    plain.zero_grad()
    found = plain(**{name: x for name, x in batch.items() if name != "target"}, return_dict=False)[0]
    loss = (found - batch["target"]).square().mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def _roundtrip(plain: Any) -> None:
    """diffusers' folder comes out byte by byte, and loads there with strict names."""
    with tempfile.TemporaryDirectory() as place:
        before, after = Path(place) / "in", Path(place) / "out"
        plain.save_pretrained(before)
        model = from_diffusers(before)
        assert model.load is not None
        assert model.save is not None
        model.save(model.load(), after)
        for file in before.iterdir():
            assert file.read_bytes() == (after / file.name).read_bytes(), file.name
        again, told = type(plain).from_pretrained(after, output_loading_info=True)
        assert not told["missing_keys"], told
        assert not told["unexpected_keys"], told
        here = flatten(_nested(plain))
        assert all(torch.equal(p, here[name]) for name, p in again.named_parameters())
