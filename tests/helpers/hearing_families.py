"""Laws of a family of models that see and hear: it is transformers' for the same weights, packed, on meshes, in files.

Documents are lists of parts, as in `tests.helpers.seeing_families`; and "sound" with frames of a recording, or "scene"
with frames, rows and columns of a video in patches and the frames of its sound.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ftrain
from ftrain.modules import spec, vision_language
from ftrain.modules.autoregression import generate
from ftrain.modules.model import Model
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.sounds import SoundConfig
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_media import prepare
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models
from tests.helpers.seeing_families import END, IMAGE, START, VIDEO, pack
from tests.helpers.text_families import require_equal_gradients, saved

AUDIO, HARK, HUSH, VOCAB = 64, 65, 66, 67
"""The tokens of sound, in front of it, and behind it; how many tokens there are."""
Part = int | tuple[Any, ...]


def random_model(make: Any, config: Any, seed: int = 0) -> Any:
    """The model of a class and a configuration, eager, in float32, every parameter random."""
    model = make._from_config(copy.deepcopy(config), attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            centre = float("norm" in path or "ln_" in path) * 0.5
            leaf.copy_(centre + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model.eval()


def document(parts: Sequence[Part], cfg: MediaConfig, *, seed: int = 0, seconds: float | None = None) -> dict[str, Any]:
    """The raw leaves of one document: random words, pixels and frames of sound; labels where a word follows. `seconds`:
    of a frame of its videos; None: each has its own.
    """
    generator, ids, found = torch.Generator().manual_seed(seed), list[int](), dict[str, list[Any]]()
    assert cfg.sound is not None
    for part in parts:
        kind, sizes = ("words", part) if isinstance(part, int) else ("sound", part[1:])
        if isinstance(part, tuple) and part[0] != "sound":
            kind, sizes = ("scene", part[1:]) if part[0] == "scene" else ("image" if len(part) == 2 else "video", part)
        if kind == "words":
            ids += torch.randint(3, 60, (sizes,), generator=generator).tolist()
            continue
        heard = _heard(sizes[-1], cfg.sound, found, generator) if kind in ("sound", "scene") else 0
        if kind == "sound":
            ids += [HARK, *[AUDIO] * heard, HUSH]
            continue
        frames, rows, columns = (1, *sizes) if kind == "image" else sizes[:3]
        each = rows * columns // cfg.square
        pixels = torch.randn(frames * rows * columns, cfg.tower.d_patch, generator=generator)
        name = "image" if kind == "image" else "video"
        found.setdefault("pixels" if kind == "image" else "pixel_values_videos", []).append(pixels)
        found.setdefault(f"{name}_grid_thw", []).append(torch.tensor([[frames, rows, columns]]))
        if kind == "image":
            ids += [START, *[IMAGE] * each, END]
            continue
        each_has = seconds or 0.4 + 0.3 * len(found["video_grid_thw"])
        found.setdefault("video_second_per_grid", []).append(torch.tensor([each_has]))
        between = [VIDEO] * (each * frames)
        if kind == "scene":
            between = [HARK, *mixed(frames, each, heard, each_has, cfg), HUSH]
        ids += [START, *between, END]
    tokens = torch.tensor(ids)
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    labels[labels >= IMAGE] = -100
    return {"tokens": tokens, "labels": labels, **{name: torch.cat(leaves) for name, leaves in found.items()}}


def _heard(frames: int, cfg: SoundConfig, found: dict[str, list[Any]], generator: torch.Generator) -> int:
    """Put a random recording to the leaves; how many tokens it has."""
    found.setdefault("sound", []).append(torch.randn(frames, cfg.tower.mels, generator=generator))
    found.setdefault("sound_frames", []).append(torch.tensor([frames]))
    return cfg.tower.tokens_of(frames)


def mixed(frames: int, each: int, heard: int, seconds: float, cfg: MediaConfig) -> list[int]:
    """The tokens of a video and its sound as transformers' processors mix them, written as a loop over them."""
    assert cfg.sound is not None
    assert cfg.per_second is not None
    time = (np.arange(frames).astype(np.float32) * np.float32(seconds) * np.float32(cfg.per_second)).repeat(each)
    if cfg.sound.interleave is None:
        found, i, j = list[int](), 0, 0
        while i < len(time) or j < heard:
            if j >= heard or (i < len(time) and time[i] <= j):
                found, i = [*found, VIDEO], i + 1
            else:
                found, j = [*found, AUDIO], j + 1
        return found
    chunks = [_cut(list(map(float, times)), cfg.sound.interleave) for times in (time, range(heard))]
    found = []
    for c in range(max(map(len, chunks))):
        found += [token for own, token in zip(chunks, (VIDEO, AUDIO), strict=True) for _ in range((own + [0] * 99)[c])]
    return found


def _cut(times: list[float], stretch: int) -> list[int]:
    """How many tokens each stretch of time has: a token that is late begins the next one."""
    counts = [0]
    for time in times:
        if time >= len(counts) * stretch:
            counts.append(0)
        counts[-1] += 1
    return counts


def documents(cfg: MediaConfig, parts: Sequence[Sequence[Part]], *, seed: int = 0) -> list[dict[str, Any]]:
    """A document of each."""
    return [document(own, cfg, seed=100 * seed + i) for i, own in enumerate(parts)]


def asked(one: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What transformers is given of a document."""
    made = {name: leaf for name, leaf in one.items() if name.endswith(("_thw", "_per_grid"))}
    made |= {"pixel_values": one["pixels"]} if "pixels" in one else {}
    made |= {"pixel_values_videos": one["pixel_values_videos"]} if "pixel_values_videos" in one else {}
    if "sound" in one:
        clips = one["sound"].split(one["sound_frames"].tolist())
        made["input_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).mT
        longest = torch.arange(max(map(len, clips)))
        made["feature_attention_mask"] = (longest < one["sound_frames"][:, None]).long()
    return {"input_ids": one["tokens"][None], "attention_mask": torch.ones(1, len(one["tokens"])), **made, **more}


def is_scene(one: dict[str, Any]) -> bool:
    """Whether the videos of a document have their sound mixed with them."""
    tokens = one["tokens"].tolist()
    return any(tokens[i : i + 3] == [START, HARK, VIDEO] for i in range(len(tokens)))


def positions_of(model: Any, one: dict[str, Any]) -> Tensor:
    """transformers' positions of a document, `[T, 3]`."""
    found: Tensor = model.get_rope_index(
        one["tokens"][None],
        one.get("image_grid_thw"),
        one.get("video_grid_thw"),
        torch.ones(1, len(one["tokens"])),
        is_scene(one),
        one.get("sound_frames"),
        one.get("video_second_per_grid"),
    )[0]
    return found[:, 0].T


def theirs(model: Any, given: Sequence[dict[str, Any]], folder: Path) -> tuple[float, Tensor, Any]:
    """transformers' mean loss and scores `[T, V]`, document by document, and every gradient as our tree."""
    runs = [model(**asked(one, use_cache=False), use_audio_in_video=is_scene(one)) for one in given]
    scores = torch.cat([run.logits[0] for run in runs])
    loss = torch.nn.functional.cross_entropy(scores, torch.cat([one["labels"] for one in given]))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), scores.detach(), ftrain.hf.open(saved(model, folder), native="always").load()


def require_those_of_transformers(
    model: Any, tmp_path: Path, cfg: MediaConfig, parts: Sequence[Sequence[Part]], *, seed: int = 0
) -> Model:
    """Places, loss, scores and every gradient of packed documents are those of transformers, which has each alone."""
    native = ftrain.hf.open(saved(model, tmp_path / "weights"), native="always")
    assert native.load is not None
    assert native.media is not None
    assert native.logits is not None
    params, given = native.load(), documents(cfg, parts, seed=seed)
    spec.check(params, native.specs)
    batch = native.media(pack(given))
    wanted_places = torch.cat([positions_of(model, one) for one in given])
    torch.testing.assert_close(batch["positions"], wanted_places.to(batch["positions"].dtype), rtol=0, atol=1e-4)
    assert cfg.exact or batch["positions"].dtype == torch.int64
    scores = native.logits(params, batch)
    grads, mean = torch.func.grad_and_value(lambda p: native.loss(p, batch).value())(params)
    loss, wanted_scores, wanted = theirs(model, given, tmp_path / "gradients")
    assert abs(mean.item() - loss) < 2e-5
    torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=2e-5)
    require_equal_gradients(grads, wanted, within=1e-4)
    return native


def opened(model: Any, folder: Path) -> Model:
    """The native model of the weights."""
    return ftrain.hf.open(saved(model, folder), native="always")


def streams(
    native: Model, cfg: VisionLanguageConfig, one: dict[str, Any], *, keep: Sequence[int]
) -> tuple[Tensor, ...]:
    """The streams of a document between these layers, `[T, D]` each."""
    assert native.load is not None
    batch = prepare(one, cfg.media)
    return vision_language.hidden(native.load(), batch, cfg, keep=keep)[1].kept


def on_mesh(
    native: Model,
    cfg: MediaConfig,
    parts: Sequence[Sequence[Part]],
    mesh: Mesh,
    layout: Layout,
    *,
    tokens: int,
    apart: Mapping[str, Layout] = MappingProxyType({}),
) -> tuple[float, float]:
    """Relative differences of the loss and of the gradients between one device and the mesh, in float64. `apart`:
    layouts of components of their own.
    """

    def batch(packs: int) -> dict[str, Any]:
        raw = pack([pack(documents(cfg, parts, seed=i), tokens=tokens) for i in range(packs)])
        one = [pack(documents(cfg, parts, seed=i), tokens=tokens)["segments"] + 9 * i for i in range(packs)]
        raw["segments"] = torch.cat(one)
        assert native.media is not None
        made: dict[str, Any] = native.media(raw, patches=64, chunks=8, packs=packs, parts=mesh.sequence)
        return made

    made = mesh_models.Model(native.specs, lambda p, b: (native.loss(p, b), ()), batch, dict(native.rules))
    return mesh_models.compare(made, mesh_models.plan_for(made, mesh, layout, components=apart), dtype=torch.float64)


def require_same_text(model: Any, cfg: MediaConfig, parts: Sequence[Sequence[Part]], folder: Path) -> None:
    """AssertionError unless the native model writes greedily what transformers does, prompts side by side."""
    native = ftrain.hf.open(saved(model, folder))
    prompts, wanted = documents(cfg, parts), []
    for prompt in prompts:
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = asked(prompt, use_audio_in_video=is_scene(prompt))
        wanted.append(model.generate(**given, **options)[0, len(prompt["tokens"]) :].tolist())
    assert native.load is not None
    assert native.family is not None
    assert generate(native.load(), prompts, family=native.family, max_new=6) == wanted
