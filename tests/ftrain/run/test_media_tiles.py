"""Families whose pictures are tiles: tokens, tiles and losses are those of transformers' processor and model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("PIL")

import transformers
from PIL import Image

from ftrain.bridge import from_transformers
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import Group
from ftrain.data.encoding import ChatEncoder
from ftrain.data.media.families import family_of
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.packing import Plan
from ftrain.data.rejects import BadRow
from ftrain.data.row_plan import RowGroup, shape_of
from ftrain.data.sample import Chat, Message, Part, Place, say
from ftrain.run.media import layout_of
from tests.helpers.seeing_folders import TILE_MARKS, write_pictures, write_tiles

PROCESSORS = {"llava": "Llava", "gemma3": "Gemma3", "internvl": "InternVL", "smolvlm": "SmolVLM"}
OWN = {
    "llava": {"patch_size": 4, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full",
              "image_token": "<image>"},
    "gemma3": {"full_image_sequence": "\n\n<start_of_image>" + "<soft>" * 4 + "<end_of_image>\n\n"},
    "internvl": {"start_image_token": "<img>", "image_token": "<IMG_CONTEXT>", "end_image_token": "</img>",
                 "image_seq_length": 4},
    "smolvlm": {"image_seq_len": 4, "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
                "global_image_token": "<global-img>"},
}  # fmt: skip


def processed(kind, folder, sample, images):
    """What transformers' processor gives. Some of its classes need torchvision for films, so parts are called."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = transformers.AutoImageProcessor.from_pretrained(folder)
    more = {"return_row_col_info": True} if kind == "smolvlm" else {}
    seen = found(images=images, return_tensors="pt", **more)
    turns = [{"role": m.role, "content": [{"type": p.kind, "text": p.text} for p in m.parts]} for m in sample.messages]
    grown, *rest = tokenizer.apply_chat_template(turns, tokenize=False).split(TILE_MARKS[kind])
    for i, piece in enumerate(rest):
        text = getattr(transformers, f"{PROCESSORS[kind]}Processor").replace_image_token
        grown += text(SimpleNamespace(**OWN[kind]), seen, i) + piece
    return tokenizer(grown, return_tensors="pt")["input_ids"], seen["pixel_values"]


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_the_loss_of_a_row_is_that_of_the_processor_and_the_plain_model(tmp_path, kind):
    folder = write_tiles(tmp_path, kind)
    write_pictures(tmp_path, [(20, 30), (30, 20)])
    tokenizer = load_tokenizer(folder)
    family = family_of(folder, tokenizer)
    encoder, place = ChatEncoder(tokenizer, media=family), Place(str(tmp_path / "chat.jsonl"), 1)
    parts = (Part("image", source="0.png"), Part("text", "and "), Part("image", source="1.png"), Part("text", "?"))
    sample = Chat((Message("user", parts), say("assistant", "a cat")), place=place)
    encoded = encoder.encode(sample)
    assert tokenizer.decode(encoded.ids[encoded.trained]) == "a cat<|im_end|>"
    group = ReadMedia(family)(Group((encoded.document(),)))
    images = [Image.open(tmp_path / f"{i}.png") for i in range(2)]
    ids, pixels = processed(kind, folder, sample, [images] if kind == "smolvlm" else images)
    assert ids[0].tolist() == encoded.ids.tolist()
    assert np.array_equal(pixels.flatten(0, -4).numpy(), group.documents[0].media["pixels"])

    model = from_transformers(folder, task="image_text_to_text")
    layout = layout_of(model, family)
    places = int((encoded.ids == family.token).sum())
    sizes = RowGroup(len(encoded.ids), len(encoded.ids) - places, (places,), 1)
    shape = shape_of(sizes, tokens=600, units=(family.unit,))
    assert shape.rows > 1
    batch = layout.batch([[group]], Plan(np.zeros(1), np.zeros(1), np.ones(1), shape), slots=0, leaves=None)
    labels = torch.where(torch.from_numpy(encoded.trained), ids[0], -100)[None]
    more = {"token_type_ids": (ids == family.token).long()} if kind == "gemma3" else {}
    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    wanted = plain(input_ids=ids, pixel_values=pixels, labels=labels, **more).loss.detach()
    torch.testing.assert_close(model.loss(model.load(), batch).value(), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_whose_way_of_seeing_is_not_known_reads_text_and_refuses_pictures_by_name(tmp_path):
    folder = write_tiles(tmp_path, "llava")
    text = (folder / "config.json").read_text().replace('"model_type": "llava"', '"model_type": "janus"')
    (folder / "config.json").write_text(text)
    tokenizer = load_tokenizer(folder)
    encoder, place = ChatEncoder(tokenizer, media=family_of(folder, tokenizer)), Place("a.jsonl", 2)
    assert encoder.encode(Chat((say("user", "a"), say("assistant", "b")), place=place)).trained.any()
    seen = Chat((Message("user", (Part("image", source="0.png"),)), say("assistant", "b")), place=place)
    with pytest.raises(BadRow, match=r"row 2: it has media \(of the kind image\), and how janus sees is not known"):
        encoder.encode(seen)
