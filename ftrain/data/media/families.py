"""Which family of media a model's folder is of: read from its configuration and that of its processor."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ftrain.data.media.family import Blind, MediaFamily
from ftrain.data.media.hearing import Hearing
from ftrain.data.media.limits import Limits
from ftrain.data.media.log_mel import LogMel
from ftrain.data.media.patches import Patches
from ftrain.data.media.qwen import MODELS as QWEN
from ftrain.data.media.qwen import OMNI, Films, QwenFamily
from ftrain.data.media.sizes import Multiples, MultiplesInTime
from ftrain.data.media.tile_families import MODELS as TILES
from ftrain.data.media.tile_families import tile_family
from ftrain.files.outside import read_json
from ftrain.modules.families.registry import seeing_family_of

_SENSES = ("vision_config", "audio_config", "thinker_config")
_PROCESSOR = (("processor_config.json", ""),)
_IMAGE_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", ""))
_SOUND_FILES = (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", ""))
_VIDEO_FILES = (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", ""), *_IMAGE_FILES[1:])


def reads_media(folder: str | PathLike[str]) -> bool:
    """Whether how the model of a folder sees media is known. ValueError for a configuration that cannot be read."""
    file = Path(folder) / "config.json"
    return file.is_file() and _read(file).get("model_type") in (*QWEN, *TILES)


def family_of(
    folder: str | PathLike[str], tokenizer: Any, *, limits: Limits | None = None, image_pixels: int | None = None
) -> MediaFamily | None:
    """How the model of a folder sees media; None for one that reads text alone. One whose way is not known sees none.

    Args:
        folder: in Hugging Face's format.
        tokenizer: of the folder, of transformers.
        limits: the most that is decoded.
        image_pixels: the most pixels of a picture; None: what the folder says.

    ValueError for files of the folder that cannot be read or say what is not known.
    """
    path = Path(folder)
    config = _read(path / "config.json") if (path / "config.json").is_file() else {}
    kind, most = config.get("model_type"), limits or Limits()
    if kind in QWEN:
        return _qwen(path, config, tokenizer, most, image_pixels)
    if image_pixels is not None:
        raise ValueError(f"{path}: the size of pictures cannot be chosen for {kind}: leave --image-pixels out")
    if kind in TILES:
        return tile_family(path, config, tokenizer, _first(path, _PROCESSOR), most)
    return Blind(str(kind)) if any(name in config for name in _SENSES) else None


def _qwen(path: Path, config: Mapping[str, Any], tokenizer: Any, limits: Limits, image_pixels: int | None) -> Any:
    kind = config["model_type"]
    omni = kind in OMNI
    told = config.get("thinker_config") or config
    third, apart = kind.startswith("qwen3"), kind.startswith("qwen3") and not omni
    images, films = _first(path, _IMAGE_FILES), _first(path, _VIDEO_FILES)
    if not images:
        raise ValueError(f"{path} has no preprocessor_config.json, which says how its pictures are read: copy it there")
    patches, film_patches = _patches(path, images, third and omni), _patches(path, films, third)
    for one in (patches, film_patches):
        _require_tower(path, told.get("vision_config") or {}, one)
    least, most = _bounds(images, 3136, 1003520)
    size = Multiples(patches.factor, least, _capped(path, image_pixels, least, most))
    # processors of omni models have a size of films of their own, whatever their files say
    least, most = _bounds({} if omni else films, *_film_bounds(apart, film_patches.factor if omni else 28))
    in_time = MultiplesInTime(film_patches.factor, least, most, film_patches.in_time)
    rule = in_time if apart else Multiples(film_patches.factor, least, most)
    taken = Films(
        film_patches, rule, rate=float(films.get("fps") or 2.0), least=films.get("min_frames") or 4,
        most=films.get("max_frames") or 768, told=apart, timed=omni or kind == "qwen2_5_vl",
    )  # fmt: skip
    usual = _SECOND_OMNI if omni and not third else _USUAL
    image, film, start, end = (_token(path, tokenizer, told, n, usual[n]) for n in _NAMES)
    hearing = _hearing(path, config, tokenizer, usual, limits) if omni else None
    quadratic = _quadratic(told.get("vision_config") or {}, patches.merge)
    return QwenFamily(
        kind, patches, size, taken, picture=image, film=film, start=start, end=end, limits=limits, quadratic=quadratic,
        hearing=hearing,
    )  # fmt: skip


_NAMES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_HEARD_NAMES = ("audio_token_id", "audio_start_token_id", "audio_end_token_id")
_USUAL = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|audio_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    "audio_start_token_id": "<|audio_start|>", "audio_end_token_id": "<|audio_end|>",
}  # fmt: skip
_SECOND_OMNI = {
    "image_token_id": "<|IMAGE|>", "video_token_id": "<|VIDEO|>", "audio_token_id": "<|AUDIO|>",
    "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
    "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
}  # fmt: skip


def _film_bounds(apart: bool, factor: int) -> tuple[int, int]:
    return (131072, 786432) if apart else (128 * factor**2, 768 * factor**2)


def _hearing(
    path: Path, config: Mapping[str, Any], tokenizer: Any, usual: Mapping[str, str], limits: Limits
) -> Hearing:
    """How an omni model hears: by its tower, and by its processor's features. ValueError for what is not known."""
    family, told = seeing_family_of(config), config.get("thinker_config") or config
    media = None if family is None else family.config(config).media
    assert media is not None
    sound, per_second = media.sound, media.per_second
    assert sound is not None
    assert per_second is not None
    features = _first(path, _SOUND_FILES)
    if features.get("dither"):
        raise ValueError(f"{path}: its processor of sound has dither = {features['dither']!r}, and none is known")
    bands = features.get("feature_size") or sound.tower.mels
    if bands != sound.tower.mels:
        raise ValueError(f"{path}: its processor has {bands} bands of sound, and its model {sound.tower.mels}")
    mel = LogMel(
        bands,
        features.get("sampling_rate") or 16_000,
        features.get("n_fft") or 400,
        features.get("hop_length") or 160,
        seconds=None,
    )
    place, start, end = (_token(path, tokenizer, told, name, usual[name]) for name in _HEARD_NAMES)
    second = not config["model_type"].startswith("qwen3")
    most = float(features.get("chunk_length") or 300) if second else None
    stretch = sound.interleave
    return Hearing(mel, sound.tower, place, start, end, per_second, stretch=stretch, most=most, limits=limits)


def _quadratic(vision: Mapping[str, Any], merge: int) -> float:
    """What attention costs for the square of a frame's tokens, over what a token's products cost: of layers with
    `12 * width**2` weights, of which only some see whole frames where others see windows.
    """
    width, depth, whole = vision.get("embed_dim") or vision.get("hidden_size"), vision.get("depth"), 1.0
    if "fullatt_block_indexes" in vision and depth:
        whole = len(vision["fullatt_block_indexes"]) / depth
    return whole * merge**2 / (6 * width) if width else 0.0


def _patches(path: Path, told: Mapping[str, Any], third: bool) -> Patches:
    usual = Patches(patch=16, mean=(0.5,) * 3, std=(0.5,) * 3) if third else Patches()
    for name, value in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if told.get(name, value) not in (value, None):
            raise ValueError(f"{path}: its processor of pictures has {name} = {told[name]!r}, and {value!r} is known")
    return Patches(
        told.get("patch_size") or usual.patch,
        told.get("merge_size") or usual.merge,
        told.get("temporal_patch_size") or usual.in_time,
        told.get("rescale_factor") or usual.scale,
        tuple(told.get("image_mean") or usual.mean),
        tuple(told.get("image_std") or usual.std),
    )


def _require_tower(path: Path, tower: Mapping[str, Any], patches: Patches) -> None:
    """ValueError for patches that the model's tower does not read."""
    for name, own in (
        ("patch_size", patches.patch),
        ("spatial_merge_size", patches.merge),
        ("temporal_patch_size", patches.in_time),
    ):
        if tower.get(name, own) != own:
            raise ValueError(
                f"{path}: its processor has patches with {name} = {own}, and its model {tower[name]}: take the "
                "processor of the model"
            )


def _bounds(told: Mapping[str, Any], least: int, most: int) -> tuple[int, int]:
    """The least and most pixels, by any of the names that they had."""
    size = told.get("size") or {}
    least = told.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or least
    most = told.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or most
    return int(least), int(most)


def _capped(path: Path, asked: int | None, least: int, most: int) -> int:
    if asked is None:
        return most
    if asked < least:
        raise ValueError(f"pictures of at most {asked} pixels: {path} makes them of {least} at least; give more")
    return min(asked, most)


def _token(path: Path, tokenizer: Any, config: Mapping[str, Any], name: str, usual: str) -> tuple[str, int]:
    """The text and the id of a token: the id that the configuration has, or that of the usual text."""
    number = config.get(name, config.get(name.replace("_token_id", "_token_index")))
    text = tokenizer.convert_ids_to_tokens(number) if number is not None else usual
    number = tokenizer.convert_tokens_to_ids(usual) if number is None else number
    if text is None or number is None or tokenizer.convert_tokens_to_ids(text) != number:
        raise ValueError(f"{path}: {name} = {number} is no token of its tokenizer: take the tokenizer of the model")
    return text, int(number)


def _first(path: Path, files: tuple[tuple[str, str], ...]) -> Mapping[str, Any]:
    """The first of these that is there: a file, or a field of one."""
    for name, field in files:
        if (path / name).is_file():
            found = _read(path / name)
            found = found.get(field) or {} if field else found
            if found:
                return found
    return {}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found
