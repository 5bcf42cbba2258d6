"""The text encoder of Wan: states and gradients are transformers', texts share a pack, folders go in and out."""

import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

import ftrain
from ftrain.bridge.described import described
from ftrain.bridge.native_umt5 import native_umt5
from ftrain.bridge.skeleton import flatten
from ftrain.modules.families import umt5
from ftrain.modules.spec import count, map_with_paths
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models
from tests.helpers.tiny_wan import relative

LENGTHS = (5, 301, 1, 19)


@pytest.fixture(scope="module")
def theirs():
    """A tiny encoder of transformers, every parameter random."""
    made = UMT5EncoderModel(UMT5Config(vocab_size=37, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(float("layer_norm" in name) + torch.randn(p.shape, generator=generator) * 0.3)
    return made


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """Its folder."""
    root = tmp_path_factory.mktemp("umt5")
    theirs.save_pretrained(root)
    return root


def pack():
    """Texts of `LENGTHS` side by side."""
    tokens_T = torch.randint(0, 37, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens_T, "segments": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))}


def test_states_and_gradients_are_those_of_transformers(theirs, folder):
    """Of each text by itself there, in a pack here: what is before a text makes no difference."""
    model, batch = ftrain.hf.open(folder), pack()
    assert model.why == "native: UMT5's encoder is a family of the library"
    texts = batch["tokens"].split(LENGTHS)
    wanted_TD = torch.cat([theirs(input_ids=t[None]).last_hidden_state[0] for t in texts])
    target_TD = torch.randn(wanted_TD.shape, generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    loss = (wanted_TD - target_TD).square().mean()
    loss.backward()
    step = ftrain.jit(ftrain.value_and_grad(lambda params, batch: model.loss(params, batch)))
    found, grads = step(model.load(), {**batch, "target": target_TD})
    torch.testing.assert_close(model.hidden(model.load(), batch), wanted_TD.detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(found, loss.detach(), atol=2e-5, rtol=0)
    own = {name: p.grad for name, p in theirs.named_parameters()}
    names = {n.leaf: n for n in model.names if not n.copy}
    want = {leaf: own[n.name].mT if n.transposed else own[n.name] for leaf, n in names.items()}
    assert flatten(grads).keys() == want.keys()
    assert max(relative(grads, map_with_paths(lambda path, _: want[path], grads)).values()) < 1e-4


def test_a_padded_row_there_is_a_text_here(theirs, folder):
    """As pipelines run it: filled up to a length and masked, of which the states of the text are kept."""
    model, batch = ftrain.hf.open(folder), pack()
    first = batch["tokens"][:5]
    row = torch.cat([first, torch.zeros(507, dtype=torch.int64)])[None]
    mask = (torch.arange(512) < 5)[None].long()
    wanted_TD = theirs(input_ids=row, attention_mask=mask).last_hidden_state[0, :5]
    found_TD = model.hidden(model.load(), {"tokens": first})
    torch.testing.assert_close(found_TD, wanted_TD.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("twice", [False, True])
def test_a_folder_goes_in_and_comes_out_to_the_byte(folder, tmp_path, twice):
    """Also one whose files have the table of tokens by both of its names."""
    source = folder
    if twice:
        source = tmp_path / "in"
        source.mkdir()
        tensors = load_file(folder / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        told = json.loads((folder / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    model = ftrain.hf.open(source, native="always")
    model.save(model.load(), tmp_path / "out")
    files = sorted(path.name for path in source.iterdir())
    assert filecmp.cmpfiles(source, tmp_path / "out", files, shallow=False) == (files, [], [])
    again = UMT5EncoderModel.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not again["missing_keys"]
    assert not again["mismatched_keys"]


def test_wan_s_own_is_counted_from_its_configuration(tmp_path):
    """The published one has the same sizes and says besides that tables are not tied."""
    told = {**umt5.PUBLISHED_XXL, "architectures": ["UMT5EncoderModel"], "tie_word_embeddings": False,
            "output_past": True, "scalable_attention": True, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(told))
    with torch.device("meta"):
        theirs = UMT5EncoderModel(UMT5Config(**umt5.PUBLISHED_XXL))
    assert count(described(tmp_path).specs) == sum(p.numel() for p in theirs.parameters()) == 5_680_910_336


def test_ranks_that_divide_the_parameters_give_what_one_gives(folder):
    made = ftrain.hf.open(folder)

    def loss(params, batch):
        found = made.loss(params, batch)
        return found, {"distance": found}

    def batch(packs):
        texts = pack()
        segments = torch.cat([texts["segments"] + 4 * i for i in range(packs)])
        return {
            "tokens": texts["tokens"].repeat(packs), "segments": segments, "target": torch.ones(len(segments), 24)
        }  # fmt: skip

    model = mesh_models.Model(made.specs, loss, batch, {})
    plan = mesh_models.plan_for(model, Mesh(shard=2, kind="virtual"), Layout())
    apart, gradients = mesh_models.compare(model, plan, dtype=torch.float64)
    assert apart < 1e-12
    assert gradients < 1e-11


def test_what_is_no_pack_of_texts_is_refused(folder):
    model, batch = ftrain.hf.open(folder), pack()
    params = model.load()
    with pytest.raises(ValueError, match=r"has no 'tokens'; it reads tokens, segments, target"):
        model.hidden(params, {})
    with pytest.raises(ValueError, match=r"tokens are torch.int64 \[1, 326\]: give int64 \[T\]"):
        model.hidden(params, {"tokens": batch["tokens"][None]})
    with pytest.raises(ValueError, match="'labels', which it does not read"):
        model.hidden(params, {**batch, "labels": batch["tokens"]})
    told = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="feed_forward_proj='relu'; UMT5's MLP is 'gated-gelu'"):
        native_umt5({**told, "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="are no text encoder of Wan's"):
        native_umt5({**told, "architectures": ["UMT5Model"]})
