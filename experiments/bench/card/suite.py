"""The suite's own tests that need a GPU."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from experiments.bench.card.telling import Stage, note, tell
from experiments.bench.table import row

ROOT = Path(__file__).resolve().parents[3]
_MARK = "pytest.mark.gpu"
_ENDS = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def gpu_tests(stage: Stage) -> None:
    """Run every test that is marked `gpu`; the figure is how many fail, told again after each test."""
    files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if _MARK in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *files]
    counts, bad = Counter[str](), list[str]()
    how = f"pytest -m gpu over {len(files)} files; peer: how all ended so far"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
            test, _, rest = line.partition(" ")
            end = next((word for word in _ENDS if rest.startswith(word)), None)
            if "::" not in test or end is None:
                continue
            counts[end] += 1
            bad += [test] if end in ("FAILED", "ERROR") else []
            peer = ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
            tell(row("tests that need a GPU: failed", len(bad), "", goal=0, peer=peer, how=how))
    note("failed tests", bad)
    note("exit code of pytest", tests.returncode)
