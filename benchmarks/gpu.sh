#!/usr/bin/env bash
# All that needs a GPU, in one call: attention kernels, the peers' choices, the speed table, Shakespeare's GPU setting
# at three seeds, and of a larger text the modern preset at 124M.
#   pip install -r requirements/benchmarks.txt && benchmarks/gpu.sh tinyshakespeare.txt corpus/
# Results are in benchmarks/results/; what does not run ends the script.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?the texts: benchmarks/gpu.sh tinyshakespeare.txt corpus/}
corpus=${2:?a text of 30 M tokens or more, as benchmarks/gpu.sh tinyshakespeare.txt corpus/}
python benchmarks/attention_kernels.py
python -m benchmarks.speed.tune --rows=124m,8b_layers,bert_base --text="$text"
python -m benchmarks.speed.run --rows=124m,8b_layers,bert_base --text="$text"
python -m benchmarks.speed.run --rows=1.3b --peers= --text="$text"  # it takes 0.9 of the memory: nobody fits beside it
for seed in 0 1 2; do
  time python scripts/train.py --config=configs/shakespeare_char_gpu.py --config.data.text="$text" \
    --config.seed=$seed --workdir="runs/shakespeare_gpu_$seed"
done
python scripts/sweep.py --config=configs/sweep_modern_124m.py --config.data.text="$corpus" --workdir=runs/modern_124m
