"""Whole omni models that think and talk equal transformers': losses of a step, gradients by choice, folders, speech."""

import pytest
import torch

from ftrain.bridge.native_talking import load_player, open_talking, talking_config
from ftrain.modules import spec, talking
from ftrain.modules.autoregression import generate
from ftrain.modules.families import qwen2_5_omni_token2wav, qwen3_omni_code2wav
from ftrain.modules.talker_generation import Choice, speak
from ftrain.modules.vision_media import prepare
from ftrain.sharding import Layout, Mesh
from tests.helpers import hearing_families as hearing
from tests.helpers import mesh_models
from tests.helpers import talking_families as talkers
from tests.helpers import talking_models as laws
from tests.helpers.seeing_families import pack
from tests.helpers.text_families import require_equal_gradients, saved

transformers = pytest.importorskip("transformers", minversion="5.24")

WHOLE = transformers.Qwen3OmniMoeForConditionalGeneration
TALKS = (
    ((2, (4, 6), 1, ("sound", 150), 2), 4, 6),
    ((3,), 5, 3),
    ((2, (2, 4, 4), 1), 3, None),
    ((1, ("scene", 4, 4, 4, 307), 2), 1, 2),
)
"""What is asked, the words of the answer, and its frames: longer than the words, shorter, none."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a whole model."""
    return saved(random_model(), tmp_path_factory.mktemp("whole") / "weights")


def random_model(seed=0, **changes):
    return hearing.random_model(WHOLE, laws.qwen3_omni(**changes), seed)


def conversations(folder, talks=TALKS, seed=0):
    media = talking_config(folder).thinker.media
    return [laws.conversation(*talk, media, seed=10 * seed + i) for i, talk in enumerate(talks)]


@pytest.mark.parametrize("flows", [True, False])
def test_losses_and_gradients_are_those_of_transformers(flows, folder, tmp_path):
    """Of packed conversations, while transformers has each alone; the talker's gradient goes on, or ends."""
    model, given = WHOLE.from_pretrained(folder, attn_implementation="eager"), conversations(folder)
    native = open_talking(folder, flows=flows)
    params = native.load()
    spec.check(params, native.specs)
    batch = native.media(pack(given, tokens=260))
    wanted = [laws.theirs(model, one) for one in given]
    sums = {name: sum(one[name] for one in wanted if name in one) for name in wanted[0]}
    count = {"text": sum(int((one["labels"] >= 0).sum()) for one in given), "codes": 14, "residuals": 33}
    found = native.loss(params, batch)
    assert [int(mean.count) for mean in found.terms] == list(count.values())
    for mean, name in zip(found.terms, count, strict=True):
        assert abs(mean.item() - sums[name].item() / count[name]) < 2e-5
    parts = [sums[name] / count[name] for name in count]
    if flows:
        sum(parts).backward()
    else:
        parts[0].backward(retain_graph=True)
        speaks = list(model.talker.parameters())
        for leaf, grad in zip(speaks, torch.autograd.grad(parts[1] + parts[2], speaks, allow_unused=True), strict=True):
            leaf.grad = grad
    grads = torch.func.grad(lambda p: native.loss(p, batch).value())(params)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    require_equal_gradients(grads, open_talking(saved(model, tmp_path)).load(), within=1e-4)


def test_folders_come_back_as_they_were(folder, tmp_path):
    native = open_talking(folder)
    native.save(native.load(), tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()
    _, told = WHOLE.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


def test_routers_are_told_by_part_and_a_batch_may_have_either_loss(folder):
    native = open_talking(folder, weights={"residuals": 0.5})
    params, given = native.load(), conversations(folder, TALKS[1:2])
    batch = native.media(pack(given, tokens=40))
    loss, loads = native.routed(params, batch)
    assert loss.weights == (1.0, 1.0, 0.5)
    assert list(loads) == [f"{part}.layers.{i}" for part in ("thinker.text", "talker.stack") for i in range(2)]
    written = {name: leaf for name, leaf in batch.items() if name != "speech"}
    spoken = {name: leaf for name, leaf in batch.items() if name != "labels"}
    assert [len(native.loss(params, one).terms) for one in (written, spoken)] == [1, 2]
    with pytest.raises(ValueError, match="a loss needs the batch's 'labels', or its 'speech'"):
        native.loss(params, {name: leaf for name, leaf in written.items() if name != "labels"})
    with pytest.raises(ValueError, match="weights has 'speech'"):
        open_talking(folder, weights={"speech": 1.0})


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`:UserWarning")
@pytest.mark.parametrize("talk", [TALKS[2][:2], TALKS[1][:2]])
def test_it_writes_speaks_and_sounds_as_transformers(talk, folder):
    """Word by word, code by code, and the wave."""
    model = WHOLE.from_pretrained(folder, attn_implementation="eager")
    native, cfg, silent = open_talking(folder), talking_config(folder), list(range(talkers.CODES, 24))
    (one,) = conversations(folder, ((*talk, None),))
    asked = {name: leaf for name, leaf in one.items() if not name.startswith("speech") and name != "labels"}
    asked["tokens"] = asked["tokens"][: len(asked["tokens"]) - talk[1] - 2]
    wanted, wave = model.generate(
        **hearing.asked(asked),
        speaker="ethan",
        thinker_max_new_tokens=5,
        thinker_eos_token_id=laws.STOP,
        talker_max_new_tokens=9,
        talker_do_sample=False,
        talker_suppress_tokens=silent,
    )
    params = native.load()
    (words,) = generate(params, [asked], family=native.family, max_new=5, stop=laws.STOP)
    written = wanted[0, len(asked["tokens"]) :].tolist()
    assert words == (written[:-1] if written[-1] == laws.STOP else written)
    said = {**asked, "tokens": wanted[0][:-1]}
    utterance = talking.to_speak(params, prepare(said, cfg.thinker.media), cfg, voice=20)
    (codes_NG,) = speak(
        params["talker"], [utterance], cfg.talker, max_frames=8, how=Choice(never=tuple(silent), again=1.05)
    )
    sounds, player = load_player(folder)
    torch.testing.assert_close(qwen3_omni_code2wav.decode(player, codes_NG, sounds), wave[0, 0], rtol=0, atol=1e-4)


OLD = transformers.Qwen2_5OmniForConditionalGeneration
OLD_TALKS = (
    ((2, (4, 6), 1, ("sound", 50), 2), 4, 6),
    ((3,), 5, 3),
    ((1, ("scene", 4, 4, 4, 207), 2), 1, 2),
    ((2,), 2, None),
)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder of a whole Qwen2.5-Omni."""
    return saved(old_model(), tmp_path_factory.mktemp("old") / "weights")


def old_model():
    return hearing.random_model(OLD, laws.qwen2_5_omni())


def old_conversations(folder, talks=OLD_TALKS):
    media = talking_config(folder).thinker.media
    voice = {"groups": 1, "voice": laws.BEGIN}
    return [laws.conversation(*talk, media, seed=i, **voice) for i, talk in enumerate(talks)]


def test_losses_and_gradients_of_qwen2_5_are_those_of_transformers(old, tmp_path):
    model, given, native = old_model(), old_conversations(old), open_talking(old, flows=True)
    params, batch = native.load(), native.media(pack(given, tokens=400))
    wanted = [laws.theirs_of_old(model, one) for one in given]
    sums = {name: sum(one[name] for one in wanted if name in one) for name in wanted[0]}
    count = {"text": sum(int((one["labels"] >= 0).sum()) for one in given), "codes": 14}
    found = native.loss(params, batch)
    assert [int(mean.count) for mean in found.terms] == list(count.values())
    for mean, name in zip(found.terms, count, strict=True):
        assert abs(mean.item() - sums[name].item() / count[name]) < 2e-5
    sum(sums[name] / count[name] for name in count).backward()
    grads = torch.func.grad(lambda p: native.loss(p, batch).value())(params)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    require_equal_gradients(grads, open_talking(saved(model, tmp_path)).load(), within=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_qwen2_5_speaks_as_transformers(number, old):
    """Code by code, of an answer that is there."""
    model, cfg, one = old_model(), talking_config(old), old_conversations(old)[number]
    said = {name: leaf for name, leaf in one.items() if not name.startswith("speech") and name != "labels"}
    params = open_talking(old).load()
    utterance = talking.to_speak(params, prepare(said, cfg.thinker.media), cfg, voice=laws.BEGIN)
    how = Choice(never=(14,), again=1.05, said=(16, 13, 14))
    (codes_NG,) = speak(params["talker"], [utterance], cfg.talker, max_frames=8, how=how)
    assert codes_NG[:, 0].tolist() == laws.spoken_by_old(model, one, frames=8)


def test_qwen2_5_sounds_as_transformers(old):
    """In a voice, from the same noise."""
    model, (cfg, player) = old_model(), load_player(old)
    codes, voice, reference = torch.tensor([[1, 5, 7, 2]]), torch.ones(1, 6), torch.randn(1, 9, 8)
    torch.manual_seed(4)
    wanted = model.token2wav(codes, voice, reference, num_steps=3)
    torch.manual_seed(4)
    told = {"codes": codes, "voice": voice, "reference": reference}
    found = qwen2_5_omni_token2wav.decode(player, told, torch.randn(1, 8, 8), cfg, steps=3)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-4)


def test_another_model_does_not_speak(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **sizes))
    for opening in (open_talking, load_player, talking_config):
        with pytest.raises(ValueError, match="model_type='llama' is no whole model with a talker"):
            opening(saved(model, tmp_path))


def test_folders_of_qwen2_5_come_back_as_they_were(old, tmp_path):
    native = open_talking(old)
    native.save(native.load(), tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (old / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.exhaustive  # a talker alone on the same mesh is in tests/modules/families
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """Packs of two data ranks, each shared by two, over which experts lie too."""
    shallow = {"stack": {"num_hidden_layers": 1}, "predictor": {"num_hidden_layers": 1}, "accept_hidden_layer": 1}
    folder = saved(random_model(words={"num_hidden_layers": 1}, **shallow), tmp_path)
    native = open_talking(folder, flows=True)
    mesh = Mesh(shard=2, sequence=2, expert=2, kind="virtual")

    def batch(packs):
        talks = (((2, (2, 4), 1), 3, 2), ((1,), 2, 3))
        each = [pack(conversations(folder, talks, seed=i), tokens=64) for i in range(packs)]
        raw = pack(each)
        raw["segments"] = torch.cat([one["segments"] + 9 * i for i, one in enumerate(each)])
        return native.media(raw, patches=32, chunks=4, packs=packs, parts=mesh.sequence)

    made = mesh_models.Model(native.specs, lambda p, b: (native.loss(p, b), ()), batch, dict(native.rules))
    loss, gradients = mesh_models.compare(made, mesh_models.plan_for(made, mesh, Layout()), dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-11
