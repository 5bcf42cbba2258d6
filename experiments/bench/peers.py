"""What published programs hold on a GPU: FSDP2 with whole layers recomputed, counted moment by moment.

A program of torch's `fully_shard` is not ours: it gathers, keeps and reduces other things at other times. So the memory
of a published run is not that of our program for its layout, but what its own holds, as its sources say:

- A layer is a group of parameters, gathered in bfloat16 for its forward, dropped, and gathered again for its backward,
  while the gather of the next one is under way: two layers' parameters. Its gradients are made whole in bfloat16, then
  copied to float32 for the reduce-scatter, whose input stays until the next layer's is made (pytorch
  torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py: `wait_for_unshard`, `post_backward`).
- What is in no layer (token table, final norm, head) is the root's group: gathered from the forward's begin to the
  backward's end, since the root is not resharded after its forward, and reduced last of all, in one piece.
- With several micro-batches a rank's float32 gradients lie beside its state from the first backward on.

Legend of formulas: bytes; bfloat16 is 2, float32 is 4; AdamW's state is 12 per parameter.
"""

from dataclasses import dataclass

from ftrain import tree
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig

GIB = 1 << 30
_HALF, _FULL, _STATE = 2, 4, 12


@dataclass(frozen=True)
class Device:
    """What the whole-device counter shows beside torch's allocator, GiB; `source` of the figure."""

    outside: float
    source: str


WITH_ALL_TO_ALL = Device(
    4.0,
    "context and NCCL: 4.34 GB on each of 8 H100 after a first all-to-all, 1.06 GB before it (NVIDIA/nccl#1685)",
)


@dataclass(frozen=True)
class Fsdp2:
    """A program of FSDP2 over `ranks` GPUs, each with `tokens` tokens of a micro-batch; every layer is recomputed.

    `micro_batches`: whether a step has several. `device`: where the published figure is of the whole GPU.
    """

    cfg: DecoderConfig
    ranks: int
    tokens: int
    micro_batches: bool
    device: Device | None = None

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        outside = 0.0 if self.device is None else self.device.outside * GIB
        return outside + max(self.moments.values())

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at the moments that can be the fullest."""
        layer, root = self._layer, self._root
        state = (_STATE + (_FULL if self.micro_batches else 0)) * self.parameters / self.ranks
        gathered = _HALF * root
        return {
            # all residuals are there, the root's parameters, the head's gradient, and layers on their way
            "first layer of the backward": state
            + gathered
            + _HALF * self._head
            + (_HALF + _HALF + _HALF + _FULL) * layer
            + self.tokens * (self.cfg.layers * self.residual + self.working),
            # nothing of the layers is left but gradients; those of the root are whole, and again in float32
            "end of the backward": _STATE * self.parameters / self.ranks
            + _FULL * self.parameters / self.ranks
            + gathered
            + (_HALF + _FULL) * root,
        }

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self._root + self.cfg.layers * self._layer

    @property
    def residual(self) -> int:
        """Bytes of a token that a layer keeps: what it is given."""
        return _HALF * self.cfg.d_model

    @property
    def working(self) -> int:
        """Bytes of a token within a layer that is recomputed, in the backward of its MLP.

        Given, both norms' results, the sum between; q, k, v before and after rotation, attention's result; gate, up and
        their product, whose gradient is there too (liger's SwiGLU writes the gradients of gate and up over these).
        """
        cfg, heads = self.cfg, self.cfg.attention
        assert cfg.d_hidden is not None
        queries, keys = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        attention = (queries + 2 * keys) + (queries + keys) + queries
        return _HALF * (4 * cfg.d_model + attention + 4 * cfg.d_hidden)

    @property
    def _layer(self) -> int:
        return _elements(self.cfg, "layers.0")

    @property
    def _head(self) -> int:
        return _elements(self.cfg, "head")

    @property
    def _root(self) -> int:
        return sum(_elements(self.cfg, part) for part in ("embedding", "norm", "head"))


def _elements(cfg: DecoderConfig, part: str) -> int:
    """Numbers in the parameters whose paths begin with `part`."""
    specs = decoder.specs(cfg)
    named = zip(tree.paths(specs), tree.leaves(specs), strict=True)
    return sum(spec.elements for path, spec in named if path == part or path.startswith(f"{part}."))
