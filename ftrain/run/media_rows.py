"""What frozen towers make of a run's media, computed once, before it: the cache is filled, and the towers never run.

Legend: T tokens of some media side by side, n those of a piece of media.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrain import tree
from ftrain.data.layout import joined
from ftrain.data.media.family import MediaFamily
from ftrain.data.media.qwen import QwenFamily
from ftrain.data.media.ready_rows import READ, ReadyRows
from ftrain.data.media.row_cache import RowCache
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Part, Place
from ftrain.hf.digests import weights_digest
from ftrain.hf.files import HfFolder
from ftrain.lora.trees import part as part_of
from ftrain.modules.model import Model
from ftrain.modules.spec import Tree, leaves_with_paths, map_with_paths
from ftrain.run.data import RunData
from ftrain.run.ranks import any_rank, is_main
from ftrain.run.recipe import Recipe

_AT_ONCE = 4096  # tokens of media that towers make at a time
_SHARD = 2**28  # bytes, about
_THREADS = 4


def ready_rows(folder: Path, family: MediaFamily | None, model: Model) -> ReadyRows:
    """How the model sees media by the cache in a folder. ValueError for a model whose towers are not computed apart."""
    if model.towers is None or not isinstance(family, QwenFamily):
        raise ValueError(
            f"--cache-media {folder}: {model.name} has no towers that are computed apart from it: leave it out, or "
            "take a model that the library has (--native auto)"
        )
    return ReadyRows(family, RowCache(folder), model.towers.width)


def require_frozen(recipe: Recipe) -> None:
    """ValueError where a run trains its towers, or computes them otherwise than they are in the folder."""
    model, towers = recipe.model, recipe.model.towers
    assert towers is not None
    if recipe.teacher is not None:
        raise ValueError("--cache-media: a teacher has towers of its own, which would be given the student's rows")
    if recipe.quantized is not None:
        raise ValueError(
            f"--cache-media with --lora.quantize {recipe.quantized}: towers that are not quantized would make other "
            "rows than the run's; leave one of them out"
        )
    trained = [target.path for target in recipe.adapter.targets] if recipe.adapter is not None else recipe.trained
    paths = [path for path, _ in leaves_with_paths(model.specs)] if trained is None else trained
    found = next((path for path in sorted(paths) if path.startswith(tuple(f"{p}." for p in towers.paths))), None)
    if found is not None:
        how = "choose --lora.targets without it" if recipe.adapter is not None else f"--freeze {' '.join(towers.paths)}"
        raise ValueError(f"--cache-media: the run trains {found}, of a tower whose rows would change: {how}")


@dataclass(frozen=True)
class _Maker:
    """What makes rows: `params` of the towers, and how media are read for them."""

    model: Model
    params: Tree
    ready: ReadyRows
    device: torch.device

    def rows(self, items: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> dict[str, dict[str, Tensor]]:
        """The rows of pieces of media with these keys, in the order of their tokens, by leaf. A piece is a document."""
        tokens, segments, spans = list[int](), list[int](), dict[str, dict[str, slice]]()
        for number, (key, counts) in enumerate((key, self._counts(arrays)) for key, arrays in items):
            spans[key] = {}
            for name, count in counts.items():
                tokens.append(0)
                spans[key][READ[name]] = slice(len(tokens), len(tokens) + count)
                tokens += [self.ready.tokens(name)] * count
            segments += [number] * (len(tokens) - len(segments))
        raw = {"tokens": torch.tensor(tokens), "segments": torch.tensor(segments), **joined([x for _, x in items])}
        made = self.model.media(raw)  # type: ignore[misc]
        held = {name: made[name] for name in ("media", "audio") if name in made}
        moved = tree.map(lambda x: x.to(self.device), held)
        with torch.no_grad():
            towers = self.model.towers.rows(self.params, moved)  # type: ignore[union-attr]
        at_T = {name: _placed(rows.cpu(), held[name]["index"], len(tokens)) for name, rows in towers.items()}
        return {
            key: {leaf: at_T["audio" if leaf == READ["sound"] else "media"][span] for leaf, span in own.items()}
            for key, own in spans.items()
        }

    def _counts(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        config = self.ready.family
        square = {"pixels": config.patches.merge**2, "pixel_values_videos": config.films.patches.merge**2}
        found = {name: len(arrays[name]) // square[name] for name in square if name in arrays}
        if "sound" in arrays:
            assert config.hearing is not None
            found["sound"] = sum(config.hearing.tower.tokens_of(int(n)) for n in arrays["sound_frames"])
        return found


def _placed(rows: Tensor, index_n: Tensor, tokens: int) -> Tensor:
    """Rows `[n, ...]` at their tokens, `[T, ...]`."""
    found = rows.new_zeros(tokens + 1, *rows.shape[1:])
    found[index_n] = rows
    return found[:tokens]


def fill(
    ready: ReadyRows,
    recipe: Recipe,
    data: RunData,
    folder: Path,
    *,
    compute: torch.dtype | None,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None],
) -> None:
    """Make the rows of all media of a run that the cache lacks. All ranks call this together; each makes its share. A
    run that ends in its middle goes on where it was.

    Args:
        ready: how the run reads them.
        recipe: of the run. data: its rows.
        folder: of the model.
        compute: the dtype that the loss computes in; None: that of the parameters.
        device: that towers run on.
        rank, world: this process, and how many there are.
        say: told what is made.

    ValueError as `require_frozen`, for a cache of other towers, or of media that were read in another way, and where a
    shard is damaged.
    """
    require_frozen(recipe)
    dtype = compute or recipe.base_dtype or torch.float32
    if is_main():
        ready.cache.begin(_config(ready, recipe.model, folder, dtype))
    any_rank(False)  # the others wait for the folder
    ready.cache.look()
    maker, before = None, len(ready.cache)
    missing, made, more = _missing(ready, data, rank, world), 0, True
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="media") as pool:
        while any_rank(more):
            found = _chunk(missing, ready, pool) if more else []
            more = bool(found)
            if more:
                maker = maker or _Maker(recipe.model, _towers(recipe.model, dtype, device), ready, device)
                _write(found, maker)
                made += len(found)
    ready.cache.look()
    say(f"media: {before:,} pieces were in {ready.cache.folder}, {len(ready.cache) - before:,} more were made")


def _towers(model: Model, dtype: torch.dtype, device: torch.device) -> Tree:
    """The parameters of the towers. ValueError for a model without a folder that is read one by one."""
    assert model.towers is not None
    if model.read is None:
        raise ValueError(f"{model.name} does not read its weights one by one, so its towers are not read alone")
    below = tuple(f"{path}." for path in model.towers.paths)
    specs = part_of(model.specs, {path for path, _ in leaves_with_paths(model.specs) if path.startswith(below)})
    return map_with_paths(lambda path, _: model.read(path).to(device, dtype), specs)  # type: ignore[misc]


def _config(ready: ReadyRows, model: Model, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    family, towers = ready.family, model.towers
    assert towers is not None
    below = tuple(f"{path}." for path in towers.paths)
    names = [name.name for name in model.names if name.leaf.startswith(below)]
    hearing = family.hearing
    return {
        "format": 1,
        "holds": "rows of media",
        "towers": {"path": str(folder), "digest": weights_digest(HfFolder.open(folder), towers.config, names)},
        "pictures": {**asdict(family.size), **asdict(family.patches)},
        "films": asdict(family.films),
        "sound": None if hearing is None else {**asdict(hearing.mel), "most": hearing.most},
        "dtype": str(dtype).removeprefix("torch."),
    }


def _missing(ready: ReadyRows, data: RunData, rank: int, world: int) -> Iterator[tuple[str, Part, Place]]:
    """Media of this rank's share of the rows that are not in the cache, each once."""
    seen = set[str]()
    for number, row in enumerate(data.rows()):
        if number % world != rank:
            continue
        try:
            group = data.loader.encode(row())
        except BadRow:
            continue  # the run tells of it
        documents = () if group is None else group.documents
        for part, place in (pair for document in documents for pair in document.parts):
            try:
                key = ready.key(part, place)
            except BadRow:
                continue
            if key not in ready.cache and key not in seen:
                seen.add(key)
                yield key, part, place


def _chunk(
    missing: Iterator[tuple[str, Part, Place]], ready: ReadyRows, pool: ThreadPoolExecutor
) -> list[tuple[str, Mapping[str, np.ndarray]]]:
    """The arrays of the next media, about as many as a shard holds; empty at the end."""
    found = list[tuple[str, Mapping[str, np.ndarray]]]()
    while sum(x.nbytes for _, arrays in found for x in arrays.values()) < _SHARD:
        few = list(islice(missing, 4 * _THREADS))
        if not few:
            break
        read = pool.map(lambda one: _read(ready.family, one[1], one[2]), few)
        found += [(key, arrays) for (key, _, _), arrays in zip(few, read, strict=True) if arrays is not None]
    return found


def _read(family: QwenFamily, part: Part, place: Place) -> Mapping[str, np.ndarray] | None:
    try:
        return family.read(part, place)
    except BadRow:
        return None


def _write(found: Sequence[tuple[str, Mapping[str, np.ndarray]]], maker: _Maker) -> None:
    """Make the rows of media, some at a time, and write them as one shard."""
    made, few, tokens = dict[str, dict[str, Tensor]](), list[tuple[str, Mapping[str, np.ndarray]]](), 0
    for item in found:
        few.append(item)
        tokens += sum(maker._counts(item[1]).values())
        if tokens >= _AT_ONCE:
            made |= maker.rows(few)
            few, tokens = [], 0
    made |= maker.rows(few) if few else {}
    maker.ready.cache.write(made)
