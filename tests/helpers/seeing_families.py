"""Laws of a family of language models that see: it is transformers' for the same weights, packed, on meshes, in files.

Documents are lists of parts: a number of words, `(rows, columns)` of an image or `(frames, rows, columns)` of a video,
in patches. Weights and gradients of transformers reach our trees through folders of files, so that the family's names
are tested with them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain.modules import spec
from ftrain.modules.autoregression import generate
from ftrain.modules.model import Model
from ftrain.modules.pictures import MediaConfig
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models
from tests.helpers.text_families import require_equal_gradients, saved

IMAGE, VIDEO, START, END, VOCAB = 60, 61, 62, 63, 64
WORDS = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
Part = int | tuple[int, ...]
MIXED: tuple[tuple[Part, ...], ...] = (
    (4, (4, 6), 3, (2, 4, 4), 5),
    (3, 6),
    (1, (2, 2), 1, (8, 2), 4, (2, 6), 2),
    (2, (3, 4, 2), 3),
)
"""An image and a video, text alone, several images, a video longer than it is wide."""


def random_model(config: Any, seed: int = 0) -> Any:
    """The model of a configuration, eager, in float32, every parameter random."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    ).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            centre = float("norm" in path or "ln_q" in path) * 0.5
            leaf.copy_(centre + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model.eval()


def document(parts: Sequence[Part], cfg: MediaConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """The raw leaves of one document: random words and pixels; labels where a word follows."""
    generator = torch.Generator().manual_seed(seed)
    ids, found = list[int](), dict[str, list[Any]]()
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 60, (part,), generator=generator).tolist()
            continue
        frames, rows, columns = (1, *part) if len(part) == 2 else part
        kind, token = ("image", IMAGE) if len(part) == 2 else ("video", VIDEO)
        pixels = torch.randn(frames * rows * columns, cfg.tower.d_patch, generator=generator)
        each = rows * columns // cfg.square
        alone = frames if cfg.split and kind == "video" else 1
        for i in range(alone):
            ids += [*([7 + i] if alone > 1 else []), START, *[token] * (each * frames // alone), END]
        found.setdefault("pixels" if kind == "image" else "pixel_values_videos", []).append(pixels)
        found.setdefault(f"{kind}_grid_thw", []).append(torch.tensor([[frames, rows, columns]]))
        if kind == "video" and cfg.per_second is not None:
            found.setdefault("second_per_grid_ts", []).append(torch.tensor([0.5 + len(found["video_grid_thw"])]))
    tokens = torch.tensor(ids)
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    labels[labels >= IMAGE] = -100
    return {"tokens": tokens, "labels": labels, **{name: torch.cat(leaves) for name, leaves in found.items()}}


def documents(cfg: MediaConfig, parts: Sequence[Sequence[Part]] = MIXED, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """A document of each."""
    return [document(own, cfg, seed=100 * seed + i) for i, own in enumerate(parts)]


def pack(given: Sequence[dict[str, Tensor]], *, tokens: int | None = None) -> dict[str, Tensor]:
    """One raw pack of documents, filled up to `tokens` with another document that has no labels."""
    if tokens is not None:
        rest = tokens - sum(len(one["tokens"]) for one in given)
        zeros = torch.zeros(rest, dtype=torch.int64)
        given = [*given, {"tokens": zeros, "labels": zeros - 100}]
    made = {"segments": torch.repeat_interleave(torch.tensor([len(one["tokens"]) for one in given]))}
    for name in dict.fromkeys(name for one in given for name in one):
        made[name] = torch.cat([one[name] for one in given if name in one])
    return made


def asked(model: Any, one: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What transformers is given of a document."""
    names = {"pixels": "pixel_values"}
    media = {names.get(name, name): leaf for name, leaf in one.items() if name not in ("tokens", "labels")}
    kinds = (one["tokens"] == IMAGE).int() + 2 * (one["tokens"] == VIDEO).int()
    return {"input_ids": one["tokens"][None], "mm_token_type_ids": kinds[None], **media, **more}


def positions_of(model: Any, one: dict[str, Tensor]) -> Tensor:
    """transformers' positions of a document, `[T, 3]`."""
    given = {name: leaf for name, leaf in asked(model, one).items() if not name.startswith("pixel")}
    found: Tensor = model.model.get_rope_index(**given)[0]
    return found[:, 0].T


def theirs(model: Any, given: Sequence[dict[str, Tensor]], folder: Path) -> tuple[float, Tensor, Any]:
    """transformers' mean loss and scores `[T, V]`, document by document, and every gradient as our tree."""
    scores = [model(**asked(model, one, use_cache=False)).logits[0] for one in given]
    labels = torch.cat([one["labels"] for one in given])
    loss = torch.nn.functional.cross_entropy(torch.cat(scores), labels)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), torch.cat(scores).detach(), ftrain.hf.open(saved(model, folder), native="always").load()


def require_those_of_transformers(
    config: Any,
    tmp_path: Path,
    cfg: MediaConfig,
    parts: Sequence[Sequence[Part]] = MIXED,
    *,
    seed: int = 0,
    within: float = 1e-4,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Places, loss, scores and every gradient of packed documents are those of transformers, which has each alone.

    `dtype`: in which ours are computed; in float64 only the rounding of transformers in float32 is left between the
    two.
    """
    model = random_model(config, seed)
    native = ftrain.hf.open(saved(model, tmp_path / "weights"), native="always")
    params, given = native.load(), documents(cfg, parts, seed=seed)
    spec.check(params, native.specs)
    assert native.media is not None
    assert native.logits is not None
    params = spec.map_with_paths(lambda _, leaf: leaf.to(dtype), params)
    batch = native.media(pack(given))
    assert torch.equal(batch["positions"], torch.cat([positions_of(model, one) for one in given]))
    scores = native.logits(params, batch)
    grads, mean = torch.func.grad_and_value(lambda p: native.loss(p, batch).value())(params)
    loss, wanted_scores, wanted = theirs(model, given, tmp_path / "gradients")
    assert abs(mean.item() - loss) < 2e-5
    torch.testing.assert_close(scores.to(wanted_scores.dtype), wanted_scores, rtol=0, atol=2e-5)
    require_equal_gradients(grads, wanted, within=within)
    return native


def require_saved_as_it_was(native: Model, tmp_path: Path) -> None:
    """What is saved of untouched weights is, to the byte, what transformers wrote: weights and configuration."""
    assert native.load is not None
    assert native.save is not None
    native.save(native.load(), tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "weights" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def on_mesh(native: Model, cfg: MediaConfig, mesh: Mesh, layout: Layout) -> tuple[float, float]:
    """Relative differences of the loss and of the gradients between one device and the mesh, in float64.

    Of several packs the first is of text alone: its ranks have no pictures.
    """

    def batch(packs: int) -> dict[str, Any]:
        own = [pack(documents(cfg, ((5,), (40,)) if i < packs - 1 else MIXED, seed=i), tokens=96) for i in range(packs)]
        raw = pack(own)
        raw["segments"] = torch.cat([one["segments"] + 9 * i for i, one in enumerate(own)])
        assert native.media is not None
        made: dict[str, Any] = native.media(raw, patches=208, packs=packs, parts=mesh.sequence)
        return made

    made = mesh_models.Model(native.specs, lambda p, b: (native.loss(p, b), ()), batch, dict(native.rules))
    return mesh_models.compare(made, mesh_models.plan_for(made, mesh, layout), dtype=torch.float64)


def require_same_text(model: Any, cfg: MediaConfig, folder: Path) -> None:
    """AssertionError unless the native model writes greedily what transformers does, prompts of any kind side by side:
    with an image and a video, of text alone, and with a video that is longer than it is wide."""
    native = ftrain.hf.open(saved(model, folder))
    prompts, wanted = documents(cfg, ((2, (4, 6), 3, (2, 4, 4), 2), (5,), (2, (5, 2, 2)))), []
    for prompt in prompts:
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = asked(model, prompt, attention_mask=torch.ones(1, len(prompt["tokens"])))
        wanted.append(model.generate(**given, **options)[0, len(prompt["tokens"]) :].tolist())
    assert native.load is not None
    assert native.family is not None
    assert generate(native.load(), prompts, family=native.family, max_new=6) == wanted
    alone = generate(native.load(), [prompts[1]["tokens"].tolist()], family=native.family, max_new=6)
    assert alone == [wanted[1]]
