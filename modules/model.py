"""What every model is to tasks, plans, benches and the command line: a few plain functions over a tree of parameters.

Native families and bridged modules both make one (`ftrain.hf.open`); nothing that takes a `Model` asks what is inside.

Legend: T tokens of a pack, B rows, L tokens of a row, V vocabulary, D model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ftrain.modules.autoregression import Family
from ftrain.modules.hf_names import Names
from ftrain.modules.moe import RouterLoad
from ftrain.modules.spec import Tree
from ftrain.sharding.batch import BatchRule


@dataclass(frozen=True)
class Leaf:
    """A leaf of a model's batch.

    - `means`: one sentence. `shape`: in the letters of the legend, e.g. "[T] or [B, L]".
    - `needed`: the model cannot run without it.
    """

    means: str
    shape: str
    needed: bool = False


@dataclass(frozen=True)
class Towers:
    """What a model computes of media alone, before its layers see them, and that can be computed once for many steps.

    - `paths`: of the parameters that it reads, nodes of the tree.
    - `rows(params, batch)`: of those parameters and what `Model.media` makes of media, the rows that stand for them:
      "media" `[n, R, D]` of pictures and films, "audio" `[n, D]`, at the tokens that the "index" of each says.
    - `width`: by the raw leaf that a tower reads the dims of its rows, `(R, D)` or `(D,)`.
    - `config`: what the towers are, as plain data.
    """

    paths: tuple[str, ...]
    rows: Callable[[Tree, Mapping[str, Any]], dict[str, Tensor]]
    width: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A model as pure functions over a tree of parameters.

    - `name`: what it is and where it comes from, for logs. `why`: why it is native or bridged.
    - `specs`: the tree of `ParamSpec`s of its parameters.
    - `batch`: what the leaves of its batch are, by name.
    - `loss(params, batch, key=None) -> Mean`: of the batch's labels (a `WeightedSum` if it has several terms), or
      `(Mean, state)` if it has `state`. `key`: int64 `[2]`, from which dropout draws; without one nothing is dropped.
    - `terms`: names of the means of its loss, where that has several and a batch all of them.
    - `routed(params, batch, key=None) -> (Mean, loads)`: the mean of `loss`, and what each router did,
      `ftrain.modules.moe.RouterLoad`s by the path of its layer, which are sums over tokens (`moe.load_metrics` makes
      numbers for a log of them). None for models without experts.
    - `rebalanced(state, loads) -> state`: the state after a step whose routers did this, the whole step's loads or
      those of its micro-batches added up: what `loss` gives beside the mean. None for models without such a state.
    - `token_losses(params, batch, key=None)`: the cross entropy of each label, in nats, with the dims of the batch's
      tokens; 0 where there is no label. Scores of all tokens are not held where the head is a linear layer. None where
      a loss is no sum over tokens.
    - `logits(params, batch, key=None)`: the scores, with the dims of the batch's tokens and V at last.
    - `hidden(params, batch, key=None)`: what the head reads, with D at last; or the features of an encoder, with the
      state if it has `state`.
    - `outputs(params, batch, key=None)`: what the model predicts where that is no scores of tokens.
    - `load(specs=None) -> params`: the weights, each rank's own part where a plan says so; None without a folder.
    - `read(path)`: the weight of one parameter from the folder, whole, on the CPU, in the dtype of its spec; None where
      weights are not read one by one.
    - `save(params, folder)`: in the format that it was loaded from.
    - `media(batch) -> batch`: what the model computes of the shapes of its media, on the host, before a step; None for
      models that need no such thing. Where documents share packs it takes `packs=`, how many one after the other the
      tokens are, and `places=`, for how many tokens of pictures each has room; where it hears `chunks=` of recordings.
    - `towers`: what it computes of media alone; None where that is not computed apart. `media(batch, rows=True)` then
      takes such rows in the place of media.
    - `rules`: how ranks share the leaves of its batch (`Plan(batch=model.rules)`) that have no entry for each token.
    - `state`: what a forward pass changes beside the parameters (statistics of BatchNorm, balancing biases of routers),
      as a tree of tensors; the functions then take it as `state=` and `loss` gives the new one. Empty for most.
    - `packs`: True if several documents may share a pack, with `batch["segments"]`; else `alone` says why not.
    - `family`: how it generates, or None.
    - `plain(params, batch) -> (loss, gradients)`: what the module that it was made of gives by itself, eager, document
      by document, in float64: 0-d, and a dict of tensors by dotted path. None for models that have no other form.
    - `names`: what Hugging Face's folders call its parameters; empty where the paths are those names. `other_names`:
      what programs of others call them, by the program ("comfyui", for files of adapters).
    - `keep`: globs of the parameters that stay float32 where the others are narrower: for `ftrain.Precision(keep=...)`.
    - `frozen`: globs of what a run leaves as it is unless it is told what to train: parts that no loss reaches.
    - `top_k`: how many experts a token uses, of those along the logical axis "expert"; 0 without, or if not known.
    """

    name: str
    specs: Tree
    batch: Mapping[str, Leaf]
    loss: Callable[..., Any]
    terms: tuple[str, ...] = ()
    routed: Callable[..., tuple[Any, Mapping[str, RouterLoad]]] | None = None
    rebalanced: Callable[[Tree, Mapping[str, RouterLoad]], Tree] | None = None
    token_losses: Callable[..., Any] | None = None
    logits: Callable[..., Tensor] | None = None
    hidden: Callable[..., Any] | None = None
    outputs: Callable[..., Any] | None = None
    load: Callable[..., Tree] | None = None
    read: Callable[[str], Tensor] | None = None
    save: Callable[..., None] | None = None
    media: Callable[..., Any] | None = None
    towers: Towers | None = None
    state: Tree = field(default_factory=dict)
    packs: bool = True
    alone: str = ""
    family: Family | None = None
    plain: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    why: str = ""
    names: Names = ()
    top_k: int = 0
    rules: Mapping[str, BatchRule] = field(default_factory=dict)
    other_names: Mapping[str, Names] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
