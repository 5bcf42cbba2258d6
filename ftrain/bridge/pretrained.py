"""`from_transformers`: a model of transformers, from its folder or its configuration, as a `Model`."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ftrain.bridge.attention import NAME
from ftrain.bridge.config import read_config
from ftrain.bridge.doors import open_doors
from ftrain.bridge.experts import expert_leaves
from ftrain.bridge.generation import Continued
from ftrain.bridge.language import Language
from ftrain.bridge.media_model import media_model
from ftrain.bridge.plain import plain_loss
from ftrain.bridge.positions import shift
from ftrain.bridge.proof import example, mixing, packed
from ftrain.bridge.rowwise import TASKS as ROWWISE
from ftrain.bridge.rowwise_model import rowwise_model
from ftrain.bridge.seq2seq_model import seq2seq_model
from ftrain.bridge.skeleton import build, nest, parameters
from ftrain.bridge.specs import beginnings, fix, inits_of, specs_of
from ftrain.bridge.weights import loader, names_of, reader, saver, stored_buffers
from ftrain.modules.model import Model
from ftrain.modules.spec import abstract
from ftrain.trace.functionalize import WritesInputs
from ftrain.trace.tracer import Traced

Task = Literal[
    "causal_lm", "masked_lm", "seq2seq_lm", "image_text_to_text", "image_classification", "audio_classification", "ctc",
    "features",
]  # fmt: skip
_CLASSES = {
    "causal_lm": ("AutoModelForCausalLM",),
    "masked_lm": ("AutoModelForMaskedLM",),
    "seq2seq_lm": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "image_text_to_text": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "image_classification": ("AutoModelForImageClassification",),
    "audio_classification": ("AutoModelForAudioClassification",),
    "ctc": ("AutoModelForCTC",),
    "features": ("AutoModel",),
}
"""The classes of transformers for each task: the first that has the architecture."""


def from_transformers(
    source: Any, *, task: Task = "causal_lm", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Model:
    """A model of transformers as pure functions over a tree of parameters; nothing is allocated.

    Args:
        source: a folder with `config.json` (and weights, for `load`), or a configuration of transformers.
        task: what the model is for; it gives the class, the loss, and the leaves of the batch, which `model.batch`
            tells: language models read "tokens"; "seq2seq_lm" a "source" too; pictures are "pixels" and recordings
            "sound"; "image_text_to_text" reads tokens [B, L] and media by the names of the model's processor, through
            `model.media(batch)`; "features" are `model.hidden` of an encoder, for a loss of one's own.
        dtype: of the parameters.
        trust_remote_code: run the Python files of a folder whose model transformers does not know.

    Raises:
        ValueError: the folder has no configuration that transformers knows, its code would have to be trusted, or the
            architecture has no such task.
        ImportError: transformers 5 is not installed.

    >>> import ftrain
    >>> from ftrain.bridge import from_transformers
    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = from_transformers(LlamaConfig(vocab_size=11, **sizes))
    >>> params = ftrain.init(model.specs, ftrain.key(0))
    >>> tokens = ftrain.randint(ftrain.key(1), (6,), low=0, high=11)
    >>> model.logits(params, {"tokens": tokens}).shape
    torch.Size([6, 11])
    """
    open_doors()
    folder = Path(source) if isinstance(source, str | Path) else None
    config = source if folder is None else read_config(folder, trust_remote_code)
    make = partial(_make, config, task, trust=trust_remote_code)
    if task in ROWWISE:
        return rowwise_model(make, task, dtype, folder)
    if task == "seq2seq_lm":
        return seq2seq_model(make, dtype, folder, _tables)
    if task == "image_text_to_text":
        return media_model(make, dtype, folder, _tables)
    made, specs, why = _suited(partial(make, dtype=dtype), folder)
    module, alone = made.module, made.alone
    stored = {name: made.held[name] for name in module.state_dict() if name in made.held}
    plain = partial(_plain, config, task, trust_remote_code)
    return Model(
        name=f"{type(module).__name__} of transformers",
        specs=specs,
        batch=made.leaves,
        loss=made.loss,
        routed=made.routed if made.routes else None,
        rebalanced=made.rebalanced if made.balanced else None,
        token_losses=made.token_losses,
        logits=made.logits,
        hidden=made.hidden,
        load=loader(module, folder, specs),
        read=reader(module, folder, specs),
        save=saver(module, made.held),
        state=made.state,
        packs=not alone,
        alone=alone,
        family=Continued(plain, made.name, stored).family() if task == "causal_lm" else None,
        plain=partial(plain_loss, plain, stored),
        why=why + _told(made.written),
        names=names_of(module, specs),
    )


def _told(written: frozenset[str]) -> str:
    """What a user is told of parameters that a model writes over, after a comma; empty for none."""
    if not written:
        return ""
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    return (
        f", with copies of {min(written)!r}{more}, which it writes over while it runs: a step computes with what is "
        "written there, and the parameters stay as they are"
    )


def _suited(make: Callable[..., nn.Module], folder: Path | None) -> tuple[Language, Any, str]:
    """The model, the specs of its parameters, and how it was bridged, in words: with our attention, or with its own.

    Its own is for modules that know attentions by their names, look into masks, or pass to attention what ours does not
    know: they cannot be built or traced with ours. An error that has another reason comes again with its own.
    """
    try:
        made, specs = _described(partial(make, attention=NAME), folder)
        return _settled(*_traced(made, specs), specs), specs, "bridged"
    except Exception as error:
        why = f"bridged, with its own attention, as ours does not suit it ({type(error).__name__}: {error})"
    made, specs = _described(partial(make, attention="eager"), folder)
    try:
        made, traced = _traced(made, specs)
    except Exception as error:
        alone = f"it cannot be traced on a pack ({type(error).__name__}: {error})"
        return replace(made, alone=alone), specs, why
    return _settled(made, traced, specs), specs, why


def _traced(made: Language, specs: Any) -> tuple[Language, Traced]:
    """The model's trace on a pack; a model that writes over its parameters is given copies of them."""
    try:
        return made, packed(made.logits, abstract(specs), example())
    except WritesInputs as error:
        if not all(path.startswith("params.") for path in error.paths):
            raise
        given = replace(made, written=frozenset(path.removeprefix("params.") for path in error.paths))
        return given, packed(given.logits, abstract(specs), example())


def _described(make: Callable[[], nn.Module], folder: Path | None) -> tuple[Language, Any]:
    """The module without memory, and the specs of its parameters. `folder`: of its buffers, if it keeps some."""
    module = build(make)
    fix(module)
    held = {} if folder is None else stored_buffers(module, folder)
    inits = inits_of(module, beginnings(module))
    specs = specs_of(parameters(module), vocab=_tables(module), experts=expert_leaves(module), inits=inits)
    return Language.of(module, held), nest(specs)


def _settled(made: Language, traced: Traced, specs: Any) -> Language:
    """The model with why documents cannot share a pack, if so, and the position of a document's first token."""
    alone = mixing(traced)
    if alone:
        return replace(made, alone=alone)
    alone_T = {"tokens": example()["tokens"]}
    first = shift(traced, lambda: packed(made.logits, abstract(specs), alone_T), example())
    if first is None:
        return replace(made, alone="it counts positions in a way of its own")
    return replace(made, first=first)


def _make(
    config: Any, task: Task, dtype: torch.dtype, *, attention: str, trust: bool, experts: str = NAME
) -> nn.Module:
    import transformers

    if task not in _CLASSES:
        raise ValueError(f"no task {task!r}; known: {', '.join(_CLASSES)}")
    options = {"attn_implementation": attention, "experts_implementation": experts, "dtype": dtype}
    for name in _CLASSES[task]:
        try:
            auto = getattr(transformers, name)
            module: nn.Module = auto.from_config(copy.deepcopy(config), trust_remote_code=trust, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
        else:
            return _in_training(module)
    part = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration", None)
    if task == "image_text_to_text" and part is not None:  # a part of a larger model, such as an omni thinker
        thinker: nn.Module = part._from_config(copy.deepcopy(config), **options)
        return _in_training(thinker)
    raise ValueError(
        f"transformers has no {config.model_type} for task {task!r} ({', '.join(_CLASSES[task])}): choose another task "
        f"of {', '.join(_CLASSES)}"
    )


def _in_training(module: nn.Module) -> nn.Module:
    """In training, without the recompute that a configuration may ask for: jit has its own."""
    for inner in module.modules():
        if getattr(inner, "gradient_checkpointing", False):
            inner.gradient_checkpointing = False  # type: ignore[assignment]
    return module.train()


def _plain(config: Any, task: Task, trust: bool) -> nn.Module:
    """The module with memory and its own eager attention and experts."""
    return _make(config, task, torch.float32, attention="eager", trust=trust, experts="eager")


def _tables(module: nn.Module) -> set[str]:
    """The names of the token table and of the head."""
    found = list[Any]()
    for where in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # some models do not say where theirs are
            found.append(getattr(module, where)())
    weights = [getattr(layer, "weight", None) for layer in found if layer is not None]
    return {name for name, p in parameters(module).items() if any(p is w for w in weights)}
