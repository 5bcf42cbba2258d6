"""The audio towers of Whisper, Qwen2.5-Omni and Qwen3-Omni equal transformers', one recording as well as several."""

import pytest
import torch

from ftrain.kernels import random
from ftrain.modules import audio_tower, spec
from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.families.audio_names import audio_names
from ftrain.modules.families.whisper import encoder_config, encoder_names
from ftrain.modules.sound_media import laid_sound
from ftrain.modules.sounds import SoundConfig, listen

transformers = pytest.importorskip("transformers", minversion="5.24")

PAIRED = AudioTowerConfig(8, layers=2, heads=2, d_hidden=12, chunk=20, mels=4, paired=True, d_out=6, marks=2)
DEEP = AudioTowerConfig(
    8, layers=2, heads=2, d_hidden=12, chunk=100, mels=6, window=2, channels=3, key_bias=True, d_out=6, deep_out=True
)
OUT = {PAIRED: (("proj", "out_FV"),), DEEP: (("proj1", "up_DF"), ("proj2", "out_FV"))}


def fields(cfg):
    return {
        "num_mel_bins": cfg.mels,
        "encoder_layers": cfg.layers,
        "encoder_attention_heads": cfg.heads,
        "encoder_ffn_dim": cfg.d_hidden,
        "d_model": cfg.d_model,
        "max_source_positions": cfg.rows,
    }


def module_of(cfg):
    own = {**fields(cfg), "n_window": cfg.chunk // 2, "output_dim": cfg.d_out}
    if cfg.paired:
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as of

        made = of.Qwen2_5OmniAudioEncoder(of.Qwen2_5OmniAudioEncoderConfig(**own))
    else:
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as of

        own |= {"n_window_infer": cfg.chunk * cfg.window, "downsample_hidden_size": cfg.channels}
        made = of.Qwen3OmniMoeAudioEncoder(of.Qwen3OmniMoeAudioEncoderConfig(**own))
    return filled(made)


def filled(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.3)
    return module.eval()


def params_of(module, cfg, names):
    """The module's weights as our tree."""
    stored = module.state_dict()
    leaves = {n.leaf.removeprefix("audio."): stored[n.name].mT if n.transposed else stored[n.name] for n in names}
    return spec.map_with_paths(lambda path, _: leaves[path], audio_tower.specs(cfg))


def heard(cfg, lengths, *, packs=1, parts=1, chunks=None):
    """Random recordings of so many frames in one document of their tokens, and what the tower reads of them."""
    frames_FM = torch.randn(sum(lengths), cfg.mels, generator=torch.Generator().manual_seed(1))
    tokens_T = torch.full((sum(map(cfg.tokens_of, lengths)),), 7).numpy()
    sound = SoundConfig(cfg, token=7, start=8)
    clips, frames_FM = listen({"sound": frames_FM, "sound_frames": torch.tensor(lengths)}, tokens_T, sound)
    room = {"tokens": len(tokens_T), "chunks": chunks, "packs": packs, "parts": parts}
    return frames_FM, laid_sound(clips, frames_FM, sound, **room)


@pytest.mark.parametrize("cfg", [PAIRED, DEEP], ids=["Qwen2.5-Omni", "Qwen3-Omni"])
@pytest.mark.parametrize("lengths", [(250, 3, 100, 41), (100, 199)])
def test_rows_and_gradients_are_those_of_transformers(cfg, lengths):
    module = module_of(cfg)
    params = params_of(module, cfg, list(audio_names(cfg, "", "audio", OUT[cfg])))
    frames_FM, sound = heard(cfg, lengths)
    wanted = module(frames_FM.T, feature_lens=torch.tensor(lengths)).last_hidden_state
    here = sound["index"] < len(wanted)

    def rows(p):
        return audio_tower.apply(p, sound, cfg)[here][sound["index"][here].argsort()]

    torch.testing.assert_close(rows(params), wanted, rtol=1e-4, atol=2e-5)
    grads = torch.func.grad(lambda p: rows(p).square().mean())(params)
    wanted.square().mean().backward()
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    want = params_of(module, cfg, list(audio_names(cfg, "", "audio", OUT[cfg])))
    for (path, ours), (_, theirs) in zip(spec.leaves_with_paths(grads), spec.leaves_with_paths(want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")


def test_whispers_encoder_is_that_of_transformers():
    config = transformers.WhisperConfig(**fields(PAIRED), vocab_size=9, decoder_layers=1, pad_token_id=0)
    module = filled(transformers.models.whisper.modeling_whisper.WhisperEncoder(config))
    cfg = encoder_config(config.to_dict())
    assert (cfg.chunk, cfg.rows) == (20, 10)
    params = params_of(module, cfg, encoder_names(cfg, "", "audio"))
    mel_CMW = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(1))
    sound = {"mel": mel_CMW, "heard": torch.full((3,), 20), "parts": torch.arange(3).repeat_interleave(10)}
    rows_ND = audio_tower.apply(params, sound, cfg)
    wanted = module(mel_CMW).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(rows_ND, wanted, rtol=1e-4, atol=2e-5)
    assert encoder_names(cfg)[0].name == "model.encoder.conv1.weight"


@pytest.mark.parametrize("cfg", [PAIRED, DEEP], ids=["Qwen2.5-Omni", "Qwen3-Omni"])
def test_a_recording_is_the_same_alone_and_beside_others(cfg):
    """Qwen3-Omni's of transformers are not: they are filled up to the longest of the batch."""
    params = spec.init(audio_tower.specs(cfg), random.key(0))
    lengths = (41, 250, 9)
    frames_FM, together = heard(cfg, lengths)
    rows = audio_tower.apply(params, together, cfg)
    found, at = rows[together["index"].argsort()], 0
    for frames, length in zip(frames_FM.split(lengths), lengths, strict=True):
        one = SoundConfig(cfg, 7, 8)
        raw, tokens = {"sound": frames, "sound_frames": torch.tensor([length])}, cfg.tokens_of(length)
        clips, own = listen(raw, torch.full((tokens,), 7).numpy(), one)
        alone = laid_sound(clips, own, one, tokens=tokens, chunks=None, packs=1, parts=1)
        rows = audio_tower.apply(params, alone, cfg)[alone["index"].argsort()][:tokens]
        torch.testing.assert_close(found[at : at + tokens], rows, rtol=1e-5, atol=1e-6)
        at += tokens


def test_every_parameter_but_the_unread_ones_takes_part():
    for cfg in (PAIRED, DEEP):
        params, (_, sound) = spec.init(audio_tower.specs(cfg), random.key(0)), heard(cfg, (120, 30))
        grads = torch.func.grad(lambda p, sound=sound, cfg=cfg: audio_tower.apply(p, sound, cfg).square().sum())(params)
        silent = [path for path, leaf in spec.leaves_with_paths(grads) if not leaf.abs().max() > 0]
        assert silent == (["marks_NV"] if cfg.marks else [])


def test_chunks_of_another_size_are_refused():
    params, (_, sound) = spec.init(audio_tower.specs(PAIRED), random.key(0)), heard(PAIRED, (30,))
    with pytest.raises(ValueError, match=r"sound \[2, 4, 19\]: the tower takes chunks of 4 x 20"):
        audio_tower.apply(params, {**sound, "mel": sound["mel"][..., 1:]}, PAIRED)
    with pytest.raises(ValueError, match="must give whole heads"):
        AudioTowerConfig(9, layers=1, heads=2, d_hidden=8, chunk=20)
