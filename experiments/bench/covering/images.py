"""Classifiers of torchvision and timm through `from_module`: statistics of the batch, dropout, stochastic depth.

All is in float64: the plain modules' own gradients in float32 are right to 2e-2 only (BatchNorm over few pictures,
fifty layers of it). A row by its name alone drops nothing and is compared with the plain module. A row "..., dropped"
draws from a key; it is compared with the model's own eager step, which recompute and meshes must repeat to the number.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ftrain
from experiments.bench.covering.case import Built, Case, nothing_to_compare
from ftrain.bridge import from_module
from ftrain.modules.spec import leaves_with_paths

ROWS, CLASSES = 4, 5
"""Pictures of a batch, and what they may show."""


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, num_classes=CLASSES, **options)


def _densenet(p: float) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES, drop_rate=p)


def _vision_transformer(p: float) -> nn.Module:
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    made = VisionTransformer(**sizes, num_classes=CLASSES, dropout=p, attention_dropout=p)
    nn.init.normal_(made.heads.head.weight)  # zeros in torchvision, which hide all gradients behind
    return made


def _timm(name: str, p: float, **options: Any) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, num_classes=CLASSES, drop_rate=p, drop_path_rate=p, **options)
    return made


SWIN = {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
MODELS: Mapping[str, Callable[[float], nn.Module]] = {
    "torchvision resnet50": lambda p: _torchvision("resnet50"),
    "torchvision regnet_y_400mf": lambda p: _torchvision("regnet_y_400mf"),
    "torchvision densenet": _densenet,
    "torchvision vision_transformer": _vision_transformer,
    "timm efficientnet_b0": partial(_timm, "efficientnet_b0"),
    "timm mobilenetv3_small_050": lambda p: _timm("mobilenetv3_small_050", p),
    "timm convnext_atto": partial(_timm, "convnext_atto"),
    "timm vit_tiny": partial(_timm, "vit_tiny_patch16_224", img_size=64, depth=2),
    "timm swin_tiny": partial(_timm, "swin_tiny_patch4_window7_224", **SWIN),
    "timm mobilevit_xxs": partial(_timm, "mobilevit_xxs"),
}
"""By name: a small model from the probability to drop, of a number or of a layer."""
DROPPED = ("torchvision densenet", "torchvision vision_transformer", "timm efficientnet_b0", "timm swin_tiny")


def cases() -> tuple[Case, ...]:
    """The rows of this set."""
    plain = [Case("images", name, partial(_plain, name)) for name in MODELS]
    return (*plain, *(Case("images", f"{name}, dropped", partial(_dropped, name)) for name in DROPPED))


def _loss(scores: Tensor, batch: Mapping[str, Tensor]) -> ftrain.Mean:
    return ftrain.Mean.of(nn.functional.cross_entropy(scores, batch["labels"], reduction="none"))


def _pictures() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 3, 64, 64, generator=generator, dtype=torch.float64)
    return {"pixels": pixels, "labels": torch.arange(ROWS) % CLASSES}


def _made(name: str, p: float) -> tuple[nn.Module, Built]:
    torch.manual_seed(0)
    module = nothing_to_compare(lambda: MODELS[name](p).double().train())
    model = from_module(module, _loss, inputs=lambda batch: (batch["pixels"],))
    assert model.load is not None
    return module, Built(model, model.load(), _pictures(), lambda: (0.0, {}))


def _plain(name: str) -> Built:
    module, built = _made(name, 0.0)
    return Built(built.model, built.params, built.batch, partial(_expected, module, built.batch), about="rows")


def _expected(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    mean = _loss(module(batch["pixels"]), batch)
    loss = mean.total / mean.count
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _dropped(name: str) -> Built:
    _, built = _made(name, 0.3)
    model, key = built.model, ftrain.key(7)

    def eager() -> tuple[float, dict[str, Tensor]]:
        if model.state:
            of_loss = ftrain.value_and_grad(model.loss, has_aux=True)
            (loss, _), grads = of_loss(built.params, built.batch, key, model.state)
        else:
            loss, grads = ftrain.value_and_grad(model.loss)(built.params, built.batch, key)
        return float(loss), dict(leaves_with_paths(grads))

    return Built(model, built.params, built.batch, eager, key=key, about="rows, dropped")
