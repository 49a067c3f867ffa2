#!/usr/bin/env bash
# Train on one Slurm node, one process per GPU:
#   sbatch example_train.sh
#   sbatch example_train.sh train/train_c.py configs/training/finetune_c_1b.yaml
# A job that is about to end (or is preempted) finishes its update, saves, and goes back into the queue by itself.
#SBATCH --job-name=warpcore
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#SBATCH --signal=B:USR1@120

set -u
script=${1:-train/train_c.py}
config=${2:-configs/training/finetune_c_3b.yaml}
WANTS_RESTART=85 # what a script exits with after a signal, once everything is saved

export MASTER_ADDR=127.0.0.1
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1

# When one process ends, the others get a minute to end too: none waits for ever for one that crashed.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60 .venv/bin/python "$script" "$config" &
step=$!
# Slurm signals this shell only: pass it on to the processes that train.
signalled=
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1 TERM

wait "$step"
status=$?
while [ -n "$signalled" ]; do # a signal ends `wait` early, while the processes are still saving
    signalled=
    wait "$step"
    status=$?
done

if [ "$status" -eq "$WANTS_RESTART" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
