"""The thinker of Qwen3-Omni, with experts, deep rows of its tower and times that are no whole numbers, equals
transformers'."""

import pytest
import torch

from ftrain import tree
from ftrain.modules.families import qwen3_omni
from ftrain.sharding import Layout, Mesh
from tests.helpers import hearing_families as laws
from tests.helpers import seeing_families as seen
from tests.helpers import tiny_thinkers

transformers = pytest.importorskip("transformers", minversion="5.24")

MIXED = (
    (4, (4, 6), 2, ("sound", 150), 3, (2, 4, 4), 5),
    (3, 6),
    (2, ("sound", 420), 1, ("sound", 3), 3),
    (1, ("scene", 4, 4, 4, 307), 2, (2, 2), 3),
)
"""As of Qwen2.5-Omni; each recording, or one beside it, fills a chunk (`ftrain.modules.audio_tower`)."""


def config(**parts):
    return tiny_thinkers.qwen3(**parts)[1]


def random_model(seed=0, **parts):
    return laws.random_model(*tiny_thinkers.qwen3(**parts), seed)


def media():
    return qwen3_omni.config(config().to_dict()).media


@pytest.mark.parametrize(
    ("words", "parts", "seed"),
    [
        ({}, MIXED, 0),
        ({"mlp_only_layers": [0], "norm_topk_prob": False}, ((1, ("scene", 2, 8, 4, 100), 2), (3,)), 1),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(words, parts, seed, tmp_path):
    model = random_model(seed, **words)
    made = laws.require_those_of_transformers(model, tmp_path, media(), parts, seed=seed)
    seen.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen3_omni_moe_thinker is a family of the library"
    assert made.top_k == 2


def test_it_writes_what_transformers_does(tmp_path):
    prompts = ((2, (4, 6), 3, ("sound", 130), 2), (5,), (1, ("scene", 2, 4, 4, 207), 2))
    laws.require_same_text(random_model(), media(), prompts, tmp_path)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(shard=2, expert=2, kind="virtual"),
        pytest.param(Mesh(sequence=2, kind="virtual"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_mesh_gives_what_one_device_gives(mesh, tmp_path):
    eyes = {"depth": 1, "deepstack_visual_indexes": [0]}
    model = random_model(ears={"encoder_layers": 1}, eyes=eyes, num_hidden_layers=1)
    parts = ((2, (2, 4), ("sound", 120), 2), (1, ("scene", 2, 2, 2, 30), 3))
    loss, gradients = laws.on_mesh(laws.opened(model, tmp_path), media(), parts, mesh, Layout(), tokens=64)
    assert loss < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_window": 40}, "n_window=40 makes 10 rows of a chunk, and files of this family have 13"),
        ({"n_window_infer": 50}, "n_window_infer=50 is less than a chunk, 100 frames"),
        ({"output_dim": 12}, "rows of sound are 12 wide, the decoder's 16"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        qwen3_omni.config(config(ears=changes).to_dict())


def test_streams_that_a_talker_reads_are_those_of_transformers(tmp_path):
    """Embeddings with media in them, and what a layer makes before deep rows are added."""
    model = random_model()
    (one,) = laws.documents(media(), (MIXED[0],))
    with torch.no_grad():
        wanted = model(**laws.asked(one), output_hidden_states=True, use_cache=False).hidden_states
    kept = laws.streams(laws.opened(model, tmp_path), qwen3_omni.config(config().to_dict()), one, keep=(0, 1, 2))
    for ours, theirs in zip(kept, wanted, strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=2e-5)


PREDICTOR = {"vocab_size": 32, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 6}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
TALKER = {
    "code_predictor_config": {**PREDICTOR, **HEADS, "num_code_groups": 3},
    "num_code_groups": 3,
    "thinker_hidden_size": 16,
    "accept_hidden_layer": 1,
    "text_config": {
        **PREDICTOR,
        **HEADS,
        "vocab_size": 64,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]},
    },
    "spatial_merge_size": 2,
    "speaker_id": {"ethan": 50},
}
VOICE = {
    "codebook_size": 8,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_quantizers": 3,
    "upsample_rates": (2,),
    "upsampling_ratios": (2,),
    "decoder_dim": 8,
    "sliding_window": 4,
}


def test_the_folder_of_a_whole_model_keeps_its_other_parts_to_the_byte(tmp_path):
    of = transformers
    whole = of.Qwen3OmniMoeConfig(thinker_config=config().to_dict(), talker_config=TALKER, code2wav_config=VOICE)
    model = laws.random_model(of.Qwen3OmniMoeForConditionalGeneration, whole)
    made = laws.opened(model, tmp_path / "weights")
    seen.require_saved_as_it_was(made, tmp_path)
    alone = laws.opened(model.thinker, tmp_path / "alone")
    assert tree.diff(made.load(), alone.load()) == ""
    assert made.why == "native: qwen3_omni_moe is a family of the library"
    changed = tree.map(lambda leaf: leaf + 1, made.load())
    made.save(changed, tmp_path / "trained")
    read, info = of.Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(read.talker.codec_head.weight, model.talker.codec_head.weight)
    assert torch.equal(read.thinker.lm_head.weight, model.thinker.lm_head.weight + 1)
