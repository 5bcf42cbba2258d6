"""Qwen3-Omni's talker and its code predictor equal transformers': losses, gradients, files, speech; and on meshes
themselves."""

import functools

import pytest
import torch

from ftrain.kernels.mean import weighted_sum
from ftrain.modules.families import qwen3_omni_talker as family
from ftrain.modules.sampling import Sampling
from ftrain.modules.speech_lines import ChatIds
from ftrain.modules.talker_generation import Choice, Utterance, speak
from ftrain.sharding import BatchRows, Layout, Mesh, TokenIndices
from tests.helpers import mesh_models
from tests.helpers import talking_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

CHAT = ChatIds(30, 31, 32)
RULES = {"frames.*": BatchRows(), "frames.index": TokenIndices()}


def talker_of(cfg):
    return family.talker(cfg, CHAT)


def loss(cfg, params, batch):
    hidden_SD, _ = talker_of(cfg).hidden(params, batch, segments=batch["segments"])
    return hidden_SD, talker_of(cfg).losses(params, hidden_SD, batch)


def random_model(seed=0, **changes):
    return laws.random_model(transformers.Qwen3OmniMoeTalkerForConditionalGeneration, laws.config(**changes), seed)


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"stack": {"norm_topk_prob": False, "num_key_value_heads": 2}, "predictor": {"num_hidden_layers": 1}}),
    ],
)
def test_losses_and_gradients_are_those_of_transformers(seed, changes, tmp_path):
    """Packed, while transformers has each document alone; a row of padding among the frames."""
    model = random_model(seed, **changes)
    cfg, params, names, folder = laws.as_ours(model, tmp_path / "weights", family)
    laws.require_saved_as_it_was(params, names, folder, tmp_path / "again")
    given = [laws.document(*sizes, seed=10 * seed + i) for i, sizes in enumerate(laws.DOCUMENTS)]
    batch = laws.pack(given, frames=12)
    wanted = [laws.theirs(model, one) for one in given]
    scores_SV = torch.cat([scores for scores, _ in wanted])
    hidden_SD, found = loss(cfg, params, batch)
    torch.testing.assert_close(talker_of(cfg).logits(params, hidden_SD), scores_SV, rtol=0, atol=2e-5)
    count = {"codes": int((batch["labels"] >= 0).sum()), "residuals": 10 * (laws.GROUPS - 1)}
    means = {name: sum(sums[name] for _, sums in wanted) / count[name] for name in count}
    for name, mean in found.items():
        assert mean.count.item() == count[name]
        assert abs(mean.item() - means[name].item()) < 2e-5
    sum(means.values()).backward()
    grads = torch.func.grad(lambda p: weighted_sum(loss(cfg, p, batch)[1], {}).value())(params)
    gradients = laws.gradients_of(model, tmp_path / "gradients", family.specs(cfg), names)
    laws.require_equal_gradients(grads, gradients, within=1e-4)


def test_documents_without_frames_have_no_residuals(tmp_path):
    cfg, params, _, _ = laws.as_ours(random_model(), tmp_path, family)
    batch = laws.pack([laws.document(5, 0, seed=0)])
    del batch["frames"]
    assert list(loss(cfg, params, batch)[1]) == ["codes"]


def test_a_mesh_gives_what_one_device_gives():
    """Packs of two data ranks, each shared by two, over which experts lie too."""
    shallow = laws.config(stack={"num_hidden_layers": 1}, predictor={"num_hidden_layers": 1})
    cfg, mesh = family.config(shallow.to_dict()), Mesh(shard=2, sequence=2, expert=2, kind="virtual")

    def run(params, batch):
        terms = loss(cfg, params, batch)[1]
        return weighted_sum(terms, {}), terms

    model = mesh_models.Model(family.specs(cfg), run, packs, RULES)
    difference, gradients = mesh_models.compare(model, mesh_models.plan_for(model, mesh, Layout()), dtype=torch.float64)
    assert difference < 1e-12
    assert gradients < 1e-11


def packs(number):
    given = [[laws.document(*sizes, seed=9 * i + k) for k, sizes in enumerate(laws.DOCUMENTS)] for i in range(number)]
    each = [laws.pack(own, tokens=36, frames=12) for own in given]
    made = {name: torch.cat([one[name] for one in each]) for name in each[0] if name != "frames"}
    made["segments"] = torch.cat([one["segments"] + 9 * i for i, one in enumerate(each)])
    index = [torch.where(one["frames"]["index"] == 36, 36 * number, one["frames"]["index"] + 36 * i)
             for i, one in enumerate(each)]  # fmt: skip
    made["frames"] = {"codes": torch.cat([one["frames"]["codes"] for one in each]), "index": torch.cat(index)}
    return made


@functools.cache
def configuration():
    return family.config(laws.config().to_dict())


def asked(seed, prompt, words):
    generator = torch.Generator().manual_seed(seed)
    one = {name: leaf for name, leaf in laws.document(prompt, 0, seed=seed).items() if name not in ("frames", "labels")}
    place = torch.arange(prompt)[:, None].expand(-1, 3)
    return Utterance(
        {**one, "positions": place}, torch.randn(words, laws.WIDTH, generator=generator), torch.ones(laws.WIDTH) * 0.3
    )


def spoken(model, one, new):
    """What transformers speaks greedily: first codes, and frames."""
    prompt = one.prompt
    media, words = model.hidden_projection(prompt["rows"]), model.text_projection(prompt["rows"])
    x = torch.where(prompt["words"][:, None] < 0, media, words)
    x = x + model.get_input_embeddings()(prompt["codes"].clamp(min=0)) * (prompt["codes"] >= 0)[:, None]
    found = model.generate(
        inputs_embeds=x[None],
        trailing_text_hidden=model.text_projection(one.words_nW)[None],
        tts_pad_embed=model.text_projection(one.pad_W)[None, None],
        talker_input_ids=torch.zeros(1, len(x), dtype=torch.int64),
        attention_mask=torch.ones(1, len(x), dtype=torch.int64),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=laws.SPEECH["codec_eos_token_id"],
        suppress_tokens=[16, 17],
        repetition_penalty=1.3,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    frames = [own[-1][0] for own in found.hidden_states if own[-1] is not None]
    return found.sequences[0].tolist(), torch.stack(frames).tolist()


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`:UserWarning")
def test_it_speaks_what_transformers_does(tmp_path):
    """Code by code, in a batch of utterances of other lengths, each longer than its words or cut before their end."""
    model = random_model(3)
    cfg, params, _, _ = laws.as_ours(model, tmp_path, family)
    utterances = [asked(0, 6, 3), asked(1, 4, 12)]
    found = speak(params, utterances, talker_of(cfg), max_frames=8, how=Choice(never=(16, 17), again=1.3))
    for codes_NG, one in zip(found, utterances, strict=True):
        first, frames = spoken(model, one, 8)
        end = first.index(cfg.ids.end) if cfg.ids.end in first else len(first)
        assert codes_NG[:, 0].tolist() == first[:end]
        assert codes_NG[: len(frames)].tolist() == frames[:end]


def test_speech_is_drawn_with_a_key_and_ends_at_its_end():
    cfg = configuration()
    params = mesh_models.Model(family.specs(cfg), None, None, {}).params(torch.float32)
    how = Choice(first=Sampling(1.0), rest=Sampling(1.0, top_k=3))
    key = torch.tensor([1, 2])
    drawn = [speak(params, [asked(0, 6, 3)], talker_of(cfg), max_frames=4, key=key, how=how)[0] for _ in range(2)]
    assert torch.equal(*drawn)
    silent = tuple(i for i in range(cfg.stack.vocab) if i != cfg.ids.end)
    assert speak(params, [asked(0, 6, 3)], talker_of(cfg), max_frames=4, how=Choice(never=silent))[0].shape == (
        0,
        laws.GROUPS,
    )
    one = asked(0, 6, 3)
    nothing = one._replace(prompt={name: leaf[:0] for name, leaf in one.prompt.items()})
    with pytest.raises(ValueError, match="the prompt of utterance 1 is empty"):
        speak(params, [one, nothing], talker_of(cfg), max_frames=4)
    with pytest.raises(ValueError, match="must be 0, or above 0 with a random key"):
        speak(params, [asked(0, 6, 3)], talker_of(cfg), max_frames=4, how=how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": {"hidden_size": 24, "head_dim": 12}}, "the code predictor is 24 wide"),
        ({"predictor": {"num_code_groups": 3}}, "num_code_groups=4 of the talker are 3"),
        ({"codec_bos_id": 40}, "names a code outside of the talker's 24"),
        ({"accept_hidden_layer": -1}, "accept_hidden_layer=-1 must be a whole number"),
        ({"num_code_groups": 1, "predictor": {"num_code_groups": 1}}, "nothing to predict behind the first code"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        family.config(laws.config(**changes).to_dict())


def test_codes_of_another_number_are_refused():
    cfg = configuration()
    params = mesh_models.Model(family.specs(cfg), None, None, {}).params(torch.float32)
    batch = laws.pack([laws.document(5, 2, seed=0)])
    batch["frames"]["codes"] = batch["frames"]["codes"][:, :3]
    with pytest.raises(ValueError, match="frames of 3 codes, of which the model has 4"):
        loss(cfg, params, batch)
