"""What `import ftrain` gives, and what it says to those who look for another name."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ftrain
from ftrain.modules import decoder


def test_every_public_name_is_there():
    assert [name for name in ftrain.__all__ if not hasattr(ftrain, name)] == []
    assert [name for name in ftrain.optim.__all__ if not hasattr(ftrain.optim, name)] == []


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(ftrain.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert ftrain.__version__ == project["version"]


def test_rooms_that_read_files_are_found_and_loaded_only_then():
    code = "import sys, ftrain; print('tensorstore' in sys.modules); ftrain.checkpoint.Checkpointer; ftrain.hf.load_hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PRNGKey", r"take ftrain\.key\(seed\)"),
        ("tree_map", r"take ftrain\.tree\.map"),
        ("Checkpointer", r"take ftrain\.checkpoint\.Checkpointer"),
        ("value_and_gradient", "did you mean 'value_and_grad'"),
        ("qqq", "module 'ftrain' has no attribute 'qqq'$"),
    ],
)
def test_other_names_are_answered(name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(ftrain, name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ftrain.init(decoder.preset("llama-tiny"), ftrain.key(0)),
            r"such as decoder\.specs\(cfg\), .*; the tree",
        ),
        (lambda: ftrain.init({"a": {"w": 3}}, ftrain.key(0)), r"tree of ParamSpecs.*; a\.w is none"),
        (lambda: ftrain.init(decoder.specs(decoder.preset("llama-tiny")), 0), r"ftrain\.key\(seed\); the key is 0"),
        (lambda: ftrain.key("a"), "a seed is a whole number, not 'a'"),
        (lambda: ftrain.key(1.5), "a seed is a whole number, not 1.5"),
    ],
)
def test_first_guesses_are_answered(make, words):
    with pytest.raises(ValueError, match=words):
        make()
