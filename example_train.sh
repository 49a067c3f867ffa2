#!/usr/bin/env bash
# Train on one Slurm node or more, one process per GPU:
#   sbatch example_train.sh train/train_c.py configs/training/finetune_c_1b.yaml
#   sbatch --nodes=4 example_train.sh train/train_c.py configs/training/finetune_c_3b.yaml use_fsdp=true fsdp_shards=8
#   sbatch --array=0-3 example_train.sh train/train_c.py configs/training/finetune_c_1b.yaml seed=%a experiment_id=c_%a
# A job that is about to end (or is preempted) finishes its update, saves, and goes back into the queue by itself.
# The processes find each other through Slurm's list of nodes; export MASTER_ADDR where that is not possible.
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
shift $(($# < 2 ? $# : 2))
set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-0}}" # %a is the number of a job in an array, as in Slurm's file names
WANTS_RESTART=85 # what a script exits with after a signal, once everything is saved

export OMP_NUM_THREADS=1

# When one process ends, the others get a minute to end too: none waits for ever for one that crashed.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60 "${PYTHON:-.venv/bin/python}" "$script" "$config" "$@" &
step=$!
# Slurm signals this shell only: pass it on to the processes that train, on all nodes.
signalled=
trap 'signalled=yes; kill -USR1 "$step"' USR1 TERM HUP

wait "$step"
status=$?
while [ -n "$signalled" ]; do # a signal ends `wait` early, while the processes are still saving
    signalled=
    wait "$step"
    status=$?
done

# A job that was cancelled is not running any more, and must not come back.
if [ "$status" -eq "$WANTS_RESTART" ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
