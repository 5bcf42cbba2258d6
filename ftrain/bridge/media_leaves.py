"""What a model asks of its pictures and sound before a step: places, parts and orders, computed on the host.

Towers of transformers read the shapes of their media as data (a grid for each picture). What they compute of it is
computed here, by the library's own functions, and becomes leaves of the batch: tensors whose shapes follow from the
number of patches alone, so that other pictures of the same total need no new trace.

Legend: B rows, L tokens of a row, P patches of all pictures, N patches of a row, M merged patches of all pictures.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MODALITIES = ("image", "video")
"""The kinds of media that have a grid, as transformers names them."""
KINDS = {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 3}
"""transformers' numbers of the kinds of tokens, by the field of a configuration that has their id."""


def prepared(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with all that the module's forward would compute of data.

    - `batch`: tokens `[B, L]`, labels, and media by the names of transformers' processors (`pixel_values` is "pixels").

    The result has "positions" where the model places tokens by their media, and "media": a dict of leaves with rows
    first, `[B, N, ...]`, or `[1, P, ...]` where rows have not equally much, which no mesh divides; and shapes of
    pictures that a model reads as numbers, as tuples of ints, which are constants of a step.

    ValueError for media and tokens of them that are not equally many.
    """
    found = dict(batch)
    made: dict[str, Any] = {}
    tower = _tower(module)
    rows = len(batch["tokens"])
    equal = _equal_rows(module, batch)
    for modality in MODALITIES:
        grid = batch.get(f"{modality}_grid_thw")
        if grid is None or tower is None:
            continue
        _require_as_many(module, batch, modality, int(grid.prod(1).sum()) // tower.spatial_merge_size**2)
        del found[f"{modality}_grid_thw"]
        made |= {f"{modality}_{name}": x for name, x in _of_grid(tower, grid).items()}
        made[_pixels(modality)] = found.pop(_pixels(modality))
    places = _places(module, batch)
    if places is not None:
        found["positions"] = places
    pixels = found.get("pixels")
    if pixels is not None and len(pixels) != rows:
        made["pixels"] = found.pop("pixels")
        equal = equal and len(pixels) % rows == 0
    found["media"] = {name: _by_rows(x, rows if equal else 1) for name, x in made.items()}
    return _static_sizes(found)


def _pixels(modality: str) -> str:
    return "pixels" if modality == "image" else "pixel_values_videos"


def _tower(module: nn.Module) -> Any:
    """The inner module that reads a grid, if there is one."""
    return next((m for m in module.modules() if "grid_thw" in inspect.signature(m.forward).parameters), None)


def _of_grid(tower: Any, grid: Tensor) -> dict[str, Tensor]:
    """By the names of transformers' own arguments, what a tower computes of a grid, int64 `[pictures, 3]`.

    In the place of bounds of parts (`cu_seqlens`) are the ids of parts, `[P]`; in the place of the order of windows
    are numbers that sort into it.
    """
    from transformers import vision_utils as of

    found = {
        "cu_seqlens": _ids(of.get_vision_cu_seqlens(grid)),
        "position_ids": of.get_vision_position_ids(grid, tower.spatial_merge_size),
    }
    if hasattr(tower, "fullatt_block_indexes"):
        order_M, bounds = of.get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        found |= {"window_index": order_M.argsort(), "cu_window_seqlens": _ids(bounds)}
    if hasattr(tower, "num_grid_per_side"):
        index, weights = of.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        found |= {"interp_indices": index, "interp_weights": weights}
    return found


def _ids(bounds: Tensor) -> Tensor:
    """Ids of parts, int64 `[P]`, from the bounds `[parts + 1]`."""
    return torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff().long())


def _require_as_many(module: nn.Module, batch: Mapping[str, Any], modality: str, features: int) -> None:
    tokens = int((kinds_of(module, batch["tokens"]) == KINDS[f"{modality}_token_id"]).sum())
    if tokens != features:
        raise ValueError(
            f"the batch has {tokens} tokens of {modality}s, and its {modality}s have {features} places: each place "
            f"of a grid is a token (id {getattr(module.config, f'{modality}_token_id', None)})"
        )


def _places(module: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Places of the tokens in time, height and width, int64 `[B, 3, L]`; None for a model that counts tokens."""
    inner: Any = next((m for m in module.modules() if hasattr(m, "get_rope_index")), None)
    if inner is None or not any(f"{modality}_grid_thw" in batch for modality in MODALITIES):
        return None
    known = inspect.signature(inner.get_rope_index).parameters
    given = {name: x for name, x in batch.items() if name in known}
    given["input_ids"] = batch["tokens"]
    if "attention_mask" in known:
        given["attention_mask"] = torch.ones_like(batch["tokens"])
    if "mm_token_type_ids" in known and "mm_token_type_ids" not in given:
        given["mm_token_type_ids"] = kinds_of(module, batch["tokens"])
    places, _ = inner.get_rope_index(**given)
    return places.transpose(0, 1).contiguous()


def kinds_of(module: nn.Module, tokens: Tensor) -> Tensor:
    """What kind of media each token stands for, as transformers numbers them; 0 for text. int64, of the same shape."""
    found = torch.zeros_like(tokens)
    for field, kind in KINDS.items():
        found[tokens == getattr(module.config, field, -1)] = kind
    return found


def _equal_rows(module: nn.Module, batch: Mapping[str, Any]) -> bool:
    """True if all rows have equally many tokens of each kind of media."""
    kinds = kinds_of(module, batch["tokens"])
    return all(len(set((kinds == kind).sum(1).tolist())) == 1 for kind in KINDS.values())


def _by_rows(x: Any, rows: int) -> Any:
    """`[P, ...]` as `[rows, P / rows, ...]`."""
    return x.unflatten(0, (rows, len(x) // rows)) if isinstance(x, Tensor) else x


def _static_sizes(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with shapes of pictures as tuples of ints."""
    names = [name for name in ("image_sizes", "batch_num_images") if isinstance(batch.get(name), Tensor)]
    return {**batch, **{name: tuple(map(tuple, batch[name].tolist())) for name in names}}
