"""`ftrain launch slurm|kubeflow|skypilot --out FILE train sft ...`: the file that starts a command on many nodes.

The file is written and nothing is started: schedulers are their own. A run that is stopped before its time saves, and
goes on when it is started again, since it has an --out of its own.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

SLURM = r"""#!/bin/bash
# Slurm starts one process per GPU itself, without torchrun between: then its signals reach every process, and the
# run's exit code reaches this script. Two minutes before the time limit Slurm sends SIGUSR1, before it takes the nodes
# for another job SIGTERM: the run finishes its step, saves, and exits with 75 to be queued again; it goes on from
# there. What fails otherwise (a process lost, a hang) is started again here, three times.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log

set -euo pipefail

resumable=75 # ftrain.resilience.signals.EXIT_RESUMABLE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
trap : TERM USR1 # this script outlives them, to hear how the run ends

for attempt in 0 1 2 3; do
    # A port of its own for each attempt: ranks of a restarted run must not find the store of dead ones.
    export MASTER_PORT=$((29500 + SLURM_JOB_ID % 1000 * 4 + attempt))
    code=0
    # Ranks end one after the other: those that still save are not killed for the first that has ended.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=0 --wait=300 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        export GROUP_WORLD_SIZE=$SLURM_JOB_NUM_NODES
        exec "${{PYTHON:-python}}" "$@"' rank -m ftrain {command} || code=$?
    if [[ $code -eq $resumable ]]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [[ $code -ne 0 ]] || exit 0
    echo "attempt $attempt ended with $code" >&2
done
exit "$code"
"""

KUBEFLOW = """# kubectl apply -f this file. The training operator gives torchrun its rendezvous (PET_* variables).
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {name}
spec:
  nprocPerNode: "{gpus}"
  pytorchReplicaSpecs:
    Worker:
      replicas: {nodes}
      restartPolicy: OnFailure
      template:
        spec:
          terminationGracePeriodSeconds: 300
          containers:
            - name: pytorch
              image: {image}
              command: {argv}
              resources:
                limits:
                  nvidia.com/gpu: {gpus}
              volumeMounts:
                - name: shm
                  mountPath: /dev/shm
          volumes:
            - name: shm
              emptyDir:
                medium: Memory
"""

SKYPILOT = """# sky launch this file
name: {name}
num_nodes: {nodes}
resources:
  accelerators: {accelerator}:{gpus}
setup: |
  pip install "ftrain-omni[train]"
run: |
  first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  torchrun --nnodes {nodes} --nproc-per-node {gpus} --node-rank "$SKYPILOT_NODE_RANK" \\
    --master-addr "$first" --master-port 29500 -m ftrain {command}
"""


@dataclass(frozen=True)
class Slurm:
    """A batch script for `sbatch`."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """What `ftrain` is to do there: train sft --model ... (behind --)."""
    out: Path
    """The file to write."""
    nodes: int = 1
    """How many nodes."""
    gpus: int = 8
    """GPUs of each node: a rank for each."""
    name: str = "ftrain"
    """Of the job."""
    time: str = "24:00:00"
    """After which Slurm ends the job."""

    def text(self) -> str:
        """The file."""
        return SLURM.format(
            name=self.name, nodes=self.nodes, gpus=self.gpus, time=self.time, command=shlex.join(self.command)
        )


@dataclass(frozen=True)
class Kubeflow:
    """A PyTorchJob for Kubeflow's training operator."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """What `ftrain` is to do there: train sft --model ... (behind --)."""
    out: Path
    """The file to write."""
    image: str
    """A container image with ftrain-omni[train] in it."""
    nodes: int = 1
    """How many pods."""
    gpus: int = 8
    """GPUs of each: a rank for each."""
    name: str = "ftrain"
    """Of the job."""

    def text(self) -> str:
        """The file."""
        words = ["torchrun", "-m", "ftrain", *self.command]
        argv = "[" + ", ".join('"' + w.replace("\\", "\\\\").replace('"', '\\"') + '"' for w in words) + "]"
        return KUBEFLOW.format(name=self.name, nodes=self.nodes, gpus=self.gpus, image=self.image, argv=argv)


@dataclass(frozen=True)
class Skypilot:
    """A task of SkyPilot."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """What `ftrain` is to do there: train sft --model ... (behind --)."""
    out: Path
    """The file to write."""
    accelerator: str = "H100"
    """Of each node."""
    nodes: int = 1
    """How many nodes."""
    gpus: int = 8
    """Accelerators of each: a rank for each."""
    name: str = "ftrain"
    """Of the task."""

    def text(self) -> str:
        """The file."""
        return SKYPILOT.format(
            name=self.name, nodes=self.nodes, gpus=self.gpus, accelerator=self.accelerator,
            command=shlex.join(self.command),
        )  # fmt: skip


def run(options: Slurm | Kubeflow | Skypilot) -> int:
    """Write the file. ValueError for a command that is none of ours, sizes below 1, or a file that is there already."""
    if not options.command or options.command[0] not in ("train", "eval", "generate", "plan"):
        raise ValueError("say what ftrain is to do there, behind --: ftrain launch slurm --out job.sh -- train sft ...")
    if options.command[0] == "train" and "--out" not in options.command:
        raise ValueError("give the run an --out: one that is queued again goes on from there")
    for size in ("nodes", "gpus"):
        if getattr(options, size) < 1:
            raise ValueError(f"--{size} {getattr(options, size)} must be at least 1")
    if options.out.exists():
        raise ValueError(f"--out {options.out} is there already")
    options.out.write_text(options.text(), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


COMMANDS = {"slurm": (Slurm, run), "kubeflow": (Kubeflow, run), "skypilot": (Skypilot, run)}
