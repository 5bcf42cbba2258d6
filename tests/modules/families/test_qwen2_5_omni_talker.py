"""Qwen2.5-Omni's talker equals transformers': loss, gradients, files; and refuses what it cannot follow."""

import pytest
import torch

from ftrain.modules.families import qwen2_5_omni_talker as family
from ftrain.modules.speech_lines import ChatIds
from tests.helpers import talking_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

CHAT = ChatIds(30, 31, 32)
SIZES = {
    "vocab_size": 40,
    "embedding_size": laws.WIDTH,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    "tts_codec_pad_token_id": 13,
    "tts_codec_start_token_id": 14,
    "tts_codec_end_token_id": 15,
    "tts_codec_mask_token_id": 16,
}


def configuration(**changes):
    return transformers.Qwen2_5OmniTalkerConfig(**{**SIZES, **changes})


def theirs(model, one):
    """transformers' scores of one document, and the sum of the cross entropy of its codes."""
    x = one["rows"] + model.get_input_embeddings()(one["codes"].clamp(min=0)) * (one["codes"] >= 0)[:, None]
    scores = model(inputs_embeds=x[None], position_ids=one["positions"].T[:, None], use_cache=False).logits[0]
    return scores, torch.nn.functional.cross_entropy(scores, one["labels"], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("seed", "changes"), [(0, {}), (1, {"pad_token_id": 2, "num_key_value_heads": 2})])
def test_loss_and_gradients_are_those_of_transformers(seed, changes, tmp_path):
    """Packed, while transformers has each document alone."""
    model = laws.random_model(transformers.Qwen2_5OmniTalkerForConditionalGeneration, configuration(**changes), seed)
    cfg, params, names, folder = laws.as_ours(model, tmp_path / "weights", family, told=False)
    laws.require_saved_as_it_was(params, names, folder, tmp_path / "again")
    given = [laws.document(*sizes, seed=10 * seed + i) for i, sizes in enumerate(laws.DOCUMENTS)]
    batch = laws.pack(given)

    def mean(p):
        hidden_SD, _ = talker.hidden(p, batch, segments=batch["segments"])
        return talker.losses(p, hidden_SD, batch)["codes"]

    talker = family.talker(cfg, CHAT, layer=2, words=1000)
    hidden_SD, _ = talker.hidden(params, batch, segments=batch["segments"])
    wanted = [theirs(model, one) for one in given]
    scores_SV = torch.cat([scores for scores, _ in wanted])
    torch.testing.assert_close(talker.logits(params, hidden_SD), scores_SV, rtol=0, atol=2e-5)
    loss = sum(total for _, total in wanted) / int((batch["labels"] >= 0).sum())
    assert abs(mean(params).item() - loss.item()) < 2e-5
    loss.backward()
    grads = torch.func.grad(lambda p: mean(p).value())(params)
    gradients = laws.gradients_of(model, tmp_path / "gradients", family.specs(cfg), names)
    laws.require_equal_gradients(grads, gradients, within=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tts_codec_end_token_id": 50}, "names a code outside of the talker's 40"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"some_entry": 3}, "some_entry=3 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        family.config({**configuration().to_dict(), **changes})
