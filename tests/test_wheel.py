"""What is installed: one importable name, beside which other packages may have what names they like."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRAINS = """
import sys, torch, ftrain
from ftrain.kernels.attention import attention
from ftrain.sharding import Mesh, Plan
from ftrain.modules import decoder
assert "site" in ftrain.__file__.rpartition("ftrain")[0], ftrain.__file__
step = ftrain.jit(lambda w, x: ftrain.value_and_grad(lambda w, x: (x @ w).square().mean())(w, x))
print(float(step(torch.ones(2, 2), torch.ones(3, 2))[0]), sorted(n for n in sys.modules if n in NAMES))
""".replace("NAMES", "('kernels', 'sharding', 'modules', 'experiments')")
BESIDE = "import kernels, transformers\nassert hasattr(kernels, 'get_kernel'), kernels.__file__\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to be put on the path, each with what pip installs into it: our wheel, and Hugging Face's `kernels`."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    (wheel,) = folder.glob("ftrain_omni-*.whl")
    found = {"wheel": wheel}
    for name, package in {"ours": str(wheel), "theirs": "kernels"}.items():
        found[name] = folder / f"site-{name}"
        command = [*pip, "install", "--no-deps", "--target", str(found[name]), package]
        subprocess.run(command, check=True, timeout=300)
    return found


def run(script: str, *path: Path, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_one_name_and_says_that_it_is_typed(places):
    names = zipfile.ZipFile(places["wheel"]).namelist()
    assert {n.partition("/")[0] for n in names if not n.startswith("ftrain_omni-")} == {"ftrain"}
    assert "ftrain/py.typed" in names
    for floor in ("kernels", "sharding", "modules"):
        files = {f"ftrain/{floor}/{p.relative_to(ROOT / floor)}" for p in (ROOT / floor).rglob("*.py")}
        assert {n for n in names if n.startswith(f"ftrain/{floor}/")} == files


@pytest.mark.slow
def test_an_installed_trainer_trains_and_takes_no_other_name(places, tmp_path):
    assert run(TRAINS, places["ours"], cwd=tmp_path) == "4.0 []"


@pytest.mark.slow
def test_hugging_face_s_kernels_and_transformers_stand_beside_it(places, tmp_path):
    """Whichever is first on the path, and whichever is first imported."""
    assert run(BESIDE + TRAINS, places["ours"], places["theirs"], cwd=tmp_path) == "4.0 ['kernels']"
    assert run(TRAINS + BESIDE + "print('both')", places["theirs"], places["ours"], cwd=tmp_path) == "both"
