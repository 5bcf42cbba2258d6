"""From a cache of clips to the batches of `ftrain train video`: which clips, in which packs, for which ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ftrain.bridge.pipelines import WanFolder
from ftrain.data.clips.cache import Cache, CachedClip, require_same
from ftrain.data.encoding_ahead import Workers
from ftrain.data.loader import Loader
from ftrain.data.order import Order
from ftrain.data.packing import Packing
from ftrain.data.rejects import Rejects
from ftrain.data.subset import Subset, hold_out
from ftrain.modules.families.wan_config import WanConfig
from ftrain.modules.families.wan_latents import grid
from ftrain.run.clip_batches import ClipLayout, ClipRows, ReadClips, cost_of
from ftrain.run.clip_encoders import Reads, coder_config, weights_of
from ftrain.run.data import HeldOut
from ftrain.sharding import Mesh
from ftrain.sharding.batch import BatchRule
from ftrain.tasks.video import RULES

_AHEAD = 4  # steps whose clips wait for packs, and threads that read them


@dataclass(frozen=True)
class ClipOptions:
    """Which clips are trained on, and how many at once."""

    data: tuple[Path, ...]
    """Caches of `ftrain encode`; their clips are mixed."""
    first_frame: bool = False
    """Give the first latent frame as it is, at time 0 and outside of the loss: image to video in a model that has no
    channels for it (Wan 2.2's 5B)."""
    tokens: int | None = None
    """Patches of a pack; default: those of the largest clip. Smaller clips share a pack."""
    packs: int | None = None
    """Packs in a step, over all ranks; default: one for each rank with a batch of its own."""
    held_out: float = 0.02
    """Share of the clips that is not trained on, whose loss is measured at fixed times. 0: none."""
    epochs: int | None = None
    """How often each clip is trained on; default: once, or until `steps`."""
    steps: int | None = None
    """Where the run ends at the latest."""
    rejected: float = 0.05
    """The share of clips that may be damaged before the run stops."""


@dataclass(frozen=True)
class ClipData:
    """A run's `loader`, the `held_out` batches, `steps` (about, where the data ends the run), `cfg` of the model, the
    `rules` of its batches, `micro_batches` of a step, lines for the log, states of the empty caption `[S, C]`, frames a
    second of the clips, and the clips that are `held` out and `trained` on.
    """

    loader: Loader
    held_out: HeldOut
    steps: int
    cfg: WanConfig
    rules: Mapping[str, BatchRule]
    micro_batches: int
    lines: tuple[str, ...]
    empty_text: Tensor
    fps: float
    held: tuple[CachedClip, ...]
    trained: tuple[CachedClip, ...]

    def shown(self, count: int) -> tuple[CachedClip, ...]:
        """The first `count` clips, of those that are held out where there are any."""
        return self.held[:count] or self.trained[:count]


def make_clip_data(
    options: ClipOptions,
    folder: WanFolder,
    *,
    part: str,
    mesh: Mesh,
    rank: int,
    world: int,
    drop: float,
    seed: int,
) -> ClipData:
    """The data of a run.

    - `folder`, `part`: the pipeline, and which transformer of it is trained. `mesh`, `rank`, `world`: the run's ranks.
    - `drop`: the share of captions that are left out. `seed`: of the order, and of what is held out.

    ValueError for a cache of other encoders, which are named, or of clips that the model cannot take, and for sizes
    that do not fit each other.
    """
    cfg = folder.config(part)
    caches = [_fitting(path, folder) for path in options.data]
    reads = _reads(caches[0], folder, options)
    parts = [hold_out(cache, options.held_out, key=seed) for cache in caches]
    trained = [own for own, _ in parts]
    clips = [clip for cache in caches for clip in cache.clips]
    rows = [math.prod(grid(clip.latents[1:], cfg.patch)) for clip in clips]
    ranks = mesh.replicate * mesh.shard
    multiple = 2 * mesh.sequence if mesh.sequence > 1 else 1
    tokens = -(-(options.tokens or max(rows)) // multiple) * multiple
    packs = options.packs or ranks
    _require_possible(options, tokens, max(rows), packs, ranks)
    packing = Packing(
        tokens, ranks=ranks, micro_batches=packs // ranks, cost=cost_of(cfg), buffer=_AHEAD * tokens * packs
    )
    layout = ClipLayout(
        cfg=cfg, most=max(1, tokens // min(rows)), multiple=multiple, clean_first=options.first_frame,
        empty=caches[0].empty_text() if drop else None, mask=cfg.channels_in - 2 * cfg.channels_out,
    )  # fmt: skip
    read = ReadClips(cfg, condition=reads.condition, image=reads.image)
    loader = Loader(
        Order([len(source) for source in trained], key=seed), trained, ClipRows(cfg), packing, rank=None,
        epochs=options.epochs if options.epochs or options.steps else 1, steps=options.steps,
        workers=Workers(finishing=_AHEAD), rejects=Rejects(limit=options.rejected), finish=read,
        others=replace(read, decoded=False) if world > 1 else None, mine=rank // mesh.sequence, layout=layout,
    )  # fmt: skip
    epoch = max(1, math.ceil(sum(rows) * len(_all(trained)) / len(clips) / (packs * tokens)))
    steps = options.steps or epoch * (options.epochs or 1)
    held = [own for _, own in parts if len(own)]
    sizes = sorted({clip.size for clip in clips})
    lines = (
        f"{len(clips)} clips of {', '.join('x'.join(map(str, size)) for size in sizes)}; {len(_all(held))} of them are "
        f"held out; {packs} packs of {tokens:,} patches a step, about {epoch:,} steps an epoch",
    )
    fps = caches[0].config.get("fps")
    return ClipData(
        loader, _held_out(held, loader), steps, cfg, RULES, packs // ranks, lines, caches[0].empty_text(),
        float(fps) if isinstance(fps, int | float) and fps > 0 else 16.0, tuple(_all(held)), tuple(_all(trained)),
    )  # fmt: skip


def _all(sources: list[Subset]) -> list[CachedClip]:
    return [source[i] for source in sources for i in range(len(source))]


def _fitting(path: Path, folder: WanFolder) -> Cache:
    """A cache of this pipeline's encoders."""
    cache = Cache.open(path)
    of_cache = {name: cache.config.get(name) for name in ("vae", "text_encoder", "image_encoder")}
    now = {name: weights_of(folder, name) if of_cache[name] is not None else None for name in of_cache}
    try:
        require_same(path, of_cache, now)
    except ValueError as error:
        raise ValueError(f"--data {path} and --model {folder.path} do not belong together: {error}") from error
    return cache


def _reads(cache: Cache, folder: WanFolder, options: ClipOptions) -> Reads:
    """What the transformer reads. ValueError for a cache without it, and for a first frame in two places."""
    reads = Reads.of(folder, coder_config(folder))
    if reads.condition and not cache.config.get("condition"):
        raise ValueError(f"{cache.folder} has no first frames beside its clips: encode with {folder.path}")
    if options.first_frame and reads.condition:
        raise ValueError(
            "--first-frame is for models that read it in its own place; this one has channels for it, always read"
        )
    return reads


def _require_possible(options: ClipOptions, tokens: int, largest: int, packs: int, ranks: int) -> None:
    for name in ("tokens", "packs", "epochs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if tokens < largest:
        raise ValueError(f"--tokens {tokens}: the largest clip has {largest} patches, which is the least")
    if packs % ranks:
        raise ValueError(f"--packs {packs} do not divide among {ranks} ranks: give a multiple of {ranks}")


def _held_out(sources: list[Subset], like: Loader) -> HeldOut:
    """Batches of the clips that are held out, in their order, as the run makes them."""
    if not sources:
        return HeldOut(None)
    order = Order([len(source) for source in sources], key=0, shuffle=False)
    packing = replace(like.packing, patience=0)
    rejects = Rejects(limit=1.0)
    return HeldOut(replace(like, order=order, sources=sources, packing=packing, epochs=1, steps=None, rejects=rejects))
