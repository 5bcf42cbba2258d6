"""Rules of the ops that work on each entry of the first dims alone: images, matrices, and their like."""

from torch import fx

from ftrain.trace.batch_kinds import (
    MIXED,
    NOTHING,
    SAME,
    UNKNOWN,
    Found,
    Kind,
    Kinds,
    Rule,
    first_of,
    name_of,
    reader,
    rows_in,
)
from ftrain.trace.spread_ops import tensor_of


def matrices(node: fx.Node, kinds: Kinds) -> Found:
    """Of the last two dims; those before them are batches."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return NOTHING
    return MIXED if kind.dim >= value.dim() - 2 else Found(kind)


def _by_entry_of_more(node: fx.Node, kinds: Kinds) -> Found:
    """Each entry of dim 0 alone, if there are more dims than the op works on."""
    kind, value = first_of(node, kinds)
    if any(k.partial for k in kinds.values()):
        return MIXED
    if kind.what != "rows" or kind.dim != 0:
        return NOTHING
    return Found(kind) if value.dim() > 2 and _others_alike(node, kinds, kind) else NOTHING


def _others_alike(node: fx.Node, kinds: Kinds, kind: Kind) -> bool:
    return all(k == SAME or (k.what == "rows" and k.dim == kind.dim) for k in kinds.values())


def _by_image(node: fx.Node, kinds: Kinds) -> Found:
    """Convolutions and pools: each entry of dim 0 alone, neighbours along the dims behind the channels."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return MIXED
    if kind.what != "rows":
        return NOTHING
    return Found(kind) if kind.dim == 0 and value.dim() > 2 else MIXED if kind.dim >= value.dim() - 2 else NOTHING


def _with_statistics(node: fx.Node, kinds: Kinds) -> Found:
    """Batch norm: with the statistics of the batch it mixes the rows, else each entry of dim 0 is alone."""
    always = "training" not in {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    return MIXED if always or reader(node)("training") else _by_entry(node, kinds)


def _by_entry(node: fx.Node, kinds: Kinds) -> Found:
    """Each entry of dim 0 alone."""
    if any(k.partial for k in kinds.values()):
        return MIXED
    kind, _ = first_of(node, kinds)
    return Found(kind) if kind.what == "rows" and kind.dim == 0 else NOTHING


def _attended(node: fx.Node, kinds: Kinds) -> Found:
    """Queries, keys and values `[..., tokens, width]`: entries of the dims before them are alone."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return MIXED
    if kind.what != "rows":
        return NOTHING
    masked = reader(node)("attn_mask") is not None or reader(node)("attn_bias") is not None
    return Found(kind) if kind.dim < value.dim() - 2 else NOTHING if masked else MIXED


def _of_last_two(node: fx.Node, kinds: Kinds) -> Found:
    """Zeros in a triangle of the last two dims."""
    kind, value = first_of(node, kinds)
    if kind.partial:
        return Found(kind)
    return NOTHING if kind.what != "rows" else MIXED if kind.dim >= value.dim() - 2 else Found(kind)


def _solved(node: fx.Node, kinds: Kinds) -> Found:
    """Triangular systems `A x = b`: each column of `b` alone (each row with `left=False`), if all ranks have `A`."""
    a, b = node.args[:2]
    kind, value = kinds.get(b, UNKNOWN), tensor_of(b)  # type: ignore[arg-type]
    if kinds.get(a, UNKNOWN) != SAME or kind.what != "rows" or value is None:  # type: ignore[arg-type]
        return matrices(node, kinds)
    mixed = value.dim() - (1 if reader(node)("left") is False else 2)
    return MIXED if kind.dim == mixed else Found(kind)


def _diagonals(node: fx.Node, kinds: Kinds) -> Found:
    """The last dim as diagonals of matrices, or diagonals of matrices as the last dim."""
    kind, value = first_of(node, kinds)
    if kind.what != "rows":
        return Found(kind) if kind.partial else NOTHING
    made = name_of(node) == "diag_embed"
    read, rank = reader(node), value.dim() + made
    planes = {(-2 if (d := read("dim1")) is None else d) % rank, (-1 if (d := read("dim2")) is None else d) % rank}
    if not made:
        return MIXED if kind.dim in planes else Found(kind._replace(dim=kind.dim - sum(d < kind.dim for d in planes)))
    rest = [d for d in range(rank) if d not in planes]
    return MIXED if kind.dim == value.dim() - 1 else Found(kind._replace(dim=rest[kind.dim]))


def _distances(node: fx.Node, kinds: Kinds) -> Found:
    """Of each row of the one with each of the other, the last dims being vectors."""
    if any(k.partial for k in kinds.values()):
        return MIXED
    pairs = [value.dim() - kind.dim == 2 for kind, value in rows_in(node, kinds)]
    if sum(pairs) > 1 or (pairs == [True] and len(kinds) == 1):
        return MIXED
    found = [k for k in kinds.values() if k.what == "rows"]
    first = kinds.get(node.args[0], UNKNOWN)  # type: ignore[arg-type]
    if not any(pairs) and len({k.dim for k in found}) == 1 and _others_alike(node, kinds, found[0]):
        return Found(found[0])
    return Found(first) if pairs == [True] and first.what == "rows" else NOTHING


_POOLS = (
    "convolution", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
)  # fmt: skip
_BY_ENTRY = (
    *(f"upsample_{name}" for name in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("upsample_nearest", "_upsample_nearest_exact")),
    *(f"{kind}_pad{n}d" for n in (2, 3) for kind in ("reflection", "replication")),
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d", "adaptive_max_pool3d",
    "reflection_pad1d", "replication_pad1d", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im",
)  # fmt: skip
_MATRICES = (
    "cholesky", "cholesky_inverse", "cholesky_solve", "triangular_solve", "geqrf", "ormqr",
)  # fmt: skip
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
)  # fmt: skip
_BATCH_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_with_update_functional",
)  # fmt: skip


ENTRY_RULES: dict[str, Rule] = {
    **dict.fromkeys(_POOLS, _by_image),
    **dict.fromkeys(("native_group_norm", "_native_batch_norm_legit_no_training"), _by_entry),
    **dict.fromkeys(_BATCH_NORMS, _with_statistics),
    **dict.fromkeys(_ATTENTION, _attended),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist", "_pdist_forward"), _distances),
    **dict.fromkeys(("tril", "triu"), _of_last_two),
    **dict.fromkeys(("diagonal", "diag_embed"), _diagonals),
    "linalg_solve_triangular": _solved,
    **dict.fromkeys(_BY_ENTRY, _by_entry_of_more),
    **dict.fromkeys(_MATRICES, matrices),
}
