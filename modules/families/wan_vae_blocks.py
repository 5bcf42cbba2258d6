"""Parts of Wan's video autoencoder: convolutions that look back in time, norms, attention within a frame, resampling.

Every layer sees frames in their order and nothing that comes later, so a video may be given in pieces: what a layer
must remember of the frames before is in a `Seen`, and the result is that of all frames at once.

Legend: B videos, C channels, T frames, H and W rows and columns.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.modules.spec import ParamSpec, Tree, fan_in, ones, zeros


@dataclass(frozen=True)
class Seen:
    """What layers remember of the pieces of a video before this one: `given` in the order in which they run, None for
    the first piece; `kept`: the same after this one.
    """

    given: tuple[Tensor, ...] | None = None
    kept: list[Tensor] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether nothing came before."""
        return self.given is None

    def before(self) -> Tensor | None:
        """What the next layer has kept, `[B, C, n, H, W]`; None for the first piece."""
        return None if self.given is None else self.given[len(self.kept)]

    def next(self) -> "Seen":
        """For the piece that follows."""
        return Seen(tuple(self.kept))


def conv_specs(into: int, out: int, *kernel: int) -> dict[str, ParamSpec]:
    """`weight [out, into, *kernel]` and `bias`."""
    fan = into
    for taps in kernel:
        fan *= taps
    axes: tuple[str | None, ...] = ("conv_out", "conv_in", *("conv_kernel" for _ in kernel))
    weight = ParamSpec((out, into, *kernel), axes, fan_in(fan))
    return {"weight": weight, "bias": ParamSpec((out,), ("conv_out",), zeros())}


def norm_specs(channels: int, dims: int = 3) -> dict[str, ParamSpec]:
    """`gamma [channels, 1, ...]`, with a one for each of so many dims."""
    return {
        "gamma": ParamSpec((channels, *(1 for _ in range(dims))), ("channels", *(None for _ in range(dims))), ones())
    }


def causal_conv(params: Tree, x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """A convolution over frames, rows and columns, whose taps in time look back; zeros before the first frame."""
    back = params["weight"].shape[2] - 1
    if back:
        past = seen.before()
        if past is None:
            past = x_BCTHW.new_zeros(*x_BCTHW.shape[:2], back, *x_BCTHW.shape[3:])
        x_BCTHW = torch.cat([past, x_BCTHW], 2)
        seen.kept.append(x_BCTHW[:, :, -back:])
    padding = (0, params["weight"].shape[3] // 2, params["weight"].shape[4] // 2)
    return nnf.conv3d(x_BCTHW, params["weight"], params["bias"], padding=padding)


def normed(params: Tree, x_BCTHW: Tensor) -> Tensor:
    """An RMS norm over channels, dim 1; normed in float32 or wider."""
    wide = x_BCTHW.to(accumulate_dtype(x_BCTHW.dtype))
    return nnf.normalize(wide, dim=1).to(x_BCTHW.dtype) * x_BCTHW.shape[1] ** 0.5 * params["gamma"]


def residual_specs(into: int, out: int) -> Tree:
    """Two norms and convolutions, and a shortcut where the channels change."""
    tree = {
        "norm1": norm_specs(into),
        "conv1": conv_specs(into, out, 3, 3, 3),
        "norm2": norm_specs(out),
        "conv2": conv_specs(out, out, 3, 3, 3),
    }
    return tree if into == out else {**tree, "conv_shortcut": conv_specs(into, out, 1, 1, 1)}


def residual(params: Tree, x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """`[B, C, T, H, W]` to as many frames of the block's channels."""
    beside = causal_conv(params["conv_shortcut"], x_BCTHW, seen) if "conv_shortcut" in params else x_BCTHW
    for i in (1, 2):
        x_BCTHW = causal_conv(params[f"conv{i}"], nnf.silu(normed(params[f"norm{i}"], x_BCTHW)), seen)
    return x_BCTHW + beside


def attention_specs(channels: int) -> Tree:
    """Attention of one head within a frame."""
    return {
        "norm": norm_specs(channels, 2),
        "to_qkv": conv_specs(channels, 3 * channels, 1, 1),
        "proj": conv_specs(channels, channels, 1, 1),
    }


def attend(params: Tree, x_BCTHW: Tensor) -> Tensor:
    """Each place of a frame reads all places of the frame, and is added to what it was."""
    frames = _frames(x_BCTHW)
    qkv = nnf.conv2d(normed(params["norm"], frames), params["to_qkv"]["weight"], params["to_qkv"]["bias"])
    q, k, v = qkv.flatten(2).mT[:, None].chunk(3, -1)
    read = nnf.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(-1, frames.shape[2:])
    out = nnf.conv2d(read, params["proj"]["weight"], params["proj"]["bias"])
    return x_BCTHW + _video(out, len(x_BCTHW))


def middle_specs(channels: int) -> Tree:
    """A residual block, attention, a residual block."""
    return {
        "attentions": [attention_specs(channels)],
        "resnets": [residual_specs(channels, channels), residual_specs(channels, channels)],
    }


def middle(params: Tree, x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """`[B, C, T, H, W]` to the same shape."""
    x_BCTHW = attend(params["attentions"][0], residual(params["resnets"][0], x_BCTHW, seen))
    return residual(params["resnets"][1], x_BCTHW, seen)


def down_specs(channels: int, *, time: bool) -> Tree:
    """Half the rows and columns, and with `time` half the frames."""
    tree: Tree = {"resample": {"1": conv_specs(channels, channels, 3, 3)}}
    return {**tree, "time_conv": conv_specs(channels, channels, 3, 1, 1)} if time else tree


def down(params: Tree, x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """`[B, C, T, H, W]` to half the rows and columns; of 2n + 1 frames n + 1, the first of which stays as it is."""
    inner = params["resample"]["1"]
    frames = nnf.conv2d(nnf.pad(_frames(x_BCTHW), (0, 1, 0, 1)), inner["weight"], inner["bias"], stride=2)
    x_BCTHW = _video(frames, len(x_BCTHW))
    if "time_conv" not in params:
        return x_BCTHW
    past = seen.before()
    seen.kept.append(x_BCTHW[:, :, -1:])
    whole = x_BCTHW if past is None else torch.cat([past, x_BCTHW], 2)
    first = [x_BCTHW[:, :, :1]] if past is None else []
    if whole.shape[2] < 3:
        return first[0]
    weights = params["time_conv"]
    return torch.cat([*first, nnf.conv3d(whole, weights["weight"], weights["bias"], stride=(2, 1, 1))], 2)


def up_specs(channels: int, out: int, *, time: bool) -> Tree:
    """Twice the rows and columns, and with `time` twice the frames."""
    tree: Tree = {"resample": {"1": conv_specs(channels, out, 3, 3)}}
    return {**tree, "time_conv": conv_specs(channels, 2 * channels, 3, 1, 1)} if time else tree


def up(params: Tree, x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """`[B, C, T, H, W]` to twice the rows and columns; of n + 1 frames 2n + 1, the first of which stays as it is."""
    if "time_conv" in params:
        first, rest = (x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]) if seen.is_first else (None, x_BCTHW)
        both = causal_conv(params["time_conv"], rest, seen) if rest.shape[2] else _nothing(rest, seen)
        twice = both.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x_BCTHW = twice if first is None else torch.cat([first, twice], 2)
    frames = _frames(x_BCTHW)
    frames = frames[..., :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)
    inner = params["resample"]["1"]
    return _video(nnf.conv2d(frames, inner["weight"], inner["bias"], padding=1), len(x_BCTHW))


def _nothing(x_BCTHW: Tensor, seen: Seen) -> Tensor:
    """Of no frames none, and zeros are remembered."""
    b, c, _, h, w = x_BCTHW.shape
    seen.kept.append(x_BCTHW.new_zeros(b, c, 2, h, w))
    return x_BCTHW.new_zeros(b, 2 * c, 0, h, w)


def folded_down(x_BCTHW: Tensor, out: int, *, time: int, space: int) -> Tensor:
    """Means of groups of neighbours, `out` channels: the shortcut beside `down`. Zeros before an odd first frame."""
    x_BCTHW = nnf.pad(x_BCTHW, (0, 0, 0, 0, -x_BCTHW.shape[2] % time, 0))
    b, c, t, h, w = x_BCTHW.shape
    split = x_BCTHW.reshape(b, c, t // time, time, h // space, space, w // space, space)
    moved = split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, out, -1, t // time, h // space, w // space)
    return moved.mean(2)


def folded_up(x_BCTHW: Tensor, out: int, *, time: int, space: int, first: bool) -> Tensor:
    """Channels repeated over neighbours, `out` channels: the shortcut beside `up`. `first`: no frame is made before the
    first one.
    """
    b, c, t, h, w = x_BCTHW.shape
    repeated = x_BCTHW.repeat_interleave(out * time * space**2 // c, 1)
    split = repeated.reshape(b, out, time, space, space, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    made = split.reshape(b, out, t * time, h * space, w * space)
    return made[:, :, time - 1 :] if first else made


def _frames(x_BCTHW: Tensor) -> Tensor:
    """Frames as pictures, `[B * T, C, H, W]`."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _video(frames: Tensor, videos: int) -> Tensor:
    return frames.unflatten(0, (videos, -1)).transpose(1, 2)
