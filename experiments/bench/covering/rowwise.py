"""Rows of the bench for models whose batch is rows: pictures and recordings, in train mode, without dropout.

Legend: B rows, L frames or patches, D model width.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.bench.covering.case import Built, nothing_to_compare
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest, parameters
from ftrain.kernels.mean import Mean
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree

ROWS = 4
DROPOUTS = MappingProxyType(
    dict.fromkeys(
        (
            "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "drop_path_rate",
            "dropout_rate", "drop_connect_rate", "hidden_dropout", "activation_dropout", "attention_dropout",
            "feat_proj_dropout", "feat_quantizer_dropout", "final_dropout", "layerdrop", "mask_time_prob",
            "mask_feature_prob", "attention_dropout_prob", "dropout", "encoder_layerdrop", "conformer_conv_dropout",
            "conv_pos_dropout", "ffn_dropout", "attn_dropout", "aspp_dropout_prob", "attn_drop_rate", "drop_rate",
            "positional_dropout", "encoder_layerdrop", "adapter_dropout", "dropout_positions",
        ),
        0.0,
    )
)  # fmt: skip
"""The fields of configurations that drop or mask at random."""
_CLASSES = {
    "image_classification": "AutoModelForImageClassification",
    "audio_classification": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "features": "AutoModel",
}


@dataclass(frozen=True)
class Rows:
    """A model of rows. `kind`: transformers' type of model. `options`: what makes it small.

    `inputs`: the module's arguments for `ROWS` rows, made from a seed.
    """

    kind: str
    task: Literal["image_classification", "audio_classification", "ctc", "features"]
    inputs: Callable[[torch.Generator], Mapping[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The small configuration, without dropout."""
        from transformers import CONFIG_MAPPING

        make: Callable[..., Any] = CONFIG_MAPPING[self.kind]
        usual = make().to_dict()
        undropped = {name: 0.0 for name in DROPOUTS if name in usual and not isinstance(usual[name], list)}
        return make(**{**undropped, **self.options})

    def build(self) -> Built:
        """The row, with what the plain module gives by itself."""
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        config = nothing_to_compare(self.config)
        module = nothing_to_compare(partial(self._module, config))
        made = self.inputs(torch.Generator().manual_seed(0))
        given = {name: x.double() if x.is_floating_point() else x for name, x in made.items()}
        wanted = nothing_to_compare(partial(self._plain, copy.deepcopy(module), given))
        model = self._with_loss(self._bridged(config, module))
        params = nest({name: p.detach().clone() for name, p in parameters(module).items()})
        names = {"pixel_values": "pixels", "input_values": "sound", "input_features": "sound", "attention_mask": "mask"}
        batch = {names.get(name, name): x for name, x in given.items()}
        return Built(
            model=model,
            params=params,
            batch=batch if self.task == "features" else {**batch, "labels": self._labels()},
            expected=lambda: wanted,
            roundtrip=partial(roundtrip, _CLASSES[self.task], self.task, model, params),
            about=self.task,
        )

    def _bridged(self, config: Any, module: Any) -> Model:
        """The model, with the numbers that the module does not train, and that it may have drawn."""
        if all(p.requires_grad for p in module.parameters()):
            return from_transformers(copy.deepcopy(config), task=self.task, dtype=torch.float64)
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            return from_transformers(folder, task=self.task, dtype=torch.float64)

    def _module(self, config: Any) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        auto = getattr(transformers, _CLASSES[self.task])
        made: nn.Module = auto.from_config(copy.deepcopy(config), attn_implementation="eager")
        return made.double().train()

    def _labels(self) -> Tensor:
        if self.task == "ctc":
            return torch.tensor([[3, 4, 3], [5, 5, -100], [6, -100, -100], [7, 8, 9]])
        return torch.arange(ROWS) % 2

    def _with_loss(self, model: Model) -> Model:
        """Features have no loss of their own: that of their sines."""
        if self.task != "features":
            return model
        hidden = model.hidden
        assert hidden is not None

        def loss(params: Any, batch: Any, key: Tensor | None = None, state: Any = None) -> Any:
            found = hidden(params, batch, key, state)
            return (Mean.of(found[0].sin()), found[1]) if isinstance(found, tuple) else Mean.of(found.sin())

        return replace(model, loss=loss)

    def _plain(self, module: nn.Module, given: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        out = module(**given)
        if self.task == "features":
            loss = out[0].sin().mean()
        elif self.task == "ctc":
            loss = self._ctc(module, out.logits, given)
        else:
            loss = nn.functional.cross_entropy(out.logits, self._labels())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {float(loss)}")
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    def _ctc(self, module: Any, scores_BLV: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        labels = self._labels()
        flat, sizes = labels[labels >= 0], (labels >= 0).sum(1)
        frames = torch.full((ROWS,), scores_BLV.shape[1])
        if "attention_mask" in given:
            frames = module._get_feat_extract_output_lengths(given["attention_mask"].sum(-1)).long()
        chances = scores_BLV.log_softmax(-1).transpose(0, 1)
        blank = module.config.pad_token_id
        return nn.functional.ctc_loss(chances, flat, frames, sizes, blank=blank, reduction="sum") / len(flat)


def roundtrip(auto: str, task: Any, model: Model, params: Tree) -> None:
    """Save, and load with transformers' class `auto` and with the bridge. AssertionError for another name or number."""
    import transformers

    assert model.save is not None
    with tempfile.TemporaryDirectory() as folder:
        model.save(params, folder)
        loaded, told = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
        strange = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
        if strange:
            raise AssertionError(f"transformers reads it with other names: {strange[:3]}")
        same("transformers", dict(loaded.named_parameters()), flatten(params))
        read = from_transformers(folder, task=task).load
        assert read is not None
        same("the bridge", flatten(read()), flatten(params))


def same(reader: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """AssertionError for numbers that are not those wanted."""
    for name, x in wanted.items():
        if not torch.equal(found[name], x):
            raise AssertionError(f"{reader} reads other numbers for {name}")


def pictures(generator: torch.Generator, size: int = 32) -> dict[str, Tensor]:
    """Noise as pictures, `[B, 3, size, size]`."""
    return {"pixel_values": torch.randn(ROWS, 3, size, size, generator=generator)}
