"""The thinker of Qwen2.5-Omni, which sees and hears, equals transformers'; alone and in the folder of a whole model."""

import pytest
import torch

from ftrain.modules.families import qwen2_5_omni
from ftrain.sharding import Layout, Mesh
from tests.helpers import hearing_families as laws
from tests.helpers import seeing_families as seen
from tests.helpers import tiny_thinkers

pytest.importorskip("transformers", minversion="5.24")

FLAT = {"depth": 1, "fullatt_block_indexes": []}
MIXED = (
    (4, (4, 6), 2, ("sound", 50), 3, (2, 4, 4), 1, ("sound", 4), 4),
    (3, 6),
    (2, ("sound", 41), 3),
    (1, ("scene", 4, 4, 4, 507), 2, (2, 2), ("sound", 20), 3),
)
"""An image, sound and a video; text alone; sound alone; a video with its sound, and other media behind it."""
SLOW = ((2, ("scene", 6, 4, 4, 9), 1, ("scene", 2, 8, 4, 600), 2),)
"""Sound that ends before its video, and one that is longer."""


def config(**parts):
    return tiny_thinkers.qwen2_5(**parts)[1]


def random_model(seed=0, **parts):
    return laws.random_model(*tiny_thinkers.qwen2_5(**parts), seed)


def media(**changes):
    return qwen2_5_omni.config({**config().to_dict(), **changes}).media


@pytest.mark.parametrize(("parts", "seed"), [(MIXED, 0), (SLOW, 1)])
def test_loss_and_gradients_are_those_of_transformers(parts, seed, tmp_path):
    model = random_model(seed)
    made = laws.require_those_of_transformers(model, tmp_path, media(), parts, seed=seed)
    seen.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen2_5_omni_thinker is a family of the library"


def test_it_writes_what_transformers_does(tmp_path):
    prompts = ((2, (4, 6), 3, ("sound", 30), 2), (5,), (1, ("scene", 2, 4, 4, 207), 2))
    laws.require_same_text(random_model(), media(), prompts, tmp_path)


TOWERS = {"vision": Layout(("shard",), sequence=None), "audio": Layout((), sequence=None)}


@pytest.mark.parametrize(
    ("mesh", "apart"),
    [
        (Mesh(sequence=2, kind="virtual"), TOWERS),
        pytest.param(Mesh(shard=2, sequence=2, kind="virtual"), TOWERS, marks=pytest.mark.exhaustive),
        pytest.param(Mesh(shard=2, sequence=2, kind="virtual"), {}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_mesh_gives_what_one_device_gives(mesh, apart, tmp_path):
    """Also with the towers laid out apart from the decoder."""
    made = laws.opened(random_model(ears={"encoder_layers": 1}, eyes=FLAT, num_hidden_layers=1), tmp_path)
    parts = ((2, (2, 4), ("sound", 30), 2), (1, ("scene", 2, 2, 2, 90), 3))
    loss, gradients = laws.on_mesh(made, media(), parts, mesh, Layout(), tokens=64, apart=apart)
    assert loss < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_window": 9}, "pairs of them would lie in two chunks"),
        ({"max_source_positions": 8}, "max_source_positions=8 is less than the 10 rows of a chunk"),
        ({"output_dim": 12}, "rows of sound are 12 wide, the decoder's 16"),
        ({"activation_function": "relu"}, "activation_function='relu', not 'gelu'"),
        ({"scale_embedding": True}, "scale_embedding=True is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        qwen2_5_omni.config(config(ears=changes).to_dict())


def test_a_tower_of_sound_and_a_thinker_must_be_there():
    told = config().to_dict()
    with pytest.raises(ValueError, match="audio_config=None must be an object"):
        qwen2_5_omni.config({**told, "audio_config": None})
    with pytest.raises(ValueError, match="thinker_config is missing"):
        qwen2_5_omni.config({**told, "model_type": "qwen2_5_omni"})
    with pytest.raises(ValueError, match="thinker_config=3 must be an object"):
        qwen2_5_omni.config({"model_type": "qwen2_5_omni", "thinker_config": 3})


def test_streams_that_a_talker_reads_are_those_of_transformers(tmp_path):
    """Embeddings with media in them, and what a layer makes, as transformers counts hidden states."""
    model = random_model()
    (one,) = laws.documents(media(), (MIXED[0],))
    with torch.no_grad():
        wanted = model(**laws.asked(one), output_hidden_states=True, use_cache=False).hidden_states
    kept = laws.streams(laws.opened(model, tmp_path), qwen2_5_omni.config(config().to_dict()), one, keep=(0, 1, 2))
    for ours, theirs in zip(kept, wanted, strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=2e-5)
