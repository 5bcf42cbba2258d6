"""Answers that share their question: what is shared, in which models, and losses and gradients of whole documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from ftrain.bridge.batches import LANGUAGE
from ftrain.bridge.native import NativeDecoder
from ftrain.data.documents import IGNORE, Document, Group, lay
from ftrain.kernels.documents import Documents
from ftrain.modules import decoder
from ftrain.modules.delta_net import DeltaNetConfig, delta_net_block
from ftrain.modules.model import Model
from ftrain.modules.packs import join_packs
from ftrain.modules.spec import map_with_paths
from ftrain.sharding import Mesh, Plan
from ftrain.tasks import Dpo, Kto, Reward
from ftrain.tasks.shared_prompts import PREFIX, shared_documents, why_not_shared
from ftrain.tree import leaves

CFG = decoder.preset("llama-tiny")
SPECS = decoder.specs(CFG)
TOKENS = 40


def model_of(cfg: decoder.DecoderConfig) -> Model:
    made = NativeDecoder(cfg)
    return Model(
        "tiny", decoder.specs(cfg), LANGUAGE, made.loss, token_losses=made.token_losses, logits=made.logits,
        hidden=made.hidden,
    )  # fmt: skip


MODEL = model_of(CFG)


def params(seed: int):
    return map_with_paths(lambda _, p: p.double(), ftrain.init(SPECS, ftrain.key(seed)))


def document(question: list[int], answer: list[int], **marks: int) -> Document:
    tokens = np.array([*question, *answer])
    labels = np.array([*[IGNORE] * (len(question) - 1), *answer, IGNORE])
    return Document(tokens, labels, {name: np.full(len(tokens), mark) for name, mark in marks.items()})


def pairs(leaf: str, first: int, second: int, *, seed: int) -> list[tuple[Document, Document]]:
    random = np.random.default_rng(seed)
    some = lambda n: random.integers(1, 200, n).tolist()  # noqa: E731
    questions = [some(n) for n in (6, 3, 1)]
    return [
        (document(q, some(a), **{leaf: first}), document(q, some(b), **{leaf: second}))
        for q, a, b in zip(questions, (2, 4, 3), (5, 1, 2), strict=True)
    ]


def batch(leaf: str, marks: tuple[int, int], share: bool) -> dict:
    """Two packs, one for each of two ranks."""
    packs = []
    for seed in (0, 1):
        groups = [Group(shared_documents(*pair) if share else pair) for pair in pairs(leaf, *marks, seed=seed)]
        pack = lay(groups, tokens=TOKENS, first=TOKENS * seed)
        packs.append(pack)
    return join_packs(packs)


TASKS = {
    "dpo": (Dpo(), "side", (1, -1), {"reference": params(1)}),
    "ipo": (Dpo(kind="ipo", sft=0.2), "side", (1, -1), {"reference": params(1)}),
    "kto": (Kto(), "judged", (1, 2), {"reference": params(1)}),
    "reward": (Reward(), "side", (1, -1), {"head": {"task_head": torch.randn(64, 1, dtype=torch.float64)}}),
}


def gradients(name: str, share: bool, told: bool = False, **jit):
    task, leaf, marks, options = TASKS[name]

    def step(params, batch):
        return ftrain.value_and_grad(lambda p: task.loss(MODEL, p, batch, **options)[0])(params)

    made = batch(leaf, marks, share)
    if told:
        made["segments"] = Documents.of(made["segments"], packs=2)
    return ftrain.jit(step, **jit)(params(0), made)


@pytest.mark.parametrize("name", list(TASKS))
def test_losses_and_gradients_are_those_of_whole_documents(name: str) -> None:
    want = gradients(name, share=False)
    got = gradients(name, share=True, told=name != "kto")
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_ranks_with_a_pack_each_give_the_same() -> None:
    plan = Plan(Mesh(shard=2, kind="virtual"))
    got = gradients("dpo", share=True, told=True, plan=plan, specs={"params": SPECS})
    for a, b in zip(leaves(got), leaves(gradients("dpo", share=False)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_question_stands_in_the_pack_once_but_for_the_token_that_answers_begin_at() -> None:
    first, second = shared_documents(document([5, 6, 7], [8, 9]), document([5, 6, 7], [4]))
    assert first.tokens.tolist() == [5, 6, 7, 8, 9]
    assert second.tokens.tolist() == [7, 4]
    assert second.labels.tolist() == [4, IGNORE]
    assert second.leaves[PREFIX].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        (document([5, 6], [8, 9]), document([5, 6], [8, 9]), 1),  # labels are each answer's own, though they are equal
        (document([5, 6], [8]), document([4, 6], [8]), 0),
        (document([5], [8]), document([5], [9]), 0),
    ],
)
def test_what_has_labels_is_not_shared(first: Document, second: Document, count: int) -> None:
    _, other = shared_documents(first, second)
    assert (len(second) - len(other), other.leaves[PREFIX][0]) == (count, count)


def test_only_models_whose_tokens_meet_in_causal_attention_share() -> None:
    assert why_not_shared(MODEL) == ""
    net = delta_net_block(DeltaNetConfig(64, key_heads=2, heads=2, key_dim=16, value_dim=16, taps=4))
    recurrent = decoder.DecoderConfig(
        CFG.vocab, 64, 2, CFG.attention, d_hidden=32, pattern=(None, decoder.layer_with(CFG, attention=net))
    )
    assert "reads other tokens" in why_not_shared(model_of(recurrent)) or "not known" in why_not_shared(
        model_of(recurrent)
    )
    assert "encoders of media" in why_not_shared(replace(MODEL, media=lambda batch: batch))


def test_rows_are_refused() -> None:
    row = {name: leaf[None] for name, leaf in batch("side", (1, -1), True).items()}
    with pytest.raises(ValueError, match="give rows without 'prefix'"):
        Dpo().loss(MODEL, params(0), row, reference=params(1))
