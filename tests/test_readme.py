"""The README's examples run as they stand."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_one_after_the_other(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[-1] < losses[0]
    assert names["compiled"].memory().peak > 0
    assert Path("step.html").stat().st_size > 0
    assert names["checkpoints"].steps() == [100]
