"""Pictures of a batch are laid side by side, in packs and parts of them, and what does not fit is refused by name."""

import pytest
import torch

from ftrain.modules.pictures import MediaConfig
from ftrain.modules.vision_media import prepare
from ftrain.modules.vision_tower import TowerConfig
from tests.helpers import seeing_families as seen

TOWER = TowerConfig(8, layers=1, heads=2, d_hidden=8, d_out=8, patch=1, frames=1, channels=1, window=1, side=3)
CFG = MediaConfig(TOWER, seen.IMAGE, seen.VIDEO)


def raw(*parts, seed=0):
    return seen.document(parts or (2, (2, 4), 1, (2, 2, 2), 1), CFG, seed=seed)


def test_every_token_of_a_picture_gets_its_own_patches():
    given = raw()
    made = prepare(given, CFG)
    media = made["media"]
    assert made["replaced"].tolist() == (given["tokens"] >= seen.IMAGE).logical_and(given["tokens"] < 62).tolist()
    assert media["index"].tolist() == made["replaced"].nonzero().flatten().tolist()  # the image is the first
    both = torch.cat([given["pixels"], given["pixel_values_videos"]])
    assert torch.equal(media["pixels"], both)
    assert media["frames"].ids_T.tolist() == [0] * 8 + [8] * 4 + [12] * 4
    assert (media["frames"].offsets_N[:4].tolist(), media["frames"].longest) == ([0, 8, 12, 16], 1024)
    assert torch.unique(media["windows"].ids_T).numel() == 4


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_packs_and_parts_hold_whole_frames_of_their_own(parts):
    one, other = raw(3, (4, 4), 1, (2, 2), 1, (4, 2), 4, seed=1), raw(20, (2, 4), 5, seed=2)
    size = max(len(one["tokens"]), len(other["tokens"]))
    both = [seen.pack([given], tokens=size) for given in (one, other)]
    joined = {name: torch.cat([b[name] for b in both]) for name in ("tokens", "labels", "pixels", "image_grid_thw")}
    joined["segments"] = torch.cat([both[0]["segments"], both[1]["segments"] + 7])
    media = prepare(joined, CFG, patches=64, packs=2, parts=parts)["media"]
    assert media["pixels"].shape == (128, 1)
    room = 64 // parts
    for part, ids in enumerate(media["frames"].ids_T.split(room)):
        assert ((ids >= part * room) & (ids < (part + 1) * room)).all()
    for pack, index in enumerate(media["index"].chunk(2)):
        there = index[index < 2 * size]
        assert (there // size == pack).all()
    assert media["index"].sort().values[: 4 + 1 + 2 + 2].tolist() == [
        i for i, token in enumerate(joined["tokens"].tolist()) if token == seen.IMAGE
    ]


def test_text_alone_has_no_media_unless_there_is_a_budget():
    given = raw(5)
    assert "media" not in prepare(given, CFG)
    media = prepare(given, CFG, patches=16)["media"]
    assert media["index"].tolist() == [5] * 4


def test_rows_are_documents():
    one = raw(1, (2, 2), 1)
    rows = {**one, "tokens": one["tokens"].view(1, -1).repeat(2, 1)}
    rows |= {"pixels": one["pixels"].repeat(2, 1), "image_grid_thw": one["image_grid_thw"].repeat(2, 1)}
    made = prepare(rows, CFG)
    assert made["positions"].shape == (2, 5, 3)
    assert torch.equal(made["positions"][0], made["positions"][1])


def changed(**leaves):
    return {**raw(), **leaves}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(tokens=raw()["tokens"][4:]), r"1 tokens of images \(id 60\), and its 1 images have 2 places"),
        (changed(image_grid_thw=torch.tensor([[0, 2, 4]])), "image 0 has 0 frames"),
        (changed(image_grid_thw=torch.tensor([[1, 2, 3]])), "2 x 3 patches: .* multiples of 2"),
        (changed(image_grid_thw=torch.tensor([[1, 2, 8]])), r"\[8, 1\]: .* ask for floating numbers, \[16, 1\]"),
        (changed(image_grid_thw=torch.tensor([1, 2, 4])), "give frames, rows and columns"),
        (changed(pixels=torch.full((8, 1), torch.nan)), "image 0 has a pixel that is no finite number"),
        (changed(pixels=torch.ones(8, 1, dtype=torch.int64)), "floating numbers"),
        (changed(second_per_grid_ts=torch.ones(1)), "counts frames, not seconds"),
        (changed(mm_token_type_ids=torch.zeros(len(raw()["tokens"]))), "mm_token_type_ids says another kind"),
        ({k: v for k, v in raw().items() if k != "pixels"}, "'image_grid_thw' and no 'pixels'"),
        (changed(segments=torch.tensor([0, 0, 0, 0, *[1] * (len(raw()["tokens"]) - 4)])), "lies in two documents"),
        (changed(tokens=torch.tensor([60, 5, 60, 61, 61])), "2 tokens of one image that begin at token 0 do not stand"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        prepare(given, CFG)


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"pictures of 16 patches, in frames of up to 8, .* patches=8 in 1 parts"):
        prepare(raw(), CFG, patches=8)
    with pytest.raises(ValueError, match="patches=6 are not 1 equal parts of whole squares of 4"):
        prepare(raw(), CFG, patches=6)
    with pytest.raises(ValueError, match="not 3 equal packs"):
        prepare(raw(4, (2, 2), 1), CFG, packs=3)
