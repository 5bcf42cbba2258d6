"""Checkpoints written and read part by part are those of `save` and `restore`."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import checkpoint
from ftrain.checkpoint import Storage
from ftrain.hf.stream import Group, Range, SavedArrays, groups, save_stream


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "params.a": torch.randn(37, 11, generator=generator),
        "params.b": torch.randn(5, 6, 7, generator=generator).bfloat16(),
        "params.c": torch.randint(0, 9, (301,), generator=generator),
        "params.d": torch.tensor(3.5),
        "opt_state.e": torch.zeros(64, 3),
    }


def parts(tensors: dict[str, torch.Tensor], group: Group) -> dict[str, torch.Tensor]:
    found = {}
    for path, part in group.items():
        box = part.box(tuple(tensors[path].shape))
        found[path] = tensors[path][tuple(slice(start, start + n) for start, n in box)].contiguous()
    return found


def stream(tensors: dict[str, torch.Tensor], root: Path, step: int, *, limit: int, chunk: int, database: bool = True):
    meta = {path: tensor.to("meta") for path, tensor in tensors.items()}
    storage = Storage(chunk_bytes=chunk, database=database)
    save_stream(root, step, meta, lambda group: parts(tensors, group), limit=limit, storage=storage)


@given(limit=st.integers(1, 5000), chunk=st.integers(300, 3000), database=st.booleans())
@settings(deadline=None, max_examples=6)
def test_what_is_streamed_in_can_be_restored(
    limit: int, chunk: int, database: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, tensors = tmp_path_factory.mktemp("run"), state()
    stream(tensors, root, 4, limit=limit, chunk=chunk, database=database)
    restored = checkpoint.restore({path: torch.empty_like(t, device="meta") for path, t in tensors.items()}, root)
    torch.testing.assert_close(restored, tensors, rtol=0, atol=0)


@given(limit=st.integers(1, 5000), dims=st.tuples(st.integers(0, 1), st.integers(0, 2)))
@settings(deadline=None, max_examples=6)
def test_what_was_saved_can_be_streamed_out(
    limit: int, dims: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, tensors = tmp_path_factory.mktemp("run"), state()
    checkpoint.save(tensors, root, 2, storage=Storage(chunk_bytes=200))
    along = {"params.a": dims[0], "params.b": dims[1]}
    del tensors["opt_state.e"]
    saved = SavedArrays(root, 2, "params")
    shapes = {path: leaf.shape for path, leaf in saved.arrays.items()}
    found = {path: torch.empty_like(tensor) for path, tensor in tensors.items()}
    grain = {path: Range(along.get(path, 0), 0, 1) for path in shapes}
    for group in groups(shapes, {path: t.itemsize for path, t in tensors.items()}, grain, limit):
        for path, values in saved.read(group).items():
            box = group[path].box(shapes[path])
            found[path][tuple(slice(start, start + n) for start, n in box)] = values
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6),
    limit=st.integers(1, 400),
    unit=st.integers(1, 3),
)
@settings(deadline=None)
def test_groups_hold_everything_once_within_the_limit(sizes: list[list[int]], limit: int, unit: int) -> None:
    shapes = {f"w{i}": tuple(shape) for i, shape in enumerate(sizes)}
    counts = {path: torch.zeros(shape, dtype=torch.int64) for path, shape in shapes.items()}
    made = list(groups(shapes, dict.fromkeys(shapes, 4), {path: Range(0, 0, unit) for path in shapes}, limit))
    for group in made:
        for path, part in group.items():
            counts[path][part.start : part.start + part.length] += 1
            assert part.start % unit == 0
        total = sum(4 * counts[path][: part.length].numel() for path, part in group.items())
        smallest = len(group) == 1 and next(iter(group.values())).length <= unit
        assert total <= limit or smallest
    assert all((count == 1).all() for count in counts.values())


def test_an_error_on_the_way_leaves_the_last_step(tmp_path: Path) -> None:
    tensors = state()
    stream(tensors, tmp_path, 1, limit=100, chunk=100)
    calls = []

    def failing(group: Group) -> dict[str, torch.Tensor]:
        calls.append(group)
        if len(calls) == 3:
            raise OSError("no such disk")
        return parts(tensors, group)

    meta = {path: tensor.to("meta") for path, tensor in tensors.items()}
    with pytest.raises(OSError, match="no such disk"):
        save_stream(tmp_path, 1, meta, failing, limit=500)
    assert checkpoint.steps(tmp_path) == [1]
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("global_step")} == {"global_step_1"}
    restored = checkpoint.restore({path: torch.empty_like(t, device="meta") for path, t in tensors.items()}, tmp_path)
    torch.testing.assert_close(restored, tensors, rtol=0, atol=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    checkpoint.save(state(), tmp_path, 1)
    lost = next(file for file in (tmp_path / "global_step_1" / "model" / "d").iterdir())
    lost.unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"{lost.name} is missing"):
        SavedArrays(tmp_path, 1, "params")
