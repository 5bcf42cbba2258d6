"""Folders of Wan's: the library's own model, equal to diffusers', in and out to the byte, by either one's names."""

import filecmp
import json
import shutil

import pytest
import torch
from safetensors import safe_open

import ftrain
from ftrain.bridge.native_wan import config_of, native_wan
from ftrain.bridge.skeleton import flatten
from ftrain.hf.save import save_hf
from ftrain.hf.shards import DIFFUSERS as FORM
from ftrain.modules.families import wan_names
from ftrain.modules.families.wan_config import config
from ftrain.modules.families.wan_latents import lay, patchify
from tests.helpers import tiny_wan
from tests.helpers.tiny_wan import BOTH_ENDS, TINY, WITH_IMAGE

diffusers = pytest.importorskip("diffusers")
DATA = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of diffusers' for each kind."""
    root = tmp_path_factory.mktemp("wan")
    for name, told in {"text": TINY, "image": WITH_IMAGE, "both": BOTH_ENDS}.items():
        tiny_wan.module(told).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("kind", ["text", "image", "both"])
def test_a_folder_goes_in_and_comes_out_to_the_byte(folders, kind, tmp_path):
    model = ftrain.hf.open(folders / kind)
    assert model.why == "native: Wan is a family of the library"
    params = model.load()
    model.save(params, tmp_path)
    files = sorted(path.name for path in (folders / kind).iterdir())
    assert filecmp.cmpfiles(folders / kind, tmp_path, files, shallow=False) == (files, [], [])
    again = ftrain.init(model.specs, ftrain.key(0))
    assert model.load(again) is again
    assert all(torch.equal(a, b) for a, b in zip(ftrain.tree.leaves(params), ftrain.tree.leaves(again), strict=True))


def test_several_files_are_those_of_diffusers(folders, tmp_path):
    cfg, made = config(TINY), tiny_wan.module(TINY)
    made.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    params = tiny_wan.tree_of(made.state_dict(), cfg)
    told = json.loads((tmp_path / "theirs/config.json").read_text())
    save_hf(params, tmp_path / "ours", told, wan_names.diffusers(cfg), max_shard="40KB", form=FORM)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(files) > 3
    assert filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", files, shallow=False) == (files, [], [])
    assert ftrain.hf.open(tmp_path / "ours", native="always").load()["out"].keys() == params["out"].keys()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_authors_layout_goes_out_and_comes_in(folders, kind, tmp_path):
    """Numbers are the same, norms have changed their names, and what comes back is diffusers' file again."""
    model = ftrain.hf.open(folders / kind)
    params = model.load()
    told = {**WITH_IMAGE, "image_dim": 1280} if kind == "image" else TINY
    if kind == "image":  # the authors' file has one width of pictures
        module = tiny_wan.module(told)
        module.save_pretrained(tmp_path / "in")
        model = ftrain.hf.open(tmp_path / "in")
        params = model.load()
    model.save(params, tmp_path / "authors", layout="authors")
    there = ftrain.hf.open(tmp_path / "authors", native="always")
    assert ftrain.modules.spec.count(there.specs) == ftrain.modules.spec.count(model.specs)
    back = there.load()
    assert all(torch.equal(a, b) for a, b in zip(ftrain.tree.leaves(params), ftrain.tree.leaves(back), strict=True))
    with safe_open(tmp_path / "authors" / DATA, framework="pt") as held:
        assert torch.equal(held.get_tensor("blocks.1.norm3.weight"), params["layers"][1]["text_norm"]["weight_D"])
        assert not any("norm2" in name for name in held.keys())  # noqa: SIM118
    there.save(back, tmp_path / "diffusers", layout="diffusers")
    source = tmp_path / "in" if kind == "image" else folders / kind
    assert filecmp.cmp(tmp_path / "diffusers" / DATA, source / DATA, shallow=False)
    with pytest.raises(ValueError, match='layout is "diffusers" or "authors", not'):
        there.save(back, tmp_path, layout="comfyui")


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("per_row", [False, True])
def test_it_takes_the_batch_that_the_bridged_model_takes(folders, kind, per_row):
    """Loss and velocities of clips in rows, with one time for each or one for each patch."""
    native, bridged = ftrain.hf.open(folders / kind), ftrain.hf.open(folders / kind, native="never")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    channels = 9 if kind == "image" else 4
    batch = {
        "hidden_states": draw(2, channels, 2, 4, 6),
        "timestep": torch.rand(2, 12, generator=generator) * 1000 if per_row else torch.tensor([7, 960]),
        "encoder_hidden_states": draw(2, 512, 12),
        "target": draw(2, 4, 2, 4, 6),
    }
    if kind == "image":
        batch["encoder_hidden_states_image"] = draw(2, 7, 10)
    ours, theirs = native.load(), bridged.load()
    torch.testing.assert_close(native.outputs(ours, batch), bridged.outputs(theirs, batch), rtol=0, atol=3e-5)
    torch.testing.assert_close(native.loss(ours, batch).value(), bridged.loss(theirs, batch).value())


def test_a_pack_is_what_the_bridged_model_says_of_each_clip(folders):
    native, bridged = ftrain.hf.open(folders / "text"), ftrain.hf.open(folders / "text", native="never")
    cfg, theirs = config(TINY), bridged.load()
    given = tiny_wan.clips(cfg)
    batch = lay([given], cfg, rows=32)
    total, count = 0.0, 0
    for clip in given:
        text = torch.cat([clip.text_SC, torch.zeros(512 - len(clip.text_SC), 12)])
        told = {"hidden_states": clip.input_CFHW, "encoder_hidden_states": text, "target": clip.target_CFHW}
        one = {name: x[None] for name, x in told.items()}
        mean = bridged.loss(theirs, {**one, "timestep": torch.tensor([1000 * clip.time])})
        total, count = total + mean.total, count + mean.count
    loss = native.loss(native.load(), batch)
    torch.testing.assert_close(loss.value(), total / count)
    assert loss.count == count
    rows = native.outputs(native.load(), batch)[: len(patchify(given[0].input_CFHW, cfg.patch))]
    assert rows.shape == (12, 16)


def test_half_precision_keeps_what_the_authors_keep(folders):
    model = ftrain.hf.open(folders / "text", dtype=torch.bfloat16)
    dtypes = {path: spec.dtype for path, spec in flatten(model.specs).items()}
    assert dtypes["layers.0.attention.w_q_DHK"] == torch.bfloat16
    wide = {"time.six.w", "layers.0.table_16D", "layers.1.text_norm.bias_D", "out.w_DQ"}
    assert all(dtypes[path] == torch.float32 for path in wide)
    assert model.keep == ("time.**", "layers.*.table_16D", "out.*", "layers.*.text_norm.*")


def test_the_two_experts_of_a_pipeline_know_their_noise(folders, tmp_path):
    for name in ("transformer", "transformer_2"):
        shutil.copytree(folders / "text", tmp_path / name)
    of = ["diffusers", "WanTransformer3DModel"]
    told = {"boundary_ratio": 0.875, "transformer": of, "transformer_2": of}
    (tmp_path / "model_index.json").write_text(json.dumps(told))
    high, low = (ftrain.hf.open(tmp_path / name) for name in ("transformer", "transformer_2"))
    assert config_of(tmp_path / "transformer") == config(TINY, times=(0.875, 1.0))
    assert "for times from 0.875 to 1" in high.name
    assert "for times from 0 to 0.875" in low.name
    (tmp_path / "model_index.json").write_text(json.dumps({**told, "transformer_2": [None, None]}))
    assert "for times" not in ftrain.hf.open(tmp_path / "transformer").name
    with pytest.raises(ValueError, match="is a pipeline of several models: give the folder of one, of transformer"):
        ftrain.hf.open(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({**told, "boundary_ratio": 2}))
    with pytest.raises(ValueError, match="boundary_ratio=2 must be a number between 0 and 1"):
        native_wan(tmp_path / "transformer")


def changed(folder, tmp_path, **entries):
    shutil.copytree(folder, tmp_path / "changed")
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "changed/config.json").write_text(json.dumps({**told, **entries}))
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1,000,000,000, and there are 69 weights"),
        ({"num_layers": 3}, "has no tensor 'blocks.2.scale_shift_table'"),
        ({"ffn_dim": 64}, r"needs \[64, 40\]: use the configuration of these weights"),
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(folders, tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        ftrain.hf.open(changed(folders / "text", tmp_path, **entries), native="always").load()


def test_what_the_library_has_not_is_bridged_and_says_why(folders, tmp_path):
    model = ftrain.hf.open(changed(folders / "text", tmp_path, qk_norm="l2"))
    assert model.why.startswith("bridged: config.json: qk_norm='l2'")
    with pytest.raises(ValueError, match="holds a model of diffusers, which has no task 'sequence_classification'"):
        ftrain.hf.open(folders / "text", task="sequence_classification")


def test_batches_that_do_not_fit_are_refused_by_name():
    model = native_wan(TINY)
    params = ftrain.init(model.specs, ftrain.key(0))
    batch = lay([tiny_wan.clips(config(TINY))], config(TINY))
    for change, message in (
        (lambda b: b.pop("positions"), "a batch needs 'positions'"),
        (lambda b: b.update(noise=b["target"]), "has 'noise', which the model does not read"),
        (lambda b: b.pop("target"), "a loss needs the batch's 'target'"),
        (lambda b: b.update(target=b["target"][:, :3]), r"shape \[21, 16\] and the target \[21, 3\]"),
    ):
        broken = dict(batch)
        change(broken)
        with pytest.raises(ValueError, match=message):
            model.loss(params, broken)
