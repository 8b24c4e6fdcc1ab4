#!/usr/bin/env bash
# All that needs a GPU, in one call: attention kernels, the peers' choices, the speed table, and Shakespeare's GPU
# setting at three seeds.
#   pip install -r requirements/benchmarks.txt && benchmarks/gpu.sh tinyshakespeare.txt
# Results are in benchmarks/results/; what does not run ends the script.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?the text: benchmarks/gpu.sh tinyshakespeare.txt}
python benchmarks/attention_kernels.py
python -m benchmarks.speed.tune --text="$text"
python -m benchmarks.speed.run --rows=124m,1.3b,8b_layers,bert_base --text="$text"
for seed in 0 1 2; do
  time python scripts/train.py --config=configs/shakespeare_char_gpu.py --config.data.text="$text" \
    --config.seed=$seed --workdir="runs/shakespeare_gpu_$seed"
done
