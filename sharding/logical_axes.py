"""The vocabulary of logical axes: what a dim of a parameter means, so that a plan can say how to split it.

A `ftrain.modules.spec.ParamSpec` names each of its dims with one of these words, or `None` for a dim that no plan ever
splits. A layout maps words to mesh axes; models never see the mesh.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

LOGICAL_AXES: Mapping[str, str] = MappingProxyType(
    {
        "vocab": "rows of a token table, columns of a language-model head: one per token id",
        "embed": "the model's width D, the size of the residual stream",
        "heads": "query heads, flattened with their head dim: H * K",
        "kv_heads": "key and value heads, flattened with their head dim: G * K",
        "head_dim": "the width K of a single attention head",
        "mlp": "the hidden width F of an MLP or of one expert",
        "expert": "experts of a mixture, one slice each",
        "layers": "a stack of equal layers",
        "patch": "the flattened pixels of one patch: channels * frames * height * width",
        "position": "rows of a learned table of positions",
        "time": "features of a diffusion time",
        "frequency": "mel or spectral bins of audio",
        "codebook": "entries of a quantizer's codebook",
        "code_dim": "the width of one codebook entry",
        "conv_in": "input channels of a convolution",
        "conv_out": "output channels of a convolution",
        "conv_kernel": "taps of a convolution along one dim",
        "channels": "channels of an image, audio or latent tensor that no convolution mixes (norms, biases)",
        "class": "classes of a classifier",
        "rank": "the inner width of a low-rank adapter",
        "any": "a dim of which nothing is known, as of a module that the trainer did not write",
    }
)


def check(axes: Iterable[str | None]) -> None:
    """ValueError that names the first unknown axis and the nearest known one; None is always allowed.

    >>> from ftrain.sharding.logical_axes import check
    >>> check(["embed", None, "mlp"])
    """
    for axis in axes:
        if axis is not None and axis not in LOGICAL_AXES:
            near = difflib.get_close_matches(str(axis), LOGICAL_AXES, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown logical axis {axis!r}; nearest: {near!r}; known: {', '.join(LOGICAL_AXES)}")
