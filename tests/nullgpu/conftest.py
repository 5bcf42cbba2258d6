"""Answers of processes on the null device, each asked once in a session, also by several workers of pytest-xdist."""

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from case import Case
from device_probe import TOGETHER
from on_null_device import answer


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ask(script, *arguments, processes=1)`: what a script of this folder answers on the null device."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent

    def asked(script: str, *arguments: str, processes: int = 1) -> Any:
        name = hashlib.sha256(repr((script, arguments, processes)).encode()).hexdigest()[:16]
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _kept(folder / f"{name}.json", lambda: answer(script, *arguments, processes=processes))

    return asked


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, made if it is not there; a failure is kept too, so that no process hangs twice."""
    if not file.exists():
        try:
            found = {"answer": make()}
        except AssertionError as error:
            found = {"error": str(error)}
        file.write_text(json.dumps(found))
    found = json.loads(file.read_text())
    assert "error" not in found, found["error"]
    return found["answer"]


@pytest.fixture(scope="session")
def measure(ask: Callable[..., Any]) -> Callable[[Case], dict[str, Any]]:
    """`measure(case)`: see `measure_step.measured`."""
    return lambda case: ask("measure_step.py", case.as_json())


@pytest.fixture(scope="session")
def measure_mesh(ask: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """`measure_mesh(case, shard=2)`: what two ranks answer, see `measure_mesh.measured`."""
    return lambda case, **axes: ask("measure_mesh.py", case.as_json(), json.dumps(axes), processes=2)


@pytest.fixture(scope="session")
def probe(ask: Callable[..., Any]) -> Callable[[str], dict[str, Any]]:
    """`probe(name)`: what a program of `device_probe.py` answers; those that leave no traces share a process."""
    together = [program.__name__ for program in TOGETHER]
    return lambda name: ask("device_probe.py", *(together if name in together else [name]))[name]
