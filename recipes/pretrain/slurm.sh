#!/bin/bash
# A pre-training run on Slurm: one process per GPU, started again after each preemption,
# node failure or time limit, and resumed from its last checkpoint.
#
#     sbatch recipes/pretrain/slurm.sh pretrain/openelm-270m --output /shared/run
#
# Submit it from the environment that has mlx-openelm; --resume auto is added here.
# The folders of the run and of the corpora must be on a file system of all nodes.
#SBATCH --job-name=openelm
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
set -u
recipe=$1
shift
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
# SIGTERM, ten minutes before the time limit, ends the run with 143 after a checkpoint.
srun --kill-on-bad-exit=1 bash -c '
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec \
        python -m mlx_openelm pretrain --recipe "$@" --resume auto
' pretrain "$recipe" "$@"
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
