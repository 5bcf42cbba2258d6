"""Families whose pictures are tiles, read from a model's folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ftrain.data.media.limits import Limits
from ftrain.data.media.tiles import Cut, InternCut, SmolCut, TileFamily, blank, tiles_of, whole

MODELS = ("llava", "gemma3", "internvl", "smolvlm", "idefics3")
"""The model types of configurations."""


def tile_family(
    path: Path, config: Mapping[str, Any], tokenizer: Any, told: Mapping[str, Any], limits: Limits
) -> TileFamily:
    """How the model of a folder sees pictures.

    Args:
        path: of the folder.
        config: of the model, of one of `MODELS`.
        tokenizer: of transformers.
        told: what processor_config.json holds.
        limits: the most that is decoded.

    ValueError for a folder without an image processor that transformers can load, or that makes tiles of several sizes.
    """
    kind = config["model_type"]
    process = _processor(path)
    size = _size(path, process)
    number = config.get("image_token_id", config.get("image_token_index"))
    token = tokenizer.convert_ids_to_tokens(number) if number is not None else None
    if token is None:
        raise ValueError(f"{path}: its image_token_id {number} is no token of its tokenizer: take the model's own")
    vision = config.get("vision_config") or {}
    made = partial(TileFamily, kind, process, token=number, size=size, limits=limits)
    if kind == "gemma3":
        if getattr(process, "do_pan_and_scan", False):
            raise ValueError(f"{path}: its processor cuts pictures (do_pan_and_scan), which is not known: set it false")
        edges = [config.get("boi_token_index", 255999), config.get("eoi_token_index", 256000)]
        start, end = tokenizer.convert_ids_to_tokens(edges)
        unit = int(config.get("mm_tokens_per_image", 256))
        cut: Cut = partial(whole, f"\n\n{start}{token * unit}{end}\n\n")
        return made(cut=cut, mark=start, around=tuple(edges), unit=unit, kinds="token_type_ids")
    if kind == "llava":
        unit = _llava_tokens(config, told, size)
        return made(cut=partial(whole, token * unit), mark=token, around=(), unit=unit)
    if kind == "internvl":
        start, end = (getattr(tokenizer, f"{name}_image_token", text) for name, text in _INTERN_EDGES)
        usual = _square(vision, size) * float(config.get("downsample_ratio", 0.5)) ** 2
        unit = int(told.get("image_seq_length") or usual)
        cut = InternCut(process, start, token, end, unit)
        return made(cut=cut, mark=token, around=_ids(tokenizer, start, end), unit=unit)
    edge = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
    all_of_it = getattr(tokenizer, "global_image_token", "<global-img>")
    unit = int(told.get("image_seq_len") or _square(vision, size) // int(config.get("scale_factor", 2)) ** 2)
    cut = SmolCut(process, edge, token, all_of_it, unit)
    return made(cut=cut, mark=token, around=_ids(tokenizer, edge, all_of_it), unit=unit, by_rows=True)


_INTERN_EDGES = (("start", "<img>"), ("end", "</img>"))


def _processor(path: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{path} holds no image processor that can be read: {str(error).splitlines()[0]}") from error


def _size(path: Path, process: Any) -> tuple[int, int]:
    """The height and width of tiles. ValueError where pictures of different shapes become tiles of different ones."""
    sizes = {tiles_of(process, blank(*shape)).shape[-2:] for shape in ((40, 60), (90, 30))}
    if len(sizes) > 1:
        raise ValueError(f"{path}: its image processor makes pictures of several sizes ({sorted(sizes)}), not tiles")
    height, width = sizes.pop()
    return int(height), int(width)


def _square(vision: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Patches of a tile."""
    patch = vision.get("patch_size", 14)
    return (size[0] // (patch[0] if isinstance(patch, list) else patch)) ** 2


def _llava_tokens(config: Mapping[str, Any], told: Mapping[str, Any], size: tuple[int, int]) -> int:
    vision = config.get("vision_config") or {}
    patch = told.get("patch_size") or vision.get("patch_size", 14)
    further = told.get("num_additional_image_tokens")
    if further is None:
        further = int(vision.get("model_type", "clip_vision_model") == "clip_vision_model")
    strategy = told.get("vision_feature_select_strategy") or config.get("vision_feature_select_strategy", "default")
    return (size[0] // patch) * (size[1] // patch) + int(further) - (strategy == "default")


def _ids(tokenizer: Any, *texts: str) -> tuple[int, ...]:
    return tuple(int(i) for i in tokenizer.convert_tokens_to_ids(list(texts)) if i is not None)
