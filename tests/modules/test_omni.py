"""The omni composition: laws of packing, absent modalities, gradients to every part, learning, tracing."""

import dataclasses

import optree
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain import tree
from ftrain.kernels import random
from ftrain.kernels.mean import weighted_sum
from ftrain.modules import omni, spec, vision_encoder
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Budget, Text, exact_budget, pack
from tests.helpers.tiny_omni import IMAGE, MODEL, documents, drawing, image

WEIGHTS = {"balance": 0.01}


def parameters(model: OmniModel = MODEL) -> dict:
    return spec.init(omni.specs(model), random.key(0))


def batch_of(docs: list, *, spare: int = 0) -> dict:
    exact = exact_budget(docs, model=MODEL)
    rows = {name: count + 8 * spare for name, count in exact.rows.items()}
    targets = {name: count + spare for name, count in exact.targets.items()}
    return pack(docs, budget=Budget(exact.tokens + 5 * spare, rows, targets), model=MODEL).batch


def terms_of(docs: list, *, spare: int = 0) -> dict:
    return omni.loss_terms(parameters(), batch_of(docs, spare=spare), model=MODEL)[0]


def test_terms_are_text_each_decoder_and_balance() -> None:
    terms = terms_of(documents())
    assert list(terms) == ["text", "draw", "balance"]
    # Trained text without the first tokens of documents, and one begin token for each drawing.
    assert terms["text"].count == 3 + 1 + 3 + 3 + 2
    assert terms["draw"].count == 8
    assert all(torch.isfinite(term.total) for term in terms.values())


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
@pytest.mark.parametrize("spare", [0, 2])
def test_the_loss_of_a_pack_is_that_of_its_documents_alone(order: list[int], spare: int) -> None:
    """Documents do not see each other, their order does not matter, and padding has no influence."""
    together = terms_of([documents()[i] for i in order], spare=spare)
    alone = [terms_of([document]) for document in documents()]
    for name in ("text", "draw", "balance"):
        parts = [terms[name] for terms in alone if name in terms]
        assert together[name].count == sum(part.count for part in parts)
        if name != "balance":  # the shares of experts are of the whole batch: not a sum over documents
            total = sum(part.total for part in parts)
            torch.testing.assert_close(together[name].total, total, rtol=1e-6, atol=2e-6)


def test_the_balance_term_does_not_count_padding() -> None:
    plain, padded = (terms_of(documents(), spare=spare)["balance"] for spare in (0, 3))
    torch.testing.assert_close(plain.total, padded.total, rtol=1e-5, atol=1e-5)


def gradients(docs: list) -> dict:
    batch = batch_of(docs, spare=1)

    def loss(params: dict) -> torch.Tensor:
        return weighted_sum(omni.loss_terms(params, batch, model=MODEL)[0], WEIGHTS).value()

    return torch.func.grad(loss)(parameters())


def largest(tree: dict) -> float:
    return max(leaf.abs().max().item() for _, leaf in spec.leaves_with_paths(tree))


def test_gradients_reach_every_part_but_the_frozen_tokenizer() -> None:
    grads = gradients(documents())
    still = {path for path, leaf in spec.leaves_with_paths(grads) if not leaf.abs().max() > 0}
    assert all(path.startswith("decoders.draw.tokenizer.") for path in still)
    assert largest(grads["decoders"]["draw"]["tokenizer"]) == 0


def test_the_mask_of_what_trains_leaves_out_the_tokenizer() -> None:
    mask = omni.trainable(MODEL)
    assert [path for path, _ in spec.leaves_with_paths(mask)] == [
        path for path, _ in spec.leaves_with_paths(parameters())
    ]
    for path, trains in spec.leaves_with_paths(mask):
        assert trains is not path.startswith("decoders.draw.tokenizer.")


def test_an_absent_modality_costs_nothing() -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("called for a batch without this modality")

    encoders = {name: dataclasses.replace(encoder, lm_encode=never) for name, encoder in MODEL.encoders.items()}
    decoders = {name: dataclasses.replace(d, lm_encode=never, lm_head=never) for name, d in MODEL.decoders.items()}
    words_only = OmniModel(MODEL.foundation, encoders, decoders)
    terms, _ = omni.loss_terms(parameters(), batch_of([documents()[2]]), model=words_only)
    assert list(terms) == ["text", "balance"]


def test_absent_and_padded_modalities_give_the_same_loss() -> None:
    budget = Budget(20, rows={"image": 16, "audio": 16}, targets={"draw": 1})
    dropped, padded = (
        omni.loss_terms(parameters(), pack([documents()[2]], budget=budget, model=MODEL, absent=how).batch, model=MODEL)
        for how in ("drop", "pad")
    )
    torch.testing.assert_close(dropped[0]["text"].total, padded[0]["text"].total)
    assert padded[0]["draw"].count == 0
    assert padded[0]["draw"].total == 0


def test_a_batch_without_labels_has_loss_zero_and_zero_gradients() -> None:
    grads = gradients([[Text([1, 2]), image(0)]])
    assert all(torch.isfinite(leaf).all() for _, leaf in spec.leaves_with_paths(grads))
    assert largest(grads["encoders"]["image"]) < 1e-2  # the balance loss alone


def test_a_modality_that_the_model_lacks_is_named() -> None:
    batch = batch_of([documents()[0]])
    smaller = OmniModel(MODEL.foundation, {"audio": MODEL.encoders["audio"]})
    with pytest.raises(ValueError, match=r"no encoder for modality 'image'; it has \['audio'\]"):
        omni.loss_terms(parameters(smaller), batch, model=smaller)
    with pytest.raises(ValueError, match="cannot be called 'text'"):
        OmniModel(MODEL.foundation, decoders={"text": MODEL.decoders["draw"]})


def test_parts_that_are_not_as_wide_as_the_foundation_are_named() -> None:
    narrow = vision_encoder.encoder(dataclasses.replace(IMAGE, d_out=8), begin=30, end=31)
    other = dataclasses.replace(MODEL, encoders={**MODEL.encoders, "image": narrow})
    with pytest.raises(ValueError, match=r"the encoder 'image' makes rows \[\d+, 8\], and those of the foundation are"):
        omni.loss_terms(parameters(other), batch_of([documents()[0]]), model=other)


def test_each_code_is_predicted_from_the_state_before_it() -> None:
    """The loss of code i moves with codes before i and with nothing after."""
    batch = batch_of([[Text([1, 2]), drawing(0)]])
    params = parameters()
    decoder = MODEL.decoders["draw"]
    embeds, codes = decoder.lm_encode(params["decoders"]["draw"], batch["decoders"]["draw"]["target"])

    def losses(embeds: torch.Tensor) -> torch.Tensor:
        def head(p: dict, hidden_nD: torch.Tensor, codes_n: torch.Tensor) -> torch.Tensor:
            log_n = torch.log_softmax(decoder.lm_logits(p, hidden_nD), -1)
            return -log_n.gather(1, codes_n[:, None])[:, 0]

        fixed = dataclasses.replace(decoder, lm_encode=lambda *_: (embeds, codes), lm_head=head)
        probe = OmniModel(MODEL.foundation, MODEL.encoders, {"draw": fixed})
        return omni.loss_terms(params, batch, model=probe)[0]["draw"]

    reach = torch.autograd.functional.jacobian(losses, embeds).abs().sum(-1) > 0
    assert torch.equal(reach, torch.ones(4, 4, dtype=torch.bool).tril(-1))
    torch.testing.assert_close(losses(embeds).sum(), terms_of([[Text([1, 2]), drawing(0)]])["draw"].total)


def test_it_computes_in_the_dtype_of_its_parameters() -> None:
    low = optree.tree_map(lambda leaf: leaf.bfloat16(), parameters())
    terms, _ = omni.loss_terms(low, batch_of(documents()), model=MODEL)
    for name, exact in terms_of(documents()).items():
        torch.testing.assert_close(terms[name].value().float(), exact.value(), rtol=0.03, atol=0)


def test_one_batch_is_learned_by_heart() -> None:
    batch, params = batch_of([documents()[0], documents()[3]], spare=1), parameters()

    def loss(params: dict) -> torch.Tensor:
        return weighted_sum(omni.loss_terms(params, batch, model=MODEL)[0], WEIGHTS).value()

    leaves, tree = optree.tree_flatten(params)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    optimizer = torch.optim.Adam(leaves, lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(optree.tree_unflatten(tree, leaves)).backward()
        optimizer.step()
    terms, _ = omni.loss_terms(optree.tree_unflatten(tree, leaves), batch, model=MODEL)
    assert terms["text"].value() < 0.1
    assert terms["draw"].value() < 0.1


def test_the_loss_traces_on_fake_tensors_into_one_graph() -> None:
    arrays, treedef = tree.flatten(batch_of([documents()[0], documents()[3]], spare=1))
    params, batch = parameters(), dict(enumerate(arrays))

    def step(params: dict, batch: dict) -> tuple:
        def loss(params: dict) -> torch.Tensor:
            given = tree.unflatten(treedef, batch.values())
            return weighted_sum(omni.loss_terms(params, given, model=MODEL)[0], WEIGHTS).value()

        return torch.func.grad_and_value(loss)(params)

    graph = make_fx(step, tracing_mode="fake")(params, batch)
    (traced, traced_value), (eager, eager_value) = graph(params, batch), step(params, batch)
    torch.testing.assert_close(traced_value, eager_value)
    torch.testing.assert_close(optree.tree_leaves(traced), optree.tree_leaves(eager), rtol=1e-4, atol=1e-6)
