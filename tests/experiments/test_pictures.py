"""The experiments on real pictures: what they train on, what is held out, and how their batches lie."""

import numpy as np
import torch

import ftrain
from experiments.pictures import codec, janus
from ftrain.modules import codebook_averages, vq_image
from ftrain.modules import janus as family
from ftrain.modules.janus_media import prepare


def test_crops_are_of_the_photos_and_the_held_out_quarter_is_apart() -> None:
    seen, held_out = codec.photos()
    assert [(a.shape[1], b.shape[1]) for a, b in zip(seen, held_out, strict=True)] == [(480, 160)] * 2
    images_BCHW = codec.crops(held_out, 3, 16, np.random.default_rng(0))
    assert images_BCHW.shape == (3, 3, 16, 16)
    assert -1 <= images_BCHW.min() < images_BCHW.max() <= 1
    again = codec.crops(held_out, 3, 16, np.random.default_rng(0))
    assert torch.equal(images_BCHW, again)


def test_a_codebook_that_follows_averages_is_revived_with_them() -> None:
    way = codec.WAYS["VQGAN, averages"]
    params = ftrain.init(vq_image.specs(way.cfg), ftrain.key(0))
    begun = codebook_averages.begun(params["codebooks_QKZ"])
    dead = {**begun, "cluster_usage_QK": begun["cluster_usage_QK"] * (torch.arange(way.cfg.codes) > 4)}
    made = ftrain.TrainState.create(params, ftrain.optim.sgd(0.1))
    state = codec.State(made, made, dead, torch.ones(1, way.cfg.codes))
    images_BCHW = codec.crops(codec.photos()[0], 2, 16, np.random.default_rng(0))
    found = codec.revived(state, images_BCHW, ftrain.key(1), way)
    books, old = (s.made.params["codebooks_QKZ"][0] for s in (found, state))
    moved = (books != old).any(1)
    assert moved[:5].all()
    assert not moved[5:].any()
    assert not found.usage_QK.any()


def test_what_is_read_and_what_is_drawn_lie_in_one_pack() -> None:
    seen, _ = janus.digits.split()
    raw = janus.batch_of(
        seen.images_NHWC[:2], seen.labels_N[:2], seen.images_NHWC[2:4], seen.labels_N[2:4], np.array([False, True])
    )
    batch = prepare(raw, janus.CFG)
    assert batch["media"]["seen"]["pixels"].shape == batch["media"]["drawn"]["pixels"].shape == (2, 1, 8, 8)
    labelled = raw["labels"] >= 0
    assert raw["labels"][labelled].tolist() == [janus.FIRST + 0, janus.EOS, janus.FIRST + 1, janus.EOS]
    assert raw["tokens"][labelled].tolist() == [janus.END, janus.FIRST + 0, janus.END, janus.FIRST + 1]
    documents = raw["tokens"].split(torch.bincount(raw["segments"]).tolist())
    assert [one[1].item() for one in documents[2:]] == [janus.FIRST + 2, janus.PAD]


def test_an_untrained_model_reads_and_draws_something() -> None:
    params = ftrain.init(family.specs(janus.CFG), ftrain.key(0))
    _, held_out = janus.digits.split()
    few = janus.Digits(*(leaf[:3] for leaf in held_out))
    assert janus.read(params, few).shape == (3,)
    for guidance in (1.0, 2.0):
        assert janus.draw(params, [3, 7], guidance=guidance, seed=0).shape == (2, 1, 8, 8)
