"""Vision transformers over whole pictures with learned places (Dosovitskiy et al. 2021), as CLIP and SigLIP have them.

Pictures of one size are an array; pictures of any sizes lie side by side as patches (`lay`), each by itself. The places
of a picture of another size than the learned one are interpolated, bicubic.

Legend: B pictures, C channels, H and W rows and columns of pixels, N patches of all pictures, n rows of one picture, P
numbers of a patch, L places, D width, G heads, K head dim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import Documents
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.embedding import embedding
from ftrain.modules import encoder_stack, mlp, norm
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.linear import affine
from ftrain.modules.mlp import Kind, MlpConfig
from ftrain.modules.spec import Normal, ParamSpec, Tree, fan_in, zeros

_TAPS = 16  # places that a bicubic interpolation reads


@dataclass(frozen=True)
class PictureConfig:
    """An encoder `d_model` wide of `layers` layers of `heads` heads with MLPs of `d_hidden`.

    Its places were learned on squares of `size` pixels a side, in patches of `patch` x `patch` pixels of `channels`
    channels. `mlp_kind`, `eps`: as in `StackConfig`. `class_row` (CLIP): a learned row stands before the patches and is
    what becomes of the picture, rows are normed before the layers, and patches have no bias. `pooled` (SigLIP): a
    learned probe reads all rows.

    ValueError where `patch` does not divide `size`, or for both ways to pool.
    """

    d_model: int
    layers: int
    heads: int
    d_hidden: int
    size: int
    patch: int
    channels: int = 3
    mlp_kind: Kind = "gelu_tanh"
    eps: float = 1e-6
    class_row: bool = False
    pooled: bool = False

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"PictureConfig: patches of {self.patch} pixels do not fill a side of {self.size}")
        if self.class_row and self.pooled:
            raise ValueError(
                "PictureConfig: class_row and pooled are two ways to make one row of a picture: choose one"
            )

    @property
    def side(self) -> int:
        """Places a side."""
        return self.size // self.patch

    @property
    def d_patch(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch**2

    @property
    def stack(self) -> StackConfig:
        """The transformer."""
        return StackConfig(
            self.d_model, self.layers, self.heads, self.d_hidden,
            rope_base=None, mlp_kind=self.mlp_kind, eps=self.eps,
        )  # fmt: skip


def specs(cfg: PictureConfig) -> dict[str, Tree]:
    """`patch` (`w_DCYX`, `b_D`), `places_LD`, `stack`, and as configured `class_D` and `norm_in`, or `pool`.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(PictureConfig(16, layers=1, heads=2, d_hidden=32, size=8, patch=4)))
    3104
    """
    d, places = cfg.d_model, cfg.side**2 + cfg.class_row
    patch = {
        "w_DCYX": ParamSpec((d, cfg.channels, cfg.patch, cfg.patch), ("embed", None, None, None), fan_in(cfg.d_patch))
    }
    tree: dict[str, Tree] = {
        "patch": patch if cfg.class_row else {**patch, "b_D": ParamSpec((d,), ("embed",), zeros())},
        "places_LD": ParamSpec((places, d), ("position", "embed"), Normal(d**-0.5)),
        "stack": encoder_stack.specs(cfg.stack),
    }
    if cfg.class_row:
        tree["class_D"] = ParamSpec((d,), ("embed",), Normal(d**-0.5))
        tree["norm_in"] = norm.specs(d, kind="layer")
    return {**tree, "pool": _pool_specs(cfg)} if cfg.pooled else tree


def _pool_specs(cfg: PictureConfig) -> dict[str, Tree]:
    d = cfg.d_model
    return {
        "probe_11D": ParamSpec((1, 1, d), (None, None, "embed"), Normal(d**-0.5)),
        "w_qkv_D3D": ParamSpec((d, 3 * d), ("embed", "heads"), fan_in(d)),
        "b_qkv_3D": ParamSpec((3 * d,), ("heads",), zeros()),
        "w_o_DD": ParamSpec((d, d), ("heads", "embed"), fan_in(d)),
        "b_o_D": ParamSpec((d,), ("embed",), zeros()),
        "norm": norm.specs(d, kind="layer"),
        "mlp": mlp.specs(_pool_mlp(cfg)),
    }


def _pool_mlp(cfg: PictureConfig) -> MlpConfig:
    return MlpConfig(cfg.d_model, cfg.d_hidden, kind=cfg.mlp_kind, bias=True)


def apply(params: Any, pictures_BCHW: Tensor, cfg: PictureConfig) -> Tensor:
    """Pictures of one size to normed rows `[B, n, D]`, in the dtype of the parameters; with `class_row` that is first.

    ValueError for other channels, or sides that patches do not fill.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = PictureConfig(16, layers=1, heads=2, d_hidden=32, size=8, patch=4)
    >>> list(apply(spec.init(specs(cfg), random.key(0)), torch.zeros(2, 3, 8, 12), cfg).shape)
    [2, 6, 16]
    """
    _require_pictures(pictures_BCHW, cfg)
    x_BnD = _projected(params, patches(pictures_BCHW, cfg.patch)) + _places(params, pictures_BCHW.shape[-2:], cfg)
    if cfg.class_row:
        first_D = params["class_D"] + params["places_LD"][0]
        x_BnD = torch.cat([first_D.expand(len(x_BnD), 1, -1), x_BnD], 1)
        x_BnD = norm.apply(params["norm_in"], x_BnD, eps=cfg.eps)
    pictures, rows = x_BnD.shape[:2]
    each = Documents.equal(pictures, rows, x_BnD.device)
    return _through(params, x_BnD.flatten(0, 1), each, cfg).unflatten(0, (pictures, rows))


def _through(params: Any, x_ND: Tensor, pictures: Documents, cfg: PictureConfig) -> Tensor:
    """Rows behind the layers, each picture by itself; without rotation positions are not read."""
    return encoder_stack.apply(
        params["stack"], x_ND, positions=pictures.ids_T, segments_T=pictures, cfg=cfg.stack, whole=True
    )


def pool(params: Any, rows_BnD: Tensor, cfg: PictureConfig) -> Tensor:
    """What `apply` gives to one row of each picture, `[B, D]`. ValueError for an encoder that makes none."""
    if cfg.class_row:
        return rows_BnD[:, 0]
    if not cfg.pooled:
        raise ValueError("this encoder of pictures makes no single row of each: it has neither class_row nor pooled")
    own, heads = params["pool"], (cfg.heads, cfg.d_model // cfg.heads)
    w_q, w_k, w_v = own["w_qkv_D3D"].chunk(3, 1)
    b_q, b_k, b_v = own["b_qkv_3D"].chunk(3)
    q_GK = affine(own["probe_11D"][0, 0], w_q, b_q).unflatten(-1, heads)
    k_BnGK, v_BnGK = (affine(rows_BnD, w, b).unflatten(-1, heads) for w, b in ((w_k, b_k), (w_v, b_v)))
    wide = accumulate_dtype(rows_BnD.dtype)  # products of numbers, which no matrix product sums before they are rounded
    scores_BnG = (k_BnGK.to(wide) * q_GK.to(wide)).sum(-1) * heads[1] ** -0.5
    read_BD = (scores_BnG.softmax(1)[..., None] * v_BnGK.to(wide)).sum(1).flatten(1)
    x_BD = affine(read_BD.to(rows_BnD.dtype), own["w_o_DD"], own["b_o_D"])
    return x_BD + mlp.apply(own["mlp"], norm.apply(own["norm"], x_BD, eps=cfg.eps), cfg=_pool_mlp(cfg))


def lay(pictures: Sequence[Tensor], cfg: PictureConfig) -> dict[str, Any]:
    """Pictures `[C, H, W]` of any sizes side by side, for `apply_laid`; computed on the host, before a step.

    "patches" `[N, P]`, "taps" (int64) and "shares" `[N, 16]` (which places a patch stands at, in which parts), and
    "pictures", the `Documents` of the patches. ValueError as `apply`, where there is no picture, and for an encoder
    with `class_row`.
    """
    if cfg.class_row:
        raise ValueError("an encoder with class_row takes pictures of one size, as an array: apply")
    if not pictures:
        raise ValueError("there are no pictures to lay: leave them out of the batch")
    for picture in pictures:
        _require_pictures(picture[None], cfg)
    shares_NL = torch.cat([_shares(picture.shape[-2:], cfg) for picture in pictures])
    taps_N = shares_NL.abs().topk(min(_TAPS, shares_NL.shape[1]), 1).indices.sort(1).values
    patches_NP = torch.cat([patches(picture[None], cfg.patch)[0] for picture in pictures])
    counts = torch.tensor([picture.shape[-2] * picture.shape[-1] // cfg.patch**2 for picture in pictures])
    ids_N = torch.repeat_interleave(counts)
    return {
        "patches": patches_NP,
        "taps": taps_N,
        "shares": shares_NL.gather(1, taps_N),
        "pictures": Documents.of(ids_N, longest=int(counts.max())),
    }


def apply_laid(params: Any, laid: Mapping[str, Any], cfg: PictureConfig) -> Tensor:
    """What `lay` gives to normed rows `[N, D]`, in the dtype of the parameters."""
    taps_NAD = embedding(laid["taps"], params["places_LD"])
    x_ND = _projected(params, laid["patches"]) + (taps_NAD * laid["shares"].to(taps_NAD.dtype)[..., None]).sum(1)
    return _through(params, x_ND, laid["pictures"], cfg)


def patches(pictures_BCHW: Tensor, patch: int) -> Tensor:
    """The patches of pictures, row by row, `[B, n, C * patch * patch]`, numbers in the order of a convolution's weight.

    >>> patches(torch.arange(8.0).view(1, 1, 2, 4), 2).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    cut = pictures_BCHW.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # B C h y w x
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _projected(params: Any, patches: Tensor) -> Tensor:
    w_PD = params["patch"]["w_DCYX"].flatten(1).mT
    return affine(patches.to(w_PD.dtype), w_PD, params["patch"].get("b_D"))


def _places(params: Any, pixels: tuple[int, ...], cfg: PictureConfig) -> Tensor:
    """The places of a picture of so many rows and columns of pixels, `[n, D]`."""
    table_LD = params["places_LD"][1:] if cfg.class_row else params["places_LD"]
    return table_LD if tuple(pixels) == (cfg.size, cfg.size) else _resized(table_LD, pixels, cfg)


def _resized(table_LD: Tensor, pixels: Sequence[int], cfg: PictureConfig) -> Tensor:
    grid_DYX = table_LD.mT.unflatten(1, (cfg.side, cfg.side))
    size = [side // cfg.patch for side in pixels]
    return F.interpolate(grid_DYX[None], size=size, mode="bicubic", align_corners=False)[0].flatten(1).mT


def _shares(pixels: Sequence[int], cfg: PictureConfig) -> Tensor:
    """What part each place has in that of each patch, float32 `[n, L]`."""
    own_LL = torch.eye(cfg.side**2)
    return own_LL if tuple(pixels) == (cfg.size, cfg.size) else _resized(own_LL, pixels, cfg)


def _require_pictures(pictures_BCHW: Tensor, cfg: PictureConfig) -> None:
    fits = pictures_BCHW.dim() == 4 and pictures_BCHW.shape[1] == cfg.channels
    if not fits or any(side % cfg.patch or not side for side in pictures_BCHW.shape[2:]):
        raise ValueError(
            f"pictures {list(pictures_BCHW.shape)}: give [B, {cfg.channels}, H, W] with sides that are multiples of "
            f"{cfg.patch} pixels"
        )
    if not pictures_BCHW.is_floating_point():
        raise ValueError(f"pictures are {pictures_BCHW.dtype}: give floating numbers, normed as the model learned them")
    if math.prod(pictures_BCHW.shape) == 0:
        raise ValueError(f"pictures {list(pictures_BCHW.shape)} are none: leave them out of the batch")
