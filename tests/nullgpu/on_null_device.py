"""Run a script of this folder on the null device, in a process of its own, and read its answer.

A law that hangs or aborts then fails alone. The answer is the last line of its output, as JSON.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARIES = Path(os.environ.get("NULLGPU_LIBRARIES", ROOT / "build" / "nullgpu"))
"""Where `make` puts the libraries, and Inductor's and Triton's caches beside them."""

SECONDS = 400
"""After which a script counts as hanging."""


def answer(script: str, *arguments: str, processes: int = 1) -> Any:
    """What `script` answers to these arguments.

    With more `processes` it is started by torch.distributed.run, a device each, and answers come in the order of ranks.
    AssertionError with its last words if it fails or hangs; FileNotFoundError where the null device is not built.
    """
    if not (LIBRARIES / "libnullgpu.so").exists():
        raise FileNotFoundError(f"there is no null device in {LIBRARIES}: these tests run by `make test-nullgpu`")
    command = [str(HERE / script), *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launcher, *command]
    output = _run([sys.executable, *command], devices=processes)
    answers = [json.loads(line[len(MARK) :]) for line in output.splitlines() if line.startswith(MARK)]
    if processes == 1:
        return answers[-1]
    return sorted(answers, key=lambda found: found["rank"])


MARK = "ANSWER "


def say(value: Any) -> None:
    """Give the answer, from within a script, and end: Inductor's workers and NCCL's threads are not waited for."""
    sys.stdout.write(f"\n{MARK}{json.dumps(value)}\n")
    sys.stdout.flush()
    os._exit(0)


def environment(*, devices: int) -> dict[str, str]:
    """The variables that put a process on the null device."""
    found = {
        "LD_PRELOAD": f"{LIBRARIES / 'libnullgpu.so'} {LIBRARIES / 'libnvrtc.so.13'}",
        "LD_LIBRARY_PATH": str(LIBRARIES),
        "TRITON_LIBCUDA_PATH": str(LIBRARIES),
        "NULLGPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "modules"))),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(LIBRARIES / "inductor"),
        "TRITON_CACHE_DIR": str(LIBRARIES / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "FTRAIN_CACHE": str(LIBRARIES / "ftrain"),
    }
    return {**os.environ, **found}


def _run(command: list[str], *, devices: int) -> str:
    process = subprocess.Popen(
        command,
        env=environment(devices=devices),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(
            f"{' '.join(command)} hangs after {SECONDS} s; its last words:\n{output[-4000:]}"
        ) from None
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}:\n{output[-6000:]}"
    return output
