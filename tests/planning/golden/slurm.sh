#!/bin/bash
# llama-8b on h100:8x2, 2 hosts; written by scripts/launch.py
#SBATCH --job-name=llama-8b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-gpu=8
#SBATCH --partition=gpu
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=llama-8b-%j.log
#SBATCH --requeue

export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=gs://b/compilation_cache
module load cuda || exit 1
srun --cpu-bind=none python scripts/train.py --config=configs/llama_8b.py --workdir=gs://b/llama_8b '--config.data.text=it'"'"'s $HOME/a b/*.txt' &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a trap ends wait early
trap '' TERM
if [ "$code" -eq 0 ]; then
  python scripts/launch.py --finished=gs://b/llama_8b && exit 0
  code=75
fi
[ "$code" -ne 2 ] || exit "$code"
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
