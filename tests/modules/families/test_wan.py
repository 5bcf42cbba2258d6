"""Wan equals diffusers' for the same weights: velocities and every gradient, clips in one pack or one by one."""

import functools

import pytest
import torch

from ftrain.modules import spec
from ftrain.modules.families import wan, wan_names
from ftrain.modules.families.wan_config import (
    BOUNDARIES,
    PUBLISHED,
    WanConfig,
    authors_config,
    config,
    diffusers_config,
    expert_times,
    keep_float32,
)
from ftrain.modules.families.wan_latents import Clip, lay, patchify, unpatchify
from ftrain.sharding.paths import Rules, match
from tests.helpers import tiny_wan
from tests.helpers.tiny_wan import BOTH_ENDS, TINY, WITH_IMAGE, clips

pytest.importorskip("diffusers")


def velocities(params, batch, cfg):
    """The model's rows for a batch of `lay`."""
    return wan.apply(
        params,
        batch["latents"],
        times_M=batch["times"],
        time_rows_N=batch.get("time_rows"),
        positions_AN=batch["positions"].mT,
        text_SC=batch["text"],
        segments_N=batch["segments"],
        text_segments_S=batch["text_segments"],
        image_IC=batch.get("image"),
        image_segments_I=batch.get("image_segments"),
        cfg=cfg,
    )


@functools.cache
def tiny(kind="text"):
    told = {"text": TINY, "image": WITH_IMAGE, "both ends": BOTH_ENDS}[kind]
    cfg, made = config(told), tiny_wan.module(told)
    return cfg, made, tiny_wan.tree_of(made.state_dict(), cfg)


@pytest.mark.parametrize(("kind", "frames"), [("text", False), ("text", True), ("image", False), ("both ends", False)])
def test_velocities_and_gradients_are_those_of_diffusers(kind, frames):
    """A pack with room to spare against one clip after the other; `frames`: clean first frames, as Wan 2.2's 5B."""
    cfg, made, params = tiny(kind)
    given = clips(cfg, frame_times=frames)
    batch = lay([given], cfg, rows=None if cfg.image_places else 40, clips=None if cfg.image_places else 4)
    leaves = spec.map_with_paths(lambda _, x: x.clone().requires_grad_(), params)
    found = velocities(leaves, batch, cfg)
    wanted = torch.cat([patchify(tiny_wan.theirs(made, clip), cfg.patch) for clip in given])
    assert float((found[: len(wanted)] - wanted).detach().abs().max()) < 2e-5
    (found - batch["target"])[batch["valid"]].square().mean().backward()
    made.zero_grad()
    (wanted - batch["target"][: len(wanted)]).square().mean().backward()
    theirs = tiny_wan.tree_of({name: p.grad for name, p in made.named_parameters()}, cfg)
    for path, error in tiny_wan.relative(spec.map_with_paths(lambda _, x: x.grad, leaves), theirs).items():
        assert error < 1e-4, path


@pytest.mark.parametrize("kind", ["text", "image"])
def test_clips_one_by_one_are_those_of_the_pack(kind):
    cfg, _, params = tiny(kind)
    params = spec.map_with_paths(lambda _, x: x.double(), params)
    whole = velocities(params, _double(lay([clips(cfg)], cfg)), cfg)
    first = 0
    for clip in clips(cfg):
        batch = _double(lay([[clip]], cfg))
        assert "time_rows" not in batch
        alone = velocities(params, batch, cfg)
        torch.testing.assert_close(whole[first : first + len(alone)], alone, rtol=0, atol=1e-10)
        first += len(alone)


def _double(batch):
    return {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in batch.items()}


def test_packs_for_several_ranks_are_packs_one_by_one():
    cfg, _, params = tiny("image")
    given = clips(cfg)
    both = velocities(params, lay([given[:2], given[2:]], cfg, multiple=4), cfg)
    for rows, pack in zip(both.chunk(2), (given[:2], given[2:]), strict=True):
        alone = velocities(params, lay([pack], cfg), cfg)
        torch.testing.assert_close(rows[: len(alone)], alone, rtol=0, atol=2e-6)
    assert len(both) % 4 == 0


def test_one_clip_needs_no_segments():
    cfg, _, params = tiny()
    clip = clips(cfg)[0]
    batch = lay([[clip]], cfg)
    given = {"times_M": batch["times"], "positions_AN": batch["positions"].mT, "text_SC": batch["text"], "cfg": cfg}
    found = wan.apply(params, batch["latents"], **given)
    torch.testing.assert_close(found, velocities(params, batch, cfg), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="give segments of both latents and text, or of neither"):
        wan.apply(params, batch["latents"], **given, segments_N=batch["segments"])
    with pytest.raises(ValueError, match="there are 2 times, and no time_rows_N says"):
        wan.apply(params, batch["latents"], **{**given, "times_M": torch.rand(2)})
    with pytest.raises(ValueError, match="d_image=0, but rows of pictures were given"):
        wan.apply(params, batch["latents"], **given, image_IC=torch.zeros(7, 10))


def test_narrow_weights_leave_the_stream_and_the_time_wide():
    """With the kept ones in float32 the velocity is float32, and far nearer to the exact one than with none kept."""
    cfg, _, params = tiny()
    batch = lay([clips(cfg)], cfg)
    exact = velocities(params, batch, cfg)

    def error(kept):
        keep = lambda path: any(match(path, glob) for glob in kept)  # noqa: E731
        narrow = spec.map_with_paths(lambda path, x: x if keep(path) else x.bfloat16(), params)
        found = velocities(narrow, batch, cfg)
        assert found.dtype == torch.float32
        return float((found - exact).norm() / exact.norm())

    assert error(keep_float32(cfg)) < 0.7 * error(())
    for told in (TINY, WITH_IMAGE, {**TINY, "cross_attn_norm": False}):
        every = [path for path, _ in spec.leaves_with_paths(wan.specs(config(told)))]
        Rules(dict.fromkeys(keep_float32(config(told)), True)).require_used(every)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("2.1-t2v-1.3b", 1_418_996_800),
        ("2.1-t2v-14b", 14_288_491_584),
        ("2.1-i2v-14b", 16_394_878_784),
        ("2.2-ti2v-5b", 4_999_787_712),
    ],
)
def test_published_models_have_their_size(name, numbers):
    cfg = config(PUBLISHED[name])
    assert spec.count(wan.specs(cfg)) == numbers
    assert cfg.rope_sections == (22, 21, 21)


@pytest.mark.parametrize("told", [TINY, WITH_IMAGE, BOTH_ENDS])
def test_every_parameter_has_its_name_in_the_order_of_diffusers(told):
    cfg = config(told)
    assert [n.name for n in wan_names.diffusers(cfg)] == list(tiny_wan.module(told).state_dict())
    assert {n.leaf for n in wan_names.authors(cfg)} == {p for p, _ in spec.leaves_with_paths(wan.specs(cfg))}


def test_names_of_the_authors_are_those_that_diffusers_converts():
    """By diffusers' own table for single files; norm2 and norm3 change places in it."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    cfg, made, _ = tiny("image")
    state = made.state_dict()
    pairs = zip(wan_names.authors(cfg), wan_names.diffusers(cfg), strict=True)
    there = {mine.name: state[own.name] for mine, own in pairs}
    converted = convert_wan_transformer_to_diffusers(dict(there))
    assert set(converted) == set(state)
    assert all(torch.equal(converted[name], x) for name, x in state.items())


def test_a_configuration_goes_out_and_comes_in():
    for told in (TINY, WITH_IMAGE, BOTH_ENDS, *PUBLISHED.values()):
        cfg = config(told)
        assert config(diffusers_config(cfg)) == cfg
    for name, told in PUBLISHED.items():
        cfg = config(told)
        assert config(authors_config(cfg), image=bool(cfg.d_image)) == cfg, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_dim": 10}, "image_dim=10 and added_kv_proj_dim=None must both be null"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm'; Wan norms queries and keys across heads"),
        ({"patch_size": [2, 2]}, r"patch_size=\[2, 2\] must be three whole numbers"),
        ({"vace_layers": [0]}, r"vace_layers=\[0\] is not understood"),
        ({"_class_name": "WanVACETransformer3DModel"}, "is no Wan transformer"),
        ({"attention_head_dim": 4}, "d_model=8 must give heads=2 an even width of at least 6"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config({**TINY, **change})


def clip_of(cfg, *, sizes=(1, 4, 4), time=0.5, channels=None, text=3, width=None, image=None):
    latents = torch.zeros(channels or cfg.channels_in, *sizes)
    return Clip(latents, time, torch.zeros(text, width or cfg.d_text), image)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"sizes": (1, 3, 4)}, r"1 frames x 3 x 4 do not divide into patches of \[1, 2, 2\]"),
        ({"channels": 6}, "6 channels, and the model takes 4 .* its own VAE"),
        ({"text": 513}, "a text of 513 rows x 12, and the model reads up to 512"),
        ({"width": 13}, "a text of 3 rows x 13"),
        ({"time": 1.5}, "time 1.5, and the model is for times from 0 to 1"),
        ({"time": [0.1, 0.2]}, "2 times, and 1 frames of patches"),
        ({"sizes": (1, 2, 2060)}, "places for 1024 along an axis"),
        ({"image": torch.zeros(7, 10)}, "d_image=0, but a clip has rows of pictures"),
    ],
)
def test_clips_of_another_model_are_refused(clip, message):
    cfg = config(TINY)
    with pytest.raises(ValueError, match=message):
        lay([[clip_of(cfg, **clip)]], cfg)


def test_an_expert_sees_its_own_noise_alone():
    boundary = BOUNDARIES["2.2-t2v-a14b"]
    high, low = (config(TINY, times=expert_times(boundary, high=h)) for h in (True, False))
    for cfg, good, bad in ((high, (0.875, 1.0), 0.87), (low, (0.0, 0.874), 0.875)):
        for time in good:
            lay([[clip_of(cfg, time=time)]], cfg)
        with pytest.raises(ValueError, match="draw times of this range, or train the other expert"):
            lay([[clip_of(cfg, time=bad)]], cfg)


def test_a_pack_without_room_is_refused():
    cfg = config(TINY)
    pack = [clip_of(cfg), clip_of(cfg, time=0.25)]
    with pytest.raises(ValueError, match="8 rows and 2 clips, and there is room for 4"):
        lay([pack], cfg, rows=4)
    with pytest.raises(ValueError, match="2 different times, and there is room for 1"):
        lay([pack], cfg, times=1)
    targets = Clip(torch.zeros(4, 1, 2, 2), 0.5, torch.zeros(1, 12), target_CFHW=torch.zeros(4, 1, 2, 2))
    with pytest.raises(ValueError, match="some clips have a target and some have none"):
        lay([[*pack, targets]], cfg)


def test_rows_go_back_to_latents():
    latents = torch.randn(3, 4, 6, 8)
    assert torch.equal(unpatchify(patchify(latents, (2, 2, 4)), (4, 6, 8), (2, 2, 4)), latents)
    with pytest.raises(ValueError, match="rows are no latents of"):
        unpatchify(torch.zeros(5, 4), (1, 2, 2), (1, 2, 2))


def test_configurations_are_checked():
    sizes = {"channels_in": 4, "channels_out": 4, "d_model": 24, "layers": 1, "heads": 2, "d_hidden": 8}
    for change, message in (
        ({"heads": 5}, "must give heads=5"),
        ({"time_features": 3}, "time_features=3 must be even"),
        ({"patch": (1, 2)}, "must be three sizes"),
        ({"times": (0.5, 0.5)}, "must be a range within 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            WanConfig(**{**sizes, **change})
