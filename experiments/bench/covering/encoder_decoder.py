"""Encoder-decoders of transformers, with a source of text or of sound.

Legend: B rows, L tokens of a row.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.covering.case import Built, Case, nothing_to_compare
from experiments.bench.covering.rowwise import DROPOUTS, roundtrip
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest, parameters
from ftrain.sharding import BatchRows

_SMALL = {
    "vocab_size": 128, "d_model": 16, "hidden_size": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "num_encoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "ngram": 2,
    "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "encoder_sparse_step": 2,
    "decoder_sparse_step": 2, "expert_capacity": 64, "src_vocab_size": 128, "tgt_vocab_size": 128, "pad_token_id": 0,
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 64, "decoder_start_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2, "forced_eos_token_id": None, "dropout_rate": 0.0, "local_radius": 4, "global_block_size": 4,
    "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8,
    "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2, "router_jitter_noise": 0.0, "block_size": 8, "stagger_local_blocks": False,
    "attention_window": 8, "speech_encoder_layers": 2, "conv_channels": 16, "input_feat_per_channel": 8,
    "encoder_num_key_value_heads": 2, "decoder_num_key_value_heads": 2, "expert_dropout": 0.0,
    "moe_token_dropout": 0.0, "num_global_tokens": 4,
}  # fmt: skip
"""What a configuration is made small with: the fields that it has of these."""
_TEXT = (
    "t5", "bart", "mbart", "pegasus", "marian", "mt5", "umt5", "bigbird_pegasus", "led", "prophetnet", "plbart",
    "nllb-moe", "switch_transformers", "longt5", "m2m_100", "blenderbot", "blenderbot-small", "mvp", "fsmt",
    "pegasus_x", "t5gemma",
)  # fmt: skip
_SOURCES, _TARGETS = (12, 9, 10, 11), (9, 11, 8, 12)
"""Lengths of the documents of a pack, whose halves are whole documents."""


def cases() -> tuple[Case, ...]:
    """A row for each family."""
    sound: Mapping[str, Mapping[str, Any]] = {
        "whisper": {"source": (8, 40)},
        "speech_to_text": {"source": (40, 8)},
    }
    text = [Case("encoder_decoder", kind, Pairs(kind).build) for kind in _TEXT]
    masked = [Case("encoder_decoder", f"{kind} masked rows", Pairs(kind, masked=True).build) for kind in ("t5", "bart")]
    return (*text, *masked, *(Case("encoder_decoder", k, Pairs(k, **options).build) for k, options in sound.items()))


@dataclass(frozen=True)
class Pairs:
    """An encoder-decoder. `kind`: transformers' type of model. `source`: the shape of a row of sound; None: text.

    `masked`: the rows of the source are filled up to one length.
    """

    kind: str
    source: tuple[int, ...] | None = None
    masked: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The small configuration, without dropout."""
        from transformers import CONFIG_MAPPING

        make: Any = CONFIG_MAPPING[self.kind]
        usual = make().to_dict()
        options = {name: value for name, value in {**DROPOUTS, **_SMALL, **self.options}.items() if name in usual}
        if self.kind == "t5gemma":
            part = {name: value for name, value in _SMALL.items() if name in usual["encoder"]}
            part |= {
                "attention_dropout": 0.0,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 4,
            }
            options |= {"encoder": part, "decoder": dict(part), "vocab_size": 128}
        return make(**options)

    def build(self) -> Built:
        """The row, with what the plain module gives by itself."""
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        config = nothing_to_compare(self.config)
        module = nothing_to_compare(partial(self._module, config))
        batch = self._rows()
        wanted = nothing_to_compare(partial(self._plain, copy.deepcopy(module), batch))
        model = from_transformers(copy.deepcopy(config), task="seq2seq_lm")
        if model.packs and not self.masked:
            batch, wanted = _packed(), self._plain(copy.deepcopy(module), *_documents())
        params = nest({name: p.detach().clone() for name, p in parameters(module).items()})
        expert = any(spec.axes[:1] == ("expert",) for spec in flatten(model.specs).values())
        return Built(
            model=model,
            params=params,
            batch=batch,
            expected=lambda: wanted,
            splits=frozenset({"expert"} if expert else ()),
            rules=dict.fromkeys(("source", "source_segments"), BatchRows()) if "segments" in batch else {},
            roundtrip=partial(roundtrip, self._auto, "seq2seq_lm", model, params),
            about="packed" if "segments" in batch else "masked rows" if self.masked else "rows",
        )

    @property
    def _auto(self) -> str:
        return "AutoModelForSeq2SeqLM" if self.source is None else "AutoModelForSpeechSeq2Seq"

    def _module(self, config: Any) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        auto = getattr(transformers, self._auto)
        made: nn.Module = auto.from_config(copy.deepcopy(config), attn_implementation="eager")
        return made.train()

    def _rows(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        source = torch.randint(3, 120, (2, 16), generator=generator)
        if self.source is not None:
            source = torch.randn(2, *self.source, generator=generator)
        tokens = torch.randint(3, 120, (2, 11), generator=generator)
        labels = tokens.roll(-1, 1)
        labels[:, -1] = -100
        found = {"source": source, "tokens": tokens, "labels": labels}
        if self.kind == "fsmt":  # it looks for padding in the target, unless it is told
            found["mask"] = torch.ones_like(tokens).bool()
        return {**found, "source_mask": torch.arange(16) < torch.tensor([[16], [9]])} if self.masked else found

    def _plain(self, module: Any, *batches: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        total, count = torch.zeros(()), 0
        for batch in batches:
            mask = {"attention_mask": batch["source_mask"].long()} if "source_mask" in batch else {}
            given = {module.main_input_name: batch["source"], "decoder_input_ids": batch["tokens"], **mask}
            logits = module(**given, use_cache=False).logits.float()
            labels = batch["labels"].flatten()
            total = total + nn.functional.cross_entropy(
                logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum"
            )
            count += int((labels != -100).sum())
        loss = total / count
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {float(loss)}")
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _documents() -> list[dict[str, Tensor]]:
    """Pairs of different lengths, each as one row."""
    generator, found = torch.Generator().manual_seed(1), []
    for here, there in zip(_TARGETS, _SOURCES, strict=True):
        tokens = torch.randint(3, 120, (1, here), generator=generator)
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
        source = torch.randint(3, 120, (1, there), generator=generator)
        found.append({"source": source, "tokens": tokens, "labels": labels})
    return found


def _packed() -> dict[str, Tensor]:
    """The pairs as a pack of sources and one of targets."""
    pairs = _documents()
    found = {name: torch.cat([pair[name][0] for pair in pairs]) for name in ("source", "tokens", "labels")}
    return {**found, "segments": _ids(_TARGETS), "source_segments": _ids(_SOURCES)}


def _ids(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
