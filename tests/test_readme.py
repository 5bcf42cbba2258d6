"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_first_example_trains(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {"__name__": "readme"}
    exec(compile(blocks[0], str(README), "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    exec(compile(blocks[1].split("compiled.report")[0], str(README), "exec"), names)
    assert names["compiled"].memory().peak > 0
