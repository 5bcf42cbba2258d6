"""`from_diffusers`: a model of diffusers, from its folder or its configuration, as a `Model`.

Legend: B rows (samples).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.diffusers_files import load, read_config, save
from ftrain.bridge.draws import drawing
from ftrain.bridge.mochi import use_fixed_shapes
from ftrain.bridge.scaled_attention import RowAttention
from ftrain.bridge.skeleton import buffers, build, call, flatten, nest, parameters
from ftrain.bridge.specs import inits_of, specs_of
from ftrain.graph.torch_private import exporting
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Leaf, Model
from ftrain.modules.spec import Tree
from ftrain.trace.spmd import current_sharded

TARGET = "target"
"""The leaf of a batch that the prediction is compared with."""
_ALONE = "its tokens are made of a sample's latents inside of the module"
_OPTIONS = ("return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


def from_diffusers(source: str | Path | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Model:
    """A transformer or UNet of diffusers as pure functions over a tree of parameters; nothing is allocated.

    Args:
        source: the folder of one model (`config.json`, and weights for `load`), for a pipeline its `transformer` or
            `unet`; or what its `config.json` says, with `_class_name`.
        dtype: of the parameters, but for those that diffusers keeps in float32 in its models of half precision.

    A batch holds the arguments of the module's `forward` by their names, most of them with B rows, and `target`: what
    the prediction is to be, of its shape. `model.loss` is the mean of the squared distance over all elements (for flow
    matching the target is noise less data); `model.outputs(params, batch)` gives the prediction, for a loss of one's
    own. On a mesh ranks divide rows; name leaves without rows (tables of places) in the plan as
    `ftrain.sharding.Replicated()`.

    Raises:
        ValueError: there is no configuration of a model that this diffusers knows; when it runs, a batch that lacks an
            argument or has one that the model does not read, and ranks that share a sequence.
        ImportError: diffusers is not installed.

    >>> import ftrain, torch
    >>> from ftrain.bridge import from_diffusers
    >>> sizes = {"sample_size": 4, "in_channels": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    >>> config = {"_class_name": "PixArtTransformer2DModel", "cross_attention_dim": 8, "caption_channels": 6, **sizes}
    >>> model = from_diffusers({**config, "out_channels": 2})
    >>> params = ftrain.init(model.specs, ftrain.key(0))
    >>> batch = {"hidden_states": torch.ones(1, 2, 4, 4), "encoder_hidden_states": torch.ones(1, 3, 6)}
    >>> model.outputs(params, {**batch, "timestep": torch.tensor([7])}).shape
    torch.Size([1, 2, 4, 4])
    """
    folder = None if isinstance(source, Mapping) else Path(source)
    kind, config = read_config(source)
    module = build(lambda: kind.from_config(dict(config))).train()
    module = _in_dtype(module, dtype)
    use_fixed_shapes(module)
    specs = nest(specs_of(parameters(module), inits=inits_of(module)))
    made = Diffusion(module, f"{kind.__name__} of diffusers", buffers(module))
    return Model(
        name=made.name,
        specs=specs,
        batch=made.leaves,
        loss=made.loss,
        outputs=made.outputs,
        load=None if folder is None else partial(load, module, folder, specs),
        save=partial(save, module, made.held),
        packs=False,
        alone=_ALONE,
        why="bridged",
    )


@dataclass(frozen=True)
class Diffusion:
    """A model of diffusers around `module`, which may be without memory. `held`: its buffers by name."""

    module: nn.Module
    name: str
    held: Mapping[str, Tensor]

    def loss(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Mean:
        """The mean, over all elements, of the squared distance of prediction and `batch["target"]`. `key`: int64 `[2]`,
        for dropout. ValueError for a batch without a target of the prediction's shape, and as `outputs`.
        """
        if TARGET not in batch:
            raise ValueError(f"{self.name}: a loss needs the batch's {TARGET!r} (what the prediction is to be)")
        found, target = self.outputs(params, batch, key), batch[TARGET]
        if found.shape != target.shape:
            raise ValueError(
                f"{self.name}: its prediction has shape {list(found.shape)} and the batch's {TARGET!r} "
                f"{list(target.shape)}: give a target of the prediction's shape"
            )
        return Mean.of((found.float() - target.float()).square())

    def outputs(self, params: Tree, batch: Mapping[str, Any], key: Tensor | None = None) -> Tensor:
        """What the module predicts. `key`: int64 `[2]`, for dropout.

        ValueError for a batch that does not fit, and on a mesh whose ranks share a sequence.
        """
        self._require(batch)
        arguments = {name: x for name, x in batch.items() if name != TARGET}
        if "return_dict" in self._accepted:
            arguments["return_dict"] = False
        rows = next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1), 0)
        with exporting(), drawing(key, rows), RowAttention():
            found = call(self.module, {**self.held, **flatten(params)}, (), arguments)
        return found[0] if isinstance(found, tuple) else found

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """What it reads of a batch: its forward's arguments, and the target."""
        found = {
            name: Leaf("an argument of the module's forward", "as the module wants it", needed=p.default is p.empty)
            for name, p in self._accepted.items()
            if name not in _OPTIONS and p.kind is not p.VAR_KEYWORD
        }
        return {**found, TARGET: Leaf("what the prediction is to be", "that of the prediction")}

    @cached_property
    def _accepted(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.module.forward).parameters)

    def _require(self, batch: Mapping[str, Any]) -> None:
        missing = [name for name, leaf in self.leaves.items() if leaf.needed and name not in batch]
        if missing:
            raise ValueError(f"{self.name}: its forward needs {missing[0]!r}, and the batch has {', '.join(batch)}")
        unknown = [name for name in batch if name not in self.leaves]
        if unknown:
            raise ValueError(
                f"{self.name}: the batch has {unknown[0]!r}, which the model does not read; it reads "
                f"{', '.join(self.leaves)}"
            )
        trace = current_sharded()
        if trace is not None and trace.plan.mesh.sequence > 1:
            raise ValueError(
                f"{self.name}: ranks of a sequence axis cannot share its tokens, as {_ALONE}: divide samples among "
                "data axes (shard, replicate)"
            )


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with floating parameters in `dtype`, but for those that diffusers keeps in float32."""
    wide = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for path, inner in module.named_modules():
        for name, p in inner.named_parameters(recurse=False):
            kept = any(part in f"{path}.{name}".split(".") for part in wide)
            if p.is_floating_point() and not kept and p.dtype != dtype:
                setattr(inner, name, nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad))
    return module
