"""`ftrain convert`: there and back equal to the byte, and readable by `restore`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ftrain import checkpoint
from ftrain.cli.main import main
from ftrain.hf import load_hf
from ftrain.modules import decoder
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.spec import abstract
from tests.helpers.hf_twins import FAMILIES, build, specs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def theirs(folder: Path, family: str = "qwen3-moe", dtype: torch.dtype = torch.bfloat16) -> DecoderConfig:
    """A folder as it comes from the hub, in several files and with a tokenizer."""
    model, cfg = build(family, dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "image.png").write_bytes(b"not needed")
    return cfg


def convert(*arguments: Any) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_equal_folders(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs(tmp_path / "hf", family, dtype)
    convert("--from-hf", tmp_path / "hf", "--to", tmp_path / "run")
    convert("--from-ckpt", tmp_path / "run", "--to-hf", tmp_path / "back", "--max-shard", "40KB")
    expected = contents(tmp_path / "hf")
    del expected["image.png"]
    assert contents(tmp_path / "back") == expected


def test_there_and_back_through_a_bucket(
    s3: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["endpoint"])
    monkeypatch.setenv("AWS_REGION", s3["aws_region"])
    cfg = theirs(tmp_path / "hf")
    convert("--from-hf", tmp_path / "hf", "--to", "s3://runs/converted", "--step", 2)
    restored = checkpoint.restore({"params": abstract(specs(cfg, torch.bfloat16))}, "s3://runs/converted")
    torch.testing.assert_close(
        restored["params"], load_hf(tmp_path / "hf", specs(cfg, torch.bfloat16), decoder_names(cfg)), rtol=0, atol=0
    )
    convert("--from-ckpt", "s3://runs/converted", "--to-hf", tmp_path / "back", "--max-shard", "40KB")
    expected = contents(tmp_path / "hf")
    del expected["image.png"]
    assert contents(tmp_path / "back") == expected
    assert main(["convert", "--from-ckpt", "s3://runs/converted"]) == 2
    assert "s3://runs/converted is in no file system of this machine: say where to write" in capsys.readouterr().err
    assert main(["convert", "--from-ckpt", "s3://runs/nothing", "--to-hf", str(tmp_path / "none")]) == 2
    assert "s3://runs/nothing/model_assets/config.json is missing: give the config.json" in capsys.readouterr().err


def test_restore_reads_what_was_converted(tmp_path: Path) -> None:
    cfg = theirs(tmp_path / "hf")
    convert("--from-hf", tmp_path / "hf", "--to", tmp_path / "run", "--step", 7, "--params", "params.foundation")
    assert checkpoint.steps(tmp_path / "run") == [7]
    like = {"params": {"foundation": abstract(specs(cfg, torch.bfloat16))}}
    restored = checkpoint.restore(like, tmp_path / "run")["params"]["foundation"]
    loaded = load_hf(tmp_path / "hf", specs(cfg, torch.bfloat16), decoder_names(cfg))
    torch.testing.assert_close(restored, loaded, rtol=0, atol=0)


def test_a_trained_state_is_exported_in_the_dtype_asked_for(tmp_path: Path) -> None:
    cfg = theirs(tmp_path / "hf")
    params = load_hf(tmp_path / "hf", specs(cfg, torch.float32), decoder_names(cfg))
    state = {"params": {"foundation": params, "encoder": torch.ones(3)}, "opt_state": [torch.ones(2)], "step": 3}
    checkpoint.save(state, tmp_path / "run", 3)
    options = ("--config", tmp_path / "hf" / "config.json", "--params", "params.foundation", "--dtype", "bfloat16")
    convert("--from-ckpt", tmp_path / "run", *options, "--max-shard", "40KB")
    expected = contents(tmp_path / "hf")
    made = contents(tmp_path / "run" / "global_step_3" / "hf_ckpt")
    assert made == {name: expected[name] for name in made}
    assert set(made) > {"config.json", "model.safetensors.index.json"}
    assert checkpoint.restore(state, tmp_path / "run")["step"] == 3


def test_only_the_weights_must_be_there(tmp_path: Path) -> None:
    cfg = theirs(tmp_path / "hf")
    params = load_hf(tmp_path / "hf", specs(cfg, torch.bfloat16), decoder_names(cfg))
    checkpoint.save({"params": params, "opt_state": params}, tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run" / "global_step_3" / "optimizer")
    options = ("--config", tmp_path / "hf" / "config.json", "--max-shard", "40KB")
    convert("--from-ckpt", tmp_path / "run", "--to-hf", tmp_path / "back", *options)
    expected = contents(tmp_path / "hf")
    assert all(file == expected[name] for name, file in contents(tmp_path / "back").items())


def test_weights_are_cast_on_the_way_in(tmp_path: Path) -> None:
    cfg = theirs(tmp_path / "hf")
    convert("--from-hf", tmp_path / "hf", "--to", tmp_path / "run", "--dtype", "float32")
    restored = checkpoint.restore({"params": abstract(decoder.specs(cfg))}, tmp_path / "run")
    loaded = load_hf(tmp_path / "hf", decoder.specs(cfg), decoder_names(cfg))
    torch.testing.assert_close(restored["params"], loaded, rtol=0, atol=0)


def test_a_folder_that_does_not_fit_leaves_no_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs(tmp_path / "hf")
    config = (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "hf" / "config.json").write_text(config.replace('"vocab_size": 99', '"vocab_size": 98'))
    assert main(["convert", "--from-hf", str(tmp_path / "hf"), "--to", str(tmp_path / "run")]) == 2
    assert "'lm_head.weight' has shape [99, 48], but our 'head.w_DV' [48, 98]" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--step", "5"), "no step 5"),
        (("--params", "param"), "run has no tensors below 'param'; it has params"),
        (("--config", "deeper.json"), "has no leaf 'params.layers.2.attention.k_norm_K', which the decoder of"),
        (("--config", "wider.json"), "'params.layers.0.moe.w_down_EFD' is [12, 20, 48] in step 0"),
        (("--config", "gone.json"), "gone.json is missing"),
        (("--max-shard", "5 apples"), "not '5 apples'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    options: tuple[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs(tmp_path / "hf")
    convert("--from-hf", "hf", "--to", "run")
    text = (tmp_path / "hf" / "config.json").read_text()
    Path("deeper.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    Path("wider.json").write_text(text.replace('"moe_intermediate_size": 20', '"moe_intermediate_size": 21'))
    assert main(["convert", "--from-ckpt", "run", "--to-hf", "back", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("back").exists() or not list(Path("back").iterdir())


def test_a_flipped_bit_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs(tmp_path / "hf", dtype=torch.float32)
    convert("--from-hf", tmp_path / "hf", "--to", tmp_path / "run")
    files = [file for file in (tmp_path / "run" / "global_step_0" / "model").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert main(["convert", "--from-ckpt", str(tmp_path / "run"), "--to-hf", str(tmp_path / "back")]) == 2
    assert largest.name in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_files_and_weights_of_another_conversion_are_replaced(tmp_path: Path) -> None:
    theirs(tmp_path / "hf")
    convert("--from-hf", tmp_path / "hf", "--to", tmp_path / "run")
    theirs(tmp_path / "other", "llama-tied")
    convert("--from-hf", tmp_path / "other", "--to", tmp_path / "run")
    assert (tmp_path / "run" / "model_assets" / "config.json").read_bytes() == (
        tmp_path / "other" / "config.json"
    ).read_bytes()
    convert("--from-ckpt", tmp_path / "run", "--to-hf", tmp_path / "hf", "--max-shard", "40KB")
    assert contents(tmp_path / "hf") == contents(tmp_path / "other")
