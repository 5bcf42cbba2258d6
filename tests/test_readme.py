"""The README's examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_one_after_the_other(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[-1] < losses[0]
    assert names["compiled"].memory().peak > 0
    assert Path("step.html").stat().st_size > 0
    assert names["checkpoints"].steps() == [100]


def test_the_script_for_many_ranks_is_short_and_goes_on_on_another_number_of_ranks(tmp_path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (script,) = [block for block in blocks if "ftrain.run.session" in block]
    assert len(script.splitlines()) <= 20
    file = tmp_path / "script.py"
    file.write_text("import torch\ntorch.set_num_threads(1)\n" + blocks[0] + script.replace("(done, 6)", "(done, 2)"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    env = {**os.environ, "PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1"}
    options: dict = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    first = subprocess.run([*run, "2", str(file)], **options)
    assert first.returncode == 0, first.stderr[-3000:]
    file.write_text(file.read_text().replace("(done, 2)", "(done, 4)"))
    second = subprocess.run([sys.executable, str(file)], **options)
    assert second.returncode == 0, second.stderr[-3000:]
    said = re.findall(r"step (\d+): ([0-9.]+)", first.stdout + second.stdout)
    assert [int(n) for n, _ in said] == [1, 2, 3, 4]
    assert float(said[-1][1]) < float(said[0][1])
