"""The library's own models that see: pictures are data of a step, rows are packs, files of any age are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ftrain
from ftrain import tree
from ftrain.modules.families import qwen2_5_vl
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

EYES = {
    "depth": 2,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CONFIG = transformers.Qwen2_5_VLConfig(
    text_config={**laws.WORDS, "rope_parameters": ROPE}, vision_config=EYES, **laws.IDS
)
MEDIA = qwen2_5_vl.config(CONFIG.to_dict()).media


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return laws.saved(laws.random_model(CONFIG), tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def native(folder):
    return ftrain.hf.open(folder, task="image_text_to_text")


def test_other_pictures_of_as_many_tokens_and_patches_are_not_traced_again(native):
    params, seen = native.load(), []
    step = ftrain.jit(lambda params, batch: native.loss(params, batch).value())
    for parts in (laws.MIXED, (((2, 8), 3, (6, 4)), (5,)), ((7,),)):
        batch = native.media(laws.pack(laws.documents(MEDIA, parts), tokens=96), patches=160)
        seen.append(step(params, batch))
        torch.testing.assert_close(seen[-1], native.loss(params, batch).value(), rtol=1e-6, atol=0)
    assert step.traces == 1
    assert torch.stack(seen).isfinite().all()


def test_rows_are_documents_of_a_pack(native):
    params = native.load()
    documents = laws.documents(MEDIA, ((2, (4, 4), 3), (2, (2, 8), 3)))
    packed = native.media(laws.pack(documents))
    rows = laws.pack(documents)
    rows |= {name: rows[name].view(2, -1) for name in ("tokens", "labels")}
    del rows["segments"]
    found = native.media(rows)
    assert found["positions"].shape == (2, 11, 3)
    torch.testing.assert_close(native.loss(params, found).value(), native.loss(params, packed).value())
    torch.testing.assert_close(native.logits(params, found).flatten(0, 1), native.logits(params, packed))
    assert native.token_losses(params, found).shape == (2, 11)
    assert native.hidden(params, found).shape == (2, 11, 16)


def test_a_parameter_is_read_alone(native):
    path = "vision.layers.0.attention.w_qkv_D3HK"
    assert torch.equal(native.read(path), native.load()["vision"]["layers"][0]["attention"]["w_qkv_D3HK"])


def test_text_needs_no_preparation(native):
    params, (one,) = native.load(), laws.documents(MEDIA, ((9,),))
    found = native.loss(params, one).value()
    torch.testing.assert_close(native.loss(params, native.media(one)).value(), found)
    counted = {**one, "positions": torch.arange(9)}
    torch.testing.assert_close(native.loss(params, counted).value(), found)


def test_pictures_that_did_not_reach_their_tokens_give_no_number(native):
    params, (one,) = native.load(), laws.documents(MEDIA, ((2, (4, 4), 3),))
    batch = native.media(one)
    assert native.loss(params, batch).value().isfinite()
    alone = {name: batch[name] for name in ("tokens", "labels")}
    assert native.loss(params, alone).value().isnan()
    changed = {**batch, "tokens": torch.where(batch["tokens"] == laws.IMAGE, 5, batch["tokens"])}
    assert native.loss(params, changed).value().isnan()
    with pytest.raises(ValueError, match=r"'pixels' as it came: give what model\.media"):
        native.loss(params, one)
    with pytest.raises(ValueError, match="needs the batch's 'labels'"):
        native.loss(params, {"tokens": one["tokens"]})


def flat(config):
    """As transformers 4 wrote it: the decoder's entries at the top, rotary positions in two."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision = {**config["vision_config"], "in_chans": 3, "spatial_patch_size": 2}
    return {**text, **config, "vision_config": {k: v for k, v in vision.items() if k != "in_channels"}}


def test_files_of_transformers_4_and_of_its_memory_are_read_and_kept(folder, native, tmp_path):
    config = flat(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    called = {"visual.": "model.visual.", "model.": "model.language_model."}
    inner = {next((new + n.removeprefix(old) for old, new in called.items() if n.startswith(old)), n): x
             for n, x in weights.items()}  # fmt: skip
    for name, tensors in (("older", weights), ("inner", inner)):
        other = tmp_path / name
        other.mkdir()
        (other / "config.json").write_text(
            json.dumps({**config, "text_after_video": "max"}, sort_keys=True, indent=2) + "\n"
        )
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        model = ftrain.hf.open(other, native="always")
        assert tree.diff(model.load(), native.load()) == ""
        model.save(model.load(), tmp_path / "again")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (other / file).read_bytes()
    assert model.specs == native.specs


def test_what_text_config_says_decides_beside_what_files_of_transformers_4_repeat(folder, native, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    repeated = {"hidden_size": 16, "sliding_window": 32768, "vision_token_id": 59}
    (tmp_path / "config.json").write_text(json.dumps({**config, **repeated}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    assert ftrain.hf.open(tmp_path, native="always").specs == native.specs


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"vision_config": None}, "vision_config=None must be an object"),
        ({"vision_config": {**EYES, "depth": 10**9}}, "depth is 1,000,000,000, and there are weights of no more than"),
        ({"text_after_video": "later"}, "text_after_video='later' is not 'extent' or 'max'"),
        ({"hidden_size": 99}, "hidden_size=99 and text_config.hidden_size=16 contradict"),
        ({"image_token_id": "x"}, "image_token_id='x' must be a whole number"),
    ],
)
def test_what_a_file_says_wrongly_is_refused_by_name(entry, message, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **entry}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        ftrain.hf.open(tmp_path, native="always")


def test_fewer_layers_of_the_decoder_for_a_look_at_shapes(folder, native):
    model = ftrain.hf.open(folder, native="always", layers=1)
    assert [len(model.specs[part]["layers"]) for part in ("text", "vision")] == [1, 2]
    assert model.load is None
    assert model.specs["vision"] == native.specs["vision"]
