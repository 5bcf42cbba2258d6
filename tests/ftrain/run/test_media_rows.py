"""Chats with pictures as rows: tokens, masks, pixels and losses are those of transformers' processor and model."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("PIL")

import transformers
from PIL import Image

import ftrain
from ftrain.bridge import from_transformers
from ftrain.data.chat_template import load_tokenizer
from ftrain.data.documents import Document, Group
from ftrain.data.encoding import ChatEncoder, Length
from ftrain.data.loader import Loader
from ftrain.data.media.families import family_of
from ftrain.data.media.limits import Limits
from ftrain.data.media_finishing import ReadMedia
from ftrain.data.order import Order
from ftrain.data.packing import Packing
from ftrain.data.rejects import BadRow
from ftrain.data.row_plan import RowGroup
from ftrain.data.sample import Captioned, Chat, Message, Part, Place, say
from ftrain.run.media import layout_of
from ftrain.tasks.rows import TextRows
from tests.helpers.seeing_folders import TEMPLATE, write_pictures, write_qwen

PROCESSORS = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VL",
    "qwen3_5": "Qwen3VL",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, [(40, 70), (33, 50)])
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = write_qwen(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


def asked(place, *turns):
    """A chat of two pictures."""
    parts = (
        Part("image", source="0.png"),
        Part("text", "what "),
        Part("image", source="1.png"),
        Part("text", "is it?"),
    )
    return Chat((Message("user", parts), say("assistant", "a cat"), *turns), place=place)


def opened(folder, pictures, **options):
    tokenizer = load_tokenizer(folder)
    family = family_of(folder, tokenizer)
    return ChatEncoder(tokenizer, media=family, **options), family, Place(str(pictures / "chat.jsonl"), 1)


def batch_of(layout, groups, *, tokens=512):
    """The batch of a step of these groups, whose documents have been read."""
    sizes = [layout.sizes(Waits(group), Packing(tokens)) for group in groups]
    plan = layout.plan(sizes, np.ones(len(groups)), np.zeros(len(groups)), Packing(tokens))
    assert (plan.pack_N == 0).all()
    return layout.batch([groups], plan, slots=0, leaves=None)


class Waits:
    def __init__(self, group):
        self._group = group
        self.lengths = np.array([len(document) for document in group.documents])

    def group(self, tokens):
        return self._group


def processed(kind, folder, sample, images):
    """What transformers' processor gives. Its class needs torchvision for films, so its parts are called by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = transformers.AutoImageProcessor.from_pretrained(folder)
    seen = found(images=images, return_tensors="pt")
    turns = [{"role": m.role, "content": [{"type": p.kind, "text": p.text} for p in m.parts]} for m in sample.messages]
    first, *rest = tokenizer.apply_chat_template(turns, tokenize=False).split("<|image_pad|>")
    own, grown = SimpleNamespace(image_processor=found, image_token="<|image_pad|>"), first
    for i, piece in enumerate(rest):
        grown += getattr(transformers, f"{PROCESSORS[kind]}Processor").replace_image_token(own, seen, i) + piece
    ids = tokenizer(grown, return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {**seen, "input_ids": ids, "mm_token_type_ids": kinds}


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_the_loss_of_a_row_is_that_of_the_processor_and_the_plain_model(folders, pictures, kind):
    folder = folders(kind)
    encoder, family, place = opened(folder, pictures)
    sample = asked(place, say("user", "sure?"), say("assistant", "yes"))
    encoded = encoder.encode(sample)
    group = ReadMedia(family)(Group((encoded.document(),)))

    given = processed(kind, folder, sample, [Image.open(pictures / name) for name in ("0.png", "1.png")])
    assert given["input_ids"][0].tolist() == encoded.ids.tolist()
    media = group.documents[0].media
    assert np.array_equal(given["pixel_values"].numpy(), media["pixels"])  # to the bit
    assert np.array_equal(given["image_grid_thw"].numpy(), media["image_grid_thw"])

    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    labels = torch.where(torch.from_numpy(encoded.trained), given["input_ids"][0], -100)[None]
    wanted = plain(**given, labels=labels).loss.detach()
    model = from_transformers(folder, task="image_text_to_text")
    batch = batch_of(layout_of(model, family), [group])
    assert batch["tokens"].shape == (2, 192)  # a row of padding, and both are filled up with pictures that none sees
    assert batch["media"]["pixels"].shape == (2, 4 * 96, 96)
    torch.testing.assert_close(model.loss(model.load(), batch).value(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_learned_is_spelled_out(folders, pictures):
    encoder, _, place = opened(folders("qwen2_5_vl"), pictures)
    encoded = encoder.encode(asked(place))
    pad = "<|image_pad|>"
    assert encoder.tokenizer.decode(encoded.ids) == (
        f"<|im_start|>user\n<|vision_start|>{pad * 45}<|vision_end|>what <|vision_start|>{pad * 24}<|vision_end|>is it?"
        "<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    )
    assert encoder.tokenizer.decode(encoded.ids[encoded.trained]) == "a cat<|im_end|>"
    everything, _, _ = opened(folders("qwen2_5_vl"), pictures, train="everything")
    told = everything.encode(asked(place))
    assert everything.tokenizer.decode(told.ids[told.trained]) == (
        "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    )
    captioned = encoder.encode(Captioned(Part("image", source="1.png"), "a dog", place=place))
    assert encoder.tokenizer.decode(captioned.ids) == (
        f"<|im_start|>user\n<|vision_start|>{pad * 24}<|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\na dog<|im_end|>\n"
    )


def picture(data, name="x.png"):
    return lambda place: Chat((Message("user", (Part("image", source=data),)), say("assistant", "a")), place=place)


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("sample", "options", "says"),
    [
        (picture("none.png"), {}, r"none.png cannot be read: No such file"),
        (picture(b"no picture"), {}, r"media of 10 bytes is no whole picture"),
        (picture(png((900, 2))), {}, r"a picture of 2 x 900: a side is more than 200 times the other"),
        (picture(png((100, 90))), {"limits": Limits(pixels=1000)}, r"has 9000 pixels, more than 1000"),
        (lambda place: Chat((Message("user", (Part("audio", source="a"),)), say("assistant", "a")), place=place), {},
         r"it has media \(of the kind audio\), and the model reads text, image, video alone"),
        (asked, {"template": TEMPLATE.replace("<|image_pad|>", "")},
         r"the chat template writes '<\|image_pad\|>' 0 times for 2 items of image"),
        (asked, {"template": TEMPLATE.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")},
         r"writes '<\|image_pad\|>' 4 times for 2 items of image"),
        (asked, {"length": Length(80, "right")}, r"\d+ tokens, with its 2 pictures, recordings or films, and"),
        (lambda place: Chat((say("user", "a <|image_pad|>"), say("assistant", "a")), place=place), {},
         r"a text contains '<\|image_pad\|>', which is a control token"),
        (asked, {"media": None}, r"it has media \(of the kind image\), and the model reads text alone"),
    ],
)  # fmt: skip
def test_rows_whose_media_cannot_be_seen_are_refused_by_name(folders, pictures, sample, options, says):
    tokenizer = load_tokenizer(folders("qwen2_5_vl"))
    options = dict(options)
    family = family_of(folders("qwen2_5_vl"), tokenizer, limits=options.pop("limits", None))
    encoder = ChatEncoder(tokenizer, **{"media": family, **options})
    with pytest.raises(BadRow, match=r"chat.jsonl, row 3: .*" + says):
        encoder.encode(sample(Place(str(pictures / "chat.jsonl"), 3)))


def test_a_picture_that_is_not_what_its_header_tells_is_refused_when_it_is_read(folders, pictures):
    encoder, family, place = opened(folders("qwen2_5_vl"), pictures)
    whole = png((64, 48))
    broken = picture(whole[: len(whole) // 2])(place)
    group = Group((encoder.encode(broken).document(),))  # the header is whole
    with pytest.raises(BadRow, match="is no whole picture"):
        ReadMedia(family)(group)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_films_are_frames_at_a_rate_and_patches_of_two(folders, pictures, kind):
    encoder, family, place = opened(folders(kind), pictures)
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3), np.uint8)
    sample = Chat((Message("user", (Part("video", source=frames),)), say("assistant", "a")), place=place)
    encoded = encoder.encode(sample)
    media = ReadMedia(family)(Group((encoded.document(),))).documents[0].media
    t, h, w = media["video_grid_thw"][0].tolist()
    assert t == 3
    assert (encoded.ids == family.film[1]).sum() == t * h * w // 4
    assert media["pixel_values_videos"].shape == (t * h * w, 3 * 2 * 4 * 4)
    if kind == "qwen2_5_vl":
        assert media["second_per_grid_ts"].tolist() == [1.0]
    else:
        frame = f"<|vision_start|>{'<|video_pad|>' * (h * w // 4)}<|vision_end|>"
        spelled = "".join(f"<{second} seconds>{frame}" for second in (0.2, 1.2, 2.2))
        assert spelled in encoder.tokenizer.decode(encoded.ids)
    model = from_transformers(folders(kind), task="image_text_to_text")
    short = Chat((Message("user", (Part("video", source=frames[:4]),)), say("assistant", "ab")), place=place)
    groups = [ReadMedia(family)(Group((encoder.encode(one).document(),))) for one in (sample, short)]
    layout, params = layout_of(model, family), model.load()
    alone = [model.loss(params, batch_of(layout, [group])) for group in groups]
    together = model.loss(params, batch_of(layout, groups, tokens=1024))
    torch.testing.assert_close(together.total, sum(mean.total for mean in alone), rtol=1e-5, atol=1e-5)


def test_texts_alone_are_rows_without_media(folders, pictures):
    encoder, family, place = opened(folders("qwen2_5_vl"), pictures)
    model = from_transformers(folders("qwen2_5_vl"), task="image_text_to_text")
    group = Group((encoder.encode(Chat((say("user", "hi"), say("assistant", "ho")), place=place)).document(),))
    batch = batch_of(layout_of(model, family), [group], tokens=64)
    assert batch["media"] == {}
    assert model.loss(model.load(), batch).value().isfinite()


def test_ranks_of_a_sequence_are_refused_before_anything_runs(folders):
    model = from_transformers(folders("qwen2_5_vl"), task="image_text_to_text")
    with pytest.raises(ValueError, match=r"--sequence 2: .* divide rows among --shard and --replicate"):
        layout_of(model, sequence=2)


def test_the_shapes_of_a_run_are_few():
    from ftrain.data.row_plan import shape_of

    sizes = [RowGroup(30 + n, 30, (n,), 1) for n in range(1, 900)]
    shapes = {shape_of(group, tokens=1024, units=(1,)) for group in sizes}
    assert len(shapes) < 40
    for group in sizes:
        shape = shape_of(group, tokens=1024, units=(1,))
        assert shape.media[0] >= group.media[0]
        assert 30 + shape.media[0] + 1 <= shape.length
        assert shape.rows * shape.length <= 1024 * 1.04


def test_each_process_decodes_the_media_of_its_own_packs_alone(folders, pictures):
    encoder, family, place = opened(folders("qwen2_5_vl"), pictures)
    rows = [
        Chat((Message("user", (Part("image", source="0.png"),)), say("assistant", f"{i}")), place=place)
        for i in range(8)
    ]
    model = from_transformers(folders("qwen2_5_vl"), task="image_text_to_text")
    shared = {
        "order": Order([8], key=0), "sources": [rows], "encode": TextRows(encoder), "rank": None,
        "packing": Packing(128, ranks=2, micro_batches=1), "layout": layout_of(model, family),
        "finish": ReadMedia(family), "others": ReadMedia(family, decoded=False),
    }  # fmt: skip
    steps = [list(Loader(**shared, mine=mine)) for mine in range(2)]
    assert len(steps[0]) == len(steps[1]) == 4
    for step in zip(*steps, strict=True):
        pixels = [found.batch["media"]["pixels"] for found in step]
        assert pixels[0].shape == pixels[1].shape
        rows_of_one = len(pixels[0]) // 2
        assert pixels[0][:rows_of_one].any()
        assert not pixels[0][rows_of_one:].any()
        assert pixels[1][rows_of_one:].any()
        assert not pixels[1][:rows_of_one].any()
        assert torch.equal(step[0].batch["positions"], step[1].batch["positions"])


def test_texts_of_a_model_whose_documents_cannot_share_a_pack_are_rows():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    model = from_transformers(transformers.MambaConfig(vocab_size=32, **sizes))
    assert not model.packs
    params, layout = ftrain.init(model.specs, ftrain.key(0)), layout_of(model)
    groups = [Group((Document(ids, np.append(ids[1:], -100)),)) for ids in (np.arange(9), np.arange(20, 26))]
    alone = [model.loss(params, batch_of(layout, [group])) for group in groups]
    together = batch_of(layout, groups)
    assert together["tokens"].shape == (42, 12)
    torch.testing.assert_close(model.loss(params, together).total, sum(mean.total for mean in alone))
