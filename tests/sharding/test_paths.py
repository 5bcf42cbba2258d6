"""The glob language: what matches, which rule decides, and what a rule that decides nothing says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.sharding.paths import Rules, match, specificity

NAMES = st.sampled_from(["layers", "0", "1", "w", "w_q", "norm"])
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(".".join)
GLOBS = st.lists(NAMES | st.sampled_from(["*", "**", "w*"]), min_size=1, max_size=5).map(".".join)
TREE = ["embedding.table", "encoder.norm.g", "encoder.w", "layers.0.w_q", "layers.0.norm.g", "layers.1.w_q"]


@pytest.mark.parametrize(
    ("glob", "matched"),
    [
        ("encoder.w", ["encoder.w"]),
        ("encoder", []),
        ("encoder.**", ["encoder.norm.g", "encoder.w"]),
        ("layers.*.w_q", ["layers.0.w_q", "layers.1.w_q"]),
        ("layers.*", []),
        ("layers.**", ["layers.0.w_q", "layers.0.norm.g", "layers.1.w_q"]),
        ("**.norm.*", ["encoder.norm.g", "layers.0.norm.g"]),
        ("**.w*", ["encoder.w", "layers.0.w_q", "layers.1.w_q"]),
        ("**", TREE),
    ],
)
def test_what_a_glob_matches(glob, matched):
    assert [path for path in TREE if match(path, glob)] == matched


@given(PATHS, GLOBS, GLOBS)
def test_the_order_of_rules_means_nothing(path, one, other):
    def decide(globs):
        try:
            return Rules({glob: glob for glob in globs}).glob_of(path)
        except ValueError:
            return "tie"

    assert decide([one, other]) == decide([other, one])


@given(PATHS, st.lists(GLOBS, max_size=4))
def test_the_decision_is_a_most_specific_match(path, globs):
    rules = Rules(dict.fromkeys(globs, "same"))
    found, matching = rules.glob_of(path), [glob for glob in globs if match(path, glob)]
    assert (found is None) == (not matching)
    assert found is None or specificity(found) == max(map(specificity, matching))


@given(PATHS)
def test_a_path_is_its_own_most_specific_glob(path):
    rules = Rules({path: "own", "**": "all", path.rpartition(".")[0] + ".*" if "." in path else "*": "parent"})
    assert rules.find(path) == "own"


def test_names_before_partial_names_before_stars():
    rules = Rules({"**": 0, "*.*.*": 1, "layers.**": 2, "layers.*.w_*": 3, "layers.*.*": 4, "layers.0.w_q": 5})
    assert [rules.find(path) for path in ("layers.0.w_q", "layers.1.w_q", "layers.1.b", "a.b.c", "x")] == [
        5,
        3,
        4,
        1,
        0,
    ]


def test_a_tie_is_an_error_unless_both_say_the_same():
    globs = {"encoder.**": "a", "**.norm": "b"}
    with pytest.raises(
        ValueError, match=r"Remat: 'encoder\.\*\*' and '\*\*\.norm' both match 'encoder\.norm' and neith"
    ):
        Rules(globs, "Remat").find("encoder.norm")
    assert Rules({**globs, "encoder.norm": "c"}).find("encoder.norm") == "c"
    assert Rules(dict.fromkeys(globs, "a")).find("encoder.norm") == "a"


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("encoders.**", r"nearest: 'encoder\.\w+"),
        ("encoder", r"all below it are 'encoder\.\*\*'"),
        ("w_q", r"anywhere is '\*\*\.w_q'"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(glob, hint):
    with pytest.raises(ValueError, match=rf"freeze: '{glob.replace('*', '.')}' matches nothing; .*{hint}"):
        Rules({glob: 1, "**": 2}, "freeze").require_used(TREE)
    Rules({"encoder.**": 1, "**": 2}).require_used(TREE)


def test_a_rule_about_a_node_holds_for_all_below_it():
    rules = Rules({"layers": "local", "layers.*.moe": "ring", "head": "whole"}, below=True)
    paths = ["layers.0.moe.w", "layers.0.norm", "layers", "head", "heads.w"]
    assert [rules.find(path) for path in paths] == ["ring", "local", "local", "whole", None]
    with pytest.raises(ValueError, match="'head' matches nothing"):
        rules.require_used(paths[:2])


@pytest.mark.parametrize("glob", ["", "a..b", ".a", "a."])
def test_an_empty_part_is_no_glob(glob):
    with pytest.raises(ValueError, match="is no glob over dotted paths"):
        Rules({glob: 1})


def test_matches_can_be_printed():
    rules = Rules({"layers.**": "slow", "layers.*.w_q": "fast"})
    assert rules.table(["layers.0.w_q", "layers.0.b", "head"]).splitlines() == [
        "layers.0.w_q  layers.*.w_q  fast",
        "layers.0.b    layers.**     slow",
        "head          -",
    ]
