"""A Slurm of one node, which is this machine, for as long as a test: real daemons, a real queue."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")

_CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed here ({missing[0]} is missing: apt-get install slurm-wlm)"
    return None if os.geteuid() == 0 else "Slurm's daemons must be started by root"


class Cluster:
    """Commands of a Slurm whose configuration is in the folder."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command says; its error is an AssertionError."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_now(self, number: str) -> None:
        """Ask that a job which waits in the queue need not; nothing for one that runs."""
        command = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
        subprocess.run(command, env=self.environment, capture_output=True, timeout=60)

    def wait_for(self, number: str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """Return when the job is in one of these states; AssertionError when it is not in time."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}"
            time.sleep(0.2)
        return job


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, and end them."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    config = _CONFIG.format(host=host, folder=folder, ports=[_free_port(), _free_port()])
    (folder / "slurm.conf").write_text(config)
    found = Cluster(folder)
    daemons = []
    try:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            log = open(folder / f"{command[0]}.log", "w")  # noqa: SIM115 (its process has it)
            daemons.append(subprocess.Popen(command, env=found.environment, stdout=log, stderr=log))
            log.close()
        deadline = time.monotonic() + 60
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "--noheader", "--format", "%t"], env=found.environment, capture_output=True, text=True
            ).stdout
        ):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text() + (
                folder / "slurmd.log"
            ).read_text()
            time.sleep(0.3)
        yield found
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
