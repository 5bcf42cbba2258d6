"""Loading: parts of leaves for a rank, tied weights, and what is said about folders that do not fit."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ftrain.hf import HfFolder, load_hf
from ftrain.hf.load import stored_dtypes
from ftrain.modules.hf_names import HfTensor
from ftrain.modules.spec import ParamSpec, leaves_with_paths, ones
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.layout import Dropless

E_, D, F = 4, 6, 10
SPECS = {
    "norm": ParamSpec((D,), ("embed",), ones()),
    "table": ParamSpec((F, D), ("vocab", "embed"), ones()),
    "experts": ParamSpec((E_, D, F), ("expert", "embed", "mlp"), ones()),
}
NAMES = (
    HfTensor("norm.weight", "norm"),
    HfTensor("embed.weight", "table"),
    HfTensor("head.weight", "table", copy=True),
    *(HfTensor(f"experts.{e}.weight", "experts", index=e, transposed=True) for e in range(E_)),
)


def leaves() -> dict[str, torch.Tensor]:
    return {path: torch.randn(leaf.shape) for path, leaf in SPECS.items()}


def tensors(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    experts = {f"experts.{e}.weight": tree["experts"][e].T.contiguous() for e in range(E_)}
    return {"norm.weight": tree["norm"], "embed.weight": tree["table"], **experts}


def write(folder: Path, weights: dict[str, torch.Tensor], *, files: int = 1) -> Path:
    """A folder of safetensors as others write it."""
    folder.mkdir(exist_ok=True)
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    index = {name: names[i % files] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@st.composite
def windows(draw: st.DrawFn) -> dict[str, tuple[tuple[int, int], ...]]:
    found = {}
    for path, leaf in SPECS.items():
        starts = [draw(st.integers(0, size)) for size in leaf.shape]
        parts = [(start, draw(st.integers(0, size - start))) for start, size in zip(starts, leaf.shape, strict=True)]
        found[path] = tuple(parts)
    return found


@given(parts=windows())
@settings(deadline=None, max_examples=40)
def test_any_part_of_a_leaf_is_that_part_of_the_whole(parts, tmp_path_factory: pytest.TempPathFactory) -> None:
    tree = leaves()
    folder = write(tmp_path_factory.mktemp("hf"), tensors(tree), files=3)
    loaded = load_hf(folder, SPECS, NAMES, windows=parts)
    for path, part in parts.items():
        assert torch.equal(loaded[path], tree[path][tuple(slice(start, start + n) for start, n in part)])


def test_the_ranks_of_a_mesh_load_their_pieces_and_together_the_whole(tmp_path: Path) -> None:
    tree = leaves()
    folder = write(tmp_path, tensors(tree), files=2)
    mesh = Mesh(shard=4, expert=2, kind="fake")
    placements = Plan(mesh, Layout(experts=Dropless())).placements(SPECS)
    for path, placement in placements.items():
        found = torch.full(placement.shape, float("nan"))
        for rank in range(mesh.size):
            part = placement.windows(mesh, rank)
            piece = load_hf(folder, SPECS, NAMES, windows={path: part})[path]
            found[tuple(slice(start, start + n) for start, n in part)] = piece
        assert torch.equal(found, tree[path]), path


def test_only_the_bytes_of_a_part_are_read(tmp_path: Path) -> None:
    """A file of 6 GB, of which nothing is on the disk: reading all of it would fill memory with zeros."""
    rows, columns = 1_500_000, 1000
    body = {"big": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    text = json.dumps(body).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * rows * columns)
    spec = {"big": ParamSpec((columns, rows), ("embed", "vocab"), ones())}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = load_hf(
        tmp_path, spec, [HfTensor("big", "big", transposed=True)], windows={"big": ((0, columns), (rows - 50, 50))}
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert part["big"].shape == (columns, 50)
    assert grown < 200 * 2**20


def test_a_tied_weight_may_be_repeated_but_must_be_equal(tmp_path: Path) -> None:
    tree = leaves()
    repeated = {**tensors(tree), "head.weight": tree["table"].clone()}
    assert torch.equal(load_hf(write(tmp_path, repeated), SPECS, NAMES)["table"], tree["table"])
    repeated["head.weight"][1, 2] += 1
    with pytest.raises(ValueError, match=r"'head.weight' should repeat our 'table', but differs.*tie_word_embeddings"):
        load_hf(write(tmp_path, repeated), SPECS, NAMES)


def test_the_dtypes_on_disk_can_be_asked_for(tmp_path: Path) -> None:
    weights = tensors(leaves())
    weights["embed.weight"] = weights["embed.weight"].bfloat16()
    weights["experts.1.weight"] = weights["experts.1.weight"].bfloat16()
    found = stored_dtypes(HfFolder.open(write(tmp_path, weights)), NAMES)
    assert found == {"norm": torch.float32, "table": torch.bfloat16, "experts": torch.float32}


@pytest.mark.parametrize("name", ["norm.weight", "experts.2.weight"])
def test_a_number_beyond_the_dtype_of_the_spec_is_refused(name: str, tmp_path: Path) -> None:
    weights = tensors(leaves())
    half = {path: dataclasses.replace(spec, dtype=torch.float16) for path, spec in SPECS.items()}
    weights[name].view(-1)[1] = torch.inf
    assert load_hf(write(tmp_path, weights), half, NAMES)["norm"].dtype == torch.float16
    weights[name].view(-1)[0] = -1e5
    with pytest.raises(ValueError, match=rf"'{name}' holds -100000, which torch.float16 cannot hold .*65504"):
        load_hf(write(tmp_path, weights), half, NAMES)


def renamed(weights: dict, old: str, new: str) -> dict:
    return {new if name == old else name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: renamed(w, "experts.2.weight", "experts.2.weights"), r"no tensor 'experts.2.weight', which is our "),
        (lambda w: renamed(w, "experts.2.weight", "experts.2.weights"), r"nearest there: 'experts.2.weights'"),
        (lambda w: {**w, "bias": torch.ones(2)}, r"holds 'bias'.*unexpected='ignore'"),
        (
            lambda w: {**w, "embed.weight": torch.ones(F, D + 1)},
            r"model.safetensors: 'embed.weight' has shape \[10, 7\], but our 'table' \[10, 6\] needs \[10, 6\]",
        ),
        (lambda w: {**w, "experts.0.weight": torch.ones(D, F)}, r"needs \[10, 6\]"),
        (lambda w: {**w, "norm.weight": torch.ones(D, dtype=torch.complex64)}, r"'norm.weight' has dtype C64"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(change, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load_hf(write(tmp_path, change(tensors(leaves()))), SPECS, NAMES)


def test_buffers_of_older_files_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path, {**tensors(leaves()), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert set(load_hf(folder, SPECS, NAMES)) == set(SPECS)


def test_what_is_too_much_can_be_left_out(tmp_path: Path) -> None:
    tree = leaves()
    folder = write(tmp_path, {**tensors(tree), "bias": torch.ones(2)})
    loaded = load_hf(folder, SPECS, NAMES, unexpected="ignore")
    assert all(torch.equal(leaf, tree[path]) for path, leaf in leaves_with_paths(loaded))


def test_names_must_fill_every_leaf_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors(leaves()))
    with pytest.raises(ValueError, match=r"the names give 'experts' \[4, 6, 10\] the parts \[0, 1, 2\]"):
        load_hf(folder, SPECS, NAMES[:-1])
    with pytest.raises(ValueError, match=r"the names give 'norm' \[6\] no tensor"):
        load_hf(folder, SPECS, NAMES[1:])
    with pytest.raises(ValueError, match=r"put 'norm.weight' at 'nrm', where the specs have no parameter"):
        load_hf(folder, SPECS, (dataclasses.replace(NAMES[0], leaf="nrm"), *NAMES[1:]))


@pytest.mark.parametrize("part", [((0, 7),), ((-1, 2),), ((0, 6), (0, 1))])
def test_a_part_outside_of_its_leaf_is_refused(part, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'norm' \[6\] has no part"):
        load_hf(write(tmp_path, tensors(leaves())), SPECS, NAMES, windows={"norm": part})


def damage_truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_remove(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def damage_swap(folder: Path) -> None:
    weights = load_file(folder / "model-00002-of-00003.safetensors")
    save_file(renamed(weights, next(iter(weights)), "other"), folder / "model-00002-of-00003.safetensors")


def damage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def damage_pickle(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "model-00002-of-00003.safetensors is damaged"),
        (damage_remove, "model-00002-of-00003.safetensors is missing"),
        (damage_swap, "index.json says that model-00002-of-00003.safetensors holds .* but it does not"),
        (damage_index, "index.json is not JSON"),
        (damage_pickle, "neither model.safetensors nor .* pytorch_model.bin, which is pickled"),
    ],
)
def test_damaged_folders_are_named(damage, words: str, tmp_path: Path) -> None:
    folder = write(tmp_path, tensors(leaves()), files=3)
    damage(folder)
    with pytest.raises(ValueError, match=words):
        load_hf(folder, SPECS, NAMES)
