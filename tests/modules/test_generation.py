"""Generation: the same as running one prompt at a time with growing sequences, and what sampling promises."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.kernels import random
from ftrain.modules import decoder as foundation
from ftrain.modules import omni, spec
from ftrain.modules.generation import generate_codes, generate_text
from ftrain.modules.packing import Text, exact_budget, pack
from tests.helpers import whole_pack
from tests.helpers.tiny_omni import MODEL, audio, drawing, image

PROMPTS = [[Text([1, 2, 3])], [image(0), Text([4])], [audio(1, 900)], [Text([5]), drawing(2), Text([6])]]


def wild_params(model: omni.OmniModel) -> dict:
    wild = spec.init(omni.specs(model), random.key(0))
    wild["foundation"]["head"]["w_DV"] *= 20  # fresh models repeat one token for ever
    wild["decoders"]["draw"]["head_DC"] *= 20
    wild["decoders"]["draw"]["codes_CD"] *= 20
    return wild


@pytest.fixture(scope="module")
def params() -> dict:
    return wild_params(MODEL)


def last_hidden(params: dict, document: list) -> torch.Tensor:
    batch = pack([document], budget=exact_budget([document], model=MODEL), model=MODEL).batch
    rows, places, _ = omni.media_rows(params, batch, model=MODEL)
    x_TD = omni.merge(foundation.embed(params["foundation"], batch["tokens_T"]), rows, places)
    return omni.hidden_states(params, x_TD, batch, model=MODEL)[0][-1:]


def test_text_is_what_growing_one_document_at_a_time_gives(params: dict) -> None:
    for prompt, made in zip(PROMPTS, generate_text(params, PROMPTS, model=MODEL, max_new=5), strict=True):
        grown: list[int] = []
        for _ in range(5):
            hidden_1D = last_hidden(params, [*prompt, Text(grown)])
            grown.append(int(foundation.logits(params["foundation"], hidden_1D, MODEL.foundation).argmax()))
        assert made == grown


def test_codes_are_what_growing_one_document_at_a_time_gives(params: dict) -> None:
    codes_BN = generate_codes(params, PROMPTS, model=MODEL, decoder="draw")
    own, decoder = params["decoders"]["draw"], MODEL.decoders["draw"]
    assert codes_BN.shape == (4, 4)
    for prompt, made in zip(PROMPTS, codes_BN, strict=True):
        for step in range(4):
            document = [*prompt, Text([decoder.begin] + [0] * step)]
            batch = pack([document], budget=exact_budget([document], model=MODEL), model=MODEL).batch
            rows, places, _ = omni.media_rows(params, batch, model=MODEL)
            end = len(batch["tokens_T"])
            rows.append(decoder.lm_embed(own, made[None])[:step])
            places.append(torch.arange(end - step, end))
            x_TD = omni.merge(foundation.embed(params["foundation"], batch["tokens_T"]), rows, places)
            hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=MODEL)
            assert made[step] == decoder.lm_logits(own, hidden_TD[-1:]).argmax()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.sampled_from([*range(len(PROMPTS))]), min_size=1, max_size=5), st.booleans())
def test_text_is_what_running_the_whole_pack_again_gives(params: dict, which: list[int], sampled: bool) -> None:
    prompts = [PROMPTS[i] for i in which]
    options = {"key": random.key(3), "temperature": 1.5} if sampled else {}
    made = generate_text(params, prompts, model=MODEL, max_new=4, **options)
    assert made == whole_pack.text(params, prompts, model=MODEL, max_new=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key": random.key(3), "temperature": 1.5},
        {"guidance": 3.0, "unconditional": [[], [Text([9, 8])], [], []]},
        {"guidance": 3.0, "unconditional": [[]] * 4, "key": random.key(4), "temperature": 0.7},
    ],
    ids=["greedy", "sampled", "guided", "guided and sampled"],
)
def test_codes_are_what_running_the_whole_pack_again_gives(params: dict, options: dict) -> None:
    options = {"model": MODEL, "decoder": "draw", **options}
    assert torch.equal(generate_codes(params, PROMPTS, **options), whole_pack.codes(params, PROMPTS, **options))


def test_an_image_can_follow_nothing(params: dict) -> None:
    options = {"model": MODEL, "decoder": "draw"}
    assert torch.equal(generate_codes(params, [[], []], **options), whole_pack.codes(params, [[], []], **options))


def test_experts_are_chosen_with_the_state_of_balancing() -> None:
    """Biases that send every token to experts 1 and 3 change what is generated, with a cache as without."""
    biased = dataclasses.replace(MODEL.foundation, moe=dataclasses.replace(MODEL.foundation.moe, balance="bias"))
    model = dataclasses.replace(MODEL, foundation=biased)
    params, options = wild_params(model), {"model": model, "max_new": 5}
    made = {}
    for name, one in (("even", 0.0), ("forced", 50.0)):
        balance = {"router_bias_LE": one * torch.tensor([[0.0, 1.0, 0.0, 1.0]] * biased.layers)}
        made[name] = generate_text(params, PROMPTS, balance=balance, **options)
        assert made[name] == whole_pack.text(params, PROMPTS, balance=balance, **options)
    assert made["even"] != made["forced"]


def test_each_step_runs_one_token_per_prompt(params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("prefill", "extend"):
        real = getattr(foundation, name)
        spy = lambda own, x_TD, real=real, **options: (ran.append(len(x_TD)), real(own, x_TD, **options))[1]  # noqa: E731
        monkeypatch.setattr(foundation, name, spy)
    generate_text(params, PROMPTS[:1] * 2, model=MODEL, max_new=3)
    assert ran == [6, 2, 2]


def test_generated_codes_are_the_most_likely_under_the_training_loss(params: dict) -> None:
    """Teacher forcing and generation agree on where each code is read and written."""
    codes_BN = generate_codes(params, PROMPTS[:1], model=MODEL, decoder="draw")
    target = drawing(0)
    batch = pack([[*PROMPTS[0], target]], budget=exact_budget([[*PROMPTS[0], target]], model=MODEL), model=MODEL).batch
    own, decoder = params["decoders"]["draw"], MODEL.decoders["draw"]
    index_n = batch["decoders"]["draw"]["index_n"]
    x_TD = omni.merge(
        foundation.embed(params["foundation"], batch["tokens_T"]), [decoder.lm_embed(own, codes_BN)], [index_n]
    )
    hidden_TD, _ = omni.hidden_states(params, x_TD, batch, model=MODEL)
    assert torch.equal(decoder.lm_logits(own, hidden_TD[index_n - 1]).argmax(-1), codes_BN[0])


def test_codes_become_pixels(params: dict) -> None:
    codes_BN = generate_codes(params, PROMPTS[:2], model=MODEL, decoder="draw")
    pixels = MODEL.decoders["draw"].lm_generate(params["decoders"]["draw"], codes_BN)
    assert pixels.shape == (2, 1, 8, 8)


def test_text_ends_before_the_stop_token(params: dict) -> None:
    free = generate_text(params, PROMPTS, model=MODEL, max_new=5)
    stop = free[0][2]
    for ids, whole in zip(generate_text(params, PROMPTS, model=MODEL, max_new=5, stop=stop), free, strict=True):
        assert ids == (whole[: whole.index(stop)] if stop in whole else whole)


def test_samples_follow_the_key(params: dict) -> None:
    sample = lambda seed: generate_codes(  # noqa: E731
        params, [PROMPTS[0]] * 8, model=MODEL, decoder="draw", key=random.key(seed), temperature=2.0
    )
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert len({tuple(row) for row in sample(0).tolist()}) > 1


def test_a_cold_sample_is_the_greedy_choice(params: dict) -> None:
    cold = generate_text(params, PROMPTS, model=MODEL, max_new=3, key=random.key(0), temperature=1e-4)
    assert cold == generate_text(params, PROMPTS, model=MODEL, max_new=3)


def test_guidance_leans_away_from_the_unconditional_scores(params: dict) -> None:
    draw = lambda **options: generate_codes(params, PROMPTS[:2], model=MODEL, decoder="draw", **options)  # noqa: E731
    plain = draw()
    assert torch.equal(draw(guidance=1.0 + 1e-6, unconditional=[[], []]), plain)
    assert torch.equal(draw(guidance=7.0, unconditional=PROMPTS[:2]), plain)
    other = generate_codes(params, [[Text([9])]] * 2, model=MODEL, decoder="draw")
    assert torch.equal(draw(guidance=0.0, unconditional=[[Text([9])]] * 2), other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 1.0}, "random key"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"guidance": 2.0}, "guidance=2.0 with 0 unconditional prompts for 4"),
        ({"decoder": "sing"}, "no decoder for modality 'sing'"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_wrong_options_are_named(params: dict, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate_codes(params, **({"prompts": PROMPTS, "model": MODEL, "decoder": "draw"} | options))


def test_an_empty_prompt_has_no_next_token(params: dict) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_text(params, [[Text([1])], [Text([])]], model=MODEL, max_new=1)
