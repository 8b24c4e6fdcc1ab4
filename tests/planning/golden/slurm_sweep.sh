#!/bin/bash
# rates, a sweep of 6 points on gpu:1x1, 1 host; written by scripts/launch.py
#SBATCH --job-name=rates
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --array=0-5
#SBATCH --time=30
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=rates-%A_%a.log
#SBATCH --requeue

export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=runs/compilation_cache
srun --cpu-bind=none python scripts/sweep.py --config=configs/sweep_learning_rate.py --workdir=runs/rates --index="$SLURM_ARRAY_TASK_ID" &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a trap ends wait early
trap '' TERM
if [ "$code" -eq 0 ]; then
  python scripts/sweep.py --config=configs/sweep_learning_rate.py --workdir=runs/rates --index="$SLURM_ARRAY_TASK_ID" --list | awk '$3 != "finished" && $3 != "diverged" {left = 1} END {exit !NR || left}' && exit 0
  code=75
fi
[ "$code" -ne 2 ] || exit "$code"
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
