"""The loop of generation over families that are no decoder: a recurrent network, an encoder-decoder, scores by hand.

Legend: B samples, V vocabulary, H state, S source tokens.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.modules import decoder, spec
from ftrain.modules.autoregression import Family, decoder_family, generate, generate_ids
from ftrain.modules.generation import generate_text
from ftrain.modules.omni import OmniModel
from ftrain.modules.packing import Text
from ftrain.modules.sampling import Sampling, choose, likely

V, H = 11, 6
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def weights(*names: str) -> dict[str, Tensor]:
    shapes = {"embed": (V, H), "out": (H, V), "keep": (H, H), "read": (H, H)}
    return {n: random.normal(random.key(i), shapes[n], dtype=torch.float64) * 2 for i, n in enumerate(names)}


def recurrent() -> tuple[Family, dict[str, Tensor]]:
    """`h = tanh(h keep + embed[token])`; prompts of different lengths run one by one."""

    def one(params: dict, token_B: Tensor, h_BH: Tensor) -> Tensor:
        return torch.tanh(h_BH @ params["keep"] + params["embed"][token_B])

    def prefill(params: dict, prompts: list[list[int]], room: int) -> tuple[Tensor, Tensor]:
        states = []
        for prompt in prompts:
            h_1H = torch.zeros(1, H, dtype=torch.float64)
            for token in prompt:
                h_1H = one(params, torch.tensor([token]), h_1H)
            states.append(h_1H)
        h_BH = torch.cat(states)
        return h_BH @ params["out"], h_BH

    def extend(params: dict, token_B: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        h_BH = one(params, token_B, h_BH)
        return h_BH @ params["out"], h_BH

    return Family(prefill, extend), weights("embed", "keep", "out")


def translating() -> tuple[Family, dict[str, Tensor]]:
    """Each step reads a source by attention; its prompts are pairs of a source and the beginning of a target."""

    def scores(params: dict, token_B: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        read = [
            source_SH.T @ (source_SH @ params["embed"][t]).softmax(0)
            for t, source_SH in zip(token_B, state, strict=True)
        ]
        return torch.stack(read) @ params["read"] @ params["out"], state

    def prefill(params: dict, prompts: list[tuple[list[int], int]], room: int) -> tuple[Tensor, list[Tensor]]:
        sources = [params["embed"][torch.tensor(source)] for source, _ in prompts]
        return scores(params, torch.tensor([begin for _, begin in prompts]), sources)

    return Family(prefill, scores), weights("embed", "read", "out")


def test_a_recurrent_network_generates_what_running_it_again_gives() -> None:
    family, params = recurrent()
    for prompt, made in zip(PROMPTS, generate(params, PROMPTS, family=family, max_new=6), strict=True):
        for i, token in enumerate(made):
            scores_1V, _ = family.prefill(params, [[*prompt, *made[:i]]], 0)
            assert token == int(scores_1V.argmax())


def test_prompts_are_whatever_the_family_takes() -> None:
    family, params = translating()
    pairs = [([1, 2, 3], 0), ([4, 5], 7)]
    both = generate(params, pairs, family=family, max_new=4)
    assert both == [generate(params, [pair], family=family, max_new=4)[0] for pair in pairs]
    assert both[0] != generate(params, [([9, 8], 0)], family=family, max_new=4)[0]


def test_any_of_several_ids_stops() -> None:
    family, params = recurrent()
    free = generate(params, PROMPTS, family=family, max_new=8)
    one, other = free[0][0], next(token for token in free[1] if token != free[0][0])
    for ends in ([one, other], [other, one]):
        for ids, whole in zip(generate(params, PROMPTS, family=family, max_new=8, stop=ends), free, strict=True):
            first = next((i for i, token in enumerate(whole) if token in ends), len(whole))
            assert ids == whole[:first]
            assert len(ids) < 8


def test_it_ends_when_all_have_stopped() -> None:
    family, params = recurrent()
    runs = []

    def counted(params: dict, token_B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        runs.append(len(token_B))
        return family.extend(params, token_B, state)

    first = [ids[0] for ids in generate(params, PROMPTS, family=family, max_new=1)]
    slow = dataclasses.replace(family, extend=counted)
    assert generate(params, PROMPTS, family=slow, max_new=50, stop=first) == [[], [], []]
    assert runs == []
    assert generate(params, PROMPTS, family=slow, max_new=0) == [[], [], []]


def test_a_key_for_each_prompt_makes_samples_independent_of_the_batch() -> None:
    family, params = recurrent()
    keys_B2 = random.split(random.key(3), 3)
    options = {"family": family, "max_new": 12, "temperature": 1.5}
    made = generate(params, PROMPTS, key=keys_B2, **options)
    for i in range(3):
        assert generate(params, [PROMPTS[i]], key=keys_B2[i], **options) != [made[(i + 1) % 3]]
        assert generate(params, [PROMPTS[i]], key=keys_B2[i : i + 1], **options) == [made[i]]
    assert generate(params, PROMPTS[::-1], key=keys_B2.flip(0), **options) == made[::-1]


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    scores_V = random.normal(random.key(1), (V,), dtype=torch.float64)
    drawn_B = choose(scores_V.expand(40_000, V), random.key(2), 0, Sampling(temperature=0.7))
    shares_V = torch.bincount(drawn_B, minlength=V) / len(drawn_B)
    torch.testing.assert_close(shares_V.double(), (scores_V / 0.7).softmax(0), atol=0.01, rtol=0)


def test_only_the_likely_ones_are_drawn() -> None:
    scores_BV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(1000, 4)
    drawn = lambda **how: set(choose(scores_BV, random.key(0), 0, Sampling(1.0, **how)).tolist())  # noqa: E731
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.8) == {0, 1}
    assert drawn(top_p=0.81) == {0, 1, 2}
    assert drawn(top_p=1e-9) == {0}
    assert drawn(top_k=3, top_p=0.6) == {0, 1}
    assert drawn(top_k=9, top_p=1.0) == {0, 1, 2, 3}


def test_what_is_left_is_what_transformers_leaves() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    scores_BV = 3 * random.normal(random.key(4), (50, 30))
    for top_k, top_p in ((5, None), (None, 0.7), (12, 0.9), (1, 0.5)):
        want_BV = scores_BV
        if top_k is not None:
            want_BV = process.TopKLogitsWarper(top_k)(None, want_BV)
        if top_p is not None:
            want_BV = process.TopPLogitsWarper(top_p)(None, want_BV)
        assert torch.equal(likely(scores_BV, Sampling(1.0, top_k, top_p)), want_BV)


def test_a_decoder_alone_is_that_of_an_omni_model_without_media() -> None:
    cfg = decoder.preset("llama-tiny")
    params = spec.init(decoder.specs(cfg), random.key(0))
    params["head"]["w_DV"] *= 20
    options = {"max_new": 6, "key": random.key(5), "temperature": 1.0, "top_k": 9, "top_p": 0.9}
    documents = [[Text(ids)] for ids in PROMPTS]
    made = generate(params, PROMPTS, family=decoder_family(cfg), **options)
    assert made == generate_text({"foundation": params}, documents, model=OmniModel(cfg), **options)
    assert len({tuple(ids) for ids in made}) == 3


def test_positions_of_several_axes_are_equal_for_text() -> None:
    heads = dataclasses.replace(decoder.preset("llama-tiny").attention, rope_sections=(4, 2, 2))
    cfg = dataclasses.replace(decoder.preset("llama-tiny"), attention=heads)
    params = spec.init(decoder.specs(cfg), random.key(0))
    (made,) = generate(params, [[1, 2, 3]], family=decoder_family(cfg), max_new=4)
    whole = torch.tensor([1, 2, 3, *made])
    hidden_TD, _ = decoder.apply(params, whole, positions=torch.arange(7).expand(3, -1), segments=None, cfg=cfg)
    assert decoder.logits(params, hidden_TD, cfg).argmax(-1)[2:-1].tolist() == made


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 1.0}, "above 0 with a random key"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_new": -1}, "max_new=-1"),
        ({"temperature": 1.0, "key": random.split(random.key(0), 2)}, r"keys \[2, 2\] for 3 samples"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_wrong_options_are_named(options: dict, words: str) -> None:
    cfg = decoder.preset("llama-tiny")
    params = spec.init(decoder.specs(cfg), random.key(0))
    with pytest.raises(ValueError, match=words):
        generate(params, **{"prompts": PROMPTS, "family": decoder_family(cfg), "max_new": 2, **options})


def test_the_ids_as_they_were_chosen() -> None:
    family, params = recurrent()
    made_BN = generate_ids(params, PROMPTS, family=family, max_new=5)
    assert made_BN.tolist() == generate(params, PROMPTS, family=family, max_new=5)
