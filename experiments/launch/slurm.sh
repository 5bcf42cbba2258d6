#!/bin/bash
# One job of any experiment on many nodes:  sbatch --nodes 16 experiments/launch/slurm.sh experiments/omni_moe.py --sequence 4
# Slurm warns with SIGUSR1 two minutes before the time limit: the run finishes its step, saves, and exits with 75 to be
# queued again; `--resume auto` with a fixed --out goes on from there.
#SBATCH --job-name=ftrain
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --output=runs/slurm-%j.log

set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: sbatch $0 EXPERIMENT.py [its options]" >&2; exit 2; }

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
out="runs/slurm-${SLURM_JOB_ID}"

# A store of its own for each attempt: ranks of a restarted run must not find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

code=0
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$gpus" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${head_node}:29500" \
    --max-restarts 3 \
    "$@" --out "$out" --resume auto || code=$?

if [[ $code -eq 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
