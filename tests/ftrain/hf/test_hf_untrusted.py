"""A model's folder may come from anybody: names stay in it, files are files, sizes are those of the weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftrain.cli.main import main
from ftrain.hf.files import HfFolder, member
from ftrain.modules import decoder
from ftrain.modules.hf_config import hf_config
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.spec import abstract, leaves_with_paths

CFG = decoder.preset("llama-tiny")


@pytest.fixture
def folder(tmp_path):
    """A whole model, in one file."""
    here = tmp_path / "hf"
    here.mkdir()
    leaves = dict(leaves_with_paths(abstract(decoder.specs(CFG))))
    tensors = {}
    for name in decoder_names(CFG):
        if not name.copy:
            leaf = torch.zeros(leaves[name.leaf].shape)
            own = leaf if name.index is None else leaf[name.index]
            tensors[name.name] = (own.mT if name.transposed else own).contiguous()
    save_file(tensors, here / "model.safetensors")
    (here / "config.json").write_text(json.dumps(hf_config(CFG)))
    return here


def refused(folder, capsys, words):
    assert main(["convert", "--from-hf", str(folder), "--to", str(folder.parent / "run")]) == 2
    said = capsys.readouterr().err
    assert words in said, said
    assert not list((folder.parent / "run").glob("global_step_*"))


def test_a_whole_folder_is_converted(folder):
    assert main(["convert", "--from-hf", str(folder), "--to", str(folder.parent / "run")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers is 1,000,000,000,000, and there are weights of no",
        ),
        ({"num_local_experts": 10**9}, "num_local_experts is 1,000,000,000, and there are"),
        ({"num_attention_heads": "4"}, "config.json: num_attention_heads is '4', not a whole number"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps is nan, not a number"),
        ({"decoder_sparse_step": 0}, "config.json: decoder_sparse_step is 0, not a whole number"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings is 'no', not true or false"),
        ({"rope_parameters": {"rope_theta": "x"}}, "config.json: rope_parameters.rope_theta is 'x', not a number"),
    ],
)
def test_a_configuration_that_no_weights_can_have(folder, capsys, change, words):
    (folder / "config.json").write_text(json.dumps({**hf_config(CFG), **change}))
    refused(folder, capsys, words)


def pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def link(file):
    file.unlink(missing_ok=True)
    (file.parent.parent / "secret").write_text("{}")
    file.symlink_to("../secret")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("change", "words"), [(pipe, "is a pipe, not a regular file"), (link, "is a link to ../secret")]
)
def test_links_and_pipes_are_refused(folder, capsys, name, change, words):
    change(folder / name)
    if name == "tokenizer.json" and change is pipe:
        assert main(["convert", "--from-hf", str(folder), "--to", str(folder.parent / "run")]) == 0
        assert not (folder.parent / "run" / "model_assets" / name).exists()
    else:
        refused(folder, capsys, words)


def test_a_folder_of_templates_that_is_a_link_is_refused(folder, capsys):
    secrets = folder.parent / "secrets"
    secrets.mkdir()
    (secrets / "keys.txt").write_text("mine")
    (folder / "additional_chat_templates").symlink_to(secrets)
    refused(folder, capsys, "additional_chat_templates is a link, not a folder")


def test_a_small_file_that_is_huge_is_refused(folder, capsys):
    with open(folder / "vocab.txt", "wb") as file:
        file.truncate(2**40)
    refused(folder, capsys, "vocab.txt has 1,099,511,627,776 bytes, and may have 268,435,456")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "a/b", "a\0b"])
def test_an_index_names_files_of_its_folder_alone(folder, capsys, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, capsys, "is no name of a file in")


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"weight_map": {"a": 5}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(folder, capsys, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, capsys, "model.safetensors.index.json")


def test_the_cache_of_the_hub_is_read_through_its_links(folder, tmp_path):
    """There the files of a snapshot are links to blobs of the same repository, which have their hashes for names."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "rev1", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    template = "additional_chat_templates/tool_use.jinja"
    for here in (folder, snapshot):
        (here / template).parent.mkdir()
    (folder / template).write_text("{{ tools }}")
    for number, name in enumerate(("model.safetensors", "config.json", template)):
        (folder / name).rename(blobs / f"ab{number}")
        (snapshot / name).symlink_to(Path("../../../blobs" if "/" in name else "../../blobs") / f"ab{number}")
    here = HfFolder.open(snapshot)
    assert here.config()["model_type"] == "llama"
    assert {stored.shown.name for stored in here.tensors.values()} == {"model.safetensors"}
    assert main(["convert", "--from-hf", str(snapshot), "--to", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model_assets" / template).read_text() == "{{ tools }}"
    (blobs / "ab1").unlink()
    (blobs / "ab1").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"config\.json is a link, not a regular file"):
        member(snapshot, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 3}, "config.json: num_attention_heads=3 is not a multiple"),
        ({"model_type": "gpt9"}, "config.json: model_type='gpt9' is not one of"),
        ({"head_dim": 1}, "config.json: AttentionConfig: rotary positions need an even head_dim"),
    ],
)
def test_the_configuration_that_is_wrong_is_named_with_its_folder(folder, capsys, change, words):
    (folder / "config.json").write_text(json.dumps({**hf_config(CFG), **change}))
    refused(folder, capsys, f"{folder}/{words}")


def converted(folder):
    """A run's folder with the model at step 0, as somebody could hand it over, and its model's small files."""
    (folder / "tokenizer.json").write_text("evil")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("evil")
    assert main(["convert", "--from-hf", str(folder), "--to", str(folder.parent / "run")]) == 0
    (folder.parent / "mine").write_text("precious")
    return folder.parent / "run"


def test_a_link_in_a_handed_over_step_is_replaced_and_not_written_through(folder):
    run = converted(folder)
    made = run / "global_step_0" / "hf_ckpt"
    made.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (made / name).symlink_to(folder.parent / "mine")
    assert main(["convert", "--from-ckpt", str(run)]) == 0
    assert (folder.parent / "mine").read_text() == "precious"
    assert (made / "tokenizer.json").read_text() == "evil"
    assert not (made / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("below", ["", "additional_chat_templates"])
def test_a_folder_in_a_handed_over_step_that_is_a_link_is_refused(folder, capsys, below):
    run = converted(folder)
    made, mine = run / "global_step_0" / "hf_ckpt", folder.parent / "my_model"
    mine.mkdir()
    (mine / "model.safetensors").write_text("precious")
    if below:
        made.mkdir()
    (made / below).symlink_to(mine)
    assert main(["convert", "--from-ckpt", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{made / below} is a link, not a folder" in said
    assert sorted(p.name for p in mine.iterdir()) == ["model.safetensors"]
    assert (mine / "model.safetensors").read_text() == "precious"


def test_a_folder_of_ones_own_may_be_a_link(folder):
    run, there = converted(folder), folder.parent / "disk"
    there.mkdir()
    (folder.parent / "out").symlink_to(there)
    assert main(["convert", "--from-ckpt", str(run), "--to-hf", str(folder.parent / "out")]) == 0
    assert (there / "tokenizer.json").read_text() == "evil"
