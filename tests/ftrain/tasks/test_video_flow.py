"""Training of video transformers: what is asked of the model, what counts, and that ranks agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrain
from ftrain.bridge.native_wan import native_wan
from ftrain.data.documents import Document, Group
from ftrain.data.packing import Plan, Shape
from ftrain.kernels.mean import Mean
from ftrain.modules.families.wan_config import config
from ftrain.modules.families.wan_latents import Clip, lay, patchify
from ftrain.modules.spec import Normal, map_with_paths
from ftrain.run.clip_batches import ClipLayout
from ftrain.sharding import Layout, Mesh
from ftrain.tasks.flow import dropped
from ftrain.tasks.video import RULES, VideoFlow
from tests.helpers import mesh_models
from tests.helpers.tiny_wan import TINY
from tests.helpers.tiny_wan_pipeline import WITH_FRAME

SIZES = ((2, 4, 6), (1, 6, 4), (3, 2, 2))
KEY = ftrain.key(3)


def model_of(told):
    specs = map_with_paths(lambda _, spec: replace(spec, init=Normal(0.1)), native_wan(told).specs)
    return replace(native_wan(told), specs=specs)


def media(told, seed=0):
    """Of clips of `SIZES` with texts of 3, 0 and 9 rows."""
    rng, found = np.random.default_rng(seed), []
    for size, rows in zip(SIZES, (3, 0, 9), strict=True):
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        made = {"latents": draw(4, *size), "text": draw(rows, 12)}
        found.append({**made, "condition": draw(4, *size)} if told is WITH_FRAME else made)
    return found


def batch_of(told, packs, *, rows=24, **layout):
    """The batch of these packs of media."""
    made = []
    for pack in packs:
        zeros = [np.zeros(m["latents"][0].size // 4, np.int64) for m in pack]
        made.append([Group((Document(z, z, media=m),)) for z, m in zip(zeros, pack, strict=True)])
    how = ClipLayout(cfg=config(told), most=3, mask=4 if told is WITH_FRAME else 0, **layout)
    plan = Plan(np.zeros(0), np.zeros(0), np.zeros(0), Shape(rows))
    return how.batch(made, plan, slots=0, leaves=None)


@pytest.mark.parametrize("kind", ["text", "frame", "clean first"])
def test_the_loss_is_that_of_each_clip_by_itself(kind):
    """Noised rows at the clip's time, conditions beside them; a clean first frame is at 0 and does not count."""
    told = WITH_FRAME if kind == "frame" else TINY
    cfg, model, clips = config(told), model_of(told), media(told)
    params = ftrain.init(model.specs, ftrain.key(0))
    batch = batch_of(told, [clips], clean_first=kind == "clean first")
    task = VideoFlow(times="logit_normal", weighting="bell")
    found, terms = task.loss(model, params, batch, key=KEY)
    assert terms == {}
    given = batch.get("given")
    assert (given is not None) == (kind == "clean first")
    noisy = task.flow.noisy(batch["data"], ids_N=batch["clip"], key=KEY, given_N=given, valid_N=batch["labels"] == 0)
    first, errors, count = 0, 0.0, 0
    for number, clip in enumerate(clips):
        latents = torch.from_numpy(clip["latents"])
        own = slice(first, first + latents[0].numel() // 4)
        first = own.stop
        frames, time = latents.shape[1], float(task.flow.times.draw(KEY, torch.tensor([number])))
        clean = kind == "clean first" and frames > 1
        times = [0.0, *[time] * (frames - 1)] if clean else time
        alone = lay([[Clip(latents if told is TINY else torch.zeros(12, *latents.shape[1:]), times,
                           torch.from_numpy(clip["text"]))]], cfg)  # fmt: skip
        beside = []
        if told is WITH_FRAME:
            mask = torch.zeros(4, *latents.shape[1:])
            mask[:, 0] = 1
            beside = [patchify(torch.cat([mask, torch.from_numpy(clip["condition"])]), cfg.patch)]
        alone["latents"] = torch.cat([noisy.x[own], *beside], -1)
        error = (model.outputs(params, alone) - noisy.target[own]).square()
        counted = error[len(error) // frames :] if clean else error
        errors += float(counted.sum() * task.flow.weight(torch.tensor([time])))
        count += counted.numel()
        torch.testing.assert_close(noisy.x[own][0], batch["data"][own][0]) if clean else None
    assert float(found.count) == count
    assert found.item() == pytest.approx(errors / count, rel=1e-5)


def test_captions_that_are_left_out_are_the_empty_one():
    model, clips = model_of(TINY), media(TINY)
    params = ftrain.init(model.specs, ftrain.key(0))
    empty = torch.full((2, 12), 0.5)
    batch = batch_of(TINY, [clips], empty=empty)
    key = next(
        k for k in map(ftrain.key, range(99)) if dropped(k, batch["clips"][:3], 0.5).tolist() == [True, False, True]
    )
    found, _ = VideoFlow(drop=0.5).loss(model, params, batch, key=key)
    by_hand = [{**clips[0], "text": empty.numpy()}, clips[1], {**clips[2], "text": empty.numpy()}]
    wanted, _ = VideoFlow().loss(model, params, batch_of(TINY, [by_hand]), key=key)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.item() != pytest.approx(VideoFlow().loss(model, params, batch, key=key)[0].item(), rel=1e-5)
    with pytest.raises(ValueError, match="the batch has no 'empty'"):
        VideoFlow(drop=0.5).loss(model, params, batch_of(TINY, [clips]), key=key)


def test_without_a_key_it_is_the_mean_at_fixed_times_of_the_range():
    model, batch = model_of(TINY), batch_of(TINY, [media(TINY)])
    params = ftrain.init(model.specs, ftrain.key(0))
    found, terms = VideoFlow(low=0.5, high=1.0, shift=5.0, weighting="cosmap").loss(model, params, batch)
    assert list(terms) == ["at_0.55", "at_0.65", "at_0.75", "at_0.85", "at_0.95"]
    assert found.item() == pytest.approx(sum(t.item() for t in terms.values()) / 5, rel=1e-6)
    again, _ = VideoFlow(low=0.5, high=1.0).loss(model, params, batch)
    assert again.item() == found.item()  # no matter how times are drawn


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(sequence=2, kind="virtual"),
        pytest.param(Mesh(shard=2, kind="virtual"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_mesh_gives_what_one_device_gives(mesh):
    made, task = model_of({**TINY, "num_layers": 1}), VideoFlow(drop=0.3)

    def loss(params, batch):
        found, _ = task.loss(made, params, batch, key=KEY)
        return found, {"flow": Mean(found.total.detach(), found.count)}

    def batch(packs):
        given = [media(TINY, seed=i)[i % 2 :] for i in range(packs)]
        return batch_of(TINY, given, multiple=4, clean_first=True, empty=torch.ones(1, 12))

    model = mesh_models.Model(made.specs, loss, batch, dict(RULES))
    apart, gradients = mesh_models.compare(model, mesh_models.plan_for(model, mesh, Layout()), dtype=torch.float64)
    assert apart < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, r"drop=1.0, a share of captions, must be in \[0, 1\)"),
        ({"shift": 0.0}, "shift=0.0 must be positive"),
        ({"low": 0.9, "high": 0.3}, r"low=0.9 and high=0.3 must be in order"),
        ({"weighting": "sigma_sqrt"}, "has no mean: give"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoFlow(**options)
