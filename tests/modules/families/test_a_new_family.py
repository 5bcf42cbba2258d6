"""A family that the library has not is one file: what it computes, its `config.json`, its names, and a `Model` of them.

Idefics3 (and SmolVLM): SigLIP's encoder of pictures, squares of whose rows become tokens of a Llama. All of it is
written here from shared blocks; laws hold it against transformers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import ftrain
from ftrain.bridge.batches import LANGUAGE, documents_of, places_of, require_tokens
from ftrain.bridge.native import NativeFiles
from ftrain.bridge.over_text import OverText
from ftrain.hf.files import HfFolder
from ftrain.kernels.embedding import merge_rows
from ftrain.modules import decoder, linear, picture_encoder
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families.image_text import picture_of, picture_tensors, sizes_of
from ftrain.modules.families.vision_language import text_names
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.model import Leaf, Model
from ftrain.modules.picture_encoder import PictureConfig
from ftrain.optim import adamw
from ftrain.sharding import BatchRows, Layout, Mesh, TokenIndices
from ftrain.step.state import TrainState
from ftrain.tasks import NextToken
from tests.helpers import mesh_models
from tests.helpers.text_families import require_equal_gradients, saved

transformers = pytest.importorskip("transformers", minversion="5.24")

# --- the family ---


@dataclass(frozen=True)
class Config:
    """A decoder, an encoder, the token that stands for a picture's row, and patches a side of a row's square."""

    text: DecoderConfig
    picture: PictureConfig
    image: int
    side: int


def config_of(said: dict[str, Any]) -> Config:
    eyes = said["vision_config"]
    sizes = sizes_of(eyes, act="gelu_pytorch_tanh", eps=1e-6, width=1152, hidden=3072)
    text = decoder_config({**said["text_config"], "tie_word_embeddings": said["tie_word_embeddings"]})
    return Config(text, picture_of(eyes, **sizes), said["image_token_id"], said["scale_factor"])


def specs(cfg: Config) -> dict[str, Any]:
    square = cfg.side**2 * cfg.picture.d_model
    return {
        "picture": picture_encoder.specs(cfg.picture),
        "connector": linear.specs(square, cfg.text.d_model, ("mlp", "embed")),
        "text": decoder.specs(cfg.text),
    }


def names(cfg: Config) -> tuple[HfTensor, ...]:
    return (
        *picture_tensors(cfg.picture, "model.vision_model", "picture"),
        HfTensor("model.connector.modality_projection.proj.weight", "connector.w", transposed=True),
        *text_names(cfg.text, "model.text_model."),
    )


def squared(rows_BnD: torch.Tensor, side: int) -> torch.Tensor:
    """The rows of each square of patches as one, `[B, n / side**2, side**2 * D]`."""
    patches = int(rows_BnD.shape[1] ** 0.5)
    rows_ByixjD = rows_BnD.unflatten(1, (patches // side, side, patches // side, side))
    return rows_ByixjD.transpose(2, 3).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Idefics3(OverText):
    cfg: Config

    @property
    def text(self) -> DecoderConfig:
        return self.cfg.text

    def loss(self, params: Any, batch: Any, key: torch.Tensor | None = None) -> ftrain.Mean:
        return self.mean(params, self.states(params, batch), batch["labels"])

    def states(self, params: Any, batch: Any) -> torch.Tensor:
        require_tokens("Idefics3", batch, LEAVES)
        x_TD = decoder.embed(params["text"], batch["tokens"].flatten())
        if "pixels" in batch:
            rows_BnD = picture_encoder.apply(params["picture"], batch["pixels"], self.cfg.picture)
            rows_BmD = linear.apply(params["connector"], squared(rows_BnD, self.cfg.side))
            x_TD = merge_rows(x_TD, rows_BmD.flatten(0, 1).to(x_TD.dtype), batch["index"])
        documents = documents_of(batch)
        return decoder.apply(params["text"], x_TD, positions=places_of(batch), segments=documents, cfg=self.cfg.text)[0]


LEAVES = {
    **LANGUAGE,
    "pixels": Leaf("pictures, normed as the model learned them", "[B, C, H, W]"),
    "index": Leaf("where the rows of pictures stand among the tokens", "[n]"),
}
RULES = {"pixels": BatchRows(), "index": TokenIndices()}


def opened(path: Any) -> Model:
    folder = HfFolder.open(path)
    cfg = config_of(folder.config())
    files, made = NativeFiles(folder, specs(cfg), {}, names(cfg)), Idefics3(cfg)
    return Model(
        name="Idefics3", specs=files.specs, batch=LEAVES, loss=made.loss, token_losses=made.token_losses,
        logits=made.logits, hidden=made.hidden, load=files.load, read=files.read, save=partial(files.save, {}),
        rules=RULES, why="written in one file", names=files.names,
    )  # fmt: skip


# --- what is true of it ---

IMAGE, VOCAB, EACH = 50, 51, 4
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS = ((3, 1, 4, 1, 2), (5,), (1, 1, 3))
"""Words, pictures, words, ... of each document."""


@pytest.fixture
def theirs():
    words = {**SIZES, "model_type": "llama", "vocab_size": VOCAB, "num_key_value_heads": 1, "pad_token_id": None}
    eyes = {**SIZES, "image_size": 8, "patch_size": 2}
    config = transformers.Idefics3Config(
        text_config=words, vision_config=eyes, image_token_id=IMAGE, scale_factor=2, tie_word_embeddings=False,
        pad_token_id=None,
    )  # fmt: skip
    auto = transformers.AutoModelForImageTextToText
    model, generator = auto.from_config(config, attn_implementation="eager").float().eval(), torch.manual_seed(0)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            leaf.copy_(0.5 * float("norm" in path) + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model


def documents(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator, made = torch.Generator().manual_seed(seed), []
    for parts in PARTS:
        ids = [
            torch.full((EACH * n,), IMAGE) if i % 2 else torch.randint(1, IMAGE, (n,), generator=generator)
            for i, n in enumerate(parts)
        ]
        tokens = torch.cat(ids)
        labels = torch.cat([tokens[1:], torch.tensor([-100])])
        pixels = torch.randn(sum(parts[1::2]), 3, 8, 8, generator=generator)
        made.append({"tokens": tokens, "labels": labels.where(labels != IMAGE, -100), "pixels": pixels})
    return made


def packed(packs: int = 1) -> dict[str, torch.Tensor]:
    given = [one for i in range(packs) for one in documents(i)]
    batch = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    lengths = torch.tensor([len(one["tokens"]) for one in given])
    places = torch.cat([torch.arange(n) for n in lengths.tolist()])
    index = (batch["tokens"] == IMAGE).nonzero()[:, 0]
    return {**batch, "index": index, "segments": torch.repeat_interleave(lengths), "positions": places}


def test_it_is_transformers_and_its_folders_are(theirs, tmp_path):
    model = opened(saved(theirs, tmp_path / "weights"))
    params, batch = model.load(), packed()
    grads, mean = torch.func.grad_and_value(lambda p: model.loss(p, batch).value())(params)
    scores = []
    for one in documents():
        seen = {"pixel_values": one["pixels"][None]} if len(one["pixels"]) else {}
        scores.append(theirs(input_ids=one["tokens"][None], use_cache=False, **seen).logits[0])
    loss = cross_entropy(torch.cat(scores), batch["labels"])
    loss.backward()
    assert abs(mean.item() - loss.item()) < 2e-5
    torch.testing.assert_close(model.logits(params, batch), torch.cat(scores), rtol=0, atol=2e-5)
    model.save(params, tmp_path / "again")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(leaf, again[name]) for name, leaf in theirs.state_dict().items())
    with torch.no_grad():
        for leaf in theirs.parameters():
            leaf.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    require_equal_gradients(grads, opened(saved(theirs, tmp_path / "gradients")).load(), within=1e-4)


def test_it_trains_as_any_model_does(theirs, tmp_path):
    """By a task, in a jitted step; on a mesh its losses are those of one device."""
    model, tx = opened(saved(theirs, tmp_path)), adamw(1e-2)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, torch.Tensor]:
        (mean, _), grads = ftrain.value_and_grad(partial(NextToken().loss, model), has_aux=True)(state.params, batch)
        return state.apply(tx, grads), mean

    jitted, state, losses = ftrain.jit(step, donate="state"), TrainState.create(model.load(), tx), []
    for _ in range(8):
        state, loss = jitted(state, packed())
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    made = mesh_models.Model(model.specs, lambda p, b: (model.loss(p, b), ()), packed, RULES)
    plan = mesh_models.plan_for(made, Mesh(shard=2, kind="virtual"), Layout())
    loss, gradients = mesh_models.compare(made, plan, dtype=torch.float64)
    assert loss < 1e-12
    assert gradients < 1e-11
