#!/bin/bash
# One job of any experiment on many nodes:  sbatch --nodes 16 experiments/launch/slurm.sh experiments/omni_moe.py --sequence 4
# Slurm starts one process per GPU itself, without torchrun between: then its signals reach every process, and the run's
# exit code reaches this script. Two minutes before the time limit Slurm sends SIGUSR1, before it takes the nodes for
# another job SIGTERM: the run finishes its step, saves, and exits with 75 to be queued again; `--resume auto` with a
# fixed --out goes on from there. What fails otherwise (a process lost, a hang) is started again here, three times.
#SBATCH --job-name=ftrain
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log

set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: sbatch $0 EXPERIMENT.py [its options]" >&2; exit 2; }

resumable=75 # ftrain.resilience.signals.EXIT_RESUMABLE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # experiments are not installed
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
        exec "${PYTHON:-python}" "$@"' rank "$@" --out "runs/slurm-$SLURM_JOB_ID" --resume auto || code=$?
    if [[ $code -eq $resumable ]]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [[ $code -ne 0 ]] || exit 0
    echo "attempt $attempt ended with $code" >&2
done
exit "$code"
