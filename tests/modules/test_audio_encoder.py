"""The audio encoder: the packed convolution, packed clips."""

import numpy as np
import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import audio_encoder, spec
from ftrain.modules.audio_encoder import AudioConfig

TINY = AudioConfig(d_model=16, layers=2, heads=2, d_out=12, rate=8000, n_fft=128, hop=40, mels=10, merge=2)


def wave(seconds: float, *, rate: int = 8000, seed: int = 0) -> np.ndarray:
    """A chirp with noise."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=times.shape)
    return (0.5 * np.sin(2 * np.pi * (200 + 700 * times) * times) + 0.01 * noise).astype(np.float32)


def test_halving_conv_is_conv1d_on_each_clip_alone() -> None:
    lengths = [4, 2, 8]
    x_FI, w_3IO, b_O = torch.randn(14, 5), torch.randn(3, 5, 6), torch.randn(6)
    segments_F = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = audio_encoder.halving_conv({"w_3IO": w_3IO, "b_O": b_O}, x_FI, segments_F)
    alone = [
        torch.nn.functional.conv1d(clip.T[None], w_3IO.permute(2, 1, 0), b_O, stride=2, padding=1)[0].T
        for clip in x_FI.split(lengths)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


def features(*clips: np.ndarray, budget: int | None = None) -> dict[str, torch.Tensor]:
    mels = [torch.from_numpy(audio_encoder.clip_features(clip, cfg=TINY)["mel_FM"]) for clip in clips]
    segments = [torch.full((len(mel),), i) for i, mel in enumerate(mels)]
    if budget is not None:
        rest = budget - sum(map(len, mels))
        mels.append(torch.zeros(rest, TINY.mels))
        segments.append(torch.full((rest,), len(clips)))
    return {"mel_FM": torch.cat(mels), "segments_N": torch.cat(segments)}


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (320, 1), (321, 2), (8000, 25)])
def test_a_clip_is_filled_up_to_whole_tokens(samples: int, tokens: int) -> None:
    mel_FM = audio_encoder.clip_features(np.ones(samples), cfg=TINY)["mel_FM"]
    assert mel_FM.shape == (tokens * TINY.rows_per_token, TINY.mels)


def test_clips_in_a_pack_do_not_hear_one_another_nor_the_padding() -> None:
    params = spec.init(audio_encoder.specs(TINY), random.key(0))
    short, long = wave(0.1), wave(0.25, seed=1)
    alone = [audio_encoder.lm_encode(params, features(clip), cfg=TINY) for clip in (short, long)]
    packed = audio_encoder.lm_encode(params, features(short, long, budget=80), cfg=TINY)
    assert packed.shape == (80 // TINY.rows_per_token, TINY.d_out)
    torch.testing.assert_close(packed[: sum(map(len, alone))], torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_order_of_sounds_matters() -> None:
    """Sounds between silences, so that convolutions see one at a time: only positions tell their order."""
    params = spec.init(audio_encoder.specs(TINY), random.key(0))
    sounds = torch.randn(5, TINY.rows_per_token, TINY.mels)
    sounds[:, TINY.rows_per_token // 2 :] = 0
    order = torch.tensor([0, 3, 1, 4, 2])
    one, other = (
        audio_encoder.lm_encode(
            params, {"mel_FM": mel_FM, "segments_N": torch.zeros(len(mel_FM), dtype=torch.int64)}, cfg=TINY
        )
        for mel_FM in (sounds.flatten(0, 1), sounds[order].flatten(0, 1))
    )
    assert (one[order] - other).abs().max() > 1e-3


def test_every_parameter_takes_part() -> None:
    params = spec.init(audio_encoder.specs(TINY), random.key(0))
    clips = features(wave(0.1), wave(0.2, seed=1))
    grads = torch.func.grad(lambda p: audio_encoder.lm_encode(p, clips, cfg=TINY).square().sum())(params)
    silent = [path for path, leaf in spec.leaves_with_paths(grads) if not leaf.abs().max() > 0]
    assert not silent


@pytest.mark.parametrize("bad", [np.zeros((2, 400)), np.zeros((0, 3))])
def test_a_wave_of_several_channels_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one channel"):
        audio_encoder.clip_features(bad, cfg=TINY)


def test_a_broken_token_is_refused() -> None:
    params = spec.init(audio_encoder.specs(TINY), random.key(0))
    with pytest.raises(ValueError, match="12 mel frames are not whole tokens of 8"):
        audio_encoder.lm_encode(params, {"mel_FM": torch.zeros(12, 10), "segments_N": torch.zeros(12)}, cfg=TINY)
