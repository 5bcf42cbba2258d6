"""Trees: names of leaves, structures that must agree, structs as nodes."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftrain import tree


class Pair(NamedTuple):
    left: Any
    right: Any


@tree.struct
class State:
    params: Any
    step: Any
    name: str = tree.static(default="run")

    def __post_init__(self) -> None:
        assert self.params is not None


@tree.struct
class Empty:
    pass


def example() -> State:
    return State({"layers": [{"w": 1, "b": None}, Pair(2, (3,))], "head": 4}, 5)


def test_paths_are_dotted_names_in_the_order_of_the_leaves():
    assert tree.paths(example()) == ["params.head", "params.layers.0.w", "params.layers.1.left",
                                     "params.layers.1.right.0", "step"]  # fmt: skip
    assert tree.leaves(example()) == [4, 1, 2, 3, 5]


def test_a_leaf_alone_has_the_empty_name():
    assert tree.paths(7) == [""]
    assert tree.paths(None) == []


def test_unflatten_undoes_flatten():
    leaves, treedef = tree.flatten(example())
    assert tree.unflatten(treedef, leaves) == example()


def test_a_struct_is_frozen_and_mapped_without_its_constructor():
    state = example()
    with pytest.raises(AttributeError):
        state.step = 6
    mapped = tree.map(lambda x: -x, state)
    assert isinstance(mapped, State)
    assert mapped.name == "run"
    assert mapped.step == -5
    assert tree.map(lambda x: x, Empty()) == Empty()


def test_static_fields_are_part_of_the_structure():
    other = State(example().params, 5, name="other")
    assert tree.flatten(example())[1] != tree.flatten(other)[1]
    with pytest.raises(ValueError, match="static fields of a State differ"):
        tree.map(lambda a, b: a, example(), other)


def test_map_with_path_and_several_trees():
    out = tree.map_with_path(lambda path, a, b: f"{path}:{a + b}", {"x": [1, 2]}, {"x": [10, 20]})
    assert out == {"x": ["x.0:11", "x.1:22"]}


def test_map_many_makes_one_tree_per_output():
    assert tree.map_many(lambda x: (x, x * x), 2, [2, {"a": 3}]) == ([2, {"a": 3}], [4, {"a": 9}])
    assert tree.map_many(lambda x: (x, x), 2, {"a": None}) == ({"a": None}, {"a": None})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"x": {"w": 1}}, {"x": {"v": 1}}, r"'x.w' is only in the first tree"),
        ({"x": [1]}, {"x": [1, 2]}, r"'x.1' is only in tree 2"),
        ({"x": 1}, {"x": None}, r"at 'x': a leaf in the first tree, None in tree 2"),
        ({"x": [1]}, {"x": (1,)}, r"at 'x': a list in the first tree, a tuple in tree 2"),
        (1, [1], r"at the root: a leaf in the first tree, a list in tree 2"),
        ({"x": Pair(1, 2)}, {"x": Pair(1, [2])}, r"at 'x.right'"),
    ],
)
def test_map_names_the_first_place_where_trees_part(a: Any, b: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tree.map(lambda x, y: x, a, b)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("layers.3.w", "layers.*.w", True),
        ("layers.3.w", "layers.*", False),
        ("layers.3.w", "layers.**", True),
        ("layers", "layers.**", True),
        ("layers.3.moe.w_up", "**.w_*", True),
        ("w_up", "**.w_*", True),
        ("layers.3.w", "**.3.**", True),
        ("layers.3.w", "layers.w", False),
        ("layers.33.w", "layers.?.w", False),
        ("", "**", True),
    ],
)
def test_match(path: str, pattern: str, expected: bool):
    assert tree.match(path, pattern) is expected


names = st.lists(st.sampled_from(["a", "bb", "c0", "10"]), min_size=1, max_size=5)


@given(names, st.data())
def test_a_path_matches_itself_with_any_part_made_a_star_and_any_run_a_double_star(parts: list[str], data: Any):
    begin = data.draw(st.integers(0, len(parts)))
    end = data.draw(st.integers(begin, len(parts)))
    path = ".".join(parts)
    assert tree.match(path, ".".join([*parts[:begin], "**", *parts[end:]]))
    assert tree.match(path, ".".join([*parts[:begin], *["*"] * (end - begin), *parts[end:]]))
    assert not tree.match(path, path + ".*")


def test_nearest_name():
    assert tree.nearest("adam", ["adamw", "muon"]) == "adamw"
    assert tree.nearest("qqq", ["adamw", "muon"]) is None


def test_diff_lists_leaves_that_differ():
    a = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "n": 1, "same": torch.zeros(1)}
    b = {"w": torch.zeros(2, 4), "c": torch.zeros(3), "n": 2, "same": torch.ones(1)}
    assert tree.diff(a, b).splitlines() == [
        "b: only in the first, float32[3] cpu",
        "n: 1 against 2",
        "w: float32[2, 3] cpu against float32[2, 4] cpu",
        "c: only in the second, float32[3] cpu",
    ]
    assert tree.diff(a, a) == ""
    assert tree.diff({"x": [1]}, {"x": (1,)}) == "at 'x': a list in the first, a tuple in the second"
    assert tree.diff(list(range(30)), list(range(1, 31)), limit=2).splitlines()[-1] == "... and 28 more"


def test_a_struct_is_no_dataclass_before():
    with pytest.raises(ValueError, match="leave @dataclass out"):

        @tree.struct
        @dataclasses.dataclass
        class Twice:
            w: int
